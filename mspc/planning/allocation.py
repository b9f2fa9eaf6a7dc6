"""From a recipe and measured sensitivities to a plan that a solver can obey to the letter."""

from collections.abc import Sequence

import torch

from mspc.errors import InputError
from mspc.formats.layout import num_bytes as num_bytes_of
from mspc.numerics.masking import check_divides, num_pruned
from mspc.numerics.quant import groups_of
from mspc.planning.budget import exact_counts, exact_keeps
from mspc.planning.curve import Curve
from mspc.planning.knapsack import by_curves, cheapest, mixture
from mspc.published.allocators import ALLOCATORS, HALF_WIDTHS, NEEDS_SENSITIVITY, trace_rank
from mspc.recipe import AUTO, CURVES, MIXED_OF, MIXED_PATTERN, SEARCH, Recipe
from mspc.types import NM, Grid, Matrix, Pattern, PlannedMatrix, Target, Unstructured

TEMPERS = (0.75,)
"""Of plans that `auto` tries: how far they go from uniform, where curves goes all the way, 1."""
ROUNDING_WEIGHTS = (0.5, 2.0)
"""Likewise under a budget: what the predicted loss of rounding is multiplied by, beside that of pruning."""
HOPELESS = 2.0
"""Plans whose predicted loss is so many times the least are not tried."""
SPARSITY_STEPS = 32
"""Sparsities that a matrix may have under a budget, as parts of 1."""
ROUNDED_BITS = (8, 4, 3, 2)


def wants_sensitivity(recipe: Recipe) -> bool:
    """Whether the plan depends on it: not for a plan that is given, one fixed pattern, or a uniform share."""
    return _allocates(recipe) and recipe.allocator in NEEDS_SENSITIVITY


def wants_curves(recipe: Recipe) -> bool:
    return recipe.has_budget or (_allocates(recipe) and recipe.allocator in (CURVES, AUTO, SEARCH))


def wants_trial(recipe: Recipe) -> bool:
    """Whether plans are tried on text that was held out."""
    return wants_curves(recipe) and recipe.allocator in (AUTO, SEARCH)


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
    if recipe.fixed_pattern is not None:
        patterns: Sequence[Pattern] = [recipe.fixed_pattern] * len(flat)
        return _planned(recipe, matrices, patterns, sensitivities, curves)
    if recipe.allocator in ALLOCATORS:
        values, blocks = [sensitivities.get(matrix.name, 0.0) for matrix, _ in flat], [block for _, block in flat]
        allocator = ALLOCATORS[str(recipe.allocator)]
        wished = allocator(values, blocks, recipe.target_sparsity, half_width(recipe) or 0.0)
    elif curves:
        wished = _wished_by_curves(recipe, matrices, curves)
    else:
        wished = [recipe.target_sparsity] * len(flat)
    return _planned(recipe, matrices, _exact(recipe, matrices, wished), sensitivities, curves)


def candidates(
    recipe: Recipe, matrices: Sequence[Sequence[Matrix]], curves: dict[str, Curve]
) -> dict[str, list[PlannedMatrix]]:
    """The plans that `auto` tries, by name, the likeliest first: curves, a shorter way from uniform to it, trace
    rank and uniform."""
    flat = [(matrix, block) for block, of_block in enumerate(matrices) for matrix in of_block]
    sparsity, by_loss = recipe.target_sparsity, _wished_by_curves(recipe, matrices, curves)
    wished = {CURVES: by_loss}
    for temper in TEMPERS:
        wished[f"{CURVES} x{temper:g}"] = [sparsity + temper * (own - sparsity) for own in by_loss]
    curvatures, blocks = [curves[matrix.name].curvature for matrix, _ in flat], [block for _, block in flat]
    wished["trace-rank"] = trace_rank(curvatures, blocks, sparsity, HALF_WIDTHS["trace-rank"])
    wished["uniform"] = [sparsity] * len(flat)
    return _worth_trying(
        {
            name: _planned(recipe, matrices, _exact(recipe, matrices, shares), {}, curves)
            for name, shares in wished.items()
        }
    )


def cheapest_levels(recipe: Recipe, matrices: Sequence[Sequence[Matrix]], curves: dict[str, Curve]) -> tuple[int, ...]:
    """The plan of least predicted loss in whole sixteenths: how many of every matrix are zero."""
    flat = [matrix for of_block in matrices for matrix in of_block]
    levels = range(highest_level(recipe), -1, -1)
    options = [
        [(float(m.numel * (MIXED_OF - level)), curves[m.name].at(level / MIXED_OF)) for level in levels] for m in flat
    ]
    kept = (1 - recipe.target_sparsity) * MIXED_OF * sum(matrix.numel for matrix in flat)
    chosen = cheapest(options, max(kept, sum(of_matrix[0][0] for of_matrix in options)))
    return tuple(levels[i] for i in chosen)


def highest_level(recipe: Recipe) -> int:
    """How many sixteenths of a matrix may be zero: of N:16 one is always kept."""
    return MIXED_OF - 1 if recipe.pattern == MIXED_PATTERN else MIXED_OF


def planned_levels(
    recipe: Recipe, matrices: Sequence[Sequence[Matrix]], levels: Sequence[int], curves: dict[str, Curve]
) -> list[PlannedMatrix]:
    """The plan of such levels, made exact."""
    wished = [level / MIXED_OF for level in levels]
    return _planned(recipe, matrices, _exact(recipe, matrices, wished), {}, curves)


def _worth_trying(plans: dict[str, list[PlannedMatrix]]) -> dict[str, list[PlannedMatrix]]:
    """Those that differ and are not hopeless by their predicted losses."""
    predicted = {name: sum(matrix.sensitivity or 0.0 for matrix in plan) for name, plan in plans.items()}
    kept: dict[str, list[PlannedMatrix]] = {}
    for name, plan in plans.items():
        targets = [matrix.target for matrix in plan]
        known = any(targets == [matrix.target for matrix in other] for other in kept.values())
        if not known and predicted[name] <= HOPELESS * min(predicted.values()):
            kept[name] = plan
    return kept


def _planned(
    recipe: Recipe,
    matrices: Sequence[Sequence[Matrix]],
    patterns: Sequence[Pattern],
    sensitivities: dict[str, float],
    curves: dict[str, Curve] | None,
) -> list[PlannedMatrix]:
    flat = [matrix for of_block in matrices for matrix in of_block]
    if curves:
        sensitivities = {m.name: curves[m.name].at(p.sparsity) for m, p in zip(flat, patterns, strict=True)}
    return [
        PlannedMatrix(matrix.name, matrix.shape, Target(pattern, recipe.grid), sensitivities.get(matrix.name))
        for matrix, pattern in zip(flat, patterns, strict=True)
    ]


def _wished_by_curves(recipe: Recipe, matrices: Sequence[Sequence[Matrix]], curves: dict[str, Curve]) -> list[float]:
    flat = [matrix for of_block in matrices for matrix in of_block]
    numels, of = [matrix.numel for matrix in flat], MIXED_OF if recipe.pattern == MIXED_PATTERN else None
    return by_curves([curves[matrix.name] for matrix in flat], numels, recipe.target_sparsity, of)


def _exact(recipe: Recipe, matrices: Sequence[Sequence[Matrix]], wished: Sequence[float]) -> Sequence[Pattern]:
    """Patterns of the recipe's sparsity in all, to the weight or the nearest."""
    numels = [matrix.numel for of_block in matrices for matrix in of_block]
    if recipe.pattern == MIXED_PATTERN:
        keeps = exact_keeps(wished, numels, recipe.target_sparsity, MIXED_OF)
        return [NM(keep, MIXED_OF) for keep in keeps]
    counts = exact_counts(wished, numels, recipe.target_sparsity)
    return [Unstructured(count / numel) for count, numel in zip(counts, numels, strict=True)]


def check_bytes(recipe: Recipe, matrices: Sequence[Sequence[Matrix]], num_bytes: int, dtype: torch.dtype) -> None:
    """Raises InputError for a size that is too small for all matrices together."""
    options = _options(recipe, matrices, dtype)
    smallest = sum(min(size for _, size in of_matrix) for of_matrix in options)
    if smallest > num_bytes:
        numel = sum(matrix.numel for of_block in matrices for matrix in of_block)
        if recipe.target_size is not None:
            least = (recipe.target_bytes - num_bytes + smallest) / 1e6
            raise InputError(f"target_size {recipe.target_size} cannot be reached; the smallest is {least:.3f} MB.")
        raise InputError(
            f"The size asked for leaves {8 * num_bytes / numel:.3f} bits per weight for the {len(options)} matrices, "
            f"and the smallest that pattern {recipe.pattern} allows is {8 * smallest / numel:.3f}; ask for more."
        )


def allocate_bytes(
    recipe: Recipe,
    matrices: Sequence[Sequence[Matrix]],
    curves: dict[str, Curve],
    num_bytes: int,
    dtype: torch.dtype,
) -> dict[str, list[PlannedMatrix]]:
    """Plans that take at most so many bytes (see `check_bytes`), by name, the one of least predicted loss first.

    The others are for `auto` to try: rounding taken for less or more harmful, and the best with one number of bits.
    """
    flat = [matrix for of_block in matrices for matrix in of_block]
    options, of_flat = _options(recipe, matrices, dtype), [curves[matrix.name] for matrix in flat]
    chosen = {"mixture": mixture(of_flat, options, num_bytes)}
    if recipe.allocator == AUTO:
        for weight in ROUNDING_WEIGHTS:
            weighed = [curve.weighed(weight) for curve in of_flat]
            chosen[f"mixture, rounding x{weight:g}"] = mixture(weighed, options, num_bytes)
        for bits in ROUNDED_BITS:
            alike = [[(target, size) for target, size in of_matrix if _bits(target) == bits] for of_matrix in options]
            if sum(min(size for _, size in of_matrix) for of_matrix in alike) <= num_bytes:
                chosen[f"{bits} bits"] = mixture(of_flat, alike, num_bytes)
    return _worth_trying(
        {
            name: [
                PlannedMatrix(matrix.name, matrix.shape, target, curve.at(target.pattern.sparsity, _bits(target)))
                for matrix, curve, target in zip(flat, of_flat, targets, strict=True)
            ]
            for name, targets in chosen.items()
        }
    )


def _options(
    recipe: Recipe, matrices: Sequence[Sequence[Matrix]], dtype: torch.dtype
) -> list[list[tuple[Target, int]]]:
    """What each matrix may become under a budget, with its bytes: in the sparse export, if its size is asked for."""
    exported = recipe.bits_per_weight is None
    return [
        [(target, num_bytes_of(matrix.shape, target, dtype, exported=exported)) for target in _targets(recipe, matrix)]
        for of_block in matrices
        for matrix in of_block
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


def _bits(target: Target) -> int:
    return target.grid.bits if target.grid else 16


def check_plan(plan: Sequence[PlannedMatrix]) -> None:
    """Raises InputError for a pattern or group size that does not divide its matrix, before any work is done."""
    for matrix in plan:
        check_divides(matrix.target.pattern, matrix.shape[1], matrix.name)
        if matrix.target.grid is not None:
            groups_of(matrix.shape[1], matrix.target.grid, matrix.name)


def planned_sparsity(plan: Sequence[PlannedMatrix]) -> float:
    """The parameter-weighted sparsity that a plan asks for."""
    return sum(m.target.pattern.sparsity * m.numel for m in plan) / sum(m.numel for m in plan)
