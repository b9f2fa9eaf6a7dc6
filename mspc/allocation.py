"""From a recipe and measured sensitivities to a plan that a solver can obey to the letter."""

from collections.abc import Sequence

import torch

from mspc.allocators import ALLOCATORS, HALF_WIDTHS, NEEDS_SENSITIVITY
from mspc.allocators.budget import exact_counts, exact_keeps
from mspc.allocators.curves import Curve, by_curves, mixture
from mspc.errors import InputError
from mspc.formats.canonical import num_bytes as num_bytes_of
from mspc.masks import check_divides, num_pruned
from mspc.quant import groups_of
from mspc.recipe import MIXED_OF, MIXED_PATTERN, Recipe
from mspc.types import NM, Grid, Matrix, Pattern, PlannedMatrix, Target, Unstructured

CURVES = "curves"
"""The allocator that needs loss curves."""
SPARSITY_STEPS = 32
"""Sparsities that a matrix may have under a budget, as parts of 1."""
ROUNDED_BITS = (8, 4, 3, 2)


def wants_sensitivity(recipe: Recipe) -> bool:
    """Whether the plan depends on it: not for a plan that is given, one fixed pattern, or a uniform share."""
    return _allocates(recipe) and recipe.allocator in NEEDS_SENSITIVITY


def wants_curves(recipe: Recipe) -> bool:
    return recipe.has_budget or (_allocates(recipe) and recipe.allocator == CURVES)


def half_width(recipe: Recipe) -> float | None:
    """The alpha of a recipe, or its allocator's own; None where neither has one."""
    return HALF_WIDTHS.get(str(recipe.allocator)) if recipe.alpha is None else recipe.alpha


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
        sensitivities = {
            matrix.name: curves[matrix.name].at(pattern.sparsity)
            for (matrix, _), pattern in zip(flat, patterns, strict=True)
        }
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
        blocks = [block for _, block in flat]
        wished = ALLOCATORS[str(recipe.allocator)](values, blocks, sparsity, half_width(recipe) or 0.0)
    elif curves:
        wished = by_curves([curves[matrix.name] for matrix, _ in flat], numels, sparsity, of)
    else:
        wished = [sparsity] * len(flat)
    if of:
        return [NM(keep, MIXED_OF) for keep in exact_keeps(wished, numels, sparsity, MIXED_OF)]
    counts = exact_counts(wished, numels, sparsity)
    return [Unstructured(count / numel) for count, numel in zip(counts, numels, strict=True)]


def allocate_bytes(
    recipe: Recipe,
    matrices: Sequence[Sequence[Matrix]],
    curves: dict[str, Curve] | None,
    num_bytes: int,
    dtype: torch.dtype,
) -> list[PlannedMatrix]:
    """The plan of least predicted loss that takes at most so many bytes; without curves, only whether there is one.

    Raises InputError for a size that is too small for all matrices together.
    """
    flat = [matrix for of_block in matrices for matrix in of_block]
    options = [
        [(target, num_bytes_of(matrix.shape, target, dtype)) for target in _targets(recipe, matrix)] for matrix in flat
    ]
    smallest = sum(min(size for _, size in of_matrix) for of_matrix in options)
    if smallest > num_bytes:
        numel = sum(matrix.numel for matrix in flat)
        raise InputError(
            f"The size asked for leaves {8 * num_bytes / numel:.3f} bits per weight for the {len(flat)} matrices, and "
            f"the smallest that pattern {recipe.pattern} allows is {8 * smallest / numel:.3f}; ask for a larger size."
        )
    if curves is None:
        return []
    chosen = mixture([curves[matrix.name] for matrix in flat], options, num_bytes)
    return [
        PlannedMatrix(matrix.name, matrix.shape, target, _predicted(curves[matrix.name], target))
        for matrix, target in zip(flat, chosen, strict=True)
    ]


def _targets(recipe: Recipe, matrix: Matrix) -> list[Target]:
    """What a matrix may become under a budget: any sparsity, or N, that its pattern has, and any bits."""
    patterns: list[Pattern] = [Unstructured(0.0)]
    if recipe.fixed_pattern is not None:
        patterns.append(recipe.fixed_pattern)
    elif recipe.pattern == MIXED_PATTERN:
        patterns += [NM(keep, MIXED_OF) for keep in range(1, MIXED_OF)]
    else:
        counts = {num_pruned(matrix.numel, step / SPARSITY_STEPS) for step in range(1, SPARSITY_STEPS)}
        patterns += [Unstructured(count / matrix.numel) for count in sorted(counts - {0})]
    groups_of(matrix.shape[1], Grid(4, recipe.group_size), matrix.name)
    grids = [None, *(Grid(bits, recipe.group_size, not recipe.asymmetric) for bits in ROUNDED_BITS)]
    return [Target(pattern, grid) for pattern in patterns for grid in grids]


def _predicted(curve: Curve, target: Target) -> float:
    return curve.at(target.pattern.sparsity, target.grid.bits if target.grid else 16)


def check_plan(plan: Sequence[PlannedMatrix]) -> None:
    """Raises InputError for a pattern or group size that does not divide its matrix, before any work is done."""
    for matrix in plan:
        check_divides(matrix.target.pattern, matrix.shape[1], matrix.name)
        if matrix.target.grid is not None:
            groups_of(matrix.shape[1], matrix.target.grid, matrix.name)


def planned_sparsity(plan: Sequence[PlannedMatrix]) -> float:
    """The parameter-weighted sparsity that a plan asks for."""
    return sum(m.target.pattern.sparsity * m.numel for m in plan) / sum(m.numel for m in plan)
