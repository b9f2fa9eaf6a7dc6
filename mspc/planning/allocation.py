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
from mspc.published.allocators import ALLOCATORS
from mspc.settings import AUTO, CURVES, MIXED_OF, MIXED_PATTERN, Settings
from mspc.types import BITS, NM, Grid, MatricesByBlock, Matrix, Pattern, PlannedMatrix, Target, Unstructured, flatten

INTERPOLATIONS = (0.75,)
"""Plans that `auto` validates next to `curves`: 0 is the uniform plan, 1 is `curves`."""
QUANTIZATION_WEIGHTS = (0.5, 2.0)
"""Plans that `auto` validates under a size budget: factors of the predicted loss of quantization."""
HOPELESS = 2.0
"""A plan is not validated if its predicted loss is above this factor times the lowest."""
SPARSITY_STEPS = 32
"""Number of steps between sparsity 0 and 1 under a size budget."""


def allocate(
    settings: Settings,
    matrices: MatricesByBlock,
    sensitivities: dict[str, float],
    curves: dict[str, Curve] | None = None,
) -> list[PlannedMatrix]:
    """The plan for the matrices of every block. What was measured may be left out where it is not wanted.

    The sensitivity of a matrix in a plan by curves is its predicted loss there, in nats a token.
    """
    flat = [(matrix, block) for block, of_block in enumerate(matrices) for matrix in of_block]
    if settings.fixed_pattern is not None:
        patterns: Sequence[Pattern] = [settings.fixed_pattern] * len(flat)
        return _planned(settings, matrices, patterns, sensitivities, curves)
    if settings.allocator in ALLOCATORS:
        values, blocks = [sensitivities.get(matrix.name, 0.0) for matrix, _ in flat], [block for _, block in flat]
        allocator = ALLOCATORS[str(settings.allocator)]
        wished = allocator(values, blocks, settings.target_sparsity, settings.alpha or 0.0)
    elif curves:
        wished = _wished_by_curves(settings, matrices, curves)
    else:
        wished = [settings.target_sparsity] * len(flat)
    return _planned(settings, matrices, _exact(settings, matrices, wished), sensitivities, curves)


def candidates(
    settings: Settings, matrices: MatricesByBlock, curves: dict[str, Curve]
) -> dict[str, list[PlannedMatrix]]:
    """The plans that `auto` validates, by name: the one with the lowest predicted loss, and shorter ways to it from the
    uniform plan."""
    sparsity, by_loss = settings.target_sparsity, _wished_by_curves(settings, matrices, curves)
    wished = {CURVES: by_loss}
    for share in INTERPOLATIONS:
        wished[f"{CURVES} x{share:g}"] = [sparsity + share * (own - sparsity) for own in by_loss]
    return _distinct(
        {
            name: _planned(settings, matrices, _exact(settings, matrices, shares), {}, curves)
            for name, shares in wished.items()
        }
    )


def cheapest_levels(settings: Settings, matrices: MatricesByBlock, curves: dict[str, Curve]) -> tuple[int, ...]:
    """The plan of least predicted loss in whole sixteenths: how many of every matrix are zero."""
    flat = flatten(matrices)
    levels = range(highest_level(settings), -1, -1)
    options = [
        [(float(m.numel * (MIXED_OF - level)), curves[m.name].at(level / MIXED_OF)) for level in levels] for m in flat
    ]
    kept = (1 - settings.target_sparsity) * MIXED_OF * sum(matrix.numel for matrix in flat)
    chosen = cheapest(options, max(kept, sum(of_matrix[0][0] for of_matrix in options)))
    return tuple(levels[i] for i in chosen)


def highest_level(settings: Settings) -> int:
    """How many sixteenths of a matrix may be zero: of N:16 one is always kept."""
    return MIXED_OF - 1 if settings.pattern == MIXED_PATTERN else MIXED_OF


def planned_levels(
    settings: Settings, matrices: MatricesByBlock, levels: Sequence[int], curves: dict[str, Curve]
) -> list[PlannedMatrix]:
    """The plan of such levels, made exact."""
    wished = [level / MIXED_OF for level in levels]
    return _planned(settings, matrices, _exact(settings, matrices, wished), {}, curves)


def _distinct(plans: dict[str, list[PlannedMatrix]]) -> dict[str, list[PlannedMatrix]]:
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
    settings: Settings,
    matrices: MatricesByBlock,
    patterns: Sequence[Pattern],
    sensitivities: dict[str, float],
    curves: dict[str, Curve] | None,
) -> list[PlannedMatrix]:
    flat = flatten(matrices)
    if curves:
        sensitivities = {m.name: curves[m.name].at(p.sparsity) for m, p in zip(flat, patterns, strict=True)}
    return [
        PlannedMatrix(matrix.name, matrix.shape, Target(pattern, settings.grid), sensitivities.get(matrix.name))
        for matrix, pattern in zip(flat, patterns, strict=True)
    ]


def _wished_by_curves(settings: Settings, matrices: MatricesByBlock, curves: dict[str, Curve]) -> list[float]:
    flat = flatten(matrices)
    numels, of = [matrix.numel for matrix in flat], MIXED_OF if settings.pattern == MIXED_PATTERN else None
    return by_curves([curves[matrix.name] for matrix in flat], numels, settings.target_sparsity, of)


def _exact(settings: Settings, matrices: MatricesByBlock, wished: Sequence[float]) -> Sequence[Pattern]:
    """Patterns of the recipe's sparsity in all, to the weight or the nearest."""
    numels = [matrix.numel for of_block in matrices for matrix in of_block]
    if settings.pattern == MIXED_PATTERN:
        keeps = exact_keeps(wished, numels, settings.target_sparsity, MIXED_OF)
        return [NM(keep, MIXED_OF) for keep in keeps]
    counts = exact_counts(wished, numels, settings.target_sparsity)
    return [Unstructured(count / numel) for count, numel in zip(counts, numels, strict=True)]


def check_bytes(settings: Settings, matrices: MatricesByBlock, num_bytes: int, dtype: torch.dtype) -> None:
    """Raises InputError for a size that is too small for all matrices together."""
    options = _options(settings, matrices, dtype)
    smallest = sum(min(size for _, size in of_matrix) for of_matrix in options)
    if smallest > num_bytes:
        numel = sum(matrix.numel for of_block in matrices for matrix in of_block)
        if settings.target_size is not None:
            least = (settings.target_bytes - num_bytes + smallest) / 1e6
            raise InputError(f"target_size {settings.target_size} cannot be reached; the smallest is {least:.3f} MB.")
        raise InputError(
            f"The size asked for leaves {8 * num_bytes / numel:.3f} bits per weight for the {len(options)} matrices, "
            f"and the smallest that pattern {settings.pattern} allows is {8 * smallest / numel:.3f}; ask for more."
        )


def allocate_bytes(
    settings: Settings,
    matrices: MatricesByBlock,
    curves: dict[str, Curve],
    num_bytes: int,
    dtype: torch.dtype,
) -> dict[str, list[PlannedMatrix]]:
    """Plans that take at most so many bytes (see `check_bytes`), by name, the one of least predicted loss first.

    The others are for `auto` to try: rounding taken for less or more harmful, and the best with one number of bits.
    """
    flat = flatten(matrices)
    options, of_flat = _options(settings, matrices, dtype), [curves[matrix.name] for matrix in flat]
    chosen = {"mixed": mixture(of_flat, options, num_bytes)}
    if settings.allocator == AUTO:
        for weight in QUANTIZATION_WEIGHTS:
            weighted = [curve.weighted(weight) for curve in of_flat]
            chosen[f"mixed, quantization loss x{weight:g}"] = mixture(weighted, options, num_bytes)
        for bits in BITS:
            alike = [[(target, size) for target, size in of_matrix if target.bits == bits] for of_matrix in options]
            if sum(min(size for _, size in of_matrix) for of_matrix in alike) <= num_bytes:
                chosen[f"{bits} bits"] = mixture(of_flat, alike, num_bytes)
    return _distinct(
        {
            name: [
                PlannedMatrix(matrix.name, matrix.shape, target, curve.at(target.pattern.sparsity, target.bits))
                for matrix, curve, target in zip(flat, of_flat, targets, strict=True)
            ]
            for name, targets in chosen.items()
        }
    )


def _options(settings: Settings, matrices: MatricesByBlock, dtype: torch.dtype) -> list[list[tuple[Target, int]]]:
    """What each matrix may become under a budget, with its bytes: in the sparse export, if its size is asked for."""
    exported = settings.bits_per_weight is None
    return [
        [
            (target, num_bytes_of(matrix.shape, target, dtype, exported=exported))
            for target in _targets(settings, matrix)
        ]
        for of_block in matrices
        for matrix in of_block
    ]


def _targets(settings: Settings, matrix: Matrix) -> list[Target]:
    """What a matrix may become under a budget: any sparsity, or N, that its pattern has, and any bits."""
    patterns: list[Pattern] = [Unstructured(0.0)]
    if settings.fixed_pattern is not None:
        patterns.append(settings.fixed_pattern)
    elif settings.pattern == MIXED_PATTERN:
        patterns += [NM(keep, MIXED_OF) for keep in range(1, MIXED_OF)]
    else:
        counts = {num_pruned(matrix.numel, step / SPARSITY_STEPS) for step in range(1, SPARSITY_STEPS)}
        patterns += [Unstructured(count / matrix.numel) for count in sorted(counts - {0})]
    groups_of(matrix.shape[1], Grid(4, settings.group_size), matrix.name)
    grids = [None, *(Grid(bits, settings.group_size, not settings.asymmetric) for bits in BITS)]
    return [Target(pattern, grid) for pattern in patterns for grid in grids]


def check_plan(plan: Sequence[PlannedMatrix]) -> None:
    """Raises InputError for a pattern or group size that does not divide its matrix, before any work is done."""
    for matrix in plan:
        check_divides(matrix.target.pattern, matrix.shape[1], matrix.name)
        if matrix.target.grid is not None:
            groups_of(matrix.shape[1], matrix.target.grid, matrix.name)


def planned_sparsity(plan: Sequence[PlannedMatrix]) -> float:
    """The parameter-weighted sparsity that a plan asks for."""
    return sum(m.target.pattern.sparsity * m.numel for m in plan) / sum(m.numel for m in plan)
