"""Checks of --route all, which shows every expert all tokens in calibration."""

from mspc.errors import InputError
from mspc.model.config_checks import setting_of
from mspc.model.matrices import EXPERTS, skip_option
from mspc.model.streamed import StreamedModel
from mspc.settings import ALL, Settings
from mspc.types import MatricesByBlock, Matrix


def check_route(model: StreamedModel, matrices: MatricesByBlock, settings: Settings) -> None:
    """Raises InputError, before anything is measured, for experts that cannot be shown all tokens, and without any.

    `model` may be on meta.
    """
    if settings.route != ALL:
        return
    for index, of_block in enumerate(matrices):
        for matrix in of_block:
            if why := _only_routed(model, index, matrix):
                raise InputError(
                    f"{matrix.name} {why}, so that --route all cannot show it all tokens. Leave --route out, or such "
                    f"layers dense with {skip_option([model.name_in_block(index, matrix)])}."
                )
    if not any(matrix.index is not None for of_block in matrices for matrix in of_block):
        raise InputError("route all has no effect without experts to compress. Leave --route out.")


def _only_routed(model: StreamedModel, index: int, matrix: Matrix) -> str | None:
    """Why a matrix can see routed tokens alone; None if it can see all."""
    block, path = model.blocks[index], model.name_in_block(index, matrix).split(".")[:-1]
    if matrix.index is not None:
        reason: str | None = getattr(block.get_submodule(".".join(path)), "routed_only", None)
        return reason
    counts = {setting_of(model.config, key) for key in EXPERTS}
    for place, part in enumerate(path):
        size = len(list(block.get_submodule(".".join(path[:place])).children())) if part.isdigit() else 0
        if size > 1 and ("expert" in path[place - 1] or size in counts):
            return "is a layer of one expert in a list, to which its block gives routed tokens"
    return None
