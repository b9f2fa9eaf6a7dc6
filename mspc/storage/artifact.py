"""The folder that `compress` writes, and the tensors that can be read back from it.

    mspc.json        the manifest, written last: what there is, how it was made, how good it is
    recipe.toml      what was asked; plan.json what was decided
    config.json ...  configs and tokenizer of the source
    matrices/        the compressed matrices, one file a block (layout: `mspc.formats.canonical`)
    unchanged/       all other weights, one file a shard of the source

It is self-contained: the source is not needed to load or export it.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mspc.errors import InputError
from mspc.formats import canonical
from mspc.formats.description import target_from_dict
from mspc.storage.checkpoint import read_file
from mspc.storage.files import sha256_of
from mspc.storage.journal import NAME as JOURNAL
from mspc.types import CompressedLinear, Matrix

FORMAT_VERSION = 1
MANIFEST = "mspc.json"
EXPORT_RECORD = "mspc_export.json"
"""What exporters write of an export, where an artifact has its manifest."""
REPORT = "verification.json"
"""What `verify` found out about an export."""
MATRICES = "matrices"
UNCHANGED = "unchanged"
ROW_KEYS = {
    *("name", "parameter", "tensor", "index", "transposed", "shape", "dtype", "file", "stored", "sha256"),
    *("pattern", "sparsity", "bits", "pruned", "zeros", "sensitivity", "output_error", "damp"),
}


def is_artifact(folder: Path) -> bool:
    """Whether `compress` wrote this folder, finished or not."""
    return (folder / MANIFEST).is_file() or (folder / JOURNAL).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / JOURNAL).is_file():
            raise InputError(f"{folder} holds an unfinished run; finish it with `mspc compress ... --resume` first.")
        if (folder / EXPORT_RECORD).is_file():
            raise InputError(f"{folder} is an export; give the artifact that it was made from, or `mspc verify` it.")
        raise InputError(f"{folder} is not an mspc artifact: it has no {MANIFEST}.")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error!r}); the artifact is damaged.") from error
    if version > FORMAT_VERSION:
        raise InputError(
            f"{folder} was written in format {version}, and this mspc reads up to {FORMAT_VERSION}: upgrade mspc."
        )
    for row in manifest.get("matrices", []):
        if missing := ROW_KEYS - row.keys():
            raise InputError(
                f"{path}: the row of {row.get('name')} lacks {', '.join(sorted(missing))}; the artifact is damaged."
            )
    return manifest


class ArtifactSource:
    """An artifact as a source of tensors: compressed matrices are unpacked as they are read, under their old keys.

    With `exact`, weights on a grid are the float32 products of codes and scales, not rounded to the checkpoint's dtype.
    """

    def __init__(self, folder: Path, *, exact: bool = False) -> None:
        self.folder, self.exact = folder, exact
        self.manifest = read_manifest(folder)
        files = (row["file"] for row in self.manifest["matrices"])
        for name in [*self.manifest["source"]["shards"], *files, *self.manifest["files"]]:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise InputError(
                    f"{folder / MANIFEST} points outside its folder, at {name!r}; do not use this artifact."
                )
        self._shards: dict[str, list[str]] = self.manifest["source"]["shards"]
        self._shard_of = {key: shard for shard, keys in self._shards.items() for key in keys}
        self._rows: dict[str, list[dict[str, Any]]] = {}
        for row in self.manifest["matrices"]:
            self._rows.setdefault(row["tensor"], []).append(row)

    def keys(self) -> list[str]:
        return list(self._shard_of)

    def shards(self) -> dict[str, list[str]]:
        return self._shards

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for key in keys:
            rows = self._rows.get(key, [])
            if len(rows) == 1 and rows[0]["index"] is None:
                weight = self.matrix(rows[0]).weight
                yield key, weight.T.contiguous() if rows[0]["transposed"] else weight
                continue
            ((_, tensor),) = read_file(self.folder / UNCHANGED / self._shard_of[key], [key])
            for row in rows:  # slices of a 3-D parameter
                address_of(row).read(tensor).copy_(self.matrix(row).weight)
            yield key, tensor

    def matrix(self, row: dict[str, Any]) -> CompressedLinear:
        """The compressed matrix of one row of the manifest."""
        return read_matrix(self.folder, row, exact=self.exact)

    def stored(self, row: dict[str, Any]) -> dict[str, Tensor]:
        """The tensors of one matrix as the artifact holds them (`mspc.formats.canonical`)."""
        return read_stored(self.folder, row)

    def check_files(self) -> None:
        """Raises InputError, naming the file, when one does not have the bytes that were written."""
        for name, digest in self.manifest["files"].items():
            path = self.folder / name
            if not path.is_file() or sha256_of(path) != digest:
                state = "is damaged: its bytes are not those" if path.is_file() else "is missing of those"
                raise InputError(f"{path} {state} that mspc wrote; compress again, or restore the file.")


def read_matrix(folder: Path, row: dict[str, Any], *, exact: bool = False) -> CompressedLinear:
    """The matrix that a manifest's row describes, its weight in the checkpoint's dtype (see `ArtifactSource.exact`)."""
    target = target_from_dict(row)
    dtype = torch.float32 if exact and target.grid else getattr(torch, row["dtype"])
    num_out, num_in = row["shape"]
    return canonical.unpack(read_stored(folder, row), (num_out, num_in), target, dtype, row["name"])


def read_stored(folder: Path, row: dict[str, Any]) -> dict[str, Tensor]:
    keys = [f"{row['name']}.{part}" for part in row["stored"]]
    return {key.rpartition(".")[2]: tensor for key, tensor in read_file(folder / row["file"], keys)}


def address_of(row: dict[str, Any]) -> Matrix:
    return Matrix(row["parameter"], tuple(row["shape"]), row["index"], row["transposed"])
