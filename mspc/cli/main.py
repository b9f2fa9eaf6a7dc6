"""The command line: thin verbs over `mspc.api`. Results go to stdout, progress and messages to stderr."""

import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mspc.cli.bench_command import bench
from mspc.cli.compress_command import RanksOption, compress
from mspc.cli.console import (  # fmt: skip
    ArtifactArgument,
    ColumnOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    EncodingOption,
    InputsOption,
    JsonOption,
    LengthOption,
    ThreadsOption,
    option,
    print_json,
    print_table,
    report_bug,
    reported,
)
from mspc.cli.export_commands import export, verify
from mspc.cli.generate_command import generate
from mspc.cli.launching import launched
from mspc.cli.plan_command import plan
from mspc.cli.push_command import push
from mspc.cli.report_command import report
from mspc.cli.tasks import TASKS, ask, refuse
from mspc.cli.timings_command import timings
from mspc.errors import InputError
from mspc.progress import Silent, log
from mspc.ranks import allow, is_first, of_environment, start, stop
from mspc.version import __version__

app = typer.Typer(
    name="mspc",
    help="Prune and quantize a large language model in one call, each weight matrix according to its sensitivity; "
    "export the result, verify it, and measure it.",
    epilog="Exit codes: 0 done, 1 failed (disk, device, numerics), 2 wrong usage or input, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command()(compress)
app.command()(plan)
app.command()(timings)


@app.command(name="eval")
def eval_(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...",
            help="Checkpoint folders, .gguf files, hub ids, artifacts, dense or sparse exports.",
            show_default=False,
        ),
    ],
    text: Annotated[
        str | None,
        option(
            "Test text: the test split of builtin (Python's own documentation), c4, wikitext2 or a dataset id; "
            "or a .txt, .jsonl, .json or .parquet file, or a folder of them.",
            "builtin",
        ),
    ] = None,
    sequence_length: LengthOption = None,
    max_windows: Annotated[
        int | None, typer.Option(help="Number of windows to measure, from the first. (default: all)")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Also measure the perplexity of this model, and the KL divergence from its predictions; with --tasks "
            "its answers, and the difference.",
        ),
    ] = None,
    bos: Annotated[str | None, option("Whether windows begin with a BOS token.", "auto", metavar="auto|yes|no")] = None,
    text_column: ColumnOption = None,
    text_encoding: EncodingOption = None,
    tasks: Annotated[
        str | None,
        option(
            "Tasks of lm-evaluation-harness in place of a text, such as arc_easy,hellaswag.",
            "none",
            metavar="NAMES",
            rich_help_panel=TASKS,
        ),
    ] = None,
    limit: Annotated[
        int | None, option("Questions of each task, from the first.", "all", metavar="N", rich_help_panel=TASKS)
    ] = None,
    num_fewshot: Annotated[
        int | None, option("Examples in each prompt.", "as the task says", metavar="N", rich_help_panel=TASKS)
    ] = None,
    include_path: Annotated[
        Path | None,
        option("Folder with task files (.yaml) of your own.", "none", metavar="FOLDER", rich_help_panel=TASKS),
    ] = None,
    batch_size: Annotated[int | None, option("Prompts at a time.", 1, metavar="N", rich_help_panel=TASKS)] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    inputs: InputsOption = None,
    threads: ThreadsOption = None,
    ranks: RanksOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure the perplexity of models on test text (lower is better), or their answers to tasks.

    \b
    mspc eval MODEL                          the original
    mspc eval out/small                      the compressed model
    mspc eval out/small --against MODEL      and its distance from MODEL
    mspc eval out/a out/b --against MODEL    a table
    mspc eval out/small --text t.txt --max-windows 100
    mspc eval out/small --tasks arc_easy,hellaswag --against MODEL --limit 200

    The text is one stream of tokens, cut into windows that do not overlap.
    Compare only perplexities of the same text, window length, number of windows
    and --bos. Intervals are 95% t-intervals over the windows.
    """
    on_text = {"text": text, "sequence_length": sequence_length, "max_windows": max_windows, "bos": bos,
               "text_column": text_column, "text_encoding": text_encoding, "inputs": inputs}  # fmt: skip
    on_tasks = {"limit": limit, "num_fewshot": num_fewshot, "include_path": include_path, "batch_size": batch_size}
    shared: dict[str, Any] = {"device": device or "auto", "dtype": dtype or "auto", "threads": threads}
    allow()
    shares = ranks not in (None, 1) or of_environment().size > 1
    if tasks is not None:
        with reported(debug):
            refuse({"ranks": ranks or "torchrun" if shares else None}, "with --tasks")
        ask(paths, tasks, against, on_text, on_tasks | shared, as_json, debug)
        return
    results: list[tuple[str, dict[str, Any]]] = []
    with reported(debug):
        refuse(on_tasks, "without --tasks")
        if shares and inputs == "int8":
            raise InputError("With --inputs int8 a model is loaded whole, and ranks cannot share that. Leave one out.")
        if (code := launched(ranks)) is not None:
            raise typer.Exit(code)
        from mspc.api import evaluate
        from mspc.storage.manifest import was_recovered

        start()
        shared["progress"] = True if is_first() else Silent()
        try:
            for path in paths:
                given: dict[str, Any] = {
                    **on_text,
                    "text": text or "builtin",
                    "bos": bos or "auto",
                    "inputs": inputs or "int16",
                }
                found = evaluate(path, against=against, **given, **shared)
                row = {name: value for name, value in asdict(found).items() if value is not None}
                results.append((path, row | ({"recovered": True} if was_recovered(Path(path)) else {})))
        finally:  # what was measured is shown when a later path fails
            if is_first():
                _show(results, against, as_json, several=len(paths) > 1)
        stop()


def _show(results: list[tuple[str, dict[str, Any]]], against: str | None, as_json: bool, several: bool) -> None:
    """Print evaluations by path: a table, or for a single path a sentence."""
    if as_json and results:
        rows = [{"path": path} | row for path, row in results]
        print_json({"models": rows} if several else results[0][1])
    elif results and several:
        from mspc.cli.tables import evaluation_table

        print_table(evaluation_table(results, against))
    elif results:
        from mspc.cli.tables import evaluation_line

        print(evaluation_line(results[0][1], against))


@app.command()
def inspect(artifact: ArtifactArgument, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Show the matrices of an artifact: pattern, sparsity, bits, error."""
    with reported(debug):
        from mspc.cli.tables import matrix_table
        from mspc.pipeline.summary import cost_lines, summary, unused_note
        from mspc.storage.manifest import read_manifest

        manifest = read_manifest(artifact)
        if unused := manifest.get("unused_tensors"):
            log.warning(unused_note(unused))
    if as_json:
        print_json(manifest)
        return
    print_table(matrix_table(manifest))
    print("\n".join([summary(manifest), *cost_lines(manifest)]))


app.command()(export)
app.command()(verify)
app.command()(generate)
app.command()(bench)
app.command()(report)
app.command()(push)


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show:
        print(__version__)
        raise typer.Exit


def main() -> None:
    # These libraries log on import, about nothing that the user did.
    for name in ("torchao", "torch.utils._pytree", "torch.onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app()
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        report_bug(error)
