"""The paper's allocation by rank of sensitivity (arXiv:2310.09499, Algorithm 1), read as sparsity.

    sparsity_i = p + alpha - 2 alpha rank_i / (n - 1),   rank 0 = least sensitive

Printed, the algorithm assigns its values to "sparsity" while building them from 1 - p; they are densities, so this is
the reading in which the most sensitive matrix stays densest. The mean over matrices is p; the weighted mean over
parameters is not, which is what `budget` corrects. Sensitivity is per weight (mean trace) in both variants.
"""

from collections import defaultdict
from collections.abc import Sequence


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
