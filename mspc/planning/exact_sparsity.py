"""From the sparsities that an allocator wishes to exact ones: whole weights, or whole N of N:M.

All wishes are shifted by the same number, which makes their mean over all weights exact and keeps their differences.
Sparsities outside the possible range are clipped, and the other matrices make up for it.
"""

from collections import defaultdict
from collections.abc import Sequence

BISECTIONS = 100  # more than float64 can resolve


def shifted(wished: Sequence[float], numels: Sequence[int], sparsity: float, highest: float = 1.0) -> list[float]:
    """`clip(wished + delta, 0, highest)` with the delta whose weighted mean is `sparsity`."""
    budget = sparsity * sum(numels)
    low, high = -max(wished) - 1, highest - min(wished) + 1
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        total = sum(n * min(max(w + middle, 0.0), highest) for w, n in zip(wished, numels, strict=True))
        low, high = (middle, high) if total < budget else (low, middle)
    return [min(max(w + high, 0.0), highest) for w in wished]


def exact_counts(wished: Sequence[float], numels: Sequence[int], sparsity: float) -> list[int]:
    """Number of weights to prune in each matrix; the sum is round(sparsity * sum(numels))."""
    shares = [s * n for s, n in zip(shifted(wished, numels, sparsity), numels, strict=True)]
    counts = [int(share) for share in shares]
    missing = round(sparsity * sum(numels)) - sum(counts)
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for i in by_remainder[:missing]:  # a remainder above 0 leaves room for one more
        counts[i] += 1
    return counts


def exact_keeps(wished: Sequence[float], numels: Sequence[int], sparsity: float, of: int) -> list[int]:
    """N of N:`of` for each matrix, at least 1, so that the sum of kept weights is as near as possible to the target.

    Each N is its exact share, rounded down or up. Those with the largest remainders are rounded up. Matrices of one
    size are exchanged for matrices of another size if that brings the sum nearer to the target.
    """
    shares = [(1 - s) * of for s in shifted(wished, numels, sparsity, highest=1 - 1 / of)]
    floors = [min(max(int(share + 1e-9), 1), of) for share in shares]
    remainder = [share - floor for share, floor in zip(shares, floors, strict=True)]
    raisable: dict[int, list[int]] = defaultdict(list)
    for i in sorted(range(len(shares)), key=lambda i: -remainder[i]):
        if floors[i] < of:
            raisable[numels[i]].append(i)
    kept = sum(n * floor for n, floor in zip(numels, floors, strict=True))
    wanted = (1 - sparsity) * of * sum(numels) - kept
    for size, raised in zip(raisable, _nearest_counts(raisable, remainder, wanted), strict=True):
        for i in raisable[size][:raised]:
            floors[i] += 1
    return floors


def _nearest_counts(raisable: dict[int, list[int]], remainder: Sequence[float], wanted: float) -> list[int]:
    """Number of matrices to round up for each size: total size nearest to `wanted`, then largest sum of remainders."""
    reached: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for size, members in raisable.items():
        extended: dict[int, tuple[float, list[int]]] = {}
        for total, (gain, counts) in reached.items():
            for count in range(len(members) + 1):
                if count:
                    gain += remainder[members[count - 1]]
                key = total + size * count
                if key not in extended or gain > extended[key][0]:
                    extended[key] = (gain, [*counts, count])
        reached = extended
    nearest = min(reached, key=lambda total: (abs(total - wanted), -reached[total][0]))
    return reached[nearest][1]
