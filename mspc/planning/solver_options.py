"""The options of the solvers, as the settings of a run give them."""

from mspc.published.criteria import CRITERIA
from mspc.settings import Settings
from mspc.solvers.options import SolverOptions


def solver_options(settings: Settings) -> SolverOptions:
    return SolverOptions(
        criterion=CRITERIA[settings.criterion], damp=settings.damp, activation_order=settings.activation_order,
        iterations=settings.iterations,
    )  # fmt: skip
