"""Parts that the verbs of the command line share: options, printing, and errors as exit codes."""

import json
import logging
import platform
import shlex
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from mspc.errors import MspcError, in_brief, is_out_of_memory
from mspc.recipe import Recipe
from mspc.settings import EFFORTS
from mspc.version import __version__

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder or hub id.")]
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
LengthOption = Annotated[
    int | None,
    typer.Option(help="Number of tokens per window. (default: 2048, or the model's maximum if that is less)"),
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
        print(record.getMessage(), file=sys.stderr)


@contextmanager
def reported(debug: bool, kept: str = "") -> Iterator[None]:
    """Turn errors into one paragraph on stderr and an exit code; with --debug they keep their traceback.

    Messages of mspc are printed to stderr meanwhile. `kept` is the message about what an interruption leaves.
    """
    handler, logger = ToStderr(), logging.getLogger("mspc")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    except KeyboardInterrupt:
        fail(f"\nInterrupted. {kept}".rstrip(), 130)
    except (MspcError, OSError) as error:
        if debug:
            raise
        fail(f"Error: {error}", error.exit_code if isinstance(error, MspcError) else 1)
    except Exception as error:
        if debug or not is_out_of_memory(error):
            raise  # a bug, which `main` reports
        fail(f"Error: the memory was not enough ({in_brief(error)}). Free some, or choose a smaller model.", 1)
    finally:
        logger.removeHandler(handler)


def fail(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(code)


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


BUDGETS = {"bits_per_weight", "target_size"}
BY_SOLVER = {"iterations", "criterion", "propagation", "activation_order"}
BY_ALLOCATOR = {"alpha", "search_minutes", "sensitivity", "sensitivity_probes"}
REPLACED_BY = {
    "pattern": {"sparsity"},
    "sparsity": BUDGETS,
    "bits": BUDGETS,
    "bits_per_weight": {"sparsity", "bits", "target_size"},
    "target_size": {"sparsity", "bits", "bits_per_weight"},
    "plan": {"sparsity", "pattern", "bits", "group_size", "asymmetric", "allocator", *BUDGETS, *BY_ALLOCATOR},
    "effort": {*EFFORTS["default"], *BY_SOLVER, *BY_ALLOCATOR},
    "solver": BY_SOLVER,
    "allocator": BY_ALLOCATOR,
}
"""Options of a recipe file that an option of the command line excludes, or that only fit the one it replaces."""


def recipe_values(path: Path | None, chosen: dict[str, Any]) -> dict[str, Any]:
    """The values of a recipe file, without those that the options given on the command line replace."""
    if path is None:
        return {}
    gone = set[str]().union(*(REPLACED_BY.get(name, set()) for name in chosen))
    return {name: value for name, value in Recipe.from_toml(path).to_dict().items() if name not in gone}
