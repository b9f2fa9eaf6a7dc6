"""Tuning the kept weights of a part of a block, its attention or its MLP, towards the output of the dense model's part.

A matrix alone can only make good what shows in its own output; the matrices of a part together can do more, as
blockwise fine-tuning (EBFT, arXiv:2402.12419) and the reconstruction of submodules (arXiv:2510.14444) have shown. No
labels are needed, and no zero moves. A part is a direct child of the block that is called as a whole and holds more
than one compressed matrix.
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
from mspc.types import Matrix

TOKENS_PER_STEP = 1024
"""A step sees one batch, of at most about so many tokens."""
HELD_BACK = 8
"""One in so many batches, the last ones, is not tuned on, but decides whether the tuned weights are better."""
RATE = 0.03
"""The first step of a weight, as a share of the root mean square of the kept weights of its matrix."""
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Part:
    """A part after tuning: `weights` (O, I) by matrix in the checkpoint's dtype, or none if nothing was gained.

    `before` and `after` are ||Y - Y^||^2 / ||Y||^2 on the batches that were held back, with Y of the dense model.
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
class _Sample:
    """How a part is called for one batch, and what the dense model's part returns (B, T, D)."""

    call: Call
    wanted: Tensor


class _Captured(Exception):
    """Raised to leave a block when what it was run for is known."""


def batch_size(num_sequences: int, length: int) -> int:
    """Sequences of a batch, which makes one step: few, and so that some batches can be held back."""
    return max(1, min(TOKENS_PER_STEP // length, num_sequences // HELD_BACK))


def reconstruct(
    model: StreamedModel,
    index: int,
    blocks: tuple[nn.Module, nn.Module],
    streams: tuple[Sequence[Batch], Sequence[Batch]],
    masks: dict[Matrix, Tensor],
    steps: int,
    seed: int,
    spill: Path | None = None,
) -> Iterator[Part]:
    """Tune the parts of block `index` in the order of execution; the caller installs each before it resumes.

    `blocks` and `streams`, of two batches at least, are the compressed and the dense one; `masks` (O, I), True = kept,
    come in the order of execution.
    """
    for name, matrices in _parts(model, index, masks).items():
        samples = _samples(model, index, name, blocks, streams, spill)
        if not samples:
            continue
        full, child = f"{model.block_name(index)}.{name}", blocks[0].get_submodule(name)
        names = {matrix: model.name_in_block(index, matrix).removeprefix(name + ".") for matrix in matrices}
        kept = {names[matrix]: matrix.read(masks[matrix]).to(model.device) for matrix in matrices}
        num_held = max(1, len(samples) // HELD_BACK)
        order = _order(len(samples) - num_held, steps, seed_of(seed, full))
        tuned = _tuned(child, kept, [samples[i] for i in order])
        rounded = {names[m]: tuned[names[m]].to(model.source_dtypes[m.parameter]) for m in matrices}
        before, after = (_relative_error(child, weights, samples[-num_held:]) for weights in ({}, rounded))
        is_better = after < before
        weights = {matrix: matrix.read(rounded[names[matrix]]) for matrix in matrices} if is_better else {}
        yield Part(full, matrices, weights, before, after if is_better else before)


def _parts(model: StreamedModel, index: int, masks: dict[Matrix, Tensor]) -> dict[str, list[Matrix]]:
    """The compressed matrices of each child of a block that has more than one, by the child's name."""
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
) -> list[_Sample]:
    """One of each batch; none at all if the block does not call the part as a whole."""
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
    return [_Sample(call, output) for call, output in zip(calls, outputs, strict=True)]


def _put(value: Any, spill: Path | None) -> Any:
    """Activations (B, T, D) go to host memory; all else is shared by the batches, and stays."""
    return stored(value, spill) if isinstance(value, Tensor) and value.ndim == 3 else value


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _order(num_samples: int, steps: int, seed: int) -> list[int]:
    """Which sample each step sees: all in a random order, and again in another."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-steps // num_samples)
    return torch.cat([torch.randperm(num_samples, generator=generator) for _ in range(rounds)])[:steps].tolist()


def _run(child: nn.Module, weights: dict[str, Tensor], sample: _Sample) -> tuple[Tensor, Tensor]:
    """What a part with these weights returns for a sample, and what it should, both float32."""
    own = {name: weight.to(child.get_parameter(name)) for name, weight in weights.items()}
    device = next(child.parameters()).device
    here: Callable[[Any], Any] = lambda value: value.to(device) if isinstance(value, Tensor) else value  # noqa: E731
    kwargs = {key: here(value) for key, value in sample.call.kwargs.items()}
    output = functional_call(child, own, tuple(map(here, sample.call.args)), kwargs)
    return _first(output).float(), sample.wanted.to(device).float()


def _tuned(child: nn.Module, kept: dict[str, Tensor], samples: Sequence[_Sample]) -> dict[str, Tensor]:
    """The parameters of a part in float32 after a step of Adam on each sample, with zeros where nothing is kept."""
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
            output, wanted = _run(child, {name: leaf * kept[name] for name, leaf in leaves.items()}, sample)
            (output - wanted).square().sum().backward()
        optimizer.step()
    return {name: leaf.detach() * kept[name] for name, leaf in leaves.items()}


def _relative_error(child: nn.Module, weights: dict[str, Tensor], samples: Sequence[_Sample]) -> float:
    error = scale = 0.0
    with torch.no_grad():
        for sample in samples:
            output, wanted = _run(child, weights, sample)
            error += float((output - wanted).double().square().sum())
            scale += float(wanted.double().square().sum())
    return error / scale if scale > 0 else 0.0


def reconstruction_line(blocks: Sequence[Mapping[str, Any]]) -> str:
    """What tuning gained over all parts, from the commits of the blocks; errors are means of relative ones."""
    parts = [part for block in blocks for part in block["reconstruction"]]
    if not parts:
        return "Reconstruction: no block has a part with several compressed matrices, so nothing was tuned."
    before, after = (sum(part[f"error_{when}"] for part in parts) / len(parts) for when in ("before", "after"))
    seconds, tuned = sum(block["seconds"] for block in blocks), sum(part["tuned"] for part in parts)
    return (
        f"Reconstruction: {tuned} of {len(parts)} parts are nearer to the dense model on text held back, mean relative "
        f"error {before:.4f} before and {after:.4f} after, {seconds:.1f} s."
    )
