"""The evolutionary search of EvoPress (Sieber et al., arXiv:2410.14649) over plans in levels, for any judge of plans.

Offspring of the best plan so far differ from it by a few switches within the budget. Many are judged on a little text
and few on all of it, and only one that is better on all of it takes its parent's place.
"""

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

OFFSPRING = 32
ROUNDS = ((16, 8), (4, 2), (1, 1))
"""They are judged on a 16th of the held-out sequences, the best 8 on a quarter, and the best 2 of those on all."""
SWITCHES = 3

Levels = tuple[int, ...]
"""How many parts of every matrix are zero, in the order of the plan."""
Judge = Callable[[Levels, Sequence[int]], float]
"""How bad a plan is on the held-out sequences of these numbers."""


@dataclass(frozen=True)
class Space:
    """The plans that may be: levels of every matrix within its range that prune at least `budget` in all.

    A level of a matrix prunes its `sizes`.
    """

    sizes: Sequence[int]
    ranges: Sequence[range]
    budget: float

    def excess(self, levels: Sequence[int]) -> float:
        """What they prune beyond the budget."""
        return sum(size * level for size, level in zip(self.sizes, levels, strict=True)) - self.budget

    def switched(self, levels: Levels, rng: random.Random) -> Levels:
        """One to three random steps up, or down, and as many the other way as the budget needs and allows."""
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
    """The best levels and what they are judged on all sequences: the start, then of every generation. It never rises.

    Levels that are `known` are not drawn. Ends when nothing else is.
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
