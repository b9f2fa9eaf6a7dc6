"""A folder of safetensors files, read tensor by tensor."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mspc.errors import InputError
from mspc.storage.files import sha256_of

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


STORED_TYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool", "C64": "complex64",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16",
    "U8": "uint8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
"""Names in a safetensors header -> names of torch."""
StoredType = tuple[str, tuple[int, ...]]
"""The name of a dtype, and a shape."""


class TensorSource(Protocol):
    """Named tensors that can be read one at a time: a checkpoint, or an artifact that unpacks as it reads."""

    def keys(self) -> list[str]: ...

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]: ...

    def shards(self) -> dict[str, list[str]]:
        """The weight files, each with the keys it holds, in the order of the source."""
        ...

    def types(self) -> dict[str, StoredType]:
        """The type of every tensor, by the headers alone."""
        ...


STORABLE = ("float32", "bfloat16", "float16")
"""Types of weights that an artifact holds."""
UNUSED = ".masked_bias"
"""A tensor of old GPT-NeoX and GPT-J files that transformers ignores: -1e9, which is -infinity in float16."""


class Checkpoint:
    """The safetensors of one Hugging Face folder, single or sharded. Tensors are read on demand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        types = {name: types_in(folder / name) for name in _weight_files(folder)}
        self._types = {key: kind for of_file in types.values() for key, kind in of_file.items()}
        self._shards = {name: list(of_file) for name, of_file in types.items()}
        self._shard_of = {key: shard for shard, keys in self._shards.items() for key in keys}

    def keys(self) -> list[str]:
        return list(self._shard_of)

    def shards(self) -> dict[str, list[str]]:
        return self._shards

    def types(self) -> dict[str, StoredType]:
        return self._types

    def dense_bytes(self) -> int:
        """The size of the weight files, if the weights are dense."""
        return sum((self.folder / shard).stat().st_size for shard in self._shards)

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """`(key, tensor)` for every key, each file opened once. Raises InputError for a tensor that cannot be read."""
        by_shard = defaultdict(list)
        for key in keys:
            by_shard[self._shard_of[key]].append(key)
        for shard, names in by_shard.items():
            yield from read_file(self.folder / shard, names)

    def fingerprint(self, files: Sequence[str] | None = None) -> Iterator[tuple[str, str]]:
        """`(weight file, sha256)` for each, or for some.

        Raises InputError, naming the tensor, for NaN or infinity in weights.
        """
        for shard in self._shards if files is None else files:
            for key, tensor in self.read(self._shards[shard]):
                if key.endswith(UNUSED):
                    continue
                if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                    raise InputError(f"{self.folder / shard}: {key} contains NaN or infinity; the weights are damaged.")
            yield shard, sha256_of(self.folder / shard)


class Over:
    """A source with the names and types of another one. A subclass reads some tensors elsewhere."""

    def __init__(self, source: TensorSource) -> None:
        self.source = source

    def keys(self) -> list[str]:
        return self.source.keys()

    def shards(self) -> dict[str, list[str]]:
        return self.source.shards()

    def types(self) -> dict[str, StoredType]:
        return self.source.types()


class Replaced(Over):
    """A source with some tensors replaced by those in `folder`, in files of the same names."""

    def __init__(self, source: TensorSource, folder: Path) -> None:
        super().__init__(source)
        types = {name: types_in(folder / name) for name in source.shards() if (folder / name).is_file()}
        self._file_of = {key: folder / name for name, of_file in types.items() for key in of_file}

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for key in keys:
            yield from read_file(self._file_of[key], [key]) if key in self._file_of else self.source.read([key])


def _weight_files(folder: Path) -> list[str]:
    """One file, else those in the index, as transformers looks for them; else all safetensors files of the folder."""
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if (folder / INDEX).is_file():
        names = files_of_index(folder / INDEX)
        for name in names:
            if not (folder / name).is_file():
                raise InputError(f"{folder / name} is missing, though {INDEX} names it; download the model again.")
        return names
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        others = [path.name for path in folder.glob("*.bin")]
        remedy = "give a Hugging Face checkpoint, an artifact, or an export of the formats dense or sparse."
        if others:
            remedy = "convert its .bin files first; mspc reads no pickle."
        raise InputError(f"{folder} holds no .safetensors files; {remedy}")
    return names


def files_of_index(index: Path) -> list[str]:
    """The weight files that an index names. Raises InputError for a damaged one, and for a path out of its folder."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{index} is not a valid safetensors index ({error}); download the model again.") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise InputError(f"{index} points outside its folder, at {name!r}; do not use this checkpoint.")
    return names


def types_in(path: Path) -> dict[str, StoredType]:
    """The type of every tensor of one safetensors file, by its header."""
    with _opened(path) as file:
        parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return {key: (_name_of(part.get_dtype()), tuple(part.get_shape())) for key, part in parts.items()}


def _name_of(stored: str) -> str:
    return STORED_TYPES.get(stored, stored.lower())


def map_file(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, mapped into memory: the disk is read when they are used."""
    with _opened(path) as file:
        try:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} cannot be read ({error}); the file is damaged.") from error


def read_file(path: Path, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """`(key, tensor)` of one safetensors file, copied out of it so that no page of it stays mapped."""
    with _opened(path) as file:
        for key in keys:
            try:
                tensor = file.get_tensor(key).clone()
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path}: cannot read {key} ({error}); the file is damaged.") from error
            yield key, tensor


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} cannot be read as safetensors ({error}); it is truncated or damaged: get it again."
        ) from error
