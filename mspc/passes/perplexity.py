"""Perplexity by the field's protocol: one token stream, non-overlapping windows, every token after a window's first."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mspc.model.streamed import StreamedModel
from mspc.passes.blocks import Batch, advance, batches_of, logits_after, token_losses


@dataclass(frozen=True, slots=True)
class Perplexity:
    """`nll` is the mean cross entropy in nats over the `tokens` that were predicted; `perplexity` is exp(nll).

    `divergence` is the mean KL(reference || model) of a prediction, in nats, where there was a reference.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    sequence_length: int
    divergence: float | None = None


def measure(model: StreamedModel, ids: Tensor, reference: StreamedModel | None = None) -> Iterator[Perplexity | None]:
    """Windows (N, T) -> their perplexity, last; None after each block before, for whoever shows progress."""
    batches = batches_of(model, ids)
    beside = [] if reference is None else batches_of(reference, ids)
    for index in range(len(model.blocks)):
        for one, of_one in ((model, batches), (reference, beside)):
            if one is not None:
                with one.loaded(index) as block:
                    advance(one, index, block, of_one)
        yield None
    total = 0.0
    with torch.no_grad(), model.loaded_outer():
        for batch in batches:
            for one, hidden in zip(batch.ids, batch.hidden, strict=True):
                total += float(token_losses(model, one[None], hidden[None].to(model.device)).double().sum())
    num_windows, length = ids.shape
    tokens = num_windows * (length - 1)
    nll = total / tokens
    divergence = None if reference is None else mean_divergences(reference, beside, model, [batches])[0]
    yield Perplexity(math.exp(nll), nll, tokens, num_windows, length, divergence)


def measure_module(model: nn.Module, ids: Tensor, reference: nn.Module | None, step: Callable[[], None]) -> Perplexity:
    """The perplexity of a model in memory on windows (N, T); `step` is called after each window."""
    nll = divergence = 0.0
    with torch.no_grad(), evaluating(model), nullcontext() if reference is None else evaluating(reference):
        for window in ids:
            q = _predictions(model, window)
            nll -= float(q[:-1].gather(1, window[1:, None].to(q.device)).sum(dtype=torch.float64))
            if reference is not None:
                p = _predictions(reference, window).to(q.device)
                divergence += float((p.exp() * (p - q)).sum(dtype=torch.float64))
            step()
    tokens = len(ids) * (ids.shape[1] - 1)
    mean = None if reference is None else divergence / ids.numel()
    return Perplexity(math.exp(nll / tokens), nll / tokens, tokens, len(ids), ids.shape[1], mean)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards it is in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _predictions(model: nn.Module, window: Tensor) -> Tensor:
    """Log-probabilities (T, V) float32 of one window (T,)."""
    device = next(model.parameters()).device
    logits = model(input_ids=window[None].to(device), use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), -1)


def mean_divergences(
    reference: StreamedModel, beside: Sequence[Batch], model: StreamedModel, streams: Sequence[Sequence[Batch]]
) -> list[float]:
    """Mean KL(reference || model) over all tokens, in nats, from what the last blocks of both put out: of every stream
    of batches through the model, beside that through the reference."""
    totals, tokens = [0.0] * len(streams), 0
    with torch.no_grad(), reference.loaded_outer(), model.loaded_outer():
        for one, *others in zip(beside, *streams, strict=True):
            for row, ids in enumerate(one.ids):
                p = _log_probabilities(reference, ids, one.hidden[row])
                for i, other in enumerate(others):
                    q = _log_probabilities(model, ids, other.hidden[row])
                    totals[i] += float((p.exp() * (p - q)).sum(dtype=torch.float64))
                tokens += len(ids)
    return [total / tokens for total in totals]


def _log_probabilities(model: StreamedModel, ids: Tensor, hidden: Tensor) -> Tensor:
    """(1, T, V) float32 of one sequence, from the last block's hidden states (T, D)."""
    return torch.log_softmax(logits_after(model, ids[None], hidden[None].to(model.device)).float(), -1)
