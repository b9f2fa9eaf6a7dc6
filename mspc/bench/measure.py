"""Measures contenders, which are decoders and other engines: time to the first token, and of each further one.

On a CPU all contenders take turns, with a few tokens each, so that a busy machine disturbs all alike and speeds can be
compared round by round. On CUDA there is one contender at a time, and the device is its own.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mspc.bench.decoder import Decoder, Shape
from mspc.bench.timing import MOST_SECONDS, Ceilings, captured, device_seconds, host_seconds, inverse, spread

SEED = 0
TOKENS = 4
"""Tokens of a contender in each round of decoding."""


class Sample(NamedTuple):
    """Seconds of a token or a prompt."""

    seconds: float
    of_processor: float | None = None
    """With one thread of a CPU: without the time of other processes."""


Take = Callable[[int], Sample]
"""Runs that many steps, and tells the mean time of one."""


@dataclass(frozen=True)
class Contender:
    """Something to measure. `decode(batch, context)` and `prefill(tokens)` prepare steps."""

    shape: Shape
    weight_bytes: dict[str, int]
    """Those that a step of decoding reads: `linears`, `norms` and `head`."""
    itemsize: int
    """Bytes of a number in its cache."""
    decode: Callable[[int, int], Take]
    prefill: Callable[[int], Take]
    batches: tuple[int, ...] | None = None
    """The only batch sizes that it takes, if there are such."""

    def takes(self, batch: int) -> bool:
        return self.batches is None or batch in self.batches


def of_decoder(decoder: Decoder) -> Contender:
    """A decoder on a CPU, or one whose steps `samples_on_cuda` takes."""
    return Contender(
        decoder.shape, decoder.weight_bytes(), decoder.outer.norm.itemsize,
        lambda batch, context: _timed(decode_step(decoder, batch, context)),
        lambda tokens: _timed(prefill_step(decoder, tokens)),
    )  # fmt: skip


def _random_ids(decoder: Decoder, batch: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(decoder.shape.vocabulary, (batch, tokens), generator=generator)
    return ids.to(decoder.outer.norm.device)


def decode_step(decoder: Decoder, batch: int, context: int) -> Callable[[], Tensor]:
    """A step of `batch` sequences after `context` tokens. Its tokens (argmax) are the input of the next step."""
    cache = decoder.cache(batch, context + 1)
    ids = _random_ids(decoder, batch, 1)
    return lambda: ids.copy_(decoder(ids, cache, context).argmax(-1, keepdim=True))


def prefill_step(decoder: Decoder, tokens: int) -> Callable[[], Tensor]:
    """One prompt, from its tokens on the device to the first new token."""
    cache = decoder.cache(1, tokens)
    ids = _random_ids(decoder, 1, tokens)
    return lambda: decoder(ids, cache, 0).argmax(-1)


def _timed(step: Callable[[], Tensor]) -> Take:
    alone = torch.get_num_threads() == 1

    def take(count: int) -> Sample:
        begin = time.perf_counter(), time.thread_time()
        for _ in range(count):
            step()
        clock, processor = time.perf_counter() - begin[0], time.thread_time() - begin[1]
        return Sample(clock / count, processor / count if alone else None)

    return take


def in_turns(takes: Sequence[Take], rounds: int, steps: int) -> list[list[Sample]]:
    """The samples of each contender, one a round, after a round that warms up.

    There are fewer rounds than asked for, but at least one, if all of them would take too long. A contender that takes
    too long by itself has one sample only, the first.
    """
    samples = [[take(steps)] for take in takes]
    quick = [number for number, (first,) in enumerate(samples) if first.seconds * steps <= MOST_SECONDS]
    for number in quick:
        samples[number].clear()
    end = time.perf_counter() + MOST_SECONDS * len(quick)
    for _ in range(rounds):
        for number in quick:
            samples[number].append(takes[number](steps))
        if time.perf_counter() > end:
            break
    return samples


def step_bytes(contender: Contender, batch: int, context: int) -> dict[str, int]:
    """Bytes that a decoding step must move: all weights, the keys and values before it, and its own."""
    cached = contender.shape.cache_bytes(batch * (context + 1), contender.itemsize)
    return {**contender.weight_bytes, "cache": cached}


@torch.no_grad()
def measure_decode(
    contenders: Sequence[Contender], batch: int, context: int, repeats: int, ceilings: Ceilings
) -> list[dict[str, Any]]:
    """Steps of `batch` sequences after `context` tokens, in turns."""
    samples = in_turns([one.decode(batch, context) for one in contenders], repeats, TOKENS)
    return [
        decode_row(one, batch, context, found, _compared(found, samples), ceilings)
        for one, found in zip(contenders, samples, strict=True)
    ]


@torch.no_grad()
def measure_prefill(
    contenders: Sequence[Contender], tokens: int, repeats: int, ceilings: Ceilings
) -> list[dict[str, Any]]:
    """Prompts of `tokens` tokens, in turns."""
    samples = in_turns([one.prefill(tokens) for one in contenders], repeats, 1)
    return [
        prefill_row(one, tokens, found, _compared(found, samples), ceilings)
        for one, found in zip(contenders, samples, strict=True)
    ]


@torch.no_grad()
def decode_on_cuda(decoder: Decoder, batch: int, context: int, repeats: int, ceilings: Ceilings) -> dict[str, Any]:
    """The same as one graph of a GPU."""
    device = decoder.outer.norm.device
    found = device_seconds(captured(decode_step(decoder, batch, context), device), device, repeats)
    return decode_row(of_decoder(decoder), batch, context, list(map(Sample, found)), False, ceilings)


@torch.no_grad()
def prefill_on_cuda(decoder: Decoder, tokens: int, repeats: int, ceilings: Ceilings) -> dict[str, Any]:
    """The same as one graph of a GPU; the first new token is read on the host."""
    device = decoder.outer.norm.device
    step = captured(prefill_step(decoder, tokens), device)
    found = host_seconds(lambda: int(step()), device, repeats)
    return prefill_row(of_decoder(decoder), tokens, list(map(Sample, found)), False, ceilings)


def _compared(found: list[Sample], samples: list[list[Sample]]) -> bool:
    """Tell if a contender was in all rounds, and was not alone."""
    return len(samples) > 1 and len(found) == max(map(len, samples))


def _both(samples: list[Sample], compared: bool) -> dict[str, Any]:
    seconds = [sample.seconds for sample in samples]
    return {"samples": len(seconds), "seconds": spread(seconds), "round_seconds": seconds if compared else None}


def decode_row(
    contender: Contender, batch: int, context: int, samples: list[Sample], compared: bool, ceilings: Ceilings
) -> dict[str, Any]:
    """`compared` if the samples are of rounds that others took part in."""
    both = _both(samples, compared)
    seconds, of_processor = both["seconds"], [one.of_processor for one in samples if one.of_processor is not None]
    moved = step_bytes(contender, batch, context)
    total = sum(moved.values())
    rate = total / seconds["median"]
    return {
        "batch": batch,
        "context": context,
        **both,
        "processor_seconds": spread(of_processor) if of_processor else None,
        "tokens_per_second": inverse(seconds, batch),
        "bytes": moved,
        "bytes_per_second": inverse(seconds, total),
        "share_of_copy": rate / ceilings.copy["median"],
        "share_of_read": None if ceilings.read is None else rate / ceilings.read["median"],
        "predicted_seconds": ceilings.seconds(total, contender.shape.flops(batch, 1, context)),
    }


def prefill_row(
    contender: Contender, tokens: int, samples: list[Sample], compared: bool, ceilings: Ceilings
) -> dict[str, Any]:
    both = _both(samples, compared)
    total = sum(contender.weight_bytes.values()) + contender.shape.cache_bytes(tokens, contender.itemsize)
    return {
        "tokens": tokens,
        **both,
        "tokens_per_second": inverse(both["seconds"], tokens),
        "predicted_seconds": ceilings.seconds(total, contender.shape.flops(1, tokens, 0)),
    }
