"""The verb `bench`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mspc.cli.console import (
    BosOption,
    DebugOption,
    InputsOption,
    LengthOption,
    ThreadsOption,
    option,
    print_table,
    reported,
)
from mspc.errors import InputError
from mspc.progress import log

WHAT, HOW, OUT = "Models and formats", "Measurement", "Results"


def numbers(name: str, text: str | None) -> tuple[int, ...] | None:
    """`"1,4,8"` -> (1, 4, 8)."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"{name} must be whole numbers with commas between, such as 1,4,8, not {text!r}.")
    return tuple(int(part) for part in parts)


def bench(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PATH...",
            help="Artifacts, sparse exports, checkpoint folders, .gguf files, hub ids.",
            show_default=False,
        ),
    ] = None,
    shapes: Annotated[
        str | None,
        option(
            "Random weights in these shapes: 1b (Llama-3.2-1B), 8b (Llama-3.1-8B), from-model (those of PATH).",
            "the weights of PATH",
            rich_help_panel=WHAT,
        ),
    ] = None,
    formats: Annotated[
        str | None,
        option(
            "Formats of random weights, separated by commas: dense, bf16; int8, int4, int3, int2; N:M such as 2:4; S% "
            "such as 50%; a pattern with bits such as 2:4+int4; the path of an artifact, for its mixture.",
            "dense,int4,2:4,8:16,6:16,2:4+int4",
            "--format",
            rich_help_panel=WHAT,
        ),
    ] = None,
    baseline: Annotated[
        str,
        typer.Option(
            help="Baseline of the speedups: bf16 (torch's dense product; float32 on a CPU) or int4 (torch's kernel). "
            "Both are measured.",
            rich_help_panel=WHAT,
        ),
    ] = "bf16",
    head_bits: Annotated[
        int | None,
        option(
            "Bits of the output head of random weights with codes, and of other engines: 4, 8, or 16 for a dense one.",
            "8; with CUDA 16",
            rich_help_panel=WHAT,
        ),
    ] = None,
    peers: Annotated[
        str,
        typer.Option(
            help="Other engines on a CPU, with random weights in the same shapes: llama.cpp, onnxruntime, openvino, "
            "with commas between; auto (those that are installed) or none.",
            rich_help_panel=WHAT,
        ),
    ] = "auto",
    batch: Annotated[
        str | None, option("Numbers of sequences decoded together.", "1,4,8,32; on a CPU 1", rich_help_panel=HOW)
    ] = None,
    context: Annotated[
        str | None,
        option("Numbers of tokens that a decoding step attends to.", "128,2048; on a CPU 128", rich_help_panel=HOW),
    ] = None,
    prefill: Annotated[
        str | None, option("Numbers of tokens in a prompt.", "512,2048; on a CPU 128", rich_help_panel=HOW)
    ] = None,
    repeats: Annotated[
        int | None,
        option("Number of samples per measurement, within 10 s.", "200; on a CPU 9 rounds", rich_help_panel=HOW),
    ] = None,
    no_perplexity: Annotated[
        bool, typer.Option("--no-perplexity", help="Leave the perplexity of models out.", rich_help_panel=HOW)
    ] = False,
    sequence_length: LengthOption = None,
    max_windows: Annotated[int | None, option("Number of windows of a perplexity, from the first.", 20)] = None,
    bos: BosOption = "auto",
    device: Annotated[str, typer.Option(help="auto, cuda, cuda:1, ... or cpu.", rich_help_panel=HOW)] = "auto",
    inputs: InputsOption = None,
    threads: ThreadsOption = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="File for all figures, with versions and configuration.",
            show_default=False,
            rich_help_panel=OUT,
        ),
    ] = None,
    plot_file: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE.png",
            help="File for a plot: speedup over batch size, perplexity over tokens/s.",
            show_default=False,
            rich_help_panel=OUT,
        ),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Measure speed and memory of compressed models against dense and int4 baselines.

    \b
    mspc bench MODEL out/small                           with perplexity
    mspc bench --shapes 8b                               random weights
    mspc bench MODEL --shapes from-model --format 2:4    the same, its shapes
    mspc bench --shapes 1b --baseline int4 --json r.json --plot r.png

    Decoding is one new token per sequence; prefill is the whole prompt. On CUDA
    every step is one graph, and all formats share attention, head and fusions.
    On a CPU all rows take turns, other engines in processes of their own.
    Each time is shown with the time that its bytes need at full bandwidth.
    What is not faster than the baseline in 90% of the rounds is marked "no
    gain". Each row is printed to stderr when it is known, and tables to stdout
    at the end. See docs/benchmark.md.
    """
    kept = "Figures measured so far are above" if json_file is None else f"Figures measured so far are in {json_file}"
    with reported(debug, f"{kept}."):
        from mspc.bench.plots import check_installed, plot
        from mspc.bench.request import Request
        from mspc.bench.run import bench as run
        from mspc.bench.tables import lines_of, notes, predictions, tables, verdicts
        from mspc.storage.files import write_json

        request = Request(
            tuple(paths or ()), baseline, shapes, None if formats is None else tuple(formats.split(",")),
            numbers("--batch", batch), numbers("--context", context), numbers("--prefill", prefill), repeats, device,
            bos, not no_perplexity, max_windows, sequence_length, threads, inputs or "int16", peers, head_bits,
        )  # fmt: skip
        for file in (json_file, plot_file):
            if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
                raise InputError(f"{file} cannot be written. Name a file in a folder that exists.")
        if plot_file is not None:
            if plot_file.suffix != ".png":
                raise InputError(f"--plot draws a PNG. Name it {plot_file.stem}.png, not {plot_file.name}.")
            check_installed()
        found: dict[str, Any] = {}

        def keep(result: dict[str, Any], new: list[dict[str, Any]]) -> None:
            found.update(result)
            for row in new:
                for line in lines_of(row, result):
                    log.info(line)
            if json_file is not None:
                write_json(json_file, result)

        try:
            found = run(request, save=keep)
            if plot_file is not None:
                plot(found, plot_file)
        finally:  # what is measured is shown, whatever comes after it
            if found:
                for table in tables(found):
                    print_table(table)
                    print()
                for line in (*notes(found), *verdicts(found), *predictions(found)):
                    print(line)
