"""The forecast at the beginning of a run: a line if the run is long, and an error if it does not fit."""

from pathlib import Path
from typing import TYPE_CHECKING

from mspc.errors import InputError
from mspc.model.open import open_model
from mspc.model.outline import META
from mspc.pipeline.forecasting import Place, assumed_plan, forecast_run
from mspc.pipeline.rates import known
from mspc.progress import log
from mspc.storage.output_folder import check_space
from mspc.types import MatricesByBlock

if TYPE_CHECKING:
    from mspc.pipeline.run import Run

WORTH_A_LINE = 20.0
"""Seconds from which the forecast is shown."""


def announce(run: "Run", matrices: MatricesByBlock, spill: Path | None) -> None:
    """Show the forecast of a long run.

    Raises InputError for one that does not fit in memory, unless it is forced to, and StorageError for a disk that is
    too small. A run that goes on is shown nothing: it has made a part already.
    """
    found = forecast_run(
        open_model(run.source, device=META), run.source_name, matrices, run.settings,
        run.given or assumed_plan(run.settings, matrices), Place.named(str(run.device)),
        known(run.device, run.threads), spill=spill, out=run.folder,
    )  # fmt: skip
    if found.problems and not run.force:
        raise InputError(" ".join(found.problems) + " --force starts it nevertheless.")
    if run.resume:
        return
    check_space(run.folder, found.output_bytes)
    if found.seconds > WORTH_A_LINE:
        log.info(found.line())
