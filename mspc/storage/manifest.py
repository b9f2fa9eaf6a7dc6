"""The manifest of an artifact, `mspc.json`: what `compress` did, and one entry for every compressed matrix."""

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mspc.errors import InputError
from mspc.formats.description import StoredMatrix
from mspc.formats.targets import target_from_dict, target_to_dict
from mspc.storage.journal import NAME as JOURNAL
from mspc.types import EMBEDDINGS, HEAD, Matrix, PlannedMatrix, Target

FORMAT_VERSION = 2
"""The highest that is read. Artifacts without stacked slices, and without rows of 3-D tensors, are version 1."""
MANIFEST = "mspc.json"
EXPORT_MANIFEST = "mspc_export.json"
"""The file that an export has in place of the manifest."""


@dataclass(frozen=True, slots=True)
class MatrixEntry:
    """One compressed matrix of an artifact: its address, its target, where it is stored and how good it is."""

    address: Matrix
    source_key: str
    """Tensor of the source that is this matrix, or that has it as one slice."""
    target: Target
    """The pattern carries the sparsity that was achieved."""
    dtype: torch.dtype
    """Type of the weight in the source."""
    parts: tuple[str, ...]
    """Names of the stored tensors (`mspc.formats.layout`)."""
    num_bytes: int
    """Bytes of the stored tensors."""
    digest: str
    """sha256 by `layout.digest`."""
    pruned: int
    """Number of weights that the mask removes."""
    zeros: int
    """Number of weights that are zero, pruned or not."""
    sensitivity: float | None
    output_error: float | None
    """None for weights that were trained after they were solved (`recover`)."""
    damp: float
    propagation_damp: float
    precision: str
    """Type that the Gram was inverted in."""
    num_tokens: int
    file: str = ""
    """Path in the artifact; empty until the block is written."""
    role: str = ""
    """`head` or `embeddings` for a matrix outside of the blocks."""
    tied: str | None = None
    """Parameter of the head, where the embeddings are the head as well."""
    borrowed_tokens: int = 0
    """Tokens of its layer in the Gram of an expert that sees few."""
    routed_tokens: int | None = None
    """Tokens that are routed to an expert, where `num_tokens` are all that were shown to it."""
    rows: tuple[tuple[str, int], ...] = ()
    """Tensors of the source, one below the other, that are this slice, and their numbers of rows; empty for one.

    A tensor in the rows of several slices is 3-D, and each has the slice of its own index there.
    """
    num_slices: int = 0
    """Number of slices of the parameter, if all are compressed, so that the artifact holds them in its place."""
    stacked: bool = False
    """True for a slice that is a part of the rows of a 2-D tensor of the source."""

    @property
    def name(self) -> str:
        return self.address.name

    @property
    def shape(self) -> tuple[int, int]:
        return self.address.shape

    @property
    def planned(self) -> PlannedMatrix:
        """The matrix as a plan has it."""
        return PlannedMatrix(self.name, self.shape, self.target, self.sensitivity, self.role)

    @property
    def stored(self) -> StoredMatrix:
        """The matrix as readers of its tensors need it."""
        return StoredMatrix(self.shape, self.target.pattern, self.target.grid, self.dtype, self.address.transposed)

    def to_row(self) -> dict[str, Any]:
        """The entry as an object of JSON."""
        return {
            "name": self.name,
            "parameter": self.address.parameter,
            "tensor": self.source_key,
            "index": self.address.index,
            "transposed": self.address.transposed,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "stored": list(self.parts),
            "bytes": self.num_bytes,
            "sha256": self.digest,
            **target_to_dict(self.target),
            "sparsity": self.pruned / self.address.numel,
            "pruned": self.pruned,
            "zeros": self.zeros,
            "sensitivity": self.sensitivity,
            "output_error": self.output_error,
            "damp": self.damp,
            "propagation_damp": self.propagation_damp,
            "precision": self.precision,
            "num_tokens": self.num_tokens,
            "file": self.file,
            **{key: value for key in OPTIONAL if (value := getattr(self, key))},
            **({} if self.routed_tokens is None else {"routed_tokens": self.routed_tokens}),
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any], where: Path | str) -> "MatrixEntry":
        """The inverse. Raises InputError, naming `where`, for a row that lacks a key or has a wrong value."""
        if not isinstance(row, Mapping):
            raise InputError(f"{where} is damaged: {row!r} is no entry of a matrix.")
        try:
            num_out, num_in = row["shape"]
            dtype = getattr(torch, row["dtype"])
            if not isinstance(dtype, torch.dtype):
                raise TypeError(f"dtype {row['dtype']!r}")
            role, tied = row.get("role", ""), row.get("tied")
            if role not in ("", HEAD, EMBEDDINGS) or not isinstance(tied, str | None):
                raise TypeError(f"role {role!r}, tied {tied!r}")
            return cls(
                address=Matrix(row["parameter"], (num_out, num_in), row["index"], row["transposed"]),
                source_key=row["tensor"],
                target=target_from_dict(dict(row)),
                dtype=dtype,
                parts=tuple(row["stored"]),
                num_bytes=row["bytes"],
                digest=row["sha256"],
                file=row["file"],
                role=role,
                tied=tied,
                **{key: row[key] for key in COPIED},
                borrowed_tokens=row.get("borrowed_tokens", 0),
                routed_tokens=row.get("routed_tokens"),
                rows=tuple((str(key), int(count)) for key, count in row.get("rows", ())),
                num_slices=int(row.get("num_slices", 0)),
                stacked=bool(row.get("stacked", False)),
            )
        except KeyError as error:
            raise InputError(f"{where} is damaged: the entry of {row.get('name')} lacks {error.args[0]}.") from error
        except (InputError, AttributeError, TypeError, ValueError) as error:
            raise InputError(f"{where} is damaged at the entry of {row.get('name')} ({error}).") from error


COPIED = ("pruned", "zeros", "sensitivity", "output_error", "damp", "propagation_damp", "precision", "num_tokens")
OPTIONAL = ("role", "tied", "borrowed_tokens", "rows", "num_slices", "stacked")
"""Values of experts, head and embeddings, in a row that has them."""


def is_recovered(manifest: Mapping[str, Any]) -> bool:
    """Tell if the weights of an artifact were trained after they were solved in one shot."""
    return bool((manifest.get("recovery") or {}).get("best_step"))


def was_recovered(folder: Path) -> bool:
    """Tell the same of a folder: an artifact, or an export of one."""
    return is_recovered(_either_manifest(folder))


def predicted_time(folder: Path) -> dict[str, Any] | None:
    """The part `time` of the manifest of such a folder: what a budget in time predicted."""
    found = _either_manifest(folder).get("time")
    return found if isinstance(found, dict) else None


def _either_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact, or of an export of one; empty without one that can be read."""
    for name in (MANIFEST, EXPORT_MANIFEST):
        if (folder / name).is_file():
            with suppress(OSError, ValueError):
                found = json.loads((folder / name).read_text(encoding="utf-8"))
                return found if isinstance(found, dict) else {}
    return {}


def is_artifact(folder: Path) -> bool:
    """Tell if `compress` wrote this folder, finished or not."""
    return (folder / MANIFEST).is_file() or (folder / JOURNAL).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest as it is in the file. Raises InputError for a folder without one, or with a damaged one."""
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / JOURNAL).is_file():
            raise InputError(f"{folder} holds an unfinished run; finish it with `mspc compress ... --resume` first.")
        if (folder / EXPORT_MANIFEST).is_file():
            raise InputError(f"{folder} is an export; give the artifact that it was made from, or `mspc verify` it.")
        what = f"is not an mspc artifact: it has no {MANIFEST}" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {what}. Give a folder that `mspc compress` wrote.")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format_version"] > FORMAT_VERSION:
            raise InputError(
                f"{folder} was written in format {manifest['format_version']}, and this mspc reads up to "
                f"{FORMAT_VERSION}: upgrade mspc."
            )
        kinds = {"matrices": list, "files": dict, "source": dict, "sparsity": dict}
        for key, kind in kinds.items():
            if not isinstance(manifest[key], kind):
                raise TypeError(f"{key} is no {kind.__name__}")
        if not all(isinstance(name, str) for name in manifest.get("unused_tensors", [])):
            raise TypeError("unused_tensors is no list of names")
        manifest["source"]["shards"]
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error!r}). The artifact is damaged: compress again.") from error
    read_entries(manifest, path)
    return manifest


def read_entries(manifest: Mapping[str, Any], path: Path) -> list[MatrixEntry]:
    """The entries of a manifest, those of matrices outside of the blocks last.

    Raises InputError, naming `path`, for a damaged one and for one that comes twice.
    """
    rows = [*manifest.get("matrices", []), *manifest.get("outer", [])]
    entries = [MatrixEntry.from_row(row, path) for row in rows]
    twice = [name for name, count in Counter(entry.name for entry in entries).items() if count > 1]
    if twice:
        raise InputError(f"{path} is damaged: it has more than one entry for {twice[0]}.")
    return entries
