"""The verb `generate` of the command line."""

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mspc.cli.console import (
    DebugOption,
    DeviceOption,
    DtypeOption,
    InputsOption,
    JsonOption,
    ThreadsOption,
    option,
    print_json,
    reported,
)
from mspc.errors import InputError
from mspc.progress import log

if TYPE_CHECKING:
    from mspc.runtime.generation import Generation


def generate(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="Artifact, dense or sparse export, checkpoint folder, .gguf file or hub id.",
            show_default=False,
        ),
    ],
    prompt: Annotated[str | None, option("Prompt of the text.", "stdin", metavar="TEXT")] = None,
    max_new_tokens: Annotated[int | None, option("Number of tokens to write at most.", 256, metavar="N")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template of the model.")
    ] = False,
    temperature: Annotated[
        float | None,
        option("Draw tokens at this temperature, such as 0.7.", "take the likeliest ones", metavar="T"),
    ] = None,
    seed: Annotated[int | None, option("Seed of the draws; another one gives another text.", 0, metavar="S")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    inputs: InputsOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Let a model answer a prompt, or continue it.

    \b
    mspc generate out/small --prompt "Why is the sky blue?"
    mspc generate out/small --prompt "Once upon a time" --raw
    mspc generate out/small < prompt.txt > text.txt
    mspc generate out/small --prompt "Tell a story." --temperature 0.7 --seed 1

    The prompt is a message in the chat template of the model, where it has one.
    The text goes to stdout as it is written, and all else to stderr: at the end
    the number of tokens, and the speed of reading the prompt and of writing.
    """
    with reported(debug):
        given = _from_stdin() if prompt is None else prompt
        from mspc.api import generate as start

        written = start(
            path, given, max_new_tokens=max_new_tokens, raw=raw, temperature=temperature, seed=seed,
            device=device or "auto", dtype=dtype or "auto", threads=threads, inputs=inputs or "int16",
        )  # fmt: skip
        if as_json:
            _print_whole(written)
        else:
            _stream(written)
        log.info(_closing(written))


def _from_stdin() -> str:
    """The prompt on stdin, without the ends of lines after it. Raises InputError where somebody would have to type."""
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError("There is no prompt. Give --prompt TEXT, or a file on stdin: mspc generate PATH < prompt.txt")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"The prompt on stdin is no UTF-8 ({error}). Convert it.") from error


def _stream(written: "Generation") -> None:
    """Print pieces as they come, and the end of the last line."""
    last = ""
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal may lack some characters
    try:
        for piece in written:
            last = piece
            print(piece, end="", flush=True)
        if not last.endswith("\n"):
            print(flush=True)
    except BrokenPipeError:  # whoever reads has enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        raise SystemExit(1) from None


def _print_whole(written: "Generation") -> None:
    """Print one JSON object, also where the text is interrupted."""
    pieces: list[str] = []
    try:
        pieces.extend(written)
    finally:
        if written.ids:
            print_json(_figures(written) | {"text": "".join(pieces)})


def _figures(written: "Generation") -> dict[str, Any]:
    return {
        "ended": written.ended or None,
        "prompt_tokens": written.prompt_tokens,
        "tokens": len(written.ids),
        "prefill_seconds": written.prefill_seconds,
        "decode_seconds": written.decode_seconds,
        "prefill_tokens_per_second": written.prefill_tokens_per_second,
        "tokens_per_second": written.tokens_per_second,
    }


def _closing(written: "Generation") -> str:
    """Tokens and speeds in one line."""
    words = {"end of text": "the text ended", "limit": "--max-new-tokens reached", "context": "the context is full"}
    rate = "" if written.tokens_per_second is None else f", {written.tokens_per_second:.1f} tokens/s"
    return (
        f"Prompt: {written.prompt_tokens:,} tokens in {written.prefill_seconds:.2f} s, "
        f"{written.prefill_tokens_per_second or 0:.1f} tokens/s. Text: {len(written.ids):,} tokens in "
        f"{written.decode_seconds:.2f} s{rate}; {words[written.ended]}."
    )
