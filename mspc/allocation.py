"""From a recipe and measured sensitivities to a plan that a solver can obey to the letter."""

from collections.abc import Sequence

from mspc.allocators import ALLOCATORS, NEEDS_SENSITIVITY
from mspc.allocators.budget import exact_counts, exact_keeps
from mspc.allocators.curves import Curve, by_curves
from mspc.masks import check_divides
from mspc.quant import groups_of
from mspc.recipe import MIXED_OF, MIXED_PATTERN, Recipe
from mspc.types import NM, Matrix, Pattern, PlannedMatrix, Target, Unstructured

CURVES = "curves"
"""The allocator that needs loss curves."""


def wants_sensitivity(recipe: Recipe) -> bool:
    """Whether the plan depends on it: not for a plan that is given, one fixed pattern, or a uniform share."""
    return _allocates(recipe) and recipe.allocator in NEEDS_SENSITIVITY


def wants_curves(recipe: Recipe) -> bool:
    return _allocates(recipe) and recipe.allocator == CURVES


def _allocates(recipe: Recipe) -> bool:
    """Whether there is anything to share out."""
    return recipe.plan is None and recipe.fixed_pattern is None and recipe.target_sparsity > 0


def allocate(
    recipe: Recipe,
    matrices: Sequence[Sequence[Matrix]],
    sensitivities: dict[str, float],
    curves: dict[str, Curve] | None = None,
) -> list[PlannedMatrix]:
    """The plan for the matrices of every block. What was measured may be left out where it is not wanted.

    The sensitivity of a matrix in a plan by curves is its predicted loss there, in nats a token.
    """
    flat = [(matrix, block) for block, of_block in enumerate(matrices) for matrix in of_block]
    patterns = _patterns(recipe, flat, sensitivities, curves)
    if curves:
        predicted = {
            matrix.name: curves[matrix.name].at(pattern.sparsity)
            for (matrix, _), pattern in zip(flat, patterns, strict=True)
        }
        sensitivities = predicted
    return [
        PlannedMatrix(matrix.name, matrix.shape, Target(pattern, recipe.grid), sensitivities.get(matrix.name))
        for (matrix, _), pattern in zip(flat, patterns, strict=True)
    ]


def _patterns(
    recipe: Recipe,
    flat: Sequence[tuple[Matrix, int]],
    sensitivities: dict[str, float],
    curves: dict[str, Curve] | None,
) -> Sequence[Pattern]:
    if recipe.fixed_pattern is not None:
        return [recipe.fixed_pattern] * len(flat)
    sparsity = recipe.target_sparsity
    values = [sensitivities.get(matrix.name, 0.0) for matrix, _ in flat]
    numels = [matrix.numel for matrix, _ in flat]
    of = MIXED_OF if recipe.pattern == MIXED_PATTERN else None
    if recipe.allocator != CURVES:
        wished = ALLOCATORS[str(recipe.allocator)](values, [block for _, block in flat], sparsity, recipe.alpha)
    elif curves:
        wished = by_curves([curves[matrix.name] for matrix, _ in flat], numels, sparsity, of)
    else:
        wished = [sparsity] * len(flat)
    if of:
        return [NM(keep, MIXED_OF) for keep in exact_keeps(wished, numels, sparsity, MIXED_OF)]
    counts = exact_counts(wished, numels, sparsity)
    return [Unstructured(count / numel) for count, numel in zip(counts, numels, strict=True)]


def check_plan(plan: Sequence[PlannedMatrix]) -> None:
    """Raises InputError for a pattern or group size that does not divide its matrix, before any work is done."""
    for matrix in plan:
        check_divides(matrix.target.pattern, matrix.shape[1], matrix.name)
        if matrix.target.grid is not None:
            groups_of(matrix.shape[1], matrix.target.grid, matrix.name)


def planned_sparsity(plan: Sequence[PlannedMatrix]) -> float:
    """The parameter-weighted sparsity that a plan asks for."""
    return sum(m.target.pattern.sparsity * m.numel for m in plan) / sum(m.numel for m in plan)
