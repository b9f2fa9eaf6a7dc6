"""The solver options of a recipe."""

from mspc.published.criteria import CRITERIA
from mspc.recipe import Recipe
from mspc.solvers.options import SolverOptions


def solver_options(recipe: Recipe) -> SolverOptions:
    return SolverOptions(
        criterion=CRITERIA[recipe.criterion], damp=recipe.damp, activation_order=recipe.activation_order,
        iterations=recipe.iterations or 0,
    )  # fmt: skip
