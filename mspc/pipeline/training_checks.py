"""Checks of stages that train weights: they cannot train experts yet."""

from collections.abc import Iterable, Sequence

from mspc.errors import InputError
from mspc.model.streamed import StreamedModel
from mspc.pipeline.recovery_stage import check_memory
from mspc.settings import Settings
from mspc.types import Matrix, PlannedMatrix


def check_training(
    model: StreamedModel, matrices: Iterable[Matrix], plan: Sequence[PlannedMatrix], settings: Settings
) -> None:
    """Raises InputError, before anything is measured, for training that is asked for and impossible."""
    expert = next((matrix.name for matrix in matrices if matrix.index is not None), None)
    option = "recover" if settings.recover else "reconstruct" if settings.reconstruct else None
    if expert is not None and option is not None:
        raise InputError(
            f"{expert}: --{option} cannot train experts yet. Leave --{option} out, or the experts dense with "
            "--skip experts."
        )
    if settings.recover:
        check_memory(model, plan, settings)
