"""Allocation by loss curves: the lowest sum of predicted losses within one budget.

Every matrix has options, each with a cost and a predicted loss. Choosing one per matrix is a multiple-choice knapsack.
Dynamic programming over the cost solves it exactly: the costs of real models are multiples of a large number, so there
are few sums. For other costs, the part of a cost above that of the cheapest option is rounded up to a multiple of
1 / `SUMS` of the budget. Whatever that leaves unused is then spent on better options, one at a time.
"""

import math
from collections.abc import Sequence

import numpy
from numpy.typing import NDArray

from mspc.planning.curve import Curve
from mspc.types import Target

SUMS = 1 << 15
"""Maximum number of different sums of costs."""
STEPS = 128
"""Number of steps between sparsity 0 and 1."""


def cheapest_sparsities(
    curves: Sequence[Curve], numels: Sequence[int], sparsity: float, of: int | None = None
) -> list[float]:
    """The sparsities with the lowest predicted loss that keep at most (1 - sparsity) of all weights.

    With `of` they are those of N:of patterns, with N >= 1 even if that keeps more.
    """
    steps = of or STEPS
    shares = [k / steps for k in range(1 if of else 0, steps + 1)]
    options = [[(n * share, curve.at(1 - share)) for share in shares] for curve, n in zip(curves, numels, strict=True)]
    kept = max(1 - sparsity, shares[0])
    return [1 - shares[i] for i in cheapest(options, kept * sum(numels))]


def cheapest_targets(
    curves: Sequence[Curve], options: Sequence[Sequence[tuple[Target, float]]], budget: float
) -> list[Target]:
    """The target of each matrix, chosen from (target, cost) pairs for the lowest predicted loss within the budget.

    Costs are bytes or milliseconds.

    Raises ValueError if the cheapest targets exceed the budget.
    """
    priced = [
        [(float(cost), curve.at(t.pattern.sparsity, t.bits)) for t, cost in own]
        for curve, own in zip(curves, options, strict=True)
    ]
    return [own[i][0] for own, i in zip(options, cheapest(priced, budget), strict=True)]


def cheapest(options: Sequence[Sequence[tuple[float, float]]], budget: float) -> list[int]:
    """Index of the option (cost, loss) of each matrix, for the lowest sum of losses at a sum of costs <= `budget`.

    Raises ValueError if the cheapest options exceed the budget.
    """
    least = [min(cost for cost, _ in own) for own in options]
    room = budget - sum(least)
    if room < -1e-9 * budget:
        raise ValueError("no choice of options fits the budget")
    above = [[(cost - low, loss) for cost, loss in own] for own, low in zip(options, least, strict=True)]
    unit, size = _unit([cost for own in above for cost, _ in own], max(room, 0.0))
    best = numpy.zeros(size + 1)
    choices: list[NDArray[numpy.int32]] = []
    for own in above:
        extended = numpy.full(size + 1, math.inf)
        chosen: NDArray[numpy.int32] = numpy.zeros(size + 1, dtype=numpy.int32)
        for i, (cost, loss) in enumerate(own):
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
    for own, last in zip(reversed(above), reversed(choices), strict=True):
        picked.append(int(last[left]))
        left -= math.ceil(own[picked[-1]][0] / unit - 1e-9)
    return _spend_rest(above, picked[::-1], room)


def _spend_rest(options: Sequence[Sequence[tuple[float, float]]], picked: list[int], room: float) -> list[int]:
    """Exchange one option at a time, the one with the largest gain, while the budget leaves room."""
    left = room - sum(own[i][0] for own, i in zip(options, picked, strict=True))
    while True:
        gains = [
            (own[now][1] - loss, matrix, i)
            for matrix, (own, now) in enumerate(zip(options, picked, strict=True))
            for i, (cost, loss) in enumerate(own)
            if cost - own[now][0] <= left and loss < own[now][1]
        ]
        if not gains:
            return picked
        _, matrix, i = max(gains)
        left -= options[matrix][i][0] - options[matrix][picked[matrix]][0]
        picked[matrix] = i


def _unit(costs: Sequence[float], budget: float) -> tuple[float, int]:
    """The unit of cost, and the budget in units: the greatest common divisor of the costs unless it is too small."""
    if all(float(cost).is_integer() for cost in costs):
        divisor = math.gcd(*(int(cost) for cost in costs))
        if divisor and budget / divisor <= SUMS:
            return divisor, int(budget / divisor + 1e-9)
    return max(budget, 1e-9) / SUMS, SUMS
