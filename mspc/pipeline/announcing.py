"""The forecast at the beginning of a run: a line if the run is long, and an error if it does not fit."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mspc import ranks
from mspc.errors import InputError
from mspc.model.open import open_model
from mspc.model.outline import META
from mspc.pipeline.forecasting import Place, assumed_plan, forecast_run
from mspc.pipeline.rates import known
from mspc.progress import log
from mspc.settings import Settings
from mspc.storage.output_folder import check_space
from mspc.types import MatricesByBlock, PlannedMatrix

WORTH_A_LINE = 20.0
"""Seconds from which the forecast is shown."""


def announce(
    source: Path, device: torch.device, matrices: MatricesByBlock, settings: Settings,
    given: Sequence[PlannedMatrix] | None, threads: int, spill: Path | None, out: Path, force: bool, resumed: bool,
) -> None:  # fmt: skip
    """Show the forecast of a long run.

    `given` is the plan, if one is given. Raises InputError for a run that does not fit in memory, unless it is forced
    to, and StorageError for a disk that is too small. A run that goes on is shown nothing, as a part of it is made.
    """
    model, place, rates = open_model(source, device=META), Place.named(str(device)), known(device, threads)
    plan = given or assumed_plan(settings, matrices)
    found = forecast_run(
        model, source.name, matrices, settings, plan, place, rates, spill=spill, out=out, ranks=ranks.size()
    )
    if found.problems and not force:
        raise InputError(" ".join(found.problems) + " --force starts it nevertheless.")
    if resumed:
        return
    check_space(out, found.output_bytes)
    if found.seconds > WORTH_A_LINE:
        log.info(found.line())
