"""Solvers: weight + statistics of its input + target -> CompressedLinear. They obey the target and know no model."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from mspc.solvers.admm import admm, admm_steps, fisher, fisher_steps, kfac, kfac_steps
from mspc.solvers.mask_only import mask_only
from mspc.solvers.obs import obs
from mspc.solvers.options import SolverOptions
from mspc.solvers.rounding import Rounds
from mspc.types import CompressedLinear, GramStats, Target

__all__ = ["REVISION", "SOLVERS", "STEPS", "Solver", "SolverOptions"]

REVISION = 4
"""To be raised when the same statistics and options end with other weights: runs and curves of before are not mixed."""


class Solver(Protocol):
    """A function of the weight (O, I), the statistics, the target, the options, and the matrix name for errors.

    A given `mask` (O, I) is obeyed. It must be one of the target's pattern.
    """

    def __call__(
        self,
        weight: Tensor,
        stats: GramStats,
        target: Target,
        options: SolverOptions,
        name: str,
        mask: Tensor | None = None,
    ) -> CompressedLinear: ...


SOLVERS: dict[str, Solver] = {"admm": admm, "fisher": fisher, "kfac": kfac, "mask": mask_only, "obs": obs}
STEPS: dict[str, Callable[..., Rounds]] = {"admm": admm_steps, "fisher": fisher_steps, "kfac": kfac_steps}
"""The solvers that `rounding.together` runs for several matrices at once, with the arguments of `Solver`."""
