"""Published allocators: sensitivities -> a sparsity for every matrix. Python numbers in, Python numbers out.

An allocator only orders the matrices from dense to sparse. `planning.exact_sparsity` then makes the sparsity of the
whole exact in whole weights (or whole N of N:M). Here p is the sparsity of the whole and w is `alpha`.

    trace-rank         The seed paper's allocation by rank of sensitivity (arXiv:2310.09499, Algorithm 1):
                       sparsity_i = p + w - 2 w rank_i / (n - 1), with rank 0 = least sensitive
    layer-trace-rank   The same with layers ranked by the sum over their matrices; a layer has one sparsity
    owl                Outlier weighed layerwise sparsity (arXiv:2310.05175), one sparsity per decoder block:
                       density = 2 w x + a constant, with x in [0, 1] linear in the share of outliers of the block
    alpha              AlphaPruning (arXiv:2410.10912), one sparsity per decoder block: proportional to 1 - w + 2 w x,
                       with x in [0, 1] linear in the mean power-law exponent of the block's spectra
    uniform            p for every matrix

Algorithm 1 as printed assigns its values to "sparsity" but builds them from 1 - p, so they are densities. In this
reading the most sensitive matrix stays densest. Its sensitivity is per weight (mean trace).

The mean over matrices (trace-rank) or blocks (the others) is p. If their sizes differ, `exact_sparsity` shifts them
all. The authors of owl weigh all blocks equally; those of alpha weigh them by size, with a factor instead of a shift.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean


def trace_rank(sensitivities: Sequence[float], blocks: Sequence[int], sparsity: float, alpha: float) -> list[float]:
    """Each matrix by its own rank."""
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
    mean = fmean(offsets.values())
    return [sparsity + offsets[block] - mean for block in blocks]


def alpha_pruning(exponents: Sequence[float], blocks: Sequence[int], sparsity: float, alpha: float) -> list[float]:
    factors = {block: 1 - alpha + 2 * alpha * x for block, x in _positions(_means(exponents, blocks)).items()}
    mean = fmean(factors.values()) or 1.0  # the mean is 0 if alpha is 1 and no block differs
    return [sparsity * factors[block] / mean for block in blocks]


def _means(values: Sequence[float], blocks: Sequence[int]) -> dict[int, float]:
    of_block: dict[int, list[float]] = defaultdict(list)
    for value, block in zip(values, blocks, strict=True):
        of_block[block].append(value)
    return {block: fmean(members) for block, members in of_block.items()}


def _positions(values: dict[int, float]) -> dict[int, float]:
    """Linear positions, 0 for the least value and 1 for the greatest; 0.5 for all if they are equal."""
    low, high = min(values.values()), max(values.values())
    return {block: (value - low) / (high - low) if high > low else 0.5 for block, value in values.items()}


def uniform(sensitivities: Sequence[float], blocks: Sequence[int], sparsity: float, alpha: float) -> list[float]:
    return [sparsity] * len(blocks)


Allocator = Callable[[Sequence[float], Sequence[int], float, float], list[float]]

ALLOCATORS: dict[str, Allocator] = {
    "alpha": alpha_pruning,
    "layer-trace-rank": layer_trace_rank,
    "owl": owl,
    "trace-rank": trace_rank,
    "uniform": uniform,
}
