"""The verb `plan`: seconds, memory and disk of a run before it is made."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mspc.cli.compress_command import RecipeOption, SpillOption, asked_of, with_options_of_recipe
from mspc.cli.console import (
    DebugOption,
    JsonOption,
    ModelArgument,
    ThreadsOption,
    print_json,
    print_table,
    reported,
    with_recipe,
)
from mspc.sizes import in_words

if TYPE_CHECKING:
    from mspc.pipeline.forecasting import Forecast

PlaceOption = Annotated[
    str,
    typer.Option(
        metavar="here|cpu|h200|a100", help="Device to forecast: of this machine (here, cpu, cuda:1), or of a table."
    ),
]
PlannedRanks = Annotated[
    int, typer.Option("--ranks", metavar="N", help="Processes that share the run: 1, 2, 4, 8 or a multiple of 8.")
]
CalibrateOption = Annotated[
    bool, typer.Option("--calibrate", help="Measure this device first, in some seconds, and keep the rates.")
]
PlaceToWrite = Annotated[
    Path | None, typer.Option(help="Folder that `compress` would write, for its free space. (default: here)")
]


def plan(
    model: ModelArgument,
    out: PlaceToWrite = None,
    device: PlaceOption = "here",
    calibrate: CalibrateOption = False,
    recipe: RecipeOption = None,
    spill: SpillOption = None,
    threads: ThreadsOption = None,
    ranks: PlannedRanks = 1,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Forecast seconds, memory and disk of `compress` with the same options.

    \b
    mspc plan MODEL                                  on this machine
    mspc plan MODEL --calibrate                      measure it first
    mspc plan MODEL --sparsity 0.5 --device h200     on a GPU that is not here
    mspc plan MODEL --device h200 --ranks 8          on 8 of them

    It reads config.json alone: of a hub id nothing else is downloaded. A run on a
    busy machine takes longer. Without --calibrate, rates are those of a table.
    The exit code is 0 also for a run that does not fit.
    """
    with reported(debug):
        whole = with_recipe(recipe, asked_of(options))
        import mspc

        found = mspc.forecast(
            model, whole, out=out or Path(), device=device, threads=threads, spill=spill, calibrated=calibrate,
            ranks=ranks,
        )  # fmt: skip
    if as_json:
        print_json(found.to_dict())
    else:
        _show(found)


def _show(found: "Forecast") -> None:
    """Print a forecast: sizes, a table of the stages, and what does not fit."""
    from mspc.pipeline.forecasting import span

    demand = found.demand
    rows, columns = found.widest
    weights = f"{found.weights / 1e6:,.1f} million weights"
    print(f"{found.model}: {found.matrices} matrices in {found.blocks} blocks, {weights}; widest {rows} x {columns}.")
    print(f"Weights of {in_words(found.source_bytes)}; output of about {in_words(found.output_bytes)}.")
    table = Table("stage", "seconds", "share")
    for title, seconds in found.seconds_by_stage.items():
        table.add_row(title, f"{seconds:,.1f}", f"{seconds / found.seconds:.0%}")
    print_table(table)
    print(f"Time: {span(*found.range)}, most likely {span(found.seconds, found.seconds)} ({found.rates.origin}).")
    if found.ranks > 1:
        print(f"{found.ranks} ranks share the time; the memory is that of each.")
    print(
        f"Memory: {in_words(demand.host_peak)} at most, in the stage {demand.peak_stage!r}; at least "
        f"{in_words(demand.host_need)}."
    )
    if demand.device_need:
        print(f"GPU memory: {in_words(demand.device_peak)} at most, at least {in_words(demand.device_need)}.")
    free = "" if demand.disk_free is None else f", of {in_words(demand.disk_free)} that are free"
    print(f"Disk: {in_words(demand.disk_need)}{free}.")
    for problem in found.all_problems:
        print(f"Does not fit: {problem}")


with_options_of_recipe(plan, 2, without=("device",))
