"""The settings that all solvers take."""

from dataclasses import dataclass

from mspc.numerics.saliency import ISC, Criterion


@dataclass(frozen=True, kw_only=True, slots=True)
class SolverOptions:
    criterion: Criterion = ISC
    """Score by which the solvers obs and mask choose weights."""
    damp: float = 0.01
    """First rung of the damping ladder, as a share of the mean diagonal of the Gram."""
    activation_order: bool = False
    """Settle the columns with the largest inputs first. Grids then have static groups (solver obs)."""
    iterations: int = 20
    """Iterations of the search (solvers admm and kfac)."""
