"""The other engines by name: what they need, the formats that they are measured in, and how each is started.

Each runs in a process of its own, with weights in memory for which pages of 2 MB were asked.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from mspc.bench.decoder import Shape
from mspc.errors import InputError, MspcError, unknown

AUTO, NONE = "auto", "none"
PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
WORKER = Path(__file__).with_name("onnx_worker.py")
FIRST_ID = 2
"""The first of the tokens of a prompt, above those that may begin or end a text."""


@dataclass(frozen=True)
class Running:
    """An engine with a model. Times are in seconds, at batch 1."""

    version: str
    decode: Callable[[int, int], float]
    """`decode(context, count)`: seconds of each of `count` tokens after `context` others."""
    prefill: Callable[[int], float]
    """`prefill(tokens)`: seconds of a prompt, and of the choice of the token after it."""


@dataclass(frozen=True)
class Engine:
    packages: tuple[str, ...]
    """Those that it is imported from, and those that write its files."""
    formats: tuple[str, ...]
    start: Callable[[Path, int, int], AbstractContextManager[Running]]
    """`start(file, threads, length)` with room for `length` tokens."""


@contextmanager
def _llamacpp(file: Path, threads: int, length: int) -> Iterator[Running]:
    from mspc.bench.peers.llamacpp import LlamaCppError, running

    def prompt(tokens: int) -> list[int]:
        return [FIRST_ID + number % 50 for number in range(tokens)]

    try:
        with running(file, length, threads, PAGES) as model:

            def decode(context: int, count: int) -> float:
                found = model.timings(prompt(context), count + 1)  # the first one comes out of the prompt
                return float(found["predicted_ms"]) / count / 1000

            def prefill(tokens: int) -> float:
                return float(model.timings(prompt(tokens), 1, known=False)["prompt_ms"]) / 1000

            yield Running(version("xllamacpp"), decode, prefill)
    except LlamaCppError as error:
        raise MspcError(f"llama.cpp: {error} Leave it out with --peers.") from error


@contextmanager
def _onnx(engine: str, folder: Path, threads: int, length: int) -> Iterator[Running]:
    command = [sys.executable, str(WORKER), engine, str(folder), str(threads)]
    pipe = subprocess.PIPE
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=said, text=True, env=os.environ | PAGES)
        assert process.stdin
        assert process.stdout

        def line() -> str:
            assert process.stdout
            if found := process.stdout.readline().strip():
                return found
            process.wait()
            said.seek(0)
            raise MspcError(f"{engine} has ended: {said.read()[-1000:].strip()}\nLeave it out with --peers.")

        def ask(*words: str | int) -> float:
            with suppress(BrokenPipeError):  # it has ended, which `line` says
                _write(process.stdin, " ".join(map(str, words)))
            return float(line())

        try:
            yield Running(line(), partial(ask, "decode"), partial(ask, "prefill"))
        finally:
            with suppress(BrokenPipeError):
                process.stdin.close()
            process.terminate()  # an engine may take long to free its memory
            process.wait()
            process.stdout.close()


def _write(pipe: IO[str] | None, text: str) -> None:
    assert pipe
    pipe.write(f"{text}\n")
    pipe.flush()


ENGINES = {
    "llama.cpp": Engine(("xllamacpp", "gguf"), ("Q4_0", "Q4_K", "Q8_0"), _llamacpp),
    "onnxruntime": Engine(("onnxruntime_genai", "onnx_ir", "onnxscript"), ("int4",), partial(_onnx, "onnxruntime")),
    "openvino": Engine(("openvino", "onnx_ir", "onnxscript"), ("int4",), partial(_onnx, "openvino")),
}


def missing(engine: str) -> list[str]:
    """The packages that an engine needs and that are not installed."""
    return [package for package in ENGINES[engine].packages if find_spec(package) is None]


def choose(asked: str) -> tuple[list[str], str | None]:
    """The engines of `--peers`, and a line about those that are not installed.

    Raises InputError for names that are unknown, and for engines that are named and not installed.
    """
    remedy = "Install mspc's extra bench: pip install '.[bench]' in mspc's folder."
    if asked == NONE:
        return [], None
    names = list(dict.fromkeys(part.strip() for part in asked.split(",")))
    if asked == AUTO:
        absent = [engine for engine in ENGINES if missing(engine)]
        told = f"Not installed, and so not measured: {', '.join(absent)}. {remedy}" if absent else None
        return [engine for engine in ENGINES if engine not in absent], told
    for name in names:
        if name not in ENGINES:
            raise unknown("engine of --peers", name, [*ENGINES, AUTO, NONE])
        if needed := missing(name):
            raise InputError(f"--peers {name} needs {' and '.join(needed)}. {remedy}")
    return names, None


def write_model(folder: Path, shape: Shape, name: str, head_bits: int) -> tuple[Path, dict[str, int]]:
    """Random weights in a format of an engine: the file or folder, and the bytes of weights that a step reads."""
    if name == "int4":
        from mspc.bench.peers.random_onnx import write_random

        return folder, write_random(folder, shape, head_bits)
    from mspc.bench.peers.random_gguf import write

    file = folder / f"{name}.gguf"
    return file, write(file, shape, name, {4: name, 8: "Q8_0"}[head_bits])


def formats_of(engines: Sequence[str]) -> list[tuple[str, str]]:
    """Every engine with each of its formats."""
    return [(engine, name) for engine in engines for name in ENGINES[engine].formats]
