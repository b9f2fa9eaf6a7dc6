"""Checks of a plan against the options of its run, before anything is measured."""

from collections.abc import Sequence

from mspc.errors import InputError
from mspc.planning.allocation import check_plan
from mspc.planning.solver_options import solver_options
from mspc.settings import Settings
from mspc.solvers.obs import check_pattern
from mspc.types import UNQUANTIZED_BITS, PlannedMatrix


def check_targets(plan: Sequence[PlannedMatrix], settings: Settings) -> None:
    """Raises InputError, naming the matrix, for a target that the matrix cannot have."""
    check_plan(plan)
    for matrix in plan:
        if settings.reconstruct and matrix.target.grid:
            raise InputError(
                f"{matrix.name}: the plan quantizes it to {matrix.target.grid.bits} bits, but reconstruct tunes "
                f"weights that are not quantized. Set its bits to {UNQUANTIZED_BITS}, or leave reconstruct out."
            )
        if settings.solver == "obs" or (settings.solver != "mask" and matrix.target.grid):
            check_pattern(matrix.target.pattern, matrix.shape[1], solver_options(settings), matrix.name)
