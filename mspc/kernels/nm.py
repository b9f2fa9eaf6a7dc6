"""N:M matrices of 16-bit values, any N below M, for 1 to 8 tokens.

Layout: every row is padded to a multiple of 8 and cut into tiles of 256 kept weights; the last tile may be shorter.
Kept weight q of a tile of L lanes goes to lane q mod L, slot q div L. Memory holds the eight slots of lane 0, then
those of lane 1, so that a lane reads its values at once. The same slot of all lanes holds neighbours of the row, whose
inputs are in one cache line.

    values    (O * row + 256,): kept weights; padding is zero, and 256 more allow a tile to be read ahead
    indices   uint8 (O * row * b / 8 + 32 b,): in the order of the values, of b = 2 bits for M <= 4, 4 for M <= 16,
              else 8. The file has fewer bits for M of 2, 8 and above 16

Memory: 10 bits a weight at 8:16, 9 at 2:4, 6.25 at 5:16. Thread instructions a kept weight on sm_90, counted (tests),
at 1, 2, 4, 8 tokens: 9.1, 11.3, 15.4, 25 where N divides 32, and 12.8, 14.9, 18.8, 28 at 5:16. Products are summed in
float32. On an H200 memory limits up to 4 tokens, and the instructions limit at 8.
"""

import torch
from torch import Tensor
from torch.cuda import device_of
from torch.nn.functional import pad

from mspc.formats.bits import pack_rows, unpack_rows
from mspc.formats.description import StoredMatrix
from mspc.kernels.launch import on_gpu
from mspc.types import NM

MAX_TOKENS = 8
TILE, SLOTS = 256, 8


def supports(matrix: StoredMatrix, dtype: torch.dtype) -> bool:
    pattern, grid = matrix.target.pattern, matrix.target.grid
    return (
        isinstance(pattern, NM)
        and pattern.keep < pattern.of
        and grid is None
        and dtype == matrix.dtype
        and dtype in (torch.bfloat16, torch.float16)
    )


def repack(stored: dict[str, Tensor], matrix: StoredMatrix) -> dict[str, Tensor]:
    pattern, num_kept = _pattern(matrix), stored["values"].shape[1]
    indices = unpack_rows(stored["indices"], _file_bits(pattern), num_kept)
    bits = _index_bits(pattern)
    packed = pack_rows(_to_lanes(indices), bits).flatten()
    return {
        "values": pad(_to_lanes(stored["values"]).flatten(), (0, TILE)),
        "indices": pad(packed, (0, TILE * bits // 8)),
    }


def unrepack(repacked: dict[str, Tensor], matrix: StoredMatrix) -> dict[str, Tensor]:
    pattern, (num_rows, num_columns) = _pattern(matrix), matrix.shape
    num_kept = num_columns // pattern.of * pattern.keep
    row = -(-num_kept // SLOTS) * SLOTS
    bits = _index_bits(pattern)
    packed = repacked["indices"].cpu()[: num_rows * row * bits // 8].view(num_rows, -1)
    indices = _from_lanes(unpack_rows(packed, bits, row))[:, :num_kept].contiguous()
    values = _from_lanes(repacked["values"].cpu()[: num_rows * row].view(num_rows, row))
    return {
        "values": values[:, :num_kept].contiguous(),
        "indices": pack_rows(indices, _file_bits(pattern)),
    }


def _to_lanes(kept: Tensor) -> Tensor:
    """(O, K) -> (O, K padded to 8), in the order of the lanes of each tile."""
    padded = pad(kept, (0, -kept.shape[1] % SLOTS))
    return torch.cat([tile.unflatten(1, (SLOTS, -1)).transpose(1, 2).flatten(1) for tile in padded.split(TILE, 1)], 1)


def _from_lanes(kept: Tensor) -> Tensor:
    """The inverse, with the padding."""
    return torch.cat([tile.unflatten(1, (-1, SLOTS)).transpose(1, 2).flatten(1) for tile in kept.split(TILE, 1)], 1)


def _pattern(matrix: StoredMatrix) -> NM:
    assert isinstance(matrix.target.pattern, NM)
    return matrix.target.pattern


def _file_bits(pattern: NM) -> int:
    return (pattern.of - 1).bit_length()


def _index_bits(pattern: NM) -> int:
    return 2 if pattern.of <= 4 else 4 if pattern.of <= 16 else 8


def matmul(x: Tensor, repacked: dict[str, Tensor], matrix: StoredMatrix) -> Tensor:
    """x (T, I) -> x Wᵀ (T, O)."""
    pattern = _pattern(matrix)
    return _matmul(x, repacked["values"], repacked["indices"], matrix.shape[0], pattern.keep, pattern.of)


def expand(repacked: dict[str, Tensor], matrix: StoredMatrix, out: Tensor) -> None:
    """Write the dense weight to `out` (O, I)."""
    pattern = _pattern(matrix)
    _expand(repacked["values"], repacked["indices"], pattern.keep, pattern.of, out)


@torch.library.custom_op("mspc::nm_matmul", mutates_args=())
def _matmul(x: Tensor, values: Tensor, indices: Tensor, num_rows: int, keep: int, of: int) -> Tensor:
    with device_of(x):
        y: Tensor = on_gpu("nm").matmul(x, values, indices, num_rows, keep, of)
    return y


@_matmul.register_fake
def _(x: Tensor, values: Tensor, indices: Tensor, num_rows: int, keep: int, of: int) -> Tensor:
    return x.new_empty(len(x), num_rows)


@torch.library.custom_op("mspc::nm_expand", mutates_args=("out",))
def _expand(values: Tensor, indices: Tensor, keep: int, of: int, out: Tensor) -> None:
    with device_of(out):
        on_gpu("nm").expand(values, indices, keep, of, out)
