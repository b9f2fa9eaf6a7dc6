"""The verb `timings`: the milliseconds of a token on this CPU, part by part, for `compress --timings`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mspc.cli.compress_command import asked_of
from mspc.cli.console import DebugOption, ModelArgument, ThreadsOption, option, print_table, reported
from mspc.errors import InputError

if TYPE_CHECKING:
    from mspc.planning.time_budget import TimeBudget

UNIFORM = ("dense", "int8", "int4", "int3", "2:4", "2:4+int4", "50%+int4", "70%+int4")
"""Formats that are shown, each in all matrices."""


def timings(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(metavar="FILE.json", help="File to write, for `compress --timings`.")],
    group_size: Annotated[
        str | None, option("Number of inputs that share a scale, as for `compress`.", "auto", metavar="N|row|auto")
    ] = None,
    asymmetric: Annotated[
        bool, typer.Option("--asymmetric", help="Give each group an integer zero point, as for `compress`.")
    ] = False,
    threads: ThreadsOption = None,
    debug: DebugOption = False,
) -> None:
    """Time what a token of a model takes on this CPU, in seconds to a minute.

    \b
    mspc timings MODEL --out serve.json                          on the machine that will serve
    mspc compress MODEL --out DIR --speedup 4 --timings serve.json        on any machine

    It reads config.json alone. `compress` with --ms-per-token or --speedup and without
    --timings times this machine itself, and keeps the result.
    """
    with reported(debug):
        if out.is_dir() or not out.absolute().parent.is_dir():
            raise InputError(f"{out} cannot be written. Name a file in a folder that exists.")
        import mspc

        recipe = mspc.Recipe.from_dict(asked_of({"group_size": group_size, "asymmetric": asymmetric or None}))
        found = mspc.time_products(model, recipe, out=out, threads=threads)
    _show(found)
    print(f"{out} written: {found.timings.origin}.")


def _show(found: "TimeBudget") -> None:
    """Print the time of a token by parts, with all matrices in one format."""
    from mspc.bench.formats import parse_format
    from mspc.types import PlannedMatrix

    name, baseline = found.baseline
    timed, table = found.timings, Table("all matrices", "ms a token", "of it matrices", f"x bfloat16 with {name}")
    for text in UNIFORM:
        target: Any = parse_format(text)
        ms = found.ms_of([PlannedMatrix(one.name, one.shape, target) for one in found.work.matrices])
        table.add_row(text, f"{ms:.3f}", f"{ms - found.fixed_ms:.3f}", f"{baseline / ms:.2f}")
    print_table(table)
    print(
        f"Head {found.head_ms:.3f} ms in {timed.sizes.vocabulary:,} rows of 32 bits; all else {timed.rest_ms:.3f} ms; "
        f"bfloat16 with {name} {baseline:.3f} ms a token."
    )
