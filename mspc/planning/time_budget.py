"""A budget in time: the plan with the lowest predicted loss among those that take no more milliseconds a token.

The time of a token is a sum: the products with the matrices, the head, and the rest. The first depends on the plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Any

import torch

from mspc.errors import InputError
from mspc.planning.allocation import targets_of
from mspc.planning.curve import Curve
from mspc.planning.knapsack import cheapest_targets
from mspc.planning.timings import BATCH, CONTEXT, Timings
from mspc.planning.token_work import TokenWork
from mspc.settings import HEAD_BITS, Settings
from mspc.types import UNQUANTIZED_BITS, Grid, PlannedMatrix, Target, Unstructured

DENSE = Unstructured(0.0)
VALUES = Target(DENSE)
"""A matrix as it is."""
COMPUTED = torch.float32
"""The dtype in which a CPU computes: that of dense layers in memory."""


@dataclass(frozen=True)
class TimeBudget:
    """The time that a token may take, with the timings and the work that it is about."""

    settings: Settings
    work: TokenWork
    timings: Timings

    @property
    def baseline(self) -> tuple[str, float]:
        """The faster of torch's and our own bfloat16, by name, and its milliseconds."""
        found = {"torch": self._in_torch(), "mspc": self._in_own_values()}
        name = min(found, key=lambda name: found[name])
        return name, found[name]

    def _in_torch(self) -> float:
        """All products in bfloat16 by torch; the rest as in C++, which is less than torch takes for it."""
        timings, dtype = self.timings, torch.bfloat16
        sizes = [*self.work.linears, self.work.head_size]
        return timings.rest_ms + sum(timings.of_torch(size, dtype) for size in sizes)

    def _in_own_values(self) -> float:
        """The matrices as bfloat16 values in C++, and the head in whatever is fastest."""
        timings, dtype, head = self.timings, torch.bfloat16, self.work.head_size
        heads = timings.of_torch(head, COMPUTED), timings.of_torch(head, dtype), timings.of_target(head, VALUES, dtype)
        return timings.rest_ms + min(heads) + sum(timings.of_target(size, VALUES, dtype) for size in self.work.linears)

    @property
    def target_ms(self) -> float:
        """Milliseconds that a token may take."""
        if self.settings.ms_per_token is not None:
            return self.settings.ms_per_token
        return self.baseline[1] / (self.settings.speedup or 1.0)

    @property
    def head_ms(self) -> float:
        return self._head_ms(self.work.head)

    def _head_ms(self, grid: Grid | None) -> float:
        size = self.work.head_size
        if grid is None:
            return self.timings.of_torch(size, COMPUTED)
        return self.timings.of_target(size, Target(DENSE, grid), self.work.dtype)

    @property
    def fixed_ms(self) -> float:
        """Milliseconds of all but the matrices that are compressed."""
        timings, work = self.timings, self.work
        dense = sum(timings.of_target(size, VALUES, work.dtype) for size in work.others)  # repacked for steps in C++
        lookup = timings.lookup_ms if work.quantized_lookup else 0.0
        return timings.rest_ms + lookup + dense + self.head_ms

    def ms_of(self, plan: Sequence[PlannedMatrix]) -> float:
        """Predicted milliseconds of a token: a sum of entries of the timings."""
        timings, dtype = self.timings, self.work.dtype
        return self.fixed_ms + sum(timings.of_target(matrix.shape, matrix.target, dtype) for matrix in plan)

    def options(self) -> list[list[tuple[Target, float]]]:
        """The possible (target, milliseconds) pairs of each matrix."""
        timings, dtype, known = self.timings, self.work.dtype, {}
        for matrix in self.work.matrices:
            if matrix.shape not in known:
                targets = targets_of(self.settings, matrix)
                known[matrix.shape] = [(one, timings.of_target(matrix.shape, one, dtype)) for one in targets]
        return [known[matrix.shape] for matrix in self.work.matrices]

    def check(self) -> None:
        """Raises InputError for timings that are not of this model, for a time that cannot be reached or is no limit.

        An unreachable one is refused with the fastest that is reachable.
        """
        self._check_timings()
        options, target, asked = self.options(), self.target_ms, self._asked()
        fastest = self.fixed_ms + sum(min(ms for _, ms in own) for own in options)
        if fastest > target * (1 + 1e-9):
            raise InputError(
                f"{asked} cannot be reached here: the fastest is {fastest:.3g} ms a token ({self._times(fastest)}). "
                f"The head ({self.head_ms:.3g} ms), attention and all else that is not compressed take "
                f"{self.fixed_ms:.3g} ms of it. Ask for {self._least(fastest)}{self._smaller_head(fastest)}."
            )
        as_it_is = self.fixed_ms + sum(
            self.timings.of_target(matrix.shape, VALUES, self.work.dtype) for matrix in self.work.matrices
        )
        fixed = self.settings.fixed_bits is not None
        if target >= as_it_is and not fixed:
            raise InputError(
                f"{asked} is {target:.3g} ms a token, and the model takes {as_it_is:.3g} as it is "
                f"({self._times(as_it_is)}). Ask for less time."
            )

    def _asked(self) -> str:
        if self.settings.ms_per_token is not None:
            return f"ms_per_token {self.settings.ms_per_token:g}"
        return f"speedup {self.settings.speedup:g} over {self.baseline[1]:.3g} ms"

    def _times(self, ms: float) -> str:
        name, baseline = self.baseline
        return f"{baseline / ms:.2f} times the speed of bfloat16 with {name}"

    def _least(self, fastest: float) -> str:
        """The least that can be asked for, rounded to what can be reached."""
        if self.settings.ms_per_token is not None:
            return f"ms_per_token {_up(fastest):g}"
        return f"speedup {floor(100 * self.baseline[1] / fastest) / 100:g} or less"

    def _smaller_head(self, fastest: float) -> str:
        """The remedy of a head in fewer bits, where that saves time."""
        used = UNQUANTIZED_BITS if self.work.head is None else self.work.head.bits
        saved = {
            bits: self.head_ms - self._head_ms(Grid(bits, self.settings.group_size))
            for bits in HEAD_BITS
            if bits < used
        }
        if not saved or max(saved.values()) < 0.02 * fastest:
            return ""
        best = max(saved, key=lambda bits: saved[bits])
        return f", or add head_bits {best}, which saves about {saved[best]:.2g} ms"

    def _check_timings(self) -> None:
        timings, settings = self.timings, self.settings
        if timings.sizes != self.work.sizes:
            raise InputError(
                f"The timings ({timings.origin}) are of another model: {timings.sizes}, and this one has "
                f"{self.work.sizes}. Write them for this one with `mspc timings`."
            )
        if (timings.group_size, timings.symmetric) != (settings.group_size, not settings.asymmetric):
            raise InputError(
                f"The timings ({timings.origin}) have groups of {timings.group_size} and symmetric "
                f"{timings.symmetric}, and the run has {settings.group_size} and {not settings.asymmetric}. Write them "
                "again with `mspc timings` and the same --group-size and --asymmetric."
            )

    def allocate(self, curves: dict[str, Curve]) -> list[PlannedMatrix]:
        """The plan of at most the target's time (see `check`) with the lowest predicted loss."""
        in_order = [curves[matrix.name] for matrix in self.work.matrices]
        options = self.options()
        fastest = sum(min(ms for _, ms in own) for own in options)  # `check` lets it be a rounding error above the rest
        targets = cheapest_targets(in_order, options, max(self.target_ms - self.fixed_ms, fastest))
        return [
            PlannedMatrix(matrix.name, matrix.shape, target, curve.at(target.pattern.sparsity, target.bits))
            for matrix, curve, target in zip(self.work.matrices, in_order, targets, strict=True)
        ]

    def to_dict(self, plan: Sequence[PlannedMatrix]) -> dict[str, Any]:
        """The prediction for the manifest."""
        name, baseline = self.baseline
        ms, timings = self.ms_of(plan), self.timings
        return {
            "batch": BATCH, "context": CONTEXT, "target_ms": self.target_ms, "predicted_ms": ms,
            "matrices_ms": ms - self.fixed_ms, "head_ms": self.head_ms,
            "rest_ms": self.fixed_ms - self.head_ms, "bfloat16_ms": baseline, "bfloat16_by": name,
            "speedup": baseline / ms, "device": timings.device, "threads": timings.threads,
            "kernels": timings.kernels, "date": timings.date,
        }  # fmt: skip


def _up(ms: float) -> float:
    """Rounded up to three digits."""
    digits = 10.0 ** (2 - floor(log10(ms)))
    return ceil(ms * digits) / digits
