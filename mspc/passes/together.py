"""Matrices that do not read each other, and so can be worked on at the same time.

The queries, keys and values of a block read one tensor, and so do the gate and up projections of its MLP. No weight of
one of them changes the input of the next. A look at one batch finds them; blocks of one class with the same matrices
are looked at once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mspc import ranks
from mspc.passes.paused import PausedForward
from mspc.threads import fitting
from mspc.types import GramStats, Matrix

FEW = 8
"""Matrices that are worked on together, at most: their Grams are in memory at once."""


@dataclass(frozen=True)
class Visit:
    """One matrix of a loaded block. `weight` (O, I) is a view of the parameter in the model's precision."""

    matrix: Matrix
    weight: Tensor
    stats: GramStats
    block: int
    is_last_of_block: bool
    more: bool = False
    """True if the next visit has the same input, whatever is installed here."""


def by_few(visits: Iterable[Visit]) -> Iterator[list[Visit]]:
    """Lists of up to `FEW` visits of one block, to be worked on together; nothing is installed in between."""
    few: list[Visit] = []
    for visit in visits:
        few.append(visit)
        if visit.is_last_of_block or len(few) == FEW:
            yield few
            few = []


def independent(visits: Iterable[Visit], matrices: Sequence[Sequence[Matrix]]) -> Iterator[list[Visit]]:
    """Lists of up to `FEW` visits of one input, or of the experts of one parameter, which do not read each other."""
    last = {matrix.parameter: matrix for of_block in matrices for matrix in of_block}
    few: list[Visit] = []
    for visit in visits:
        few.append(visit)
        if (visit.matrix == last[visit.matrix.parameter] and not visit.more) or len(few) == FEW:
            yield few
            few = []


def same_inputs(start: Callable[[], PausedForward], number: int) -> list[list[Matrix]]:
    """Those of the first `number` matrices of a block, before any expert, that read one tensor after the other.

    `start` makes a pass of a batch, which is not finished. Without threads, or where ranks share the rows of a matrix,
    nothing is looked for.
    """
    if fitting() == 1 or ranks.size() > 1:
        return []
    found: list[list[Matrix]] = []
    forward, previous = start(), torch.empty(0)
    try:
        for i in range(number):
            pause = forward.run_to(i)
            if isinstance(pause, Tensor) or pause.matrix.index is not None:
                break
            if is_same(pause.inputs, previous) and len(found[-1]) < FEW:
                found[-1].append(pause.matrix)
            else:
                found.append([pause.matrix])
            previous = pause.inputs  # kept alive, so that no address is used twice
    finally:
        forward.close()
    return found


def is_same(one: Tensor, other: Tensor) -> bool:
    """Tell if two inputs are one tensor, unchanged."""
    return bool(one.numel()) and (one.data_ptr(), one.shape, one.stride(), one._version) == (
        other.data_ptr(), other.shape, other.stride(), other._version,
    )  # fmt: skip
