"""From a recipe and measured sensitivities to a plan that a solver can obey to the letter."""

from collections.abc import Sequence

from mspc.allocators import ALLOCATORS, NEEDS_SENSITIVITY
from mspc.allocators.budget import exact_counts, exact_keeps
from mspc.masks import check_divides
from mspc.quant import groups_of
from mspc.recipe import MIXED_OF, MIXED_PATTERN, Recipe
from mspc.types import NM, Matrix, Pattern, PlannedMatrix, Target, Unstructured


def wants_sensitivity(recipe: Recipe) -> bool:
    """Whether the plan depends on it: not for a plan that is given, one fixed pattern, or a uniform share."""
    return recipe.plan is None and recipe.fixed_pattern is None and recipe.allocator in NEEDS_SENSITIVITY


def allocate(
    recipe: Recipe, matrices: Sequence[Sequence[Matrix]], sensitivities: dict[str, float]
) -> list[PlannedMatrix]:
    """The plan for the matrices of every block. `sensitivities` may be empty where they are not wanted."""
    flat = [(matrix, block) for block, of_block in enumerate(matrices) for matrix in of_block]
    patterns = _patterns(recipe, flat, sensitivities)
    return [
        PlannedMatrix(matrix.name, matrix.shape, Target(pattern, recipe.grid), sensitivities.get(matrix.name))
        for (matrix, _), pattern in zip(flat, patterns, strict=True)
    ]


def _patterns(recipe: Recipe, flat: Sequence[tuple[Matrix, int]], sensitivities: dict[str, float]) -> Sequence[Pattern]:
    if recipe.fixed_pattern is not None:
        return [recipe.fixed_pattern] * len(flat)
    sparsity = recipe.target_sparsity
    values = [sensitivities.get(matrix.name, 0.0) for matrix, _ in flat]
    wished = ALLOCATORS[recipe.allocator](values, [block for _, block in flat], sparsity, recipe.alpha)
    numels = [matrix.numel for matrix, _ in flat]
    if recipe.pattern == MIXED_PATTERN:
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
