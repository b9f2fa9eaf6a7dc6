"""The verbs `export` and `verify` of the command line."""

from pathlib import Path
from typing import Annotated

import typer

from mspc.cli.console import DebugOption, JsonOption, fail, print_json, print_table, reported
from mspc.errors import InputError

OF_FORMAT = "Options of one format"


def export(
    artifact: Annotated[
        Path | None, typer.Argument(metavar="ARTIFACT", help="Folder that `mspc compress` wrote.", show_default=False)
    ] = None,
    format_name: Annotated[
        str | None,
        typer.Argument(
            metavar="FORMAT", help="dense, sparse, gptq, compressed-tensors, onnx or gguf.", show_default=False
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder to write.", show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older export.")] = False,
    verified: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Read the export back and run it in its runtimes.")
    ] = True,
    reference: Annotated[
        bool,
        typer.Option(
            "--reference", help="Keep the logits of ARTIFACT next to DIR, to run `mspc verify DIR` without ARTIFACT."
        ),
    ] = False,
    weights: Annotated[
        str | None,
        typer.Option(
            help="onnx: float32, float16, matmulnbits, qdq or sparse. (default: float32)",
            show_default=False,
            rich_help_panel=OF_FORMAT,
        ),
    ] = None,
    accuracy_level: Annotated[
        int | None,
        typer.Option(
            help="onnx, matmulnbits and sparse: 4 rounds activations to int8. (default: 0)",
            show_default=False,
            rich_help_panel=OF_FORMAT,
        ),
    ] = None,
    show_list: Annotated[bool, typer.Option("--list", help="Show the formats, and stop.")] = False,
    debug: DebugOption = False,
) -> None:
    """Write an artifact in a format that a runtime loads, and verify it there.

    \b
    mspc export --list                                     formats and runtimes
    mspc export out/small dense --out out/small-hf         for every runtime
    mspc export out/small sparse --out out/small-sparse    the small one
    mspc export out/small onnx --weights qdq --out out/small-onnx

    DIR appears when it is whole and verified; a mismatch is exit 1, and nothing
    is kept. Nothing is quantized or chosen again: a format that cannot hold what
    the artifact has is refused.
    """
    with reported(debug):
        from exporters.formats import FORMATS
        from exporters.runtimes import RUNTIMES
        from mspc.cli.tables import format_table
        from mspc.progress import Console, log

        if show_list:
            print_table(format_table(FORMATS, RUNTIMES))
            return
        if artifact is None or format_name is None or out is None:
            raise InputError("Give ARTIFACT, FORMAT and --out; `mspc export --list` shows the formats.")
        from exporters.exporting import export as export_artifact

        progress = Console()
        asked = {"weights": weights, "accuracy_level": accuracy_level}
        options = {name: value for name, value in asked.items() if value is not None}
        export_artifact(
            artifact, format_name, out, overwrite=overwrite, verified=verified, keep_reference=reference,
            options=options, progress=progress,
        )  # fmt: skip
        log.info(f"{out} written.")


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `mspc export` wrote.")],
    against: Annotated[
        Path | None,
        typer.Option(metavar="ARTIFACT", help="Compare with the artifact that DIR was made from.", show_default=False),
    ] = None,
    long: Annotated[
        bool,
        typer.Option("--long", help="Exceed windows and original contexts of more than 2048 tokens as well."),
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Prove that an export holds and computes what its artifact does; exit 1 if it does not.

    \b
    mspc verify out/small-gptq --against out/small    by the artifact itself
    mspc verify out/small-gptq                        by the export manifest

    Every file is compared by its digest, every matrix is read back by code of
    its own, and every runtime that is installed must give the same logits, within
    its tolerance, and greedy tokens up to the first that is too close to call. One
    sequence exceeds the sliding window and the original context of the config,
    if 2048 tokens do. The result goes to DIR/verification.json. Without ARTIFACT,
    runtimes are run only if the export was made with --reference.
    """
    with reported(debug):
        from exporters.verification import failures, in_short
        from exporters.verification import verify as verify_export
        from mspc.cli.tables import verification_table
        from mspc.progress import Console

        result = verify_export(folder, against, Console(), long=long)
        wrong = failures(result)
        if as_json:
            print_json(result)
        else:
            print_table(verification_table(result))
        if wrong:
            fail(f"Error: {folder} is wrong: {in_short(wrong)}.", 1)
