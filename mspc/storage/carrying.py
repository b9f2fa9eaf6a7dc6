"""The rule for the files of a model that are no weights, and the copies of them.

All files travel from a checkpoint to the artifact, and from there to each export, but for what is known not to belong:
weights in any format and their indexes, leftovers of quantization, adapters and training, caches, hidden files, and the
files of mspc itself. Downloads from the hub obey the same rule.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from fnmatch import translate
from functools import cache, partial
from pathlib import Path
from typing import Any

from mspc.errors import InputError
from mspc.progress import log
from mspc.storage.artifact import (
    EXPORTS,
    MATRICES,
    MEASUREMENTS,
    PAGE,
    PLAN,
    RECIPE,
    REFERENCE,
    REPORT,
    TIMINGS,
    UNCHANGED,
)
from mspc.storage.checkpoint import INDEX
from mspc.storage.config_json import corrected
from mspc.storage.dequantized import dense_config
from mspc.storage.files import write_atomically, write_json
from mspc.storage.journal import NAME as JOURNAL
from mspc.storage.manifest import EXPORT_MANIFEST, MANIFEST

OWN_FILES = [MANIFEST, EXPORT_MANIFEST, JOURNAL, REPORT, REFERENCE, PLAN, RECIPE, TIMINGS, PAGE]
OWN_FOLDERS = [MATRICES, UNCHANGED, MEASUREMENTS, EXPORTS]
MARKS = (MANIFEST, EXPORT_MANIFEST, JOURNAL)
"""Files by which a folder is known as an output of mspc."""


def _anywhere(*names: str) -> list[str]:
    """Patterns of files or folders at any depth; `*` matches `/` too."""
    return [pattern for name in names for pattern in (name, f"*/{name}")]


HIDDEN = _anywhere(".*")
CACHES = _anywhere(
    "__pycache__/*", "__macosx/*", "cvs/*", "node_modules/*", "wandb/*", "*.py[co]", "*.incomplete", "thumbs.db",
    "desktop.ini", "events.out.tfevents*", "checkpoint-[0-9]*/*", "global_step[0-9]*/*",
)  # fmt: skip
_SUFFIXES = (
    "safetensors", "pt", "pth", "ckpt", "h5", "hdf5", "keras", "msgpack", "onnx", "onnx[._]data", "ort", "gguf",
    "ggml", "llamafile", "tflite", "litertlm", "task", "pte", "mlmodel", "mlpackage/*", "mlmodelc/*", "mnn", "ot",
    "params", "caffemodel", "engine", "trt", "nemo", "mar", "distcp", "vmfb", "dduf", "joblib",
)  # fmt: skip
_ENDINGS = ("", "~", ".bak", ".backup", ".old", ".orig", ".tmp", ".part*", ".[0-9]*", ".gz", ".xz", ".zst", ".zip")
_TITLES = (
    "model", "weight", "adapter", "lora", "optim", "schedul", "scaler", "training_args", "state", "ggml", "param",
)  # fmt: skip
WEIGHTS = [
    *(f"*.{suffix}{ending}" for suffix in _SUFFIXES for ending in _ENDINGS),
    *(f"*.{suffix}.*" for suffix in ("safetensors", "gguf", "ggml", "onnx")),
    *(f"*{title}*.{suffix}{ending}" for title in _TITLES for suffix in ("bin", "pkl", "pickle", "npz", "dat", "pb")
      for ending in _ENDINGS),
    *("*.index.json", "*.index.*.json", "*.ckpt*.index", "*.ckpt*.meta", "*variables.index", "*.data-[0-9]*-of-[0-9]*"),
    "*.onnx_data_*",
    *_anywhere("openvino*model*.xml", "consolidated.*"),
]  # fmt: skip
"""Weights and their indexes, with what backups and downloads append to names."""
LEFTOVERS = _anywhere(
    "adapter_config*.json", "adapters.*", "quantize_config*", "quant_config*.json", "quantization_config*.json",
    "hf_quant_config.json", "quant_log*", "quant_strategy*", "gptq_log*", "quantization_map.json", "imatrix*",
    "*.imatrix", "measurement.json", "job_new.json", "recipe.yaml", "smash_config.json", "genai_config.json",
    "mlc-chat-config.json", "ndarray-cache*.json", "ort_config.json", "openvino_config.json",
)  # fmt: skip
"""Files of adapters, of another quantization, and of other runtimes' weights, which would mislead loaders."""
VOCABULARIES = [
    f"*{title}*.{suffix}"
    for title in ("vocab", "token", "merges", "bpe", "spm", "sentencepiece")
    for suffix in ("bin", "pkl", "npz", "dat", "pb")
]
"""Files that belong although their names are those of weights."""
OWN = [*OWN_FILES, *(f"{folder}/*" for folder in OWN_FOLDERS)]
NEVER = [*OWN, *HIDDEN, *CACHES, *LEFTOVERS]
LEFT_OUT = [*NEVER, *WEIGHTS]
HEADS = (b"GGUF", b"\x89HDF\r\n", b"lmgg", b"fmgg", b"tjgg", b"\x80\x02\x8a\nl\xfc\x9cF\xf9")
"""First bytes of GGUF, HDF5, three kinds of GGML, and pickles of torch before 1.6."""
SHOWN = 30
"""Names in the message at most; checkpoints with hundreds of shards exist."""


def belongs(name: str) -> bool:
    """Tell if a file of a repository, by its path there with `/`, belongs to the model and is no weights."""
    return not _matches(name, LEFT_OUT) or (
        _matches(name.rpartition("/")[2], VOCABULARIES) and not _matches(name, NEVER)
    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return _one_of(tuple(patterns)).match(name.lower()) is not None


@cache
def _one_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """All patterns as one expression; there are more than `fnmatch` keeps."""
    return re.compile("|".join(map(translate, patterns)) or "(?!)")


def carry(source: Path, out: Path, read: Iterable[str] = ()) -> None:
    """Copy all that belongs to the model of a folder, and say in one line what was left out.

    `read` are the weights that travel in another way. Configs are corrected: see `config_json.corrected`.
    """
    left_out = []
    for name, path in _walk(source, out.resolve(), ""):
        if path is None or not belongs(name) or _holds_weights(path):
            left_out.append(name)
        elif (config := _corrected_config(path, name, source)) is not None:
            write_json(out / name, config)
        else:
            write_atomically(out / name, partial(shutil.copyfile, path))
    silent, own = {*read, INDEX}, OWN if _is_output(source) else []
    told = [name for name in left_out if name not in silent and not _matches(name, own)]
    if told:
        shown = ", ".join(_printable(name) for name in told[:SHOWN])
        more = f" and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
        log.info(f"Left out, as no part of the model: {shown}{more}.")


def _walk(folder: Path, out: Path, prefix: str, above: tuple[Path, ...] = ()) -> Iterator[tuple[str, Path | None]]:
    """`(name, file)` in order, through links too; None in place of the file for what cannot be copied.

    A folder that does not belong is one name with `/` at its end, as is a link to a folder that it is in.
    """
    above = (*above, folder.resolve())
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error}). Make it readable, or remove it.") from error
    for path in paths:
        name = prefix + path.name
        if not path.is_dir():
            yield name, path if path.is_file() else None
        elif not belongs(f"{name}/x") or path.resolve() == out or _is_output(path) or _leads_up(path, above):
            yield f"{name}/", None
        else:
            yield from _walk(path, out, f"{name}/", above)


def _leads_up(folder: Path, above: Iterable[Path]) -> bool:
    return any(other.is_relative_to(folder.resolve()) for other in above)


def _is_output(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in MARKS)


def _holds_weights(path: Path) -> bool:
    """Tell by the first bytes, whatever the name, if a file is safetensors, a pickle of torch, GGUF, GGML or HDF5."""
    try:
        with path.open("rb") as file:
            head = file.read(128)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}). Make it readable, or remove it.") from error
    if head.startswith(HEADS) or (head.startswith(b"PK\x03\x04") and b"/data.pkl" in head):
        return True
    return head[8:10] == b'{"' and int.from_bytes(head[:8], "little") + 8 <= path.stat().st_size


def _corrected_config(path: Path, name: str, source: Path) -> dict[str, Any] | None:
    """A config of dense weights, without what is not there. None where it is right as it is, or is no config."""
    if not name.endswith("config.json"):
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(config, dict):
        return None
    dense = dense_config(config, source) if path == source / "config.json" else config
    found = corrected(dense, lambda file: is_carried(path.parent, file) or is_carried(source, file))
    return None if found == config else found


def is_carried(folder: Path, name: str) -> bool:
    """Tell if a folder has a file of this name, which belongs to the model."""
    try:
        return belongs(name) and (folder / name).is_file()
    except OSError:  # a name that is too long
        return False


def _printable(name: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in os.fsencode(name).decode("utf-8", "replace"))
