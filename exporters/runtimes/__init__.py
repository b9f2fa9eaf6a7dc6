"""The runtimes that exports are made for, each behind `load(folder, export manifest) -> Runner`.

A runtime that rules a format out by itself raises Unsupported with the reason; one that is not installed raises the
ModuleNotFoundError of its import.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporters.manifest import ExportManifest


class Unsupported(Exception):
    """The runtime is known not to load this export; the message is the reason."""


@dataclass(frozen=True)
class Runner:
    """A loaded model. `tolerance` is the relative error of logits that the arithmetic of the runtime explains."""

    version: str
    tolerance: float
    logits: Callable[[NDArray[np.int64]], NDArray[np.float32]]
    """Tokens (B, T) -> logits (B, T, V)."""
    generate: Callable[[Sequence[int], int], list[int]]
    """Prompt, number of tokens -> the greedy continuation, by the runtime's own generation where it has one."""
    last_logits: Callable[[NDArray[np.int64], int, int], NDArray[np.float32]]
    """Tokens (1, T), N, K -> logits (1, K, V) of the last K; the last N are added to the cache one by one."""


@dataclass(frozen=True)
class Runtime:
    module: str
    tested: str
    """The version whose results are known."""
    install: str


RUNTIMES = {
    "onnxruntime": Runtime(
        "exporters.runtimes.onnxruntime", "1.32", "the extra onnx of mspc (pip install '.[onnx]' in its folder)"
    ),
    "onnxruntime-genai": Runtime(
        "exporters.runtimes.onnxruntime_genai", "0.18", "the extra onnx of mspc (pip install '.[onnx]' in its folder)"
    ),
    "openvino": Runtime(
        "exporters.runtimes.openvino", "2026.4", "the extra openvino of mspc (pip install '.[openvino]' in its folder)"
    ),
    "gptqmodel": Runtime(
        "exporters.runtimes.gptqmodel", "7.6", "the extra gptq of mspc (pip install '.[gptq]' in its folder)"
    ),
    "transformers": Runtime(
        "exporters.runtimes.transformers",
        "5.23",
        "the extra gptq, compressed-tensors or gguf of mspc (pip install '.[gptq]' in its folder)",
    ),
    "vllm": Runtime("exporters.runtimes.vllm", "0.32", "vLLM for CPUs (`make test-vllm` shows how)"),
}

EXACT = 1e-4
"""Only the order of float32 sums differs."""
ROUNDED = 1e-3
"""Inputs of codes are rounded to 16 bits before every product."""
FLOAT32 = 1e-2
"""Products of a grid may be rounded to the model's dtype on the way; a wrong layout is off by 0.1 and more."""
HALF = 3e-2
EIGHT_BITS = 8e-2
"""Inputs of codes are rounded to 8 bits in each group before every product."""


def load(name: str, folder: Path, manifest: ExportManifest) -> Runner:
    runner: Runner = importlib.import_module(RUNTIMES[name].module).load(folder, manifest)
    return runner
