"""ONNX Runtime on the CPU; the greedy continuation goes through the key-value cache, one token a step."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from exporters.manifest import ExportManifest
from exporters.runtimes import EIGHT_BITS, EXACT, HALF, ROUNDED, Runner, Unsupported
from mspc.errors import InputError
from mspc.kernels.cpu.library import onnx_library

Feeds = dict[str, NDArray[Any]]
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


def load(folder: Path, manifest: ExportManifest) -> Runner:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # its threads would burn a busy machine
    # Where it fuses DequantizeLinear with MatMul it would otherwise round activations to int8.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if manifest.options["weights"] == "sparse":
        options.register_custom_ops_library(str(library()))
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    inputs = {item.name: (item.shape, DTYPES[item.type]) for item in session.get_inputs()}
    outputs = [item.name for item in session.get_outputs()]

    def run(feeds: Feeds) -> Feeds:
        return dict(zip(outputs, session.run(outputs, feeds), strict=True))

    return cached_runner(onnxruntime.__version__, tolerance_of(manifest), inputs, run)


def tolerance_of(manifest: ExportManifest) -> float:
    options = manifest.options
    if options["weights"] == "sparse":
        return EIGHT_BITS if options["accuracy_level"] else ROUNDED
    return HALF if options["weights"] == "float16" or options["accuracy_level"] > 1 else EXACT


def library() -> Path:
    """The file of this mspc, never one in the folder. Raises Unsupported, with the remedy, if it cannot be had."""
    try:
        return onnx_library()
    except InputError as missing:
        raise Unsupported(str(missing)) from missing


def cached_runner(
    version: str, tolerance: float, inputs: Mapping[str, tuple[Sequence[Any], Any]], run: Callable[[Feeds], Feeds]
) -> Runner:
    """A decoder with a cache, from its inputs' shapes and dtypes and a function from inputs to outputs by name."""
    caches = [name for name in inputs if name.startswith("past_key_values.")]

    def step(ids: NDArray[np.int64], past: Feeds) -> tuple[NDArray[Any], Feeds]:
        length = past[caches[0]].shape[2]
        total = length + ids.shape[1]
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones((len(ids), total), np.int64),
            "position_ids": np.tile(np.arange(length, total), (len(ids), 1)),
        }
        found = run({name: value for name, value in feeds.items() if name in inputs} | past)
        return found["logits"], {name: found[name.replace("past_key_values", "present")] for name in caches}

    def empty(batch: int) -> Feeds:
        return {name: np.zeros((batch, shape[1], 0, shape[3]), dtype) for name, (shape, dtype) in inputs.items()
                if name in caches}  # fmt: skip

    def logits(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        first, past = step(ids[:, :-1], empty(len(ids)))
        last, _ = step(ids[:, -1:], past)  # so that the cache is part of what is compared
        return np.concatenate([first, last], axis=1).astype(np.float32)

    def generate(prompt: Sequence[int], count: int) -> list[int]:
        ids, past, tokens = np.array([list(prompt)], np.int64), empty(1), []
        for _ in range(count):
            scores, past = step(ids, past)
            tokens.append(int(scores[0, -1].argmax()))
            ids = np.array([[tokens[-1]]], np.int64)
        return tokens

    def last(ids: NDArray[np.int64], decoded: int, count: int) -> NDArray[np.float32]:
        split, past = ids.shape[1] - decoded, empty(1)
        parts: list[NDArray[Any]] = []
        for begin, end in pairwise([0, *range(split, ids.shape[1] + 1)]):
            scores, past = step(ids[:, begin:end], past)
            parts.append(scores[:, -count:])
        return np.concatenate(parts, axis=1)[:, -count:].astype(np.float32)

    return Runner(version, tolerance, logits, generate, last)
