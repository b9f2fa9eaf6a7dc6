"""The matrices of a dense model that each rank works on."""

from collections.abc import Iterator
from dataclasses import replace

from mspc import ranks
from mspc.passes.together import Visit, by_few
from mspc.passes.walk import DenseWalk


def own_work(dense: DenseWalk) -> Iterator[tuple[list[Visit], list[int]]]:
    """Lists of visits for this rank to work on together, and with each the blocks that are then complete.

    Each rank gets one of as many blocks as there are ranks. The matrices of a block with experts are shared, at most
    a few at a time, as the Grams of all would take too much memory. A single rank gets everything.
    """
    if ranks.size() == 1:
        for few in by_few(dense):
            yield few, [few[0].block] if few[-1].is_last_of_block else []
        return
    window: list[int] = []
    own: list[Visit] = []
    for few in by_few(dense):
        block, complete = few[0].block, [few[0].block] if few[-1].is_last_of_block else []
        if any(matrix.index is not None for matrix in dense.matrices[block]):
            if window:
                yield own, window
                own, window = [], []
            owners = ranks.owners([sum(visit.matrix.shape) * visit.matrix.shape[1] ** 2 for visit in few])
            yield [visit for visit, owner in zip(few, owners, strict=True) if owner == ranks.rank()], complete
            continue
        if len(window) == ranks.rank():  # the walk leaves the block before the work begins
            own += (replace(visit, weight=visit.weight.clone()) for visit in few)
        window += complete
        if len(window) == ranks.size():
            yield own, window
            own, window = [], []
    if window:
        yield own, window
