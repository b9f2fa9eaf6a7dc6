"""Allocation: a plan, exact to the weight or the byte, from the settings of a run and its measurements."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from mspc.errors import InputError
from mspc.formats.layout import num_bytes as num_bytes_of
from mspc.numerics.masking import check_divides, num_pruned
from mspc.numerics.quant import groups_of
from mspc.planning.curve import Curve
from mspc.planning.exact_sparsity import exact_counts, exact_keeps
from mspc.planning.knapsack import cheapest, cheapest_sparsities, cheapest_targets
from mspc.progress import log
from mspc.published.allocators import ALLOCATORS
from mspc.settings import AUTO_GROUP_SIZES, CURVES, MIXED_OF, MIXED_PATTERN, Settings
from mspc.sizes import at_least, in_words
from mspc.types import (
    BITS,
    NM,
    UNQUANTIZED_BITS,
    Grid,
    MatricesByBlock,
    Matrix,
    Pattern,
    PlannedMatrix,
    Target,
    Unstructured,
    flatten,
)

INTERPOLATIONS = (0.75,)
"""Plans that `auto` validates next to `curves`: 0 is the uniform plan, 1 is `curves`."""
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
    """The plan. `sensitivities` and `curves` are by matrix name, and empty if the allocator needs none."""
    flat = flatten(matrices)
    if settings.fixed_pattern is not None:
        patterns: Sequence[Pattern] = [settings.fixed_pattern] * len(flat)
        return _planned(settings, matrices, patterns, sensitivities, curves)
    if settings.allocator in ALLOCATORS:
        values = [sensitivities.get(matrix.name, 0.0) for matrix in flat]
        blocks = [block for block, in_block in enumerate(matrices) for _ in in_block]
        allocator = ALLOCATORS[settings.allocator]
        wished = allocator(values, blocks, settings.target_sparsity, settings.alpha or 0.0)
    elif curves:
        wished = _wished_by_curves(settings, matrices, curves)
    else:
        wished = [settings.target_sparsity] * len(flat)
    return _planned(settings, matrices, _exact(settings, matrices, wished), sensitivities, curves)


def candidates(
    settings: Settings, matrices: MatricesByBlock, curves: dict[str, Curve]
) -> dict[str, list[PlannedMatrix]]:
    """The plans that `auto` validates, by name: the one with the lowest predicted loss first, then plans between it and
    the uniform plan."""
    sparsity, by_loss = settings.target_sparsity, _wished_by_curves(settings, matrices, curves)
    wished = {CURVES: by_loss}
    for share in INTERPOLATIONS:
        wished[f"{CURVES} x{share:g}"] = [sparsity + share * (own - sparsity) for own in by_loss]
    exact = {name: _exact(settings, matrices, shares) for name, shares in wished.items()}
    return _distinct({name: _planned(settings, matrices, patterns, {}, curves) for name, patterns in exact.items()})


def cheapest_levels(settings: Settings, matrices: MatricesByBlock, curves: dict[str, Curve]) -> tuple[int, ...]:
    """The plan with the lowest predicted loss in levels: the number of sixteenths of each matrix that are zero."""
    flat = flatten(matrices)
    levels = range(highest_level(settings), -1, -1)
    options = [
        [(float(m.numel * (MIXED_OF - level)), curves[m.name].at(level / MIXED_OF)) for level in levels] for m in flat
    ]
    kept = (1 - settings.target_sparsity) * MIXED_OF * sum(matrix.numel for matrix in flat)
    chosen = cheapest(options, max(kept, sum(own[0][0] for own in options)))
    return tuple(levels[i] for i in chosen)


def highest_level(settings: Settings) -> int:
    """The largest number of sixteenths of a matrix that may be zero; N:16 keeps at least one."""
    return MIXED_OF - 1 if settings.pattern == MIXED_PATTERN else MIXED_OF


def planned_levels(
    settings: Settings, matrices: MatricesByBlock, levels: Sequence[int], curves: dict[str, Curve]
) -> list[PlannedMatrix]:
    """The plan with these levels, adjusted to the exact sparsity."""
    wished = [level / MIXED_OF for level in levels]
    return _planned(settings, matrices, _exact(settings, matrices, wished), {}, curves)


def _distinct(plans: dict[str, list[PlannedMatrix]]) -> dict[str, list[PlannedMatrix]]:
    """The plans without duplicates, and without those whose predicted loss is hopeless."""
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
        PlannedMatrix(
            matrix.name,
            matrix.shape,
            Target(pattern, settings.grid_for(matrix.shape[1])),
            sensitivities.get(matrix.name),
        )
        for matrix, pattern in zip(flat, patterns, strict=True)
    ]


def _wished_by_curves(settings: Settings, matrices: MatricesByBlock, curves: dict[str, Curve]) -> list[float]:
    flat = flatten(matrices)
    group = MIXED_OF if settings.pattern == MIXED_PATTERN else None
    numels = [matrix.numel for matrix in flat]
    return cheapest_sparsities([curves[matrix.name] for matrix in flat], numels, settings.target_sparsity, group)


def _exact(settings: Settings, matrices: MatricesByBlock, wished: Sequence[float]) -> Sequence[Pattern]:
    """Patterns near the wished sparsities whose sparsity together is the target: exact, or as near as N:16 can be."""
    numels = [matrix.numel for matrix in flatten(matrices)]
    if settings.pattern == MIXED_PATTERN:
        keeps = exact_keeps(wished, numels, settings.target_sparsity, MIXED_OF)
        return [NM(keep, MIXED_OF) for keep in keeps]
    counts = exact_counts(wished, numels, settings.target_sparsity)
    return [Unstructured(count / numel) for count, numel in zip(counts, numels, strict=True)]


def check_bytes(settings: Settings, matrices: MatricesByBlock, num_bytes: int, dtype: torch.dtype) -> None:
    """Raises InputError if `num_bytes` is too small for all matrices together."""
    options = _options(settings, matrices, dtype)
    smallest = _smallest(options)
    numel = sum(matrix.numel for matrix in flatten(matrices))
    if num_bytes >= numel * dtype.itemsize:
        if settings.target_size is not None:
            whole = in_words(settings.target_bytes - num_bytes + numel * dtype.itemsize)
            raise InputError(
                f"target_size is {settings.target_size}, and the weights have {whole} as they are. Ask for less."
            )
        raise InputError(
            f"The size budget is {8 * num_bytes / numel:.3f} bits per weight, and the weights have "
            f"{8 * dtype.itemsize} as they are. Ask for less."
        )
    if smallest > num_bytes:
        if settings.target_size is not None:
            least = at_least(settings.target_bytes - num_bytes + smallest)
            raise InputError(
                f"target_size {settings.target_size} cannot be reached. The smallest is {least}. Ask for more."
            )
        raise InputError(
            f"The size budget is {8 * num_bytes / numel:.3f} bits per weight for the {len(options)} matrices, and the "
            f"smallest that pattern {settings.pattern} allows is {8 * smallest / numel:.3f}. Ask for more."
        )


def allocate_bytes(
    settings: Settings,
    matrices: MatricesByBlock,
    curves: dict[str, Curve],
    num_bytes: int,
    dtype: torch.dtype,
) -> list[PlannedMatrix]:
    """The plan of at most `num_bytes` (see `check_bytes`) with the lowest predicted loss."""
    flat = flatten(matrices)
    options, in_order = _options(settings, matrices, dtype), [curves[matrix.name] for matrix in flat]
    targets = cheapest_targets(in_order, options, num_bytes)
    return [
        PlannedMatrix(matrix.name, matrix.shape, target, curve.at(target.pattern.sparsity, target.bits))
        for matrix, curve, target in zip(flat, in_order, targets, strict=True)
    ]


def _options(settings: Settings, matrices: MatricesByBlock, dtype: torch.dtype) -> list[list[tuple[Target, int]]]:
    """The possible (target, bytes) pairs of each matrix. `target_size` counts the bytes of the sparse export."""
    exported = settings.bits_per_weight is None
    return [
        [(target, num_bytes_of(m.shape, target, dtype, exported=exported)) for target in targets_of(settings, m)]
        for m in flatten(matrices)
    ]


def _smallest(options: list[list[tuple[Target, int]]]) -> int:
    return sum(min(size for _, size in own) for own in options)


def targets_of(settings: Settings, matrix: Matrix) -> list[Target]:
    """The possible targets of a matrix under a budget: dense or any sparsity of the pattern, with any bits.

    A budget of time may have the bits fixed, or leave no sparsity but 0.
    """
    patterns: list[Pattern] = [Unstructured(0.0)]
    if settings.sparsity == 0:
        pass
    elif settings.fixed_pattern is not None:
        patterns.append(settings.fixed_pattern)
    elif settings.pattern == MIXED_PATTERN:
        patterns += [NM(keep, MIXED_OF) for keep in range(1, MIXED_OF)]
    else:
        counts = {num_pruned(matrix.numel, step / SPARSITY_STEPS) for step in range(1, SPARSITY_STEPS)}
        patterns += [Unstructured(count / matrix.numel) for count in sorted(counts - {0})]
    grids = [settings.grid_for(matrix.shape[1], bits) for bits in _possible_bits(settings)]
    groups_of(matrix.shape[1], Grid(4, grids[-1].group_size if grids[-1] else None), matrix.name)
    return [Target(pattern, grid) for pattern in patterns for grid in grids]


def _possible_bits(settings: Settings) -> tuple[int, ...]:
    return (UNQUANTIZED_BITS, *BITS) if settings.fixed_bits is None else (settings.fixed_bits,)


def possible_targets(settings: Settings, matrices: MatricesByBlock) -> list[PlannedMatrix]:
    """Every matrix with each number of bits that a budget may choose for it."""
    each = (replace(settings, bits=bits) for bits in _possible_bits(settings))
    return [matrix for one in each for matrix in allocate(one, matrices, {})]


def choose_group_size(settings: Settings, matrices: MatricesByBlock) -> Settings:
    """The settings with one group size for the model, where `auto` was asked for.

    It is the largest of `AUTO_GROUP_SIZES` that divides the inputs of every matrix, apart from matrices that none of
    them divides. Those get one scale per row.
    """
    if not settings.rows_if_needed or settings.plan is not None or not (settings.quantizes or settings.has_budget):
        return settings
    flat = flatten(matrices)
    least = AUTO_GROUP_SIZES[-1]
    inputs = {matrix.shape[1] for matrix in flat if matrix.shape[1] % least == 0}
    size = next((size for size in AUTO_GROUP_SIZES if not any(num % size for num in inputs)), least)
    if by_row := [matrix for matrix in flat if matrix.shape[1] % least]:
        first = f"{by_row[0].name} with {by_row[0].shape[1]} inputs"
        log.warning(
            f"{len(by_row)} of {len(flat)} matrices, such as {first}, do not divide into groups of {least} and "
            "get one scale per row. The exports gguf, and onnx with codes, cannot hold these."
        )
    return replace(settings, group_size=size)


def check_plan(plan: Sequence[PlannedMatrix]) -> None:
    """Raises InputError for a pattern or group size that does not divide its matrix."""
    for matrix in plan:
        check_divides(matrix.target.pattern, matrix.shape[1], matrix.name)
        if matrix.target.grid is not None:
            groups_of(matrix.shape[1], matrix.target.grid, matrix.name)


def planned_sparsity(plan: Sequence[PlannedMatrix]) -> float:
    """The mean sparsity of a plan over all weights."""
    return sum(m.target.pattern.sparsity * m.numel for m in plan) / sum(m.numel for m in plan)
