"""Allocators: sensitivities -> a sparsity for every matrix. Python numbers in, Python numbers out.

An allocator only says which matrix should be sparser than which; `budget` then makes the parameter-weighted total
exact in whole weights (or whole N of N:M).
"""

from collections.abc import Callable, Sequence

from mspc.allocators.by_block import alpha_pruning, depth, owl
from mspc.allocators.trace_rank import layer_trace_rank, trace_rank


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
