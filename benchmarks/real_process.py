"""A command of a row of quality_real.py in a process of its own: seconds, peak memory, date, load and commit."""

import datetime
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from environments import variables_of_its_own

ROOT = Path(__file__).parents[1]


class RowError(Exception):
    """A row that cannot be made, with what its command said."""


def measured(command: Sequence[str | Path], threads: int, log: Path) -> dict[str, Any]:
    """The cost of running the command; its output goes to `log`. Raises RowError with the end of that if it fails.

    The peak memory is the resident memory of its largest process.
    """
    words = [str(word) for word in command]
    variables = dict(os.environ) if words[0] == sys.executable else variables_of_its_own()
    variables |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    load, date, begin = os.getloadavg()[0], datetime.datetime.now(datetime.UTC), time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(words, env=variables, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RowError(f"exit code {process.returncode}: {end_of(log)}")
    scale = 1 if sys.platform == "darwin" else 1024
    return {
        "date": date.isoformat(timespec="seconds"),
        "commit": commit(),
        "command": shown(words),
        "threads": threads,
        "load_average_before": round(load, 2),
        "seconds": round(time.monotonic() - begin, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_memory_bytes": usage.ru_maxrss * scale,
    }


def end_of(log: Path) -> str:
    """The last lines of a log without paths of this machine."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return without_folders("; ".join(lines[-3:]))[-600:]


def without_folders(text: str) -> str:
    """A text whose absolute paths are only their last parts."""
    return re.sub(r"(?<![\w.])/(?:[^\s/:;'\"]+/)+", "", text)


def shown(words: Sequence[str]) -> str:
    """A command as results show it."""
    return without_folders(" ".join(words))


def commit() -> str:
    """The commit of this checkout; empty outside of one."""
    done = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def version_of(python: Path, package: str) -> str:
    """`NAME VERSION` of a package in that environment."""
    program = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run([str(python), "-c", program], env=variables_of_its_own(), capture_output=True, text=True)
    return f"{package} {done.stdout.strip()}"


def output_of(command: Sequence[str]) -> list[str]:
    """The lines that a command prints. Exits if it fails; its messages go to stderr."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{shown(command)} failed.")
    return done.stdout.splitlines()


def cache_folder() -> Path:
    """The cache of mspc, as `mspc.storage.files.cache_folder` finds it.

    That one imports torch, and the memory of this process would count as that of what it starts.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mspc"


def write_json(path: Path, value: object) -> None:
    """Write a file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)
