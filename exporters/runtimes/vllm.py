"""vLLM on the CPU, in a process of its own: it sets up threads and groups of processes that one process has only once.

Whole sequences are read at once, the long one too, and only the greedy continuation goes through the cache.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from vllm.platforms import current_platform

from exporters.manifest import ExportManifest
from exporters.runtimes import FLOAT32, HALF, Runner, Unsupported
from mspc.errors import MspcError

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
SECONDS = 1200
"""A start takes up to minutes on a busy machine."""


def load(folder: Path, manifest: ExportManifest) -> Runner:
    if not current_platform.is_cpu():
        raise Unsupported("it is run on a CPU only, and this vLLM is for another device")
    half = manifest.format in ("gptq", "compressed-tensors")  # its kernels of integers take no float32 on a CPU
    grids = {entry.target.grid for entry in manifest.entries if entry.target.grid}
    if half and (len(grids) > 1 or any(grid.bits != 4 or not grid.symmetric for grid in grids)):
        raise Unsupported("of packed codes only symmetric ones of 4 bits, with one group size, were tried in it")
    load_format = "mspc" if manifest.format == "sparse" else "auto"  # so experts too
    process = _Process(folder, "bfloat16" if half else "float32", load_format)

    def logits(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.stack([process.ask(row.tolist())[0] for row in ids])

    def generate(prompt: Sequence[int], count: int) -> list[int]:
        return [int(token) for token in process.ask(list(prompt), count)[1]]

    def last(ids: NDArray[np.int64], decoded: int, count: int) -> NDArray[np.float32]:
        return process.ask(ids[0].tolist())[0][None, -count:]

    return Runner(_version(), HALF if half else FLOAT32, logits, generate, last)


def _version() -> str:
    try:
        return version("vllm")
    except PackageNotFoundError:
        return version("vllm-cpu")


class _Process:
    """One model that answers until this is deleted."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._answers = TemporaryDirectory(prefix="mspc-vllm-")
        self._said = Path(self._answers.name, "said")
        module = "exporters.runtimes.vllm_process"
        command = [sys.executable, "-m", module, str(folder), self._answers.name, *options]
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True,
                env=os.environ | ENVIRONMENT,
            )  # fmt: skip

    def ask(self, ids: list[int], count: int = 1) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Logits (T, V) of a sequence, and its greedy continuation. Raises MspcError where the process ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([ids, count]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        limit = Timer(SECONDS, self._process.kill)
        limit.start()
        path = self._process.stdout.readline().strip()
        limit.cancel()
        if not path:
            self._process.wait()
            self._fail(self._said.read_text(encoding="utf-8", errors="replace"))
        with np.load(path) as found:
            return found["logits"], found["tokens"]

    def _fail(self, said: str) -> NoReturn:
        """Raises Unsupported where vLLM says that it is so, and MspcError with its error else."""
        reason = _reason(said)
        if any(word in reason.lower() for word in ("not support", "unsupported")):
            raise Unsupported(reason)
        raise MspcError(reason)

    def __del__(self) -> None:
        process: Any = getattr(self, "_process", None)
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()


def _reason(said: str) -> str:
    """The last line of a traceback that names an error."""
    lines = [line.strip() for line in said.splitlines() if "Error" in line and not line.startswith(" ")]
    return lines[-1] if lines else "the process ended without a word"
