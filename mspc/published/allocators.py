"""Published allocators: sensitivities -> a sparsity for every matrix. Python numbers in, Python numbers out.

An allocator only says which matrix should be sparser than which; `planning.budget` then makes the parameter-weighted
total exact in whole weights (or whole N of N:M).

Trace rank: The paper's allocation by rank of sensitivity (arXiv:2310.09499, Algorithm 1), read as sparsity.

    sparsity_i = p + alpha - 2 alpha rank_i / (n - 1),   rank 0 = least sensitive

Printed, the algorithm assigns its values to "sparsity" while building them from 1 - p; they are densities, so this is
the reading in which the most sensitive matrix stays densest. The mean over matrices is p; the weighted mean over
parameters is not, which is what `budget` corrects. Sensitivity is per weight (mean trace) in both variants.

By block: Published allocators that give all matrices of a decoder block one sparsity. With w = alpha and x from 0 to 1:

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
from collections.abc import Callable, Sequence
from statistics import fmean


def trace_rank(sensitivities: Sequence[float], blocks: Sequence[int], sparsity: float, alpha: float) -> list[float]:
    """Every matrix by its own rank."""
    ranks = _ranks(sensitivities)
    last = max(len(ranks) - 1, 1)
    return [sparsity + alpha - 2 * alpha * rank / last if len(ranks) > 1 else sparsity for rank in ranks]


def layer_trace_rank(
    sensitivities: Sequence[float], blocks: Sequence[int], sparsity: float, alpha: float
) -> list[float]:
    """Layers ranked by the sum over their matrices; every matrix of a layer gets the layer's sparsity."""
    sums: dict[int, float] = defaultdict(float)
    for sensitivity, block in zip(sensitivities, blocks, strict=True):
        sums[block] += sensitivity
    layers = sorted(sums)
    of_layer = dict(zip(layers, trace_rank([sums[layer] for layer in layers], layers, sparsity, alpha), strict=True))
    return [of_layer[block] for block in blocks]


def _ranks(values: Sequence[float]) -> list[int]:
    """Rank of each value from 0, ascending; equal values in their order of appearance."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    ranks = [0] * len(values)
    for rank, i in enumerate(order):
        ranks[i] = rank
    return ranks


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


def uniform(sensitivities: Sequence[float], blocks: Sequence[int], sparsity: float, alpha: float) -> list[float]:
    return [sparsity] * len(blocks)


Allocator = Callable[[Sequence[float], Sequence[int], float, float], list[float]]

ALLOCATORS: dict[str, Allocator] = {
    "alpha": alpha_pruning,
    "depth": depth,
    "layer-trace-rank": layer_trace_rank,
    "owl": owl,
    "trace-rank": trace_rank,
    "uniform": uniform,
}
HALF_WIDTHS = {"alpha": 0.2, "depth": 0.1, "layer-trace-rank": 0.1, "owl": 0.08, "trace-rank": 0.1}
"""The alpha of each where none is given. Of owl and alpha, their authors' with SparseGPT on LLaMA-7B (for larger models
alpha has 0.3 there). In arXiv:2502.14770 that of depth is tuned for every model: a common difference of 0.0065 over 32
blocks, as here, lies among those that came out at 70%."""
NEEDS_SENSITIVITY = frozenset({"alpha", "layer-trace-rank", "owl", "trace-rank"})
OWN_MEASURES = {"alpha": "exponents", "owl": "outliers"}
"""Of the allocators that say themselves what is measured for them."""
