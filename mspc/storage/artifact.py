"""The folder that `compress` writes, and the tensors that can be read back from it.

    mspc.json        the manifest, written last: what there is, how it was made, how good it is
    recipe.toml      what was asked; plan.json what was decided; timings.json what a budget in time went by
    config.json ...  all else that belongs to the model (`mspc.storage.carrying`)
    matrices/        the compressed matrices, one file a block (layout: `mspc.formats.layout`)
    unchanged/       all other weights, one file a shard of the source
    report.html      the page of `compress --report`; no part of what is digested, exported or resumed

It is self-contained: the source is not needed to load or export it.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from mspc.errors import InputError
from mspc.formats import layout
from mspc.formats.decoding import check_finite
from mspc.storage.checkpoint import StoredType, read_file, types_in
from mspc.storage.files import sha256_of
from mspc.storage.manifest import MANIFEST, MatrixEntry, read_entries, read_manifest
from mspc.types import CompressedLinear

PLAN = "plan.json"
RECIPE = "recipe.toml"
TIMINGS = "timings.json"
REPORT = "verification.json"
"""The file in which `verify` says what it found."""
PAGE = "report.html"
"""The page that `compress --report` writes."""
REFERENCE = "verification.npz"
"""The file of logits that runtimes must match."""
MATRICES = "matrices"
UNCHANGED = "unchanged"
MEASUREMENTS = "measurements"
OWN_TEXT = ".text.mspc"
"""The folder of text that the model wrote, until the run is complete."""
EXPORTS = "exports"


class ArtifactSource:
    """An artifact as a source of tensors: compressed matrices are unpacked as they are read, under their old keys.

    With `exact`, weights on a grid are the float32 products of codes and scales, not cast to the checkpoint's dtype.
    """

    def __init__(self, folder: Path, *, exact: bool = False) -> None:
        self.folder, self.exact = folder, exact
        self.manifest = read_manifest(folder)
        self.entries = read_entries(self.manifest, folder / MANIFEST)
        files = (entry.file for entry in self.entries)
        for name in [*self.manifest["source"]["shards"], *files, *self.manifest["files"]]:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise InputError(
                    f"{folder / MANIFEST} points outside its folder, at {name!r}; do not use this artifact."
                )
        self._shards: dict[str, list[str]] = self.manifest["source"]["shards"]
        self._shard_of = {key: shard for shard, keys in self._shards.items() for key in keys}
        self.whole = {entry.source_key: entry for entry in self.entries if entry.address.index is None}
        """Matrices that are a whole tensor of the source, by its key."""
        self.slices: dict[str, list[MatrixEntry]] = defaultdict(list)
        """Matrices that are a slice of a tensor of the source, by its key."""
        self.rows: dict[str, list[tuple[MatrixEntry, int, int]]] = defaultdict(list)
        """Tensors of the source that are rows of a matrix: the matrix, the first row and the number of rows.

        3-D ones are rows of several, one for each slice.
        """
        for entry in sorted(self.entries, key=lambda entry: entry.address.index or 0):
            first = 0
            for key, count in entry.rows:
                self.rows[key].append((entry, first, count))
                first += count
            if entry.address.index is not None and not entry.rows:
                self.slices[entry.source_key].append(entry)

    def keys(self) -> list[str]:
        return list(self._shard_of)

    def shards(self) -> dict[str, list[str]]:
        return self._shards

    def types(self) -> dict[str, StoredType]:
        """By the manifest for what is compressed. Raises InputError, naming the tensor, for one that is nowhere."""
        shards = {shard for key, shard in self._shard_of.items() if not self.is_compressed(key)}
        found = {shard: types_in(self.folder / UNCHANGED / shard) for shard in sorted(shards)}
        types: dict[str, StoredType] = {}
        for key, shard in self._shard_of.items():
            if self.is_compressed(key):
                types[key] = self._type(key)
            elif key in found[shard]:
                types[key] = found[shard][key]
            else:
                raise InputError(f"{self.folder / UNCHANGED / shard} holds no {key}. Compress again, or restore it.")
        return types

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for key in keys:
            if entry := self.whole.get(key):
                weight = self.matrix(entry).weight
                yield key, weight.T.contiguous() if entry.address.transposed else weight
            elif key in self.rows:
                parts = [self.matrix(entry).weight[first : first + count] for entry, first, count in self.rows[key]]
                yield key, torch.stack(parts) if len(parts) > 1 else parts[0].clone()
            else:
                yield key, self._sliced(key)

    def is_compressed(self, key: str) -> bool:
        """Tell if all of a tensor of the source is in compressed matrices."""
        return key in self.whole or key in self.rows or any(entry.num_slices for entry in self.slices.get(key, ()))

    def first_in(self, key: str) -> list[MatrixEntry]:
        """The compressed matrices whose first rows a tensor of the source has; each has one such tensor."""
        if key in self.rows:
            return [entry for entry, first, _ in self.rows[key] if not first]
        return [self.whole[key]] if key in self.whole else self.slices.get(key, [])

    def _type(self, key: str) -> StoredType:
        """The dtype and shape that a compressed tensor has in the source."""
        if key in self.rows:
            entry, _, count = self.rows[key][0]
            several = (len(self.rows[key]),) if len(self.rows[key]) > 1 else ()
            return str(entry.dtype).removeprefix("torch."), (*several, count, entry.shape[1])
        sliced = self.slices.get(key, [])
        entry = self.whole.get(key) or sliced[0]
        shape: tuple[int, ...] = entry.shape
        if entry.address.transposed:
            shape = shape[::-1]
        if sliced:
            shape = (entry.num_slices * shape[0], shape[1]) if entry.stacked else (entry.num_slices, *shape)
        return str(entry.dtype).removeprefix("torch."), shape

    def _sliced(self, key: str) -> Tensor:
        """A tensor that is not one matrix, with all of its slices that are."""
        if self.is_compressed(key):
            name, shape = self._type(key)
            tensor = torch.empty(shape, dtype=torch.float32 if self.exact else getattr(torch, name))
        else:
            ((_, tensor),) = read_file(self.folder / UNCHANGED / self._shard_of[key], [key])
        for entry in self.slices.get(key, []):
            entry.address.read(tensor).copy_(self.matrix(entry).weight)
        return tensor

    def matrix(self, entry: MatrixEntry) -> CompressedLinear:
        return read_matrix(self.folder, entry, exact=self.exact)

    def stored(self, entry: MatrixEntry) -> dict[str, Tensor]:
        """The tensors of one matrix as the artifact holds them (`mspc.formats.layout`)."""
        return read_stored(self.folder, entry)

    def check_files(self) -> None:
        """Raises InputError, naming the file, when one does not have the bytes that were written."""
        for name, digest in self.manifest["files"].items():
            path = self.folder / name
            if not path.is_file():
                raise InputError(f"{path} is missing, and mspc wrote it; compress again, or restore the file.")
            if sha256_of(path) != digest:
                raise InputError(f"{path} is damaged: mspc wrote other bytes; compress again, or restore the file.")


def read_matrix(folder: Path, entry: MatrixEntry, *, exact: bool = False) -> CompressedLinear:
    """The matrix of one entry, its weight in the checkpoint's dtype (see `ArtifactSource.exact`)."""
    dtype = torch.float32 if exact and entry.target.grid else entry.dtype
    return layout.unpack(read_stored(folder, entry), entry.shape, entry.target, dtype, entry.name)


def read_stored(folder: Path, entry: MatrixEntry) -> dict[str, Tensor]:
    keys = [f"{entry.name}.{part}" for part in entry.parts]
    stored = {key.rpartition(".")[2]: tensor for key, tensor in read_file(folder / entry.file, keys)}
    check_finite(stored, f"{folder / entry.file}, {entry.name}")
    return stored
