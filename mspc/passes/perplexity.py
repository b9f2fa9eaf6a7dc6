"""Perplexity by the field's protocol: one token stream, non-overlapping windows, every token after a window's first."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mspc import ranks
from mspc.errors import InputError
from mspc.model.streamed import StreamedModel
from mspc.numerics.intervals import Interval, mean_interval
from mspc.passes.blocks import BUFFERS, Batch, Logits, advance, batches_of, logits_bytes, not_finite, without_blocks
from mspc.threads import fitting, of_torch, run

LOGITS_AT_ONCE = 2**26
"""Logits of a part of a window: 256 MB in float32, where a whole window of a large vocabulary has gigabytes."""


@dataclass(frozen=True, slots=True)
class Perplexity:
    """`nll` is the mean cross entropy in nats over the `tokens` that were predicted; `perplexity` is exp(nll).

    `divergence` is the mean KL(reference || model) of a prediction in nats, or None without a reference. Intervals are
    95% t-intervals over the windows, None for a single window.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    sequence_length: int
    divergence: float | None = None
    perplexity_interval: Interval | None = None
    divergence_interval: Interval | None = None
    reference_perplexity: float | None = None
    reference_perplexity_interval: Interval | None = None
    text: str = ""
    """Name of the text."""


def measure(
    model: StreamedModel, ids: Tensor, reference: StreamedModel | None = None, begin: int = 0
) -> Iterator[Perplexity | None]:
    """Yield None after each block, for progress, and at last the perplexity of windows (N, T), which ranks share.

    Each window begins with `begin` tokens that are no text, and that are not scored. Raises InputError if there are
    fewer windows than ranks.
    """
    if len(ids) < ranks.size():
        raise InputError(
            f"{ranks.size()} ranks cannot share {len(ids)} windows of the test text. Choose at most {len(ids)} with "
            "--ranks, or give a longer --text or a shorter --sequence-length."
        )
    with ranks.together():
        own, _ = ranks.share_of(len(ids))
    ids = ids[own.start : own.stop]
    batches = batches_of(model, ids)
    reference_batches = [] if reference is None else batches_of(reference, ids)
    for index in range(len(model.blocks)):
        for one, its_batches in ((model, batches), (reference, reference_batches)):
            if one is not None:
                with one.loaded(index) as block:
                    advance(one, index, block, its_batches)
        yield None
    sums = window_by_window(model, batches, begin, reference, reference_batches)
    of_ranks = ranks.of_each([asdict(of_window) for of_window in sums])
    result = means(
        [Sums(**of_window) for of_rank in of_ranks for of_window in of_rank], ids.shape[1], first_scored(begin)
    )
    if not math.isfinite(result.nll):
        with model.loaded_outer() as outer:
            error = not_finite(outer, "The head", model.dtype)
        if isinstance(error, InputError):
            raise error
    yield result


def score(
    model: StreamedModel,
    batches: Sequence[Batch],
    begin: int = 0,
    reference: StreamedModel | None = None,
    reference_batches: Sequence[Batch] = (),
) -> Perplexity:
    """The perplexity of windows that have passed all blocks, those of the reference too."""
    sums = window_by_window(model, batches, begin, reference, reference_batches)
    return means(sums, batches[0].ids.shape[1], first_scored(begin))


def window_by_window(
    model: StreamedModel,
    batches: Sequence[Batch],
    begin: int = 0,
    reference: StreamedModel | None = None,
    reference_batches: Sequence[Batch] = (),
) -> "list[Sums]":
    """The sums of each window, as `score` needs them."""
    first, size = first_scored(begin), max(1, LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
    windows = [window for batch in batches for window in batch.sequences()]
    expected = [window for batch in reference_batches for window in batch.sequences()]
    with torch.no_grad(), without_blocks(model) as logits_of, ExitStack() as stack:
        expected_of = logits_of
        if reference is not None and reference is not model:
            expected_of = stack.enter_context(without_blocks(reference))

        def of_window(number: int) -> Sums:
            window = windows[number]
            q = (_log_probabilities(logits_of, part)[0] for part in window.parts(size))
            if reference is None:
                return window_sums(window.ids[0], q, None, first)
            p = (_log_probabilities(expected_of, part)[0] for part in expected[number].parts(size))
            return window_sums(window.ids[0], q, p, first)

        memory = min(logits_bytes(model, windows[0].ids), BUFFERS * 4 * LOGITS_AT_ONCE) * (
            1 if reference is None else 2
        )
        return list(run(of_window, range(len(windows)), memory))


def first_scored(begin: int) -> int:
    """The first position whose prediction counts, in windows that begin with `begin` tokens that are no text."""
    return max(begin - 1, 0)


def measure_module(
    model: nn.Module, ids: Tensor, reference: nn.Module | None, step: Callable[[], None], begin: int = 0
) -> Perplexity:
    """The perplexity of a model in memory on windows (N, T); `step` is called after each window."""
    first, scores = first_scored(begin), list[Sums]()
    config: Any = model.config
    logits = ids.shape[1] * int(config.get_text_config().vocab_size)
    size = BUFFERS * 4 * logits * (1 if reference is None else 2)
    with torch.no_grad(), evaluating(model), nullcontext() if reference is None else evaluating(reference):

        def of_window(window: Tensor) -> Sums:
            q = _predictions(model, window)
            p = None if reference is None else [_predictions(reference, window).to(q.device)]
            return window_sums(window, [q], p, first)

        # Hooks, such as those that offload weights, may not run in two threads. Operations have all of them then.
        modules = [module for one in (model, reference) if one is not None for module in one.modules()]
        hooked = any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "_hf_hook") for m in modules)
        with of_torch(fitting()) if hooked and fitting() > 1 else nullcontext():
            for sums in map(of_window, ids) if hooked else run(of_window, ids, size):
                scores.append(sums)
                step()
    return means(scores, ids.shape[1], first)


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over the predictions of a window in nats: cross entropies, and with a reference its own and divergences."""

    loss: float
    reference_loss: float | None = None
    divergence: float | None = None


def window_sums(window: Tensor, qs: Iterable[Tensor], ps: Iterable[Tensor] | None, first: int) -> Sums:
    """Those of a window (T,), from position `first` on.

    `qs` are the log-probabilities (t, V) of the model for successive parts of it, and `ps` those of the reference.
    """
    loss = reference_loss = divergences = 0.0
    begin, expected = 0, None if ps is None else iter(ps)
    for q in qs:
        skipped, targets = max(first - begin, 0), window[begin + 1 : begin + len(q) + 1]
        loss += _loss(q, targets, skipped)
        if expected is not None:
            p = next(expected)
            reference_loss += _loss(p, targets, skipped)
            divergences += divergence(p[skipped:], q[skipped:])
        begin += len(q)
    return Sums(loss) if expected is None else Sums(loss, reference_loss, divergences)


def means(sums: Sequence[Sums], length: int, first: int) -> Perplexity:
    """The means over all windows of a length, and their intervals."""
    scored = length - 1 - first
    nll, interval = _mean([of.loss for of in sums], scored)
    found = Perplexity(exponential(nll), nll, len(sums) * scored, len(sums), length, perplexity_interval=_exp(interval))
    losses = [of.reference_loss for of in sums if of.reference_loss is not None]
    divergences = [of.divergence for of in sums if of.divergence is not None]
    if not divergences:
        return found
    reference, reference_interval = _mean(losses, scored)
    mean, around = _mean(divergences, scored + 1)
    return replace(
        found,
        divergence=mean,
        divergence_interval=around and (max(around[0], 0.0), around[1]),  # it is never negative
        reference_perplexity=exponential(reference),
        reference_perplexity_interval=_exp(reference_interval),
    )


def _mean(sums: Sequence[float], count: int) -> tuple[float, Interval | None]:
    """The mean of sums over `count` predictions each, and its interval."""
    return sum(sums) / (count * len(sums)), mean_interval([total / count for total in sums])


def _exp(interval: Interval | None) -> Interval | None:
    return interval and (exponential(interval[0]), exponential(interval[1]))


def _loss(predictions: Tensor, targets: Tensor, skipped: int) -> float:
    """Cross entropies of targets (t,) by log-probabilities (t or t + 1, V), without the first, summed in float64."""
    wanted = targets[skipped:, None].to(predictions.device)
    return -float(predictions[skipped : len(targets)].gather(1, wanted).sum(dtype=torch.float64))


def divergence(p: Tensor, q: Tensor) -> float:
    """KL(p || q) of log-probabilities (..., V), summed over all predictions in float64.

    A token that p excludes, such as one whose logit is minus infinity, adds nothing.
    """
    return float(torch.where(p == -math.inf, 0.0, p.exp() * (p - q)).sum(dtype=torch.float64))


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

    It is the mean over all positions from `first` on. All batches have passed the last block. With several ranks they
    are those of this one, and the mean is that of the whole text.
    """
    with torch.no_grad(), without_blocks(model) as logits_of, ExitStack() as stack:
        expected_of = logits_of if reference is model else stack.enter_context(without_blocks(reference))

        def divergences(sequences: tuple[Batch, ...]) -> list[float]:
            expected, *others = sequences
            p = _log_probabilities(expected_of, expected)[:, first:]
            return [divergence(p, _log_probabilities(logits_of, other)[:, first:]) for other in others]

        all_batches = zip(reference_batches, *streams, strict=True)
        sequences = [row for some in all_batches for row in zip(*(batch.sequences() for batch in some), strict=True)]
        tokens = ranks.count(sum(expected.ids[:, first:].numel() for expected, *_ in sequences))
        memory = logits_bytes(model, sequences[0][0].ids) if sequences else 0
        of_streams = zip(*ranks.gathered(list(run(divergences, sequences, memory))), strict=True)
        return [sum(of_stream) / tokens for of_stream in of_streams]


def _log_probabilities(logits_of: Logits, batch: Batch) -> Tensor:
    """Log-probabilities (B, T, V) float32 of a batch that has passed all blocks."""
    return torch.log_softmax(logits_of(batch).float(), -1)
