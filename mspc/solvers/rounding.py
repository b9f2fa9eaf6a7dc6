"""Rounding of weights to a grid on masks that are known, for one matrix or for several of the same shape at once.

A solver that rounds is a generator: it yields what is to be rounded, and gets it back rounded. `together` runs the
solvers of several matrices, such as experts, side by side, and rounds what they ask for as one batch (`batch`). The
bytes of a matrix are the same either way.
"""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor

from mspc.numerics.linalg import inverse_factor, precise_matmul, regularized
from mspc.numerics.quant import dequantize, groups_of
from mspc.solvers.batch import BLOCK, descend_together, sweep_together
from mspc.solvers.obs import check_pattern, obs
from mspc.solvers.options import SolverOptions
from mspc.solvers.polish import better, polish, refit_scales
from mspc.threads import ROWS
from mspc.types import Codes, CompressedLinear, GramStats, Target

P = ParamSpec("P")

LARGEST_BATCH = {"cpu": 2**22, "cuda": 2**26}
"""Weights of matrices that are solved as one batch, at most. On a CPU more of them gain little; on a GPU, where a short
operation takes longer to start than to compute, it is an estimate."""

WHOLE_ROWS = 64
"""Rows that vector code of any width has no rest of: with one, some operations round the rows of a batch otherwise."""


@dataclass(frozen=True)
class Rounding:
    """Weights `wanted` (O, I) to be rounded to the grid of the target on `mask` (O, I)."""

    wanted: Tensor
    mask: Tensor
    stats: GramStats
    target: Target
    options: SolverOptions
    name: str

    def kind(self) -> tuple[Any, ...]:
        """Those of one kind can be rounded as one batch."""
        return self.wanted.shape, self.wanted.device, self.target.grid, self._size(), self.options.damp

    def _size(self) -> int:
        """The size of a group if a sweep fits each group when it reaches it, and several round as one alone; else 0."""
        assert self.target.grid is not None
        size, num_rows = groups_of(self.wanted.shape[1], self.target.grid, self.name), len(self.wanted)
        alone = self.options.activation_order or BLOCK % size or num_rows > ROWS or num_rows % WHOLE_ROWS
        return 0 if alone else size


Rounds = Generator[Rounding, CompressedLinear, CompressedLinear]
"""A solver under way: it yields what is to be rounded, and returns its result."""


def largest_batch(shape: tuple[int, ...], device: torch.device) -> int:
    """The number of matrices of a shape that are worth one batch, at least 1."""
    return max(1, LARGEST_BATCH[device.type] // math.prod(shape))


def by_itself(steps: Callable[P, Rounds]) -> Callable[P, CompressedLinear]:
    """The solver of one matrix whose steps are those of `steps`. It raises every error of `obs` as well."""

    @wraps(steps)
    def solver(*args: P.args, **kwargs: P.kwargs) -> CompressedLinear:
        return together([steps(*args, **kwargs)])[0]

    return solver


def together(solvers: Sequence[Rounds]) -> list[CompressedLinear]:
    """The results of solvers that run side by side. Raises every error of `obs`."""
    results: dict[int, CompressedLinear] = {}
    asked: dict[int, Rounding] = {}

    def go_on(number: int, resume: Callable[[], Rounding]) -> None:
        try:
            asked[number] = resume()
        except StopIteration as end:
            results[number] = end.value

    with precise_matmul():  # solvers change and restore it while others are under way
        for number, solver in enumerate(solvers):
            go_on(number, lambda solver=solver: next(solver))  # type: ignore[misc]
        while asked:
            found = dict(zip(asked, rounded(list(asked.values())), strict=True))
            asked.clear()
            for number, one in found.items():
                go_on(number, lambda solver=solvers[number], one=one: solver.send(one))  # type: ignore[misc]
    return [results[number] for number in range(len(solvers))]


def rounded(asked: Sequence[Rounding]) -> list[CompressedLinear]:
    """The OBS sweep and its polish for each matrix; those of one kind are one batch."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for number, one in enumerate(asked):
        kinds.setdefault(one.kind(), []).append(number)
    results: dict[int, CompressedLinear] = {}
    for numbers in kinds.values():
        batch = [asked[number] for number in numbers]
        several = len(batch) > 1 and batch[0].kind()[3] > 0
        results |= zip(numbers, _as_batch(batch) if several else map(_one, batch), strict=True)
    return [results[number] for number in range(len(asked))]


def _one(one: Rounding) -> CompressedLinear:
    swept = obs(one.wanted, one.stats, one.target, one.options, one.name, one.mask)
    return polish(one.wanted, swept, one.stats, one.options.damp)


def _as_batch(batch: Sequence[Rounding]) -> list[CompressedLinear]:
    """`_one` for matrices of one kind."""
    first = batch[0]
    assert first.target.grid is not None
    for one in batch:
        check_pattern(one.target.pattern, one.wanted.shape[1], one.options, one.name)
    wanted, masks = [one.wanted for one in batch], [one.mask for one in batch]
    factors = [inverse_factor(one.stats, one.options.damp, one.name) for one in batch]
    grams = [regularized(one.stats.gram, one.options.damp)[0] for one in batch]

    def improved(old: Sequence[Codes], new: Sequence[Codes]) -> list[Codes]:
        return [better(*of_one) for of_one in zip(wanted, grams, old, new, strict=True)]

    def refitted(codes: Sequence[Codes]) -> list[Codes]:
        return improved(codes, [refit_scales(*of_one) for of_one in zip(wanted, grams, codes, strict=True)])

    codes = refitted(sweep_together(wanted, masks, factors, first.target.grid, first.kind()[3]))
    codes = improved(codes, descend_together(wanted, grams, codes, masks, 2**first.target.grid.bits - 1))
    codes = refitted(codes)
    return [
        CompressedLinear(dequantize(found), one.mask, one.target, found, factor.damp, factor.precision)
        for one, factor, found in zip(batch, factors, codes, strict=True)
    ]
