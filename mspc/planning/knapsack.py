"""Allocation by loss curves: the least total of predicted losses within one budget.

Every matrix has options, each with a cost and a predicted loss. Which one of each keeps the sum of costs within the
budget at the least sum of losses is a multiple-choice knapsack, solved exactly by dynamic programming over the cost:
costs of real models are multiples of a large number, so there are few sums. Where they are not, what options cost above
the cheapest of their matrix is rounded up to a fraction of what the budget leaves for it, and what that left unused is
spent on single better options, as far as it goes.
"""

import math
from collections.abc import Sequence

import numpy
from numpy.typing import NDArray

from mspc.planning.curve import Curve
from mspc.types import Target

SUMS = 1 << 15
STEPS = 128
"""Sparsities tried for each matrix, as parts of 1."""


def by_curves(curves: Sequence[Curve], numels: Sequence[int], sparsity: float, of: int | None = None) -> list[float]:
    """Sparsities of least predicted loss with at most (1 - sparsity) of all weights kept.

    With `of`, those of N:of patterns; a matrix then keeps at least one of each group, whatever is asked.
    """
    steps = of or STEPS
    shares = [k / steps for k in range(1 if of else 0, steps + 1)]
    options = [[(n * share, curve.at(1 - share)) for share in shares] for curve, n in zip(curves, numels, strict=True)]
    kept = max(1 - sparsity, shares[0])
    return [1 - shares[i] for i in cheapest(options, kept * sum(numels))]


def mixture(curves: Sequence[Curve], options: Sequence[Sequence[tuple[Target, int]]], budget: int) -> list[Target]:
    """One of the targets of each matrix, which come with their size in bytes: least predicted loss within the budget.

    Raises ValueError when not even the smallest fit.
    """
    priced = [
        [(float(size), curve.at(t.pattern.sparsity, t.bits)) for t, size in of_matrix]
        for curve, of_matrix in zip(curves, options, strict=True)
    ]
    return [of_matrix[i][0] for of_matrix, i in zip(options, cheapest(priced, budget), strict=True)]


def cheapest(options: Sequence[Sequence[tuple[float, float]]], budget: float) -> list[int]:
    """One of the options (cost, loss) of each matrix: least sum of losses with the sum of costs at most `budget`.

    Raises ValueError when even the cheapest are more than the budget.
    """
    least = [min(cost for cost, _ in of_matrix) for of_matrix in options]
    room = budget - sum(least)
    if room < -1e-9 * budget:
        raise ValueError("no choice of options fits the budget")
    above = [[(cost - low, loss) for cost, loss in of] for of, low in zip(options, least, strict=True)]
    unit, size = _unit([cost for of_matrix in above for cost, _ in of_matrix], max(room, 0.0))
    best = numpy.zeros(size + 1)
    choices: list[NDArray[numpy.int32]] = []
    for of_matrix in above:
        extended = numpy.full(size + 1, math.inf)
        chosen: NDArray[numpy.int32] = numpy.zeros(size + 1, dtype=numpy.int32)
        for i, (cost, loss) in enumerate(of_matrix):
            units = math.ceil(cost / unit - 1e-9)
            if units > size:
                continue
            candidate = best[: size + 1 - units] + loss
            better = candidate < extended[units:]
            extended[units:][better] = candidate[better]
            chosen[units:][better] = i
        best = extended
        choices.append(chosen)
    picked, left = list[int](), size
    for of_matrix, last in zip(reversed(above), reversed(choices), strict=True):
        picked.append(int(last[left]))
        left -= math.ceil(of_matrix[picked[-1]][0] / unit - 1e-9)
    return _spend_rest(above, picked[::-1], room)


def _spend_rest(options: Sequence[Sequence[tuple[float, float]]], picked: list[int], room: float) -> list[int]:
    """Exchange one option at a time, that which gains most, while the costs leave room."""
    left = room - sum(of_matrix[i][0] for of_matrix, i in zip(options, picked, strict=True))
    while True:
        gains = [
            (of_matrix[now][1] - loss, matrix, i)
            for matrix, (of_matrix, now) in enumerate(zip(options, picked, strict=True))
            for i, (cost, loss) in enumerate(of_matrix)
            if cost - of_matrix[now][0] <= left and loss < of_matrix[now][1]
        ]
        if not gains:
            return picked
        _, matrix, i = max(gains)
        left -= options[matrix][i][0] - options[matrix][picked[matrix]][0]
        picked[matrix] = i


def _unit(costs: Sequence[float], budget: float) -> tuple[float, int]:
    """What costs are counted in, and how many of it the budget is: their divisor, if that is not too small."""
    if all(float(cost).is_integer() for cost in costs):
        divisor = math.gcd(*(int(cost) for cost in costs))
        if divisor and budget / divisor <= SUMS:
            return divisor, int(budget / divisor + 1e-9)
    return max(budget, 1e-9) / SUMS, SUMS
