"""The pieces that one process of a server holds of the matrices of a layer.

A server fuses matrices of the checkpoint (q, k and v) into one layer, and cuts layers for tensor parallelism. A matrix
arrives tensor by tensor. When all matrices of a layer are whole, they are checked, cut and prepared for the device, so
no more than one layer is in memory twice.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mspc.errors import InputError
from mspc.formats.cutting import Range, cut
from mspc.formats.decoding import check_finite, check_indices
from mspc.formats.description import StoredMatrix, check_types, types_of
from mspc.runtime.joined import joined
from mspc.runtime.linear import SparseLinear, prepare

WEIGHT = "weight"
"""The tensor of a matrix that is stored dense."""


@dataclass(frozen=True, slots=True)
class Place:
    """Rows and columns of a matrix."""

    rows: Range
    columns: Range


@dataclass(frozen=True, slots=True)
class Shard:
    """A matrix of the checkpoint, and the pieces that this process holds of it."""

    name: str
    """In the checkpoint."""
    matrix: StoredMatrix | None
    """None for one that is stored dense."""
    places: tuple[Place, ...]

    def parts(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The dtype of each of its tensors, by the last part of its name; `dtype` is that of dense ones."""
        if self.matrix is None:
            return {WEIGHT: dtype}
        return {part: kind for part, (kind, _) in self.matrix.tensors().items()}

    def pieces(self, stored: Mapping[str, Tensor], dtype: torch.dtype) -> list[nn.Module]:
        """Linear layers without bias on the CPU, not prepared. Raises InputError for tensors that are damaged."""
        if self.matrix is None:
            return [self._dense(stored[WEIGHT], place, dtype) for place in self.places]
        check_types(types_of(stored), self.matrix, self.name)
        check_finite(stored, self.name)
        check_indices(stored, self.matrix, self.name)
        found: list[nn.Module] = []
        matrix = replace(self.matrix, transposed=False)  # servers have (O, I) everywhere
        for place in self.places:
            tensors, piece = cut(stored, matrix, place.rows, place.columns, self.name)
            # Copies, because the tensors may be pages of a file that changes.
            found.append(SparseLinear.of({part: tensor.clone() for part, tensor in tensors.items()}, piece))
        return found

    def _dense(self, weight: Tensor, place: Place, dtype: torch.dtype) -> nn.Linear:
        (num_rows, num_columns), (first, last), columns = weight.shape, place.rows, place.columns
        if last > num_rows or columns[1] > num_columns:
            raise InputError(f"{self.name}: its weight is {tuple(weight.shape)}, which the model cannot use.")
        layer = nn.Linear(columns[1] - columns[0], last - first, bias=False, device="meta")
        piece = weight[first:last, slice(*columns)].to(dtype, copy=True).contiguous()
        layer.weight = nn.Parameter(piece, requires_grad=False)
        return layer


class Loading:
    """The matrices of one layer while they are loaded."""

    def __init__(
        self,
        shards: Mapping[Hashable, Shard],
        dtype: torch.dtype,
        device: torch.device,
        together: Callable[[Sequence[nn.Module]], nn.Module] = joined,
    ) -> None:
        """`shards` are in the order of the outputs, by the id that the server has for each.

        `together` makes one module of all pieces, which is then moved to the device and prepared.
        """
        self.shards, self.dtype, self.device, self._together = dict(shards), dtype, device, together
        self.layer: nn.Module | None = None
        self._stored: dict[Hashable, dict[str, Tensor]] = {shard_id: {} for shard_id in shards}

    def parts(self) -> dict[str, torch.dtype]:
        """The dtype of every tensor that any of the matrices has, by the last part of its name."""
        found: dict[str, torch.dtype] = {}
        for shard in self.shards.values():
            found = shard.parts(self.dtype) | found
        return found

    def add(self, shard_id: Hashable, part: str, tensor: Tensor) -> None:
        """Raises InputError, naming the matrix, for a tensor that is not expected, and for a damaged matrix."""
        if self.layer is not None:
            raise InputError(
                f"{self._names()}: new weights cannot be loaded into a compressed layer. Start the server again."
            )
        if shard_id not in self.shards:
            raise InputError(
                f"{self._names()}: vLLM loads its {part} as shard {shard_id!r} of a layer that has "
                f"{', '.join(map(repr, self.shards))}, which mspc does not know. Serve a dense export instead."
            )
        stored = self._stored[shard_id]
        if part not in self.shards[shard_id].parts(self.dtype) or part in stored:
            raise InputError(f"{self.shards[shard_id].name}: its {part} do not belong there, or are there twice.")
        stored[part] = tensor
        if all(set(self._stored[i]) == set(shard.parts(self.dtype)) for i, shard in self.shards.items()):
            self._build()

    def _names(self) -> str:
        return ", ".join(shard.name for shard in self.shards.values())

    def _build(self) -> None:
        pieces: list[nn.Module] = []
        for shard_id, shard in self.shards.items():
            pieces += shard.pieces(self._stored.pop(shard_id), self.dtype)
        layer = self._together(pieces).to(self.device)
        prepare(layer, self.dtype, on_cpu=True)
        self.layer = layer.requires_grad_(False)

    def whole(self) -> nn.Module:
        """The module of all pieces. Raises InputError, naming the matrix and the tensor, if one was not loaded."""
        for shard_id, shard in self.shards.items():
            missing = [part for part in shard.parts(self.dtype) if part not in self._stored.get(shard_id, ())]
            if self.layer is None and missing:
                be = "is" if missing[0] == WEIGHT else "are"
                raise InputError(f"{shard.name}: its {missing[0]} {be} missing. Export or download the folder again.")
        assert self.layer is not None
        return self.layer


def stacked(lengths: Sequence[int], rank: int, size: int) -> list[Range]:
    """The rows of rank `rank` of `size` in a matrix that stacks others of `lengths` rows; neighbours are joined.

    stacked([4, 2], 1, 2) -> [(2, 4), (5, 6)].
    """
    found: list[Range] = []
    start = 0
    for length in lengths:
        first, last = start + rank * length // size, start + (rank + 1) * length // size
        if found and found[-1][1] == first:
            found[-1] = found[-1][0], last
        else:
            found.append((first, last))
        start += length
    return found
