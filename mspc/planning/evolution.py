"""The evolutionary search of EvoPress (Sieber et al., arXiv:2410.14649) over plans in levels, for any judge of plans.

The offspring of the best plan so far differ from it by a few switches within the budget. Many are judged on a part of
the validation text, and few on all of it. A plan replaces its parent only if it is better on all of the text.
"""

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

OFFSPRING = 32
ROUNDS = ((16, 8), (4, 2), (1, 1))
"""Rounds of judging: (divisor of the number of validation sequences, number of plans that survive)."""
SWITCHES = 3
"""Maximum number of random steps in one direction that make an offspring."""

Levels = tuple[int, ...]
"""Number of parts of each matrix that are zero, in the order of the plan."""
Judge = Callable[[Levels, Sequence[int]], float]
"""Loss of a plan on the validation sequences with these numbers."""


@dataclass(frozen=True)
class Space:
    """The allowed plans: each level lies in the range of its matrix, and sum(size * level) >= `budget`."""

    sizes: Sequence[int]
    ranges: Sequence[range]
    budget: float

    def excess(self, levels: Sequence[int]) -> float:
        """sum(size * level) - budget."""
        return sum(size * level for size, level in zip(self.sizes, levels, strict=True)) - self.budget

    def switched(self, levels: Levels, rng: random.Random) -> Levels:
        """Take 1 to `SWITCHES` random steps up or down, and those in the other direction that the budget requires."""
        plan, direction = list(levels), rng.choice((-1, 1))

        def move(step: int, at_most: float) -> bool:
            able = [i for i, own in enumerate(plan) if own + step in self.ranges[i]]
            able = [i for i in able if self.sizes[i] <= at_most] or (able if step > 0 else [])
            if able:
                plan[rng.choice(able)] += step
            return bool(able)

        for _ in range(min(rng.randint(1, SWITCHES), rng.randint(1, SWITCHES))):
            move(direction, float("inf"))
        while (excess := self.excess(plan)) < 0:
            if not move(1, -excess):
                return levels
        while move(-1, self.excess(plan)):
            pass
        return tuple(plan)


def evolve(
    start: Levels, judge: Judge, space: Space, num_sequences: int, rng: random.Random, known: Collection[Levels] = ()
) -> Iterator[tuple[Levels, float]]:
    """Yields the best levels and their loss on all sequences, for the start and after each generation.

    The loss never rises. Levels that are `known` are not drawn; the search ends when no others are.
    """
    everything = range(num_sequences)
    best, least = start, judge(start, everything)
    yield best, least
    while True:
        drawn = dict.fromkeys(space.switched(best, rng) for _ in range(OFFSPRING))
        plans = [plan for plan in drawn if plan != best and plan not in known]
        if not plans:
            return
        for share, survivors in ROUNDS:
            sequences = rng.sample(everything, -(-num_sequences // share))
            judged = sorted((judge(plan, sequences), plan) for plan in plans)
            plans = [plan for _, plan in judged[:survivors]]
        if judged[0][0] < least:
            least, best = judged[0]
        yield best, least
