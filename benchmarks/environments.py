"""Virtual environments of tools that cannot live in the one of mspc, installed from a file of pinned requirements."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

STAMP = "mspc-requirements.txt"
"""The file in an environment of ours that holds its requirements."""


def environment(
    folder: Path, requirements: Path, *, built_last: str = "", variables: dict[str, str] | None = None
) -> Path:
    """The Python of the environment `folder`, installed anew unless it has the requirements as they are now.

    `built_last` is a package whose setup.py imports others: they come first, and it is built without isolation.
    `variables` are added to the environment variables of pip. Exits with a remedy if pip fails, or if
    the folder was made by somebody else.
    """
    stamp, python = folder / STAMP, folder / "bin" / "python"
    wanted = requirements.read_text(encoding="utf-8")
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    if folder.exists() and not stamp.is_file():
        sys.exit(f"{folder} is there and has no {STAMP}, so it may be yours. Choose another --venv, or delete it.")
    shutil.rmtree(folder, ignore_errors=True)
    print(f"Installing {requirements.name} into {folder}", flush=True)
    folder.mkdir(parents=True)
    stamp.write_text("", encoding="utf-8")  # first, so that one that was cut off is known too
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    lines = [line for line in wanted.splitlines() if line and not line.startswith("#")]
    last = [line for line in lines if built_last and line.startswith(built_last)]
    _install(python, [line for line in lines if line not in last], variables)
    if last:
        _install(python, ["--no-build-isolation", *last], variables)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def _install(python: Path, arguments: list[str], variables: dict[str, str] | None) -> None:
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, env=os.environ | (variables or {}), stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(
            f"{done.stderr[-2000:]}\npip could not install {' '.join(arguments)}. It needs a package index. Check the "
            f"network or pip's settings (`pip config list`), and run this again."
        )


def variables_of_its_own() -> dict[str, str]:
    """Variables for a process of such an environment, without the two that would change the packages that it finds."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
