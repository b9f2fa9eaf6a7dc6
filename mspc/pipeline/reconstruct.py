"""Tune the kept weights of a part of a block, its attention or its MLP, towards the output of the dense model's part.

A solver that sees one matrix can only correct the error in the output of that matrix. Tuned together, the matrices of a
part correct more, as blockwise fine-tuning (EBFT, arXiv:2402.12419) and the reconstruction of submodules
(arXiv:2510.14444) have shown. No labels are needed, and masks do not change. A part is a direct child of the block that
the block calls as a whole and that holds more than one compressed matrix.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mspc.model.streamed import StreamedModel
from mspc.passes.blocks import Batch, Call, run_block, stored
from mspc.passes.gradients import seed_of
from mspc.passes.route import EarlyExit
from mspc.types import Matrix

TOKENS_PER_STEP = 1024
"""Number of tokens of a batch, at most; a step of Adam sees one batch."""
BATCHES_PER_VALIDATION_BATCH = 8
"""One batch in eight, from the end, is validation text, which decides whether the tuned weights are better."""
RATE = 0.03
"""Size of the first step, as a share of the root mean square of the kept weights of a matrix."""
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class TunedPart:
    """A part after tuning: `weights` (O, I) by matrix in the checkpoint's dtype, empty if the error did not fall.

    `before` and `after` are ||Y - Y^||^2 / ||Y||^2 on the validation batches, where Y is the output of the dense part.
    """

    name: str
    matrices: list[Matrix]
    weights: dict[Matrix, Tensor]
    before: float
    after: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "part": self.name, "matrices": [matrix.name for matrix in self.matrices], "tuned": bool(self.weights),
            "error_before": self.before, "error_after": self.after,
        }  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """The arguments of a part for one batch, and the output (B, T, D) of the dense model's part."""

    call: Call
    output: Tensor


class _Captured(EarlyExit):
    """Raised to leave a block as soon as the part has been called."""


def batch_size(num_sequences: int, length: int) -> int:
    """Number of sequences of a batch, small enough that several batches are left for validation."""
    return max(1, min(TOKENS_PER_STEP // length, num_sequences // BATCHES_PER_VALIDATION_BATCH))


def reconstruct(
    model: StreamedModel,
    index: int,
    blocks: tuple[nn.Module, nn.Module],
    streams: tuple[Sequence[Batch], Sequence[Batch]],
    masks: dict[Matrix, Tensor],
    steps: int,
    seed: int,
    spill: Path | None = None,
) -> Iterator[TunedPart]:
    """Tune the parts of block `index` in the order of execution; the caller installs each before it resumes.

    `blocks` and `streams` are pairs: the compressed model's, then the dense model's. A stream has at least two batches.
    `masks` (O, I), True = kept, come in the order of execution.
    """
    for name, matrices in _parts(model, index, masks).items():
        samples = _samples(model, index, name, blocks, streams, spill)
        if not samples:
            continue
        full, child = f"{model.block_name(index)}.{name}", blocks[0].get_submodule(name)
        names = {matrix: model.name_in_block(index, matrix).removeprefix(name + ".") for matrix in matrices}
        kept = {names[matrix]: matrix.read(masks[matrix]).to(model.device) for matrix in matrices}
        num_validation = max(1, len(samples) // BATCHES_PER_VALIDATION_BATCH)
        order = _order(len(samples) - num_validation, steps, seed_of(seed, full))
        tuned = tune(child, kept, [samples[i] for i in order])
        rounded = {names[m]: tuned[names[m]].to(model.source_dtypes[m.parameter]) for m in matrices}
        before, after = (_relative_error(child, weights, samples[-num_validation:]) for weights in ({}, rounded))
        is_better = after < before
        weights = {matrix: matrix.read(rounded[names[matrix]]) for matrix in matrices} if is_better else {}
        yield TunedPart(full, matrices, weights, before, after if is_better else before)


def _parts(model: StreamedModel, index: int, masks: dict[Matrix, Tensor]) -> dict[str, list[Matrix]]:
    """The compressed matrices of each child of a block that has at least two, by the child's name."""
    parts: dict[str, list[Matrix]] = {}
    for matrix in masks:
        parts.setdefault(model.name_in_block(index, matrix).partition(".")[0], []).append(matrix)
    return {name: matrices for name, matrices in parts.items() if len(matrices) > 1}


def _samples(
    model: StreamedModel,
    index: int,
    name: str,
    blocks: tuple[nn.Module, nn.Module],
    streams: tuple[Sequence[Batch], Sequence[Batch]],
    spill: Path | None,
) -> list[Sample]:
    """One sample per batch; an empty list if the block does not call the part as a whole."""
    calls: list[Call] = []
    outputs: list[Tensor] = []

    def keep_call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        put = partial(_put, spill=spill)
        calls.append(Call(tuple(map(put, args)), {key: put(value) for key, value in kwargs.items()}))
        raise _Captured

    def keep_output(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append(stored(_first(output), spill))
        raise _Captured

    handles = (
        blocks[0].get_submodule(name).register_forward_pre_hook(keep_call, with_kwargs=True),
        blocks[1].get_submodule(name).register_forward_hook(keep_output),
    )
    try:
        for block, batches in zip(blocks, streams, strict=True):
            for batch in batches:
                with torch.no_grad(), suppress(_Captured):
                    run_block(model, block, batch, index)
    finally:
        for handle in handles:
            handle.remove()
    return [Sample(call, output) for call, output in zip(calls, outputs, strict=True)]


def _put(value: Any, spill: Path | None) -> Any:
    """Move activations (B, T, D) to host memory or to `spill`. All else is shared by the batches and stays."""
    return stored(value, spill) if isinstance(value, Tensor) and value.ndim == 3 else value


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _order(num_samples: int, steps: int, seed: int) -> list[int]:
    """The sample of each step: every round passes all samples in a new random order."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-steps // num_samples)
    return torch.cat([torch.randperm(num_samples, generator=generator) for _ in range(rounds)])[:steps].tolist()


def _run(child: nn.Module, weights: dict[str, Tensor], sample: Sample) -> tuple[Tensor, Tensor]:
    """Run a part with these weights on a sample: its output and that of the dense part, both float32."""
    own = {name: weight.to(child.get_parameter(name)) for name, weight in weights.items()}
    device = next(child.parameters()).device
    here: Callable[[Any], Any] = lambda value: value.to(device) if isinstance(value, Tensor) else value  # noqa: E731
    kwargs = {key: here(value) for key, value in sample.call.kwargs.items()}
    output = functional_call(child, own, tuple(map(here, sample.call.args)), kwargs)
    return _first(output).float(), sample.output.to(device).float()


def tune(child: nn.Module, kept: dict[str, Tensor], samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Take a step of Adam on each sample: the parameters of a part in float32, zero where `kept` is False."""
    leaves = {name: child.get_parameter(name).float().clone().requires_grad_() for name in kept}
    groups = [
        {"params": [leaf], "size": float((leaf.detach().square().sum() / kept[name].sum().clamp(min=1)).sqrt())}
        for name, leaf in leaves.items()
    ]
    optimizer = torch.optim.Adam(groups, lr=0.0, betas=BETAS)
    for step, sample in enumerate(samples):
        for group in optimizer.param_groups:
            group["lr"] = RATE * group["size"] * (1 + math.cos(math.pi * step / len(samples))) / 2
        optimizer.zero_grad()
        with torch.enable_grad():
            output, dense = _run(child, {name: leaf * kept[name] for name, leaf in leaves.items()}, sample)
            (output - dense).square().sum().backward()
        optimizer.step()
    return {name: leaf.detach() * kept[name] for name, leaf in leaves.items()}


def _relative_error(child: nn.Module, weights: dict[str, Tensor], samples: Sequence[Sample]) -> float:
    error = scale = 0.0
    with torch.no_grad():
        for sample in samples:
            output, dense = _run(child, weights, sample)
            error += float((output - dense).double().square().sum())
            scale += float(dense.double().square().sum())
    return error / scale if scale > 0 else 0.0


def reconstruction_line(blocks: Sequence[Mapping[str, Any]]) -> str:
    """Summarize the gain of tuning over all parts, from the commits of the blocks: means of their relative errors."""
    parts = [part for block in blocks for part in block["reconstruction"]]
    if not parts:
        return "Reconstruction: no block has a part with several compressed matrices, so nothing was tuned."
    before, after = (sum(part[f"error_{when}"] for part in parts) / len(parts) for when in ("before", "after"))
    seconds, tuned = sum(block["seconds"] for block in blocks), sum(part["tuned"] for part in parts)
    return (
        f"Reconstruction: {tuned} of {len(parts)} parts are nearer to the dense model on validation text, mean "
        f"relative error {before:.4f} before and {after:.4f} after, {seconds:.1f} s."
    )
