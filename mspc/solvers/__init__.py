"""Solvers: weight + statistics of its input + target -> CompressedLinear. They obey the target and know no model."""

from collections.abc import Callable

from torch import Tensor

from mspc.solvers.admm import admm, kfac
from mspc.solvers.mask_only import mask_only
from mspc.solvers.obs import obs
from mspc.solvers.options import SolverOptions
from mspc.types import CompressedLinear, GramStats, Target

__all__ = ["SOLVERS", "Solver", "SolverOptions"]

Solver = Callable[[Tensor, GramStats, Target, SolverOptions, str], CompressedLinear]
"""A function of the weight (O, I), the statistics, the target, the options, and the matrix name for errors."""

SOLVERS: dict[str, Solver] = {"admm": admm, "kfac": kfac, "mask": mask_only, "obs": obs}
