"""Published allocators that give all matrices of a decoder block one sparsity. With w = alpha and x from 0 to 1:

    owl     outlier weighed layerwise sparsity (arXiv:2310.05175): density 2 w x + a constant, x linear in the share of
            outliers of a block
    alpha   AlphaPruning (arXiv:2410.10912): sparsity proportional to 1 - w + 2 w x, x linear in the mean of the
            power-law exponents of a block's spectra: the lighter the tail, the sparser
    depth   arXiv:2502.14770, with common difference 2 w / (number of blocks - 1): sparsity 2 w x + a constant, x linear
            in the number of the block

The mean over blocks is the sparsity asked for; where blocks differ in size, `budget` shifts all of them. The authors of
owl weigh all blocks alike, those of alpha by size, with a factor in place of a shift.
"""

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean


def owl(outlier_shares: Sequence[float], blocks: Sequence[int], sparsity: float, alpha: float) -> list[float]:
    offsets = {block: -2 * alpha * x for block, x in _positions(_means(outlier_shares, blocks)).items()}
    return _about(offsets, blocks, sparsity)


def alpha_pruning(exponents: Sequence[float], blocks: Sequence[int], sparsity: float, alpha: float) -> list[float]:
    factors = {block: 1 - alpha + 2 * alpha * x for block, x in _positions(_means(exponents, blocks)).items()}
    mean = fmean(factors.values()) or 1.0  # all are 0 where alpha is 1 and no block differs
    return [sparsity * factors[block] / mean for block in blocks]


def depth(sensitivities: Sequence[float], blocks: Sequence[int], sparsity: float, alpha: float) -> list[float]:
    offsets = {block: 2 * alpha * x for block, x in _positions({block: float(block) for block in blocks}).items()}
    return _about(offsets, blocks, sparsity)


def _means(values: Sequence[float], blocks: Sequence[int]) -> dict[int, float]:
    of_block: dict[int, list[float]] = defaultdict(list)
    for value, block in zip(values, blocks, strict=True):
        of_block[block].append(value)
    return {block: fmean(members) for block, members in of_block.items()}


def _positions(values: dict[int, float]) -> dict[int, float]:
    """From 0 for the least to 1 for the greatest; all in the middle where they are equal."""
    low, high = min(values.values()), max(values.values())
    return {block: (value - low) / (high - low) if high > low else 0.5 for block, value in values.items()}


def _about(offsets: dict[int, float], blocks: Sequence[int], sparsity: float) -> list[float]:
    mean = fmean(offsets.values())
    return [sparsity + offsets[block] - mean for block in blocks]
