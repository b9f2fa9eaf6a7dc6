"""Perplexity by the field's protocol: one token stream, non-overlapping windows, every token after a window's first."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mspc.blocks import Batch, advance, batches_of, logits_after, token_losses
from mspc.models import StreamedModel


@dataclass(frozen=True, slots=True)
class Perplexity:
    """`nll` is the mean cross entropy in nats over the `tokens` that were predicted; `perplexity` is exp(nll)."""

    perplexity: float
    nll: float
    tokens: int
    windows: int
    sequence_length: int


def measure(model: StreamedModel, ids: Tensor) -> Iterator[Perplexity | None]:
    """Windows (N, T) -> their perplexity, last; None after each block before, for whoever shows progress."""
    batches = batches_of(model, ids)
    for index in range(len(model.blocks)):
        with model.loaded(index) as block:
            advance(model, index, block, batches)
        yield None
    total = 0.0
    with torch.no_grad(), model.loaded_outer():
        for batch in batches:
            for one, hidden in zip(batch.ids, batch.hidden, strict=True):
                total += float(token_losses(model, one[None], hidden[None].to(model.device)).double().sum())
    num_windows, length = ids.shape
    tokens = num_windows * (length - 1)
    nll = total / tokens
    yield Perplexity(math.exp(nll), nll, tokens, num_windows, length)


def mean_divergence(model: StreamedModel, dense: Sequence[Batch], batches: Sequence[Batch]) -> float:
    """Mean KL(dense || other) over all tokens, in nats, from outputs of the last block; the outer part is loaded."""
    total, tokens = 0.0, 0
    for one, other in zip(dense, batches, strict=True):
        for ids, reference, hidden in zip(one.ids, one.hidden, other.hidden, strict=True):
            logs = [
                torch.log_softmax(logits_after(model, ids[None], h[None].to(model.device)).float(), -1)
                for h in (reference, hidden)
            ]
            total += float((logs[0].exp() * (logs[0] - logs[1])).sum(dtype=torch.float64))
            tokens += len(ids)
    return total / tokens
