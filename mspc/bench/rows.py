"""The rows of a result, and how they compare."""

from dataclasses import asdict
from typing import Any

import torch

from mspc.bench.decoder import Decoder
from mspc.bench.measure import Contender
from mspc.bench.models import engine_of, format_of, stored_dtype
from mspc.bench.request import Candidate
from mspc.bench.timing import ratios
from mspc.storage.manifest import predicted_time, was_recovered


def empty_row(candidate: Candidate, decoder: Decoder) -> dict[str, Any]:
    """A row without measurements."""
    shape = candidate.shape
    weights = shape.block_weights * shape.blocks
    return {
        "name": candidate.name,
        "model": shape.name,
        "shape": asdict(shape),
        "format": candidate.format or format_of(decoder),
        "random_weights": candidate.folder is None,
        "peer": None,
        "recovered": candidate.folder is not None and was_recovered(candidate.folder),
        "stored_dtype": None if candidate.folder is None else name_of(stored_dtype(candidate.folder)),
        "baseline": candidate.baseline,
        "engine": engine_of(decoder),
        "weight_bytes": decoder.stored_bytes(),
        "bits_per_weight": 8 * decoder.weight_bytes()["linears"] / weights,
        "repacked_bits_per_weight": 8 * decoder.repacked_bytes() / weights,
        "copied_bits_per_weight": 8 * decoder.copied_bytes() / weights,
        "peak_memory_bytes": None,
        "clocks": None,
        "perplexity": None,
        "predicted": None if candidate.folder is None else predicted_time(candidate.folder),
        "decode": [],
        "prefill": [],
    }


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def peer_row(candidate: Candidate, contender: Contender, version: str) -> dict[str, Any]:
    """The same for another engine."""
    shape = candidate.shape
    bits = 8 * contender.weight_bytes["linears"] / (shape.block_weights * shape.blocks)
    return {
        "name": candidate.name,
        "model": shape.name,
        "shape": asdict(shape),
        "format": candidate.format,
        "random_weights": candidate.file is None,
        "peer": candidate.peer,
        "recovered": False,
        "stored_dtype": None,
        "baseline": None,
        "engine": f"{candidate.peer} {version}",
        "weight_bytes": sum(contender.weight_bytes.values()),
        "bits_per_weight": bits,
        "repacked_bits_per_weight": bits,
        "copied_bits_per_weight": 0.0,
        "peak_memory_bytes": None,
        "clocks": None,
        "perplexity": None,
        "predicted": None,
        "decode": [],
        "prefill": [],
    }


def compare(rows: list[dict[str, Any]]) -> None:
    """Set the `speedup` of every step of the rows of one shape, and its spread, over baselines and other engines.

    It is the time of the other / its own.
    """
    bases = {row["baseline"] or row["name"]: row for row in rows if row["baseline"] or row.get("peer")}
    for row in rows:
        for stage, sizes in (("decode", ("batch", "context")), ("prefill", ("tokens",))):
            for step in row[stage]:
                found: dict[str, dict[str, float]] = {}
                for name, base in bases.items():
                    for other in base[stage]:
                        if all(other[size] == step[size] for size in sizes):
                            found[name] = ratios(other, step, in_turns=base.get("lot") == row.get("lot"))
                step["speedup_spread"] = found
                step["speedup"] = {name: ratio["median"] for name, ratio in found.items()}
