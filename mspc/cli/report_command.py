"""The verb `report` of the command line."""

from pathlib import Path
from typing import Annotated

import typer

from mspc.cli.console import DebugOption, DeviceOption, DtypeOption, ThreadsOption, option, reported
from mspc.progress import log

NEEDS = "With --against"


def report(
    artifacts: Annotated[
        list[Path],
        typer.Argument(metavar="ARTIFACT...", help="Folders that `mspc compress` wrote.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Page to write, such as report.html.")],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The dense model: measure perplexity and KL divergence again, as `mspc eval --against`, and let each "
            "model continue ten prompts.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[str | None, option("Test text, as for `mspc eval`.", "builtin", rich_help_panel=NEEDS)] = None,
    sequence_length: Annotated[
        int | None,
        option("Number of tokens per window.", "2048, or the model's maximum if that is less", rich_help_panel=NEEDS),
    ] = None,
    max_windows: Annotated[
        int | None, option("Number of windows to measure, from the first.", "all", rich_help_panel=NEEDS)
    ] = None,
    bos: Annotated[
        str | None,
        option("Whether windows begin with a BOS token.", "auto", metavar="auto|yes|no", rich_help_panel=NEEDS),
    ] = None,
    text_column: Annotated[
        str | None,
        option(
            "Field or column of the text.", "text, messages or conversations", metavar="NAME", rich_help_panel=NEEDS
        ),
    ] = None,
    text_encoding: Annotated[
        str | None, option("Encoding of .txt files.", "utf-8", metavar="NAME", rich_help_panel=NEEDS)
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
    debug: DebugOption = False,
) -> None:
    """Write one HTML page about artifacts, to read and to send.

    \b
    mspc report out/small --out small.html                    one artifact
    mspc report out/a out/b --out both.html                   a comparison
    mspc report out/small --out small.html --against MODEL    measured again

    The page needs no network and no other file. It shows sizes, losses with their
    intervals, where bits and losses are in the model, what was predicted, and the
    seconds of each stage. Plots need the extra mspc[plots].
    """
    with reported(debug):
        from mspc.pages.page import report as write

        write(
            artifacts, out, against=against, text=text, sequence_length=sequence_length, max_windows=max_windows,
            bos=bos, text_column=text_column, text_encoding=text_encoding, device=device, dtype=dtype,
            threads=threads,
        )  # fmt: skip
        log.info(f"{out} written.")
