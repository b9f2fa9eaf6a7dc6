"""The verb `compress`. Its options are the fields of `mspc.recipe.Recipe`, followed by those of a run."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mspc.cli.console import (
    DebugOption,
    JsonOption,
    ModelArgument,
    OutOption,
    ThreadsOption,
    print_json,
    reported,
    with_recipe,
)
from mspc.cli.launching import launched
from mspc.progress import Silent, log
from mspc.ranks import allow, is_first, start, stop
from mspc.recipe import Recipe, default_of

ADVANCED = "Advanced"

RecipeOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.toml", help="Take options from a recipe.toml; those given here win.", rich_help_panel=ADVANCED
    ),
]
MeasurementsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Keep gradients and loss curves here for runs with another budget.",
        rich_help_panel=ADVANCED,
    ),
]  # fmt: skip
SpillOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Keep activations and Fisher factors in files here, not in memory.",
        rich_help_panel=ADVANCED,
    ),
]
ExportOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FORMAT", help="Also export to OUT/exports/FORMAT (see `mspc export --list`). Repeatable.",
    ),
]  # fmt: skip
ReportOption = Annotated[
    bool, typer.Option("--report", help="Also write OUT/report.html, a page about the result (see `mspc report`).")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue a run that was cut off.")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace an older artifact once the new one is complete.")
]

ForceOption = Annotated[
    bool, typer.Option("--force", help="Start a run that by its forecast does not fit (see `mspc plan`).")
]
RanksOption = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Processes on this machine that share the work, one a GPU: 1, 2, 4 or 8. (default: 1)",
        show_default=False,
    ),
]  # fmt: skip


def compress(
    model: ModelArgument,
    out: OutOption,
    recipe: RecipeOption = None,
    measurements: MeasurementsOption = None,
    spill: SpillOption = None,
    export: ExportOption = None,
    report: ReportOption = False,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    force: ForceOption = False,
    threads: ThreadsOption = None,
    ranks: RanksOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Prune and quantize a model, each matrix according to its sensitivity.

    \b
    mspc compress MODEL --out DIR                          the size of int4
    mspc compress MODEL --out DIR --bits-per-weight 3.25   another size
    mspc compress MODEL --out DIR --sparsity 0 --bits 4    only quantize
    mspc compress MODEL --out DIR --sparsity 0.5           only prune
    mspc compress MODEL --out DIR --pattern 2:4            for sparse cores
    """
    allow()
    with reported(debug, "If anything was solved, it is kept: `mspc compress` goes on with --resume."):
        whole = with_recipe(recipe, asked_of(options))
        if (code := launched(ranks)) is not None:
            raise typer.Exit(code)
        import mspc
        from mspc.pipeline.summary import summary

        start()
        artifact = mspc.compress(
            model, whole, out=out, measurements=measurements, spill=spill, resume=resume, overwrite=overwrite,
            exports=export or (), threads=threads, force=force, progress=True if is_first() else Silent(),
        )  # fmt: skip
        if not is_first():
            stop()
            return
        if report:
            from mspc.pages.page import report_of_run

            settings = whole.settings()
            written = report_of_run(artifact, model, settings.device, settings.dtype, threads)
            log.info(f"{written} written.")
        if as_json:
            print_json(artifact.manifest)
        else:
            log.info(f"{out}: {summary(artifact.manifest)}")
        stop()


def asked_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a recipe that were given."""
    asked = {name: value for name, value in options.items() if value is not None and value != []}
    if str(asked.get("group_size", "")).isdecimal():
        asked["group_size"] = int(asked["group_size"])
    return asked


def _option(field: dataclasses.Field[Any]) -> inspect.Parameter:
    """The parameter that typer makes an option of. Its absence is None, so that a recipe file's value stands."""
    settings, kind = field.metadata, field.type
    if kind == tuple[str, ...]:
        kind, shown = list[str] | None, ""
    else:
        shown = f" (default: {default_of(field)})"
        kind = str | None if field.name == "group_size" else kind
    flags = [settings["flags"]] if "flags" in settings else []
    declared = typer.Option(
        *flags,
        help=settings["help"] + shown,
        show_default=False,
        metavar=settings.get("metavar"),
        rich_help_panel=ADVANCED if settings["advanced"] else None,
    )
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, declared]
    )


def with_options_of_recipe(command: Callable[..., None], first: int, without: tuple[str, ...] = ()) -> None:
    """Give a command the options of a recipe after its `first` parameters, in place of `options`."""
    own = [parameter for parameter in inspect.signature(command).parameters.values() if parameter.name != "options"]
    options = [_option(field) for field in dataclasses.fields(Recipe) if field.name not in without]
    keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own[first:]]
    signature = inspect.Signature([*own[:first], *options, *keyword_only])
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()}


with_options_of_recipe(compress, 2)
