"""ONNX Runtime GenAI on the CPU: an ONNX folder by its genai_config.json, a GPTQ folder through its model builder."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime_genai as genai
from numpy.typing import NDArray
from transformers import AutoConfig

from exporters.limits import limits_of, ropes, windows_of
from exporters.manifest import ExportManifest
from exporters.runtimes import FLOAT32, Runner, Unsupported
from exporters.runtimes.onnxruntime import library, tolerance_of
from mspc.errors import InputError
from mspc.kernels.cpu.building import NAME
from mspc.model.config_checks import setting_of

LIBRARY = "custom_ops_library"
ROPE_TYPES = {"default", "llama3"}
NOT_ROUNDED = "/lm_head/MatMul,/model/embed_tokens/Gather"


def load(folder: Path, manifest: ExportManifest) -> Runner:
    is_sparse = manifest.options.get("weights") == "sparse"
    if manifest.format != "gptq":
        check_libraries(folder, is_sparse)
    if is_sparse:
        beside = folder.parent if os.access(folder.parent, os.W_OK) else None
        with TemporaryDirectory(prefix="mspc-genai-", dir=beside) as linked:
            link_with_library(folder, Path(linked))
            return runner_of(genai.Model(linked), tolerance_of(manifest))
    if manifest.format != "gptq":
        return runner_of(genai.Model(str(folder)), tolerance_of(manifest))
    _check_gptq(folder, manifest)
    with TemporaryDirectory(prefix="mspc-genai-") as built:
        build(folder, Path(built))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        windows = [limit.tokens for limit in limits_of(config) if limit in windows_of(config)]
        return runner_of(genai.Model(built), FLOAT32, max(windows, default=0) + 1)


def check_libraries(folder: Path, is_sparse: bool) -> None:
    """Raises InputError if GenAI would run another library than that of this mspc, for sparse weights."""

    def asked(value: Any) -> Iterator[Any]:
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(part, dict | list):
                yield from asked(part)
            elif key == LIBRARY:
                yield part

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """GenAI reads every value of a key that is repeated, and Python the last."""
        if repeated := {key for key, _ in pairs if [other for other, _ in pairs].count(key) > 1}:
            raise InputError(
                f"{folder / 'genai_config.json'} repeats {', '.join(sorted(repeated))}. Delete all but one."
            )
        return dict(pairs)

    text = (folder / "genai_config.json").read_text(encoding="utf-8")
    config = json.loads(text, object_pairs_hook=once)
    for name in asked(config if isinstance(config, dict) else {}):
        if not is_sparse or name != NAME:
            raise InputError(
                f"{folder / 'genai_config.json'} asks for the library {name}, and mspc runs none of an export. Delete "
                f"{LIBRARY} there."
            )


def link_with_library(folder: Path, out: Path) -> None:
    """Fill a folder with the files of an export and the library of this mspc: GenAI takes one from no other folder.

    A library of that name in the export is not taken, and `check_libraries` sees to others. Names of one file are no
    copies, where the file system has them.
    """
    wanted = library()
    for path in folder.iterdir():
        if path.is_file() and path.name != wanted.name:
            try:
                os.link(path, out / path.name)
            except OSError:
                shutil.copy(path, out / path.name)
    shutil.copy(wanted, out / wanted.name)


def _check_gptq(folder: Path, manifest: ExportManifest) -> None:
    """Raises Unsupported for folders that its model builder is known not to read."""
    grids = [entry.target.grid for entry in manifest.entries if entry.target.grid]
    if not all(grid.symmetric for grid in grids):
        raise Unsupported("its model builder reads the zero points of gptq_v2 as those of gptq")
    if any(grid.bits == 3 for grid in grids):
        raise Unsupported("its model builder does not unpack 3 bits")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if "modules_in_block_to_quantize" in config.quantization_config:
        raise Unsupported("its model builder takes no GPTQ folder with matrices left dense")
    if len(parts := ropes(config)) > 1:
        raise Unsupported("its model builder does not read rotary embeddings that differ between layers")
    if others := {part["rope_type"] for part in parts} - ROPE_TYPES:
        raise Unsupported(f"its model builder does not compute rotary embeddings of rope_type {min(others)}")
    if windows_of(config) and not setting_of(config, "layer_types"):
        raise Unsupported("its model builder leaves out a sliding window unless layer_types say where it is")


def build(folder: Path, out: Path) -> None:
    """The extra options keep it from quantizing embeddings, head and activations."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(folder), "-o", str(out)]
    command += ["-p", "int4", "-e", "cpu", "-c", str(out / "cache")]
    command += ["--extra_options", "accuracy_level=1", f"nodes_to_exclude={NOT_ROUNDED}", "hf_remote=false"]
    done = subprocess.run(command, capture_output=True, text=True)
    if "model is not currently supported" in done.stderr:
        raise Unsupported("its model builder does not know this architecture")
    if done.returncode:
        raise RuntimeError(f"its model builder failed: {done.stderr.strip().splitlines()[-1]}")


def runner_of(model: Any, tolerance: float, least: int = 1) -> Runner:
    """`least` is the smallest capacity of a cache: its windowed ones must hold more than the window."""

    def generator(rows: int, length: int) -> Any:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=max(length, least), do_sample=False, batch_size=rows)
        return genai.Generator(model, parameters)

    def logits(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        running = generator(len(ids), ids.shape[1] + 1)
        running.append_tokens(ids.astype(np.int32))
        return np.array(running.get_output("logits")).astype(np.float32)

    def generate(prompt: Sequence[int], count: int) -> list[int]:
        running, ids, tokens = generator(1, len(prompt) + count), list(prompt), []
        for _ in range(count):  # not by its own choice of tokens, which ends at an end token
            running.append_tokens(np.array([ids], np.int32))
            tokens.append(int(np.array(running.get_output("logits"))[0, -1].argmax()))
            ids = tokens[-1:]
        return tokens

    def last(ids: NDArray[np.int64], decoded: int, count: int) -> NDArray[np.float32]:
        length = ids.shape[1]
        running, split, parts = generator(1, length), length - decoded, []
        for begin, end in pairwise([0, *range(split, length + 1)]):
            running.append_tokens(ids[:, begin:end].astype(np.int32))
            parts.append(np.array(running.get_output("logits"))[:, -count:])
        return np.concatenate(parts, axis=1)[:, -count:].astype(np.float32)

    return Runner(genai.__version__, tolerance, logits, generate, last)
