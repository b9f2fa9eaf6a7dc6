"""A contender that another engine runs: random weights in a shape, or a file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mspc.bench.measure import TOKENS, Contender, Sample
from mspc.bench.peers.engines import ENGINES, write_model
from mspc.bench.peers.files import prepared
from mspc.bench.request import Candidate, Plan


@contextmanager
def contender_of(candidate: Candidate, plan: Plan, folder: Path) -> Iterator[tuple[Contender, str]]:
    """Start the engine of a candidate: a contender, and the version of the engine.

    Random weights are written to `folder`.
    """
    assert candidate.peer is not None
    assert candidate.format is not None
    if candidate.file is not None:
        file, weight_bytes = prepared(candidate.file, candidate.peer, folder)
    else:
        file, weight_bytes = write_model(folder, candidate.shape, candidate.format, plan.head_bits)
    room = plan.length + TOKENS + 1
    with ENGINES[candidate.peer].start(file, torch.get_num_threads(), room) as running:
        yield (
            Contender(
                candidate.shape, weight_bytes, torch.float32.itemsize,
                lambda batch, context: lambda count: Sample(running.decode(context, count)),
                lambda tokens: lambda count: Sample(running.prefill(tokens)),
                batches=(1,),
            ),
            running.version,
        )  # fmt: skip
