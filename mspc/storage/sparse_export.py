"""Reading the sparse export (docs/sparse-format.md): every compressed matrix of a folder, one at a time.

Files come from anywhere, so everything is checked before it is used: an error is always an InputError, and nothing is
allocated that the size of the files does not justify.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mspc.errors import InputError
from mspc.formats import layout
from mspc.formats.decoding import check_finite
from mspc.formats.description import StoredMatrix, check_types, types_of
from mspc.formats.targets import target_from_dict
from mspc.storage.checkpoint import STORABLE, Checkpoint, StoredType
from mspc.storage.manifest import MatrixEntry
from mspc.types import CompressedLinear

QUANT_METHOD = "mspc"
FORMAT_VERSION = 3
"""The highest that is read. Folders without slices are version 1, and those without stacked ones version 2."""
KEYS = (
    "parameter", "index", "shape", "transposed", "dtype", "pattern", "sparsity", "bits", "group_size", "symmetric",
    "tied", "stacked",
)  # fmt: skip


def base_of(tensor: str) -> str:
    """The common part of the names of a matrix's tensors, from its tensor in the source."""
    return tensor.removesuffix(".weight")


def stored_name(entry: MatrixEntry) -> str:
    """The common part of the names of a matrix's tensors."""
    return base_of(entry.source_key) if entry.address.index is None else entry.name


def quantization_config(entries: Iterable[MatrixEntry]) -> dict[str, Any]:
    """The `quantization_config` in config.json that describes these matrices."""
    rows = {stored_name(entry): entry.to_row() for entry in entries}
    matrices = {name: {key: row[key] for key in KEYS if row.get(key) is not None} for name, row in rows.items()}
    version = 2 if any("index" in row for row in matrices.values()) else 1
    version = 3 if any("stacked" in row for row in matrices.values()) else version
    return {"quant_method": QUANT_METHOD, "format_version": version, "matrices": matrices}


def slices_of(config: Mapping[str, Any], where: Path | str) -> dict[str, dict[int, str]]:
    """The names of the matrices that are slices of a parameter, by parameter and index.

    Raises InputError, naming a matrix, where a parameter lacks a slice, or where only some are stacked.
    """
    found: dict[str, dict[int, str]] = defaultdict(dict)
    rows = config.get("matrices")
    for name, row in rows.items() if isinstance(rows, Mapping) else ():  # `descriptions` refuses all else
        if not isinstance(row, Mapping) or row.get("index") is None:
            continue
        index, parameter = row["index"], row.get("parameter")
        if type(index) is not int or type(parameter) is not str or index in found[parameter]:
            raise InputError(f"{where}, {name}: no or not only one matrix is slice {index!r} of {parameter!r}.")
        found[parameter][index] = name
    for parameter, slices in found.items():
        if sorted(slices) != list(range(len(slices))):
            raise InputError(
                f"{where}, {slices[max(slices)]}: the matrices are not all slices of {parameter}. Get config.json "
                "again, or export the artifact again."
            )
        if len({bool(config["matrices"][name].get("stacked")) for name in slices.values()}) > 1:
            raise InputError(f"{where}, {slices[0]}: stacked differs from slice to slice. Get config.json again.")
    return dict(found)


def read_sparse(folder: Path) -> Iterator[tuple[str, dict[str, Any], CompressedLinear]]:
    """`(name, row, matrix)` for every matrix that the config describes, in its order."""
    config = read_quantization_config(folder)
    matrices = descriptions(config, folder / "config.json")
    checkpoint = Checkpoint(folder)
    for name, matrix in matrices.items():
        stored = _read_stored(checkpoint, name, matrix)
        yield name, config["matrices"][name], layout.decode(stored, matrix, name)


def is_sparse_export(folder: Path) -> bool:
    """Tell if `mspc export ARTIFACT sparse` wrote this folder."""
    try:
        return read_quantization_config(folder).get("quant_method") == QUANT_METHOD
    except InputError:
        return False


class SparseSource:
    """A sparse export as a source of dense tensors under their names in the original checkpoint.

    Compressed matrices are decoded as they are read.
    """

    def __init__(self, folder: Path) -> None:
        config, where = read_quantization_config(folder), folder / "config.json"
        matrices = descriptions(config, where)
        self._checkpoint = Checkpoint(folder)
        self._sliced = {
            parameter: [(slices[index], matrices[slices[index]]) for index in range(len(slices))]
            for parameter, slices in slices_of(config, where).items()
        }
        sliced = {name: parameter for parameter, slices in self._sliced.items() for name, _ in slices}
        rows = config["matrices"]
        self._stacked = {key for key, slices in self._sliced.items() if rows[slices[0][0]].get("stacked")}
        self._matrices = {f"{name}.weight": (name, m) for name, m in matrices.items() if name not in sliced}
        self._name_of = {
            f"{name}.{part}": sliced.get(name, f"{name}.weight") for name, m in matrices.items() for part in m.tensors()
        }

    def keys(self) -> list[str]:
        return list(dict.fromkeys(key for keys in self.shards().values() for key in keys))

    def shards(self) -> dict[str, list[str]]:
        return {
            shard: list(dict.fromkeys(self._name_of.get(key, key) for key in keys))
            for shard, keys in self._checkpoint.shards().items()
        }

    def types(self) -> dict[str, StoredType]:
        """By the config for what is compressed."""
        types = {key: kind for key, kind in self._checkpoint.types().items() if key not in self._name_of}
        for key, (_, matrix) in self._matrices.items():
            shape = matrix.shape[::-1] if matrix.transposed else matrix.shape
            types[key] = (str(matrix.dtype).removeprefix("torch."), shape)
        for key, slices in self._sliced.items():
            shapes = {matrix.shape[::-1] if matrix.transposed else matrix.shape for _, matrix in slices}
            if len(shapes) > 1:
                raise InputError(f"{slices[0][0]}: its shape is not that of the other slices of {key}.")
            num_rows, num_columns = shapes.pop()
            leading = (len(slices) * num_rows,) if key in self._stacked else (len(slices), num_rows)
            types[key] = (str(slices[0][1].dtype).removeprefix("torch."), (*leading, num_columns))
        return types

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for key in keys:
            if key in self._matrices:
                yield key, self._weight(*self._matrices[key])
            elif key in self._sliced:
                join = torch.cat if key in self._stacked else torch.stack
                yield key, join([self._weight(*of_slice) for of_slice in self._sliced[key]])
            else:
                yield from self._checkpoint.read([key])

    def _weight(self, name: str, matrix: StoredMatrix) -> Tensor:
        """A matrix as the model's parameter, or its slice, has it."""
        weight = layout.decode(_read_stored(self._checkpoint, name, matrix), matrix, name).weight
        return weight.T.contiguous() if matrix.transposed else weight


def _read_stored(checkpoint: Checkpoint, name: str, matrix: StoredMatrix) -> dict[str, Tensor]:
    """The tensors of a matrix. Raises InputError when one is missing or has another type."""
    keys = set(checkpoint.keys())
    present = [part for part in matrix.tensors() if f"{name}.{part}" in keys]
    stored = dict(zip(present, (t for _, t in checkpoint.read(f"{name}.{part}" for part in present)), strict=True))
    check_types(types_of(stored), matrix, name)
    check_finite(stored, name)
    return stored


def read_quantization_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["quantization_config"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} does not describe a sparse export of mspc ({error!r}), as `mspc export ARTIFACT sparse` "
            "writes; other checkpoints are loaded by transformers alone."
        ) from error


def descriptions(config: Mapping[str, Any], where: Path | str) -> dict[str, StoredMatrix]:
    """The matrices of a `quantization_config`, by name. Raises InputError, naming the matrix, for a wrong value."""
    try:
        method, version, rows = config["quant_method"], config["format_version"], dict(config["matrices"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{where} does not describe a sparse export of mspc ({error!r}). Get config.json again, or export the "
            "artifact again."
        ) from error
    if method != QUANT_METHOD or type(version) is not int or version < 1:
        raise InputError(
            f"{where} is not a sparse export of mspc: quant_method {method!r}, format_version {version!r}."
        )
    if version > FORMAT_VERSION:
        raise InputError(f"{where} has sparse format {version}; this mspc reads up to {FORMAT_VERSION}: upgrade mspc.")
    return {name: _description(row, f"{where}, {name}") for name, row in rows.items()}


def _description(row: Any, where: str) -> StoredMatrix:
    if not isinstance(row, dict):
        raise InputError(f"{where}: a matrix is described by an object, not by {row!r}.")
    shape, dtype, transposed = row.get("shape"), row.get("dtype"), row.get("transposed", False)
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
        raise InputError(f"{where}: shape must be two whole numbers above 0, not {shape!r}.")
    if dtype not in STORABLE:
        raise InputError(f"{where}: dtype must be one of {', '.join(STORABLE)}, not {dtype!r}.")
    if not isinstance(row.get("tied", ""), str):
        raise InputError(f"{where}: tied must be the name of a parameter, not {row['tied']!r}.")
    for key in ("transposed", "stacked"):
        if type(value := row.get(key, False)) is not bool:
            raise InputError(f"{where}: {key} must be true or false, not {value!r}.")
    try:
        target = target_from_dict(row)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return StoredMatrix((shape[0], shape[1]), target.pattern, target.grid, getattr(torch, dtype), transposed)
