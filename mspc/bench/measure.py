"""Measures one decoder: time to the first token, time of each further one, and the time that its bytes alone take."""

import time
from typing import Any

import torch
from torch import Tensor

from mspc.bench.decoder import Decoder
from mspc.bench.timing import Ceilings, captured, device_seconds, host_seconds, inverse, spread

SEED = 0


def _random_ids(decoder: Decoder, batch: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(decoder.shape.vocabulary, (batch, tokens), generator=generator)
    return ids.to(decoder.outer.norm.device)


def step_bytes(decoder: Decoder, batch: int, context: int) -> dict[str, int]:
    """Bytes that a decoding step must move: all weights, the keys and values before it, and its own."""
    cached = decoder.shape.cache_bytes(batch * (context + 1), decoder.outer.norm.itemsize)
    return {**decoder.weight_bytes(), "cache": cached}


@torch.no_grad()
def measure_decode(decoder: Decoder, batch: int, context: int, repeats: int, ceilings: Ceilings) -> dict[str, Any]:
    """Time a step of `batch` sequences after `context` tokens. Its tokens (argmax) are the input of the next step."""
    device = decoder.outer.norm.device
    cache = decoder.cache(batch, context + 1)
    ids = _random_ids(decoder, batch, 1)

    def step() -> Tensor:
        return ids.copy_(decoder(ids, cache, context).argmax(-1, keepdim=True))

    of_processor: list[float] = []

    def counted() -> Tensor:
        begin = time.thread_time()
        result = step()
        of_processor.append(time.thread_time() - begin)
        return result

    alone = device.type == "cpu" and torch.get_num_threads() == 1
    samples = device_seconds(counted if alone else captured(step, device), device, repeats)
    seconds = spread(samples)
    moved = step_bytes(decoder, batch, context)
    total = sum(moved.values())
    return {
        "batch": batch,
        "context": context,
        "samples": len(samples),
        "seconds": seconds,
        "processor_seconds": spread(of_processor[-len(samples) :]) if alone else None,
        "tokens_per_second": inverse(seconds, batch),
        "bytes": moved,
        "bytes_per_second": inverse(seconds, total),
        "share_of_copy": total / seconds["median"] / ceilings.copy["median"],
        "predicted_seconds": ceilings.seconds(total, decoder.shape.flops(batch, 1, context)),
    }


@torch.no_grad()
def measure_prefill(decoder: Decoder, tokens: int, repeats: int, ceilings: Ceilings) -> dict[str, Any]:
    """Time one prompt, from its tokens on the device to the first new token on the host."""
    device = decoder.outer.norm.device
    cache = decoder.cache(1, tokens)
    ids = _random_ids(decoder, 1, tokens)
    step = captured(lambda: decoder(ids, cache, 0).argmax(-1), device)
    samples = host_seconds(lambda: int(step()), device, repeats)
    seconds = spread(samples)
    total = sum(decoder.weight_bytes().values()) + decoder.shape.cache_bytes(tokens, decoder.outer.norm.itemsize)
    return {
        "tokens": tokens,
        "samples": len(samples),
        "seconds": seconds,
        "tokens_per_second": inverse(seconds, tokens),
        "predicted_seconds": ceilings.seconds(total, decoder.shape.flops(1, tokens, 0)),
    }
