"""Parts that the verbs of the command line share: options, printing, and errors as exit codes."""

import json
import logging
import os
import platform
import shlex
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from mspc import ranks
from mspc.errors import InputError, MspcError, in_brief, is_out_of_memory
from mspc.progress import log
from mspc.recipe import Recipe
from mspc.settings import has_goal
from mspc.version import __version__

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder, .gguf file or hub id.")]
ArtifactArgument = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder that `mspc compress` wrote.")]
OutOption = Annotated[Path, typer.Option(help="Folder to write.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
DeviceOption = Annotated[
    str | None, typer.Option(help="Device to compute on: auto, cpu, cuda, cuda:1, ... (default: auto)")
]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="Dtype of the forward passes: auto, float32, bfloat16 or float16. (default: auto)"),
]
InputsOption = Annotated[
    str | None,
    typer.Option(help="Rounding of what codes are multiplied by on a CPU: int16 or int8. (default: int16)"),
]
LengthOption = Annotated[
    int | None,
    typer.Option(help="Number of tokens per window. (default: 2048, or the model's maximum if that is less)"),
]

BosOption = Annotated[
    str,
    typer.Option(
        metavar="auto|yes|no",
        help="Whether windows begin with a BOS token: auto (as the tokenizer begins a text), yes or no.",
    ),
]
ColumnOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Field or column of the text. (default: text, messages or conversations)",
        show_default=False,
    ),
]
EncodingOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Encoding of .txt files. (default: utf-8)", show_default=False)
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Threads of the CPU. (default: OMP_NUM_THREADS, or the cores that affinity and cgroup allow)",
        show_default=False,
    ),
]


def option(text: str, default: object, *names: str, **settings: Any) -> Any:
    """An option that is None if it is not given; the help shows the default that then holds."""
    return typer.Option(*names, help=f"{text} (default: {default})", show_default=False, **settings)


def print_table(table: Table) -> None:
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)


def print_json(value: dict[str, Any]) -> None:
    """JSON knows no NaN and no infinity: they are null."""
    print(json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None)))


class ToStderr(logging.Handler):
    """Prints messages. The stream is looked up each time, so that rich can print above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        note = "Warning: " if record.levelno >= logging.ERROR else "Note: " if record.levelno >= logging.WARNING else ""
        print(f"{note}{record.getMessage()}", file=sys.stderr)


@contextmanager
def reported(debug: bool, kept: str = "") -> Iterator[None]:
    """Turn errors into one paragraph on stderr and an exit code; with --debug they keep their traceback.

    Messages of mspc are printed to stderr meanwhile. `kept` is the message about what an interruption leaves.
    """
    handler: logging.Handler = ToStderr() if ranks.of_environment().rank == 0 else logging.NullHandler()
    logger = logging.getLogger("mspc")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        yield
    except KeyboardInterrupt:
        fail(f"\nInterrupted. {kept}".rstrip(), 130)
    except (MspcError, OSError) as error:
        if debug:
            raise
        ranks.await_report(error)
        fail(f"Error: {error}", error.exit_code if isinstance(error, MspcError) else 1)
    except Exception as error:
        if debug or not is_out_of_memory(error):
            raise  # a bug, which `main` reports
        fail(f"Error: the memory was not enough ({in_brief(error)}). Free some, or choose a smaller model.", 1)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def fail(message: str, code: int) -> NoReturn:
    """Print a message and end with an exit code. Of several ranks, the first that fails does so for all."""
    other = ranks.speaks(code)
    if other is None:
        print(message, file=sys.stderr)
    else:
        ranks.await_report()
    if ranks.place().size == 1:
        raise SystemExit(code if other is None else other)
    sys.stderr.flush()
    os._exit(code if other is None else other)  # others may wait for this rank, and what parts in order waits for them


def report_bug(error: BaseException) -> NoReturn:
    """Say that an exception is a bug of mspc, and write what a report needs to a file: exit code 1."""
    packages = ("torch", "transformers", "safetensors", "tokenizers", "numpy")
    versions = [f"{name} {version(name)}" for name in packages]
    lines = [f"mspc {__version__}, Python {platform.python_version()}, {platform.platform()}", ", ".join(versions)]
    lines += [shlex.join(["mspc", *sys.argv[1:]]), "", *traceback.format_exception(error)]
    with tempfile.NamedTemporaryFile("w", prefix="mspc-bug-", suffix=".txt", delete=False, encoding="utf-8") as file:
        file.write("\n".join(line.rstrip("\n") for line in lines) + "\n")
    fail(
        f"Error: {in_brief(error)}. This is a bug of mspc, whatever the input was. Report it and attach {file.name}: "
        "it has the versions, the command and the traceback.",
        1,
    )


def with_recipe(path: Path | None, given: dict[str, Any]) -> Recipe:
    """The recipe of a file and of the options given on the command line, which win.

    As few options of the file as possible are left out so that the others fit the options given.
    """
    file = {} if path is None else Recipe.from_toml(path).to_dict()
    own = [name for name in file if name not in given and not (name == "alpha" and "allocator" in given)]
    for count in range(len(own) + 1):
        for gone in combinations(own, count):
            with suppress(InputError):
                recipe = Recipe.from_dict({name: file[name] for name in own if name not in gone} | given)
                if has_goal(file) and not recipe.has_goal:
                    continue  # the default would replace the goal of the file
                if gone:
                    log.info(f"{path}: {', '.join(gone)} left out, as the options given here exclude that.")
                return recipe
    return Recipe.from_dict(file | given)
