"""The plan of `--keep-zeros`: for each matrix the pattern of the zeros that the checkpoint has."""

from collections import Counter
from collections.abc import Iterator

import torch

from mspc.errors import InputError
from mspc.model.streamed import StreamedModel
from mspc.numerics.masking import num_pruned
from mspc.numerics.zeros import FEW, most_in_group, recognized
from mspc.planning.allocation import planned_sparsity
from mspc.progress import Progress, log
from mspc.settings import MIXED_OF, MIXED_PATTERN, Settings
from mspc.types import MatricesByBlock, Pattern, PlannedMatrix, Target, Unstructured, flatten


def plan_of_zeros(
    model: StreamedModel, matrices: MatricesByBlock, settings: Settings, progress: Progress
) -> list[PlannedMatrix]:
    """The plan whose masks hold all zeros of the checkpoint, apart from those of matrices with less than `FEW`.

    Raises InputError for a checkpoint without zeros, and for zeros that are not those of a pattern or a sparsity that
    was asked for.
    """
    flat, plan, zeros = flatten(matrices), [], []
    with progress.stage("Reading zeros", len(flat)) as step:
        for matrix in flat:
            nonzero = matrix.read(model.read_parameter(matrix.parameter)) != 0
            num_zeros = matrix.numel - int(torch.count_nonzero(nonzero))
            pattern = _pattern(nonzero, num_zeros, settings, matrix.name)
            plan.append(PlannedMatrix(matrix.name, matrix.shape, Target(pattern, settings.grid_for(matrix.shape[1]))))
            zeros.append(num_zeros)
            step(matrix.name)
    if not any(matrix.target.pattern.sparsity for matrix in plan):
        raise InputError(
            f"keep_zeros: no matrix of the checkpoint has {FEW:.0%} zeros, so there is nothing to keep. Leave it out; "
            "sparsity 0 only quantizes."
        )
    found = planned_sparsity(plan)
    if settings.sparsity is not None and abs(found - settings.sparsity) > 5e-5:
        raise InputError(
            f"sparsity {settings.sparsity:g} was asked for, but keep_zeros finds {found:.4f} in the checkpoint. Leave "
            "one of the two out."
        )
    for line in _notes(plan, zeros):
        log.info(line)
    return plan


def _pattern(nonzero: torch.Tensor, num_zeros: int, settings: Settings, name: str) -> Pattern:
    """The pattern of one matrix, by its nonzero weights, bool (O, I)."""
    wanted, share = settings.fixed_pattern, num_zeros / nonzero.numel()
    if wanted is not None:
        if nonzero.shape[1] % wanted.of or most_in_group(nonzero, wanted.of) > wanted.keep:
            raise _contradiction(settings, share, name)
        return wanted
    if share < FEW:
        return Unstructured(0.0)
    if settings.pattern == MIXED_PATTERN:
        mixed = recognized(nonzero, (MIXED_OF,))
        if mixed is None:
            raise _contradiction(settings, share, name)
        return mixed
    return recognized(nonzero) or Unstructured(share)


def _contradiction(settings: Settings, share: float, name: str) -> InputError:
    return InputError(
        f"{name}: pattern {settings.pattern} was asked for, but its zeros ({share:.2%} of it) are not in that pattern. "
        "Leave pattern out, or leave the matrix as it is with --skip."
    )


def _notes(plan: list[PlannedMatrix], zeros: list[int]) -> Iterator[str]:
    """Lines about the masks, the zeros outside them, and kept weights that are zero."""
    patterns = Counter(str(matrix.target.pattern) for matrix in plan if matrix.target.pattern.sparsity)
    shown = ", ".join(f"{count} {pattern}" for pattern, count in patterns.most_common())
    yield f"Zeros of the checkpoint: {planned_sparsity(plan):.2%} of {len(plan)} matrices. Masks: {shown}."
    pairs = list(zip(plan, zeros, strict=True))
    bare = [(matrix, count) for matrix, count in pairs if count and not matrix.target.pattern.sparsity]
    if bare:
        yield (
            f"{len(bare)} matrices, such as {bare[0][0].name}, have less than {FEW:.0%} zeros and get no mask. Their "
            f"{sum(count for _, count in bare):,} zeros are weights like the others."
        )
    masked = [(matrix, count) for matrix, count in pairs if matrix.target.pattern.sparsity]
    more = sum(count - num_pruned(matrix.numel, matrix.target.pattern.sparsity) for matrix, count in masked)
    if more:
        quantized = "may become another value" if plan[0].target.grid else "are stored as zeros"
        yield (
            f"{more:,} weights that the patterns keep are zero by accident. They are kept weights like the others and "
            f"{quantized}."
        )
