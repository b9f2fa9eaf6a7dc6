"""What every solver may be told besides the target."""

from dataclasses import dataclass

from mspc.settings import Settings


@dataclass(frozen=True, kw_only=True, slots=True)
class SolverOptions:
    criterion: str = "isc"
    """Name in `mspc.numerics.saliency.CRITERIA`."""
    damp: float = 0.01
    """First rung of the damping ladder, as a share of the mean diagonal of the Gram."""
    activation_order: bool = False
    """Settle the columns with the largest inputs first (grids then have static groups)."""
    iterations: int = 20
    """Of the search of the kfac and admm solvers."""


def solver_options(settings: Settings) -> SolverOptions:
    return SolverOptions(
        criterion=settings.criterion, damp=settings.damp, activation_order=settings.activation_order,
        iterations=settings.iterations or 0,
    )  # fmt: skip
