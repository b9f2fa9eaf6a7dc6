"""Allocators: sensitivities -> a sparsity for every matrix. Python numbers in, Python numbers out.

An allocator only says which matrix should be sparser than which; `budget` then makes the parameter-weighted total
exact in whole weights (or whole N of N:M).
"""

from collections.abc import Callable, Sequence

from mspc.allocators.trace_rank import layer_trace_rank, trace_rank


def uniform(sensitivities: Sequence[float], blocks: Sequence[int], sparsity: float, alpha: float) -> list[float]:
    return [sparsity] * len(blocks)


Allocator = Callable[[Sequence[float], Sequence[int], float, float], list[float]]

ALLOCATORS: dict[str, Allocator] = {
    "layer-trace-rank": layer_trace_rank,
    "trace-rank": trace_rank,
    "uniform": uniform,
}
NEEDS_SENSITIVITY = frozenset({"layer-trace-rank", "trace-rank"})
