"""The pattern of zeros that are there already, and the mask of each pattern."""

from collections.abc import Sequence
from math import comb, log

import torch
from torch import Tensor

from mspc.numerics.masking import select
from mspc.types import NM, Pattern

FEW = 0.01
"""Share of zeros below which a matrix has no mask. A mask takes a bit of every weight, even where it saves nothing."""
GROUPS = (4, 8, 16)
"""M of the N:M patterns that are recognized."""
CHANCE = 1e-6
"""Probability below which zeros in a pattern are no chance."""


def recognized(nonzero: Tensor, groups: Sequence[int] = GROUPS) -> NM | None:
    """The N:M pattern of the nonzero weights, bool (O, I): no group of M holds more than N. None for no pattern.

    At high sparsities any zeros are in some pattern. One counts if as many zeros at random places would be in it with a
    probability below `CHANCE`, and if at least half of the weights that it keeps are not zero. Of several, the one with
    the lowest probability is returned: 2:4 is also 4:8, which is more likely by chance.
    """
    num_rows, num_columns = nonzero.shape
    share = int(torch.count_nonzero(nonzero)) / nonzero.numel()
    found = {}
    for of in groups:
        keep = 0 if num_columns % of else most_in_group(nonzero, of)
        if not 0 < keep < of or share < keep / of / 2:
            continue
        within = sum(comb(of, kept) * share**kept * (1 - share) ** (of - kept) for kept in range(keep + 1))
        found[NM(keep, of)] = num_rows * num_columns // of * log(within)
    best = min(found, key=lambda pattern: found[pattern], default=None)
    return best if best is not None and found[best] < log(CHANCE) else None


def most_in_group(nonzero: Tensor, of: int) -> int:
    """The largest number of nonzero weights in `of` consecutive columns of a row, for nonzero weights, bool (O, I)."""
    return int(nonzero.view(len(nonzero), -1, of).sum(2, dtype=torch.int16).max())


def mask_of(weight: Tensor, pattern: Pattern) -> Tensor:
    """The mask (O, I) of a pattern that keeps every nonzero weight (O, I), and as many zeros as it has places left."""
    return select((weight != 0).float(), pattern, per_row=False)
