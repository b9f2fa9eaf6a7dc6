"""Perplexity by the field's protocol: one token stream, non-overlapping windows, every token after a window's first."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mspc.errors import InputError
from mspc.model.streamed import StreamedModel
from mspc.passes.blocks import (
    BUFFERS,
    Batch,
    Logits,
    advance,
    batches_of,
    logits_bytes,
    not_finite,
    token_losses,
    without_blocks,
)
from mspc.threads import run


@dataclass(frozen=True, slots=True)
class Perplexity:
    """`nll` is the mean cross entropy in nats over the `tokens` that were predicted; `perplexity` is exp(nll).

    `divergence` is the mean KL(reference || model) of a prediction in nats, or None without a reference.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    sequence_length: int
    divergence: float | None = None


def measure(
    model: StreamedModel, ids: Tensor, reference: StreamedModel | None = None, begin: int = 0
) -> Iterator[Perplexity | None]:
    """Yield None after each block, for progress, and at last the perplexity of windows (N, T).

    Each window begins with `begin` tokens that are no text, and that are not scored.
    """
    first = max(begin - 1, 0)  # the position whose prediction is the first to count
    batches = batches_of(model, ids)
    reference_batches = [] if reference is None else batches_of(reference, ids)
    for index in range(len(model.blocks)):
        for one, its_batches in ((model, batches), (reference, reference_batches)):
            if one is not None:
                with one.loaded(index) as block:
                    advance(one, index, block, its_batches)
        yield None
    sequences = [sequence for batch in batches for sequence in batch.sequences()]
    with torch.no_grad(), without_blocks(model) as logits_of:
        size = logits_bytes(model, sequences[0])
        total = sum(run(lambda one: float(token_losses(logits_of, one)[:, first:].double().sum()), sequences, size))
    num_windows, length = ids.shape
    tokens = num_windows * (length - 1 - first)
    nll = total / tokens
    divergence = None
    if reference is not None:
        divergence = mean_divergences(reference, reference_batches, model, [batches], first)[0]
    if not math.isfinite(nll):
        with model.loaded_outer() as outer:
            error = not_finite(outer, "The head", model.dtype)
        if isinstance(error, InputError):
            raise error
    yield Perplexity(exponential(nll), nll, tokens, num_windows, length, divergence)


def measure_module(
    model: nn.Module, ids: Tensor, reference: nn.Module | None, step: Callable[[], None], begin: int = 0
) -> Perplexity:
    """The perplexity of a model in memory on windows (N, T); `step` is called after each window."""
    first = max(begin - 1, 0)
    nll = divergence = 0.0
    config: Any = model.config
    size = BUFFERS * 4 * ids.shape[1] * int(config.get_text_config().vocab_size)
    with torch.no_grad(), evaluating(model), nullcontext() if reference is None else evaluating(reference):

        def of_window(window: Tensor) -> tuple[float, float]:
            q = _predictions(model, window)[first:]
            likelihood = float(q[:-1].gather(1, window[first + 1 :, None].to(q.device)).sum(dtype=torch.float64))
            if reference is None:
                return likelihood, 0.0
            p = _predictions(reference, window)[first:].to(q.device)
            return likelihood, float((p.exp() * (p - q)).sum(dtype=torch.float64))

        # Hooks, such as those that offload weights, may not run in two threads.
        modules = [module for one in (model, reference) if one is not None for module in one.modules()]
        hooked = any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "_hf_hook") for m in modules)
        for likelihood, of_reference in map(of_window, ids) if hooked else run(of_window, ids, size):
            nll -= likelihood
            divergence += of_reference
            step()
    tokens = len(ids) * (ids.shape[1] - 1 - first)
    mean = None if reference is None else divergence / (tokens + len(ids))
    return Perplexity(exponential(nll / tokens), nll / tokens, tokens, len(ids), ids.shape[1], mean)


def exponential(nll: float) -> float:
    """exp(nll), which is infinite where floats end."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards each module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _predictions(model: nn.Module, window: Tensor) -> Tensor:
    """Log-probabilities (T, V) float32 of one window (T,)."""
    device = next(model.parameters()).device
    logits = model(input_ids=window[None].to(device), use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), -1)


def mean_divergences(
    reference: StreamedModel,
    reference_batches: Sequence[Batch],
    model: StreamedModel,
    streams: Sequence[Sequence[Batch]],
    first: int = 0,
) -> list[float]:
    """Mean KL(reference || model) in nats of every stream of batches through the model.

    It is the mean over all positions from `first` on. All batches have passed the last block.
    """
    with torch.no_grad(), without_blocks(model) as logits_of, ExitStack() as stack:
        expected_of = logits_of if reference is model else stack.enter_context(without_blocks(reference))

        def divergences(sequences: tuple[Batch, ...]) -> list[float]:
            expected, *others = sequences
            p = _log_probabilities(expected_of, expected)[:, first:]
            found = []
            for other in others:
                q = _log_probabilities(logits_of, other)[:, first:]
                found.append(float((p.exp() * (p - q)).sum(dtype=torch.float64)))
            return found

        all_batches = zip(reference_batches, *streams, strict=True)
        sequences = [row for some in all_batches for row in zip(*(batch.sequences() for batch in some), strict=True)]
        tokens = sum(expected.ids[:, first:].numel() for expected, *_ in sequences)
        of_streams = zip(*run(divergences, sequences, logits_bytes(model, sequences[0][0])), strict=True)
        return [sum(of_stream) / tokens for of_stream in of_streams]


def _log_probabilities(logits_of: Logits, batch: Batch) -> Tensor:
    """Log-probabilities (B, T, V) float32 of a batch that has passed all blocks."""
    return torch.log_softmax(logits_of(batch).float(), -1)
