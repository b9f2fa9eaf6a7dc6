"""Bytes of files that are there, and of safetensors files that are not written yet."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from mspc.storage.checkpoint import STORED_TYPES, StoredType
from mspc.storage.manifest import MatrixEntry
from mspc.storage.sparse_export import stored_name

ORDER = (
    "uint64", "int64", "float64", "complex64", "float32", "uint32", "int32", "bfloat16", "float16", "uint16", "int16",
    "f8_e5m2fnuz", "f8_e4m3fnuz", "f8_e8m0", "float8_e4m3fn", "float8_e5m2", "int8", "uint8", "f6_e3m2", "f6_e2m3",
    "f4", "bool",
)  # fmt: skip
"""Types in the order in which safetensors stores tensors; those of one type are in the order of their names."""


def bytes_in(path: Path) -> int:
    """The size of a file, or of all files at any depth of a folder, without hidden ones, which are not written yet."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file() and not file.name.startswith("."))


def tensor_bytes(kind: StoredType) -> int:
    name, shape = kind
    dtype = getattr(torch, name, None)  # a type that mspc does not compute with has its bits in its name: f8_e8m0
    bits = int(name[1:].partition("_")[0]) if dtype is None else 8 * dtype.itemsize
    return math.prod(shape) * bits // 8


def file_bytes(types: Mapping[str, StoredType]) -> int:
    """The size of the safetensors file that holds such tensors, as `write_tensors` writes it."""
    code_of = {name: code for code, name in STORED_TYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, (name, shape) in sorted(types.items(), key=lambda item: (ORDER.index(item[1][0]), item[0])):
        begin, end = end, end + tensor_bytes((name, shape))
        header[key] = {"dtype": code_of.get(name, name.upper()), "shape": shape, "data_offsets": [begin, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + end


def sparse_export_bytes(
    shards: Mapping[str, Iterable[str]], types: Mapping[str, StoredType], entries: Iterable[MatrixEntry]
) -> int:
    """The size of the weight files of the sparse export of a model with these tensors and compressed matrices."""
    matrices: dict[str, list[MatrixEntry]] = defaultdict(list)
    for entry in entries:
        if entry.address.index is None or entry.num_slices:
            matrices[entry.source_key].append(entry)
            for key, _ in entry.rows[1:]:  # nothing takes its place
                matrices[key] = []
    return sum(
        file_bytes({name: kind for key in keys for name, kind in _exported(key, types[key], matrices.get(key)).items()})
        for keys in shards.values()
    )


def _exported(key: str, kind: StoredType, entries: Sequence[MatrixEntry] | None) -> dict[str, StoredType]:
    """The tensors that one tensor of the source becomes, which is or begins these matrices."""
    if entries is None:
        return {key: kind}
    return {
        f"{stored_name(entry)}.{part}": (str(dtype).removeprefix("torch."), shape)
        for entry in entries
        for part, (dtype, shape) in entry.stored.tensors().items()
    }
