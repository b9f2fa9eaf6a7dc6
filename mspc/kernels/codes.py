"""Matrices of codes without zeros, of 8, 4, 3 or 2 bits, for 1 to 32 tokens.

Layout (`tiles`): the bytes of the file, with O padded to 16 and I to 128. The bits of a code are in one plane. int3 has
two planes, of two bits and one; int8 has two of four bits.

    words    int32 (tiles, blocks * 64 b), b bits a code: for every tile the plane of the low bits, then that of the
             high ones. A plane of w bits is (blocks, 16 rows, 4 quarters, w). Its int32 has the codes of 4 / w words of
             8 columns: those of the first word in the low bits of nibbles 0, 4, 1, 5, 2, 6, 3, 7, those of each next
             word w bits higher. A shift and a mask therefore give pairs of neighbours.
    scales   float16 (tiles, groups, 16 rows)
    zeros    int32 (tiles, groups, 2), if asymmetric: four bits for each of 8 rows, also with int3 and int2. With int8
             (2, tiles, groups, 2): the low four bits, then the high ones

Cost at groups of 128: thread instructions a weight on sm_90, counted (tests). They are the same for 1 to 8 tokens,
because the products run on tensor cores. On an H200 memory limits up to 7.8 instructions a byte (last column).

    bits   bytes   bfloat16   float16   asymmetric   16 tokens   32 tokens   7.8 a byte
    8      1.016   4.3        3.7       4.6          4.3         5.0         7.9
    4      0.516   1.9        1.6       2.0          2.1         2.7         4.0
    3      0.391   2.3        2.1       2.5          2.6         3.2         3.0
    2      0.266   2.0        1.8       2.2          2.3         2.9         2.1

Without tensor cores int4 takes 3.5 for one token, and more for each further one. Products of codes and inputs are exact
and summed in float32. Scales multiply the sums of their groups.
"""

import torch
from torch import Tensor
from torch.cuda import device_of

from mspc.formats.bits import pack_rows, unpack_rows
from mspc.formats.description import StoredMatrix
from mspc.kernels.launch import on_gpu
from mspc.kernels.tiles import (
    MAX_TOKENS,
    from_tiles,
    group_size,
    join_fields,
    num_blocks,
    num_tiles,
    repack_grid,
    split_fields,
    tiles_fit,
    to_tiles,
    unrepack_grid,
)

__all__ = ["MAX_TOKENS", "expand", "matmul", "repack", "supports", "unrepack"]

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (4, 4)}
"""Bits of the planes of a code, low bits first."""
FIRST_BITS = [0, 16, 4, 20, 8, 24, 12, 28]
"""First bit of each code of a word."""


def supports(matrix: StoredMatrix, dtype: torch.dtype) -> bool:
    is_dense = not matrix.has_mask and not matrix.has_indices
    has_codes = matrix.grid is not None and matrix.grid.bits in PLANES
    return is_dense and has_codes and dtype in (torch.bfloat16, torch.float16) and tiles_fit(matrix)


def repack(stored: dict[str, Tensor], matrix: StoredMatrix) -> dict[str, Tensor]:
    codes = to_tiles(unpack_rows(stored["codes"], _bits(matrix), matrix.shape[1]), matrix, 8)
    planes, below = [], 0
    for width in PLANES[_bits(matrix)]:
        fields = (codes >> below & (2**width - 1)).unflatten(4, (4 * width, 4 // width)).flatten(-2)
        words = join_fields(fields, _first_bits(width))  # tiles, half, row, blocks, words
        planes.append(words.permute(0, 3, 1, 2, 4).flatten(1))
        below += width
    return {"words": torch.cat(planes, 1), **repack_grid(stored, matrix)}


def unrepack(repacked: dict[str, Tensor], matrix: StoredMatrix) -> dict[str, Tensor]:
    tiles, blocks, bits = num_tiles(matrix), num_blocks(matrix), _bits(matrix)
    codes, below = torch.zeros((), dtype=torch.uint8), 0
    for width in PLANES[bits]:
        first = blocks * 64 * below
        words = repacked["words"].cpu()[:, first : first + blocks * 64 * width].view(tiles, blocks, 2, 8, 4 * width)
        fields = split_fields(words.permute(0, 2, 3, 1, 4), _first_bits(width), width).to(torch.uint8)
        codes = codes | fields.unflatten(-1, (4 // width, 8)).flatten(4, 5) << below
        below += width
    natural = from_tiles(codes, matrix, matrix.shape[1]).contiguous()
    return {"codes": pack_rows(natural, bits), **unrepack_grid(repacked, matrix)}


def _first_bits(width: int) -> list[int]:
    """First bit of each field of an int32 of a plane: eight fields of one word of codes, then eight of the next."""
    return [bit + width * word for word in range(4 // width) for bit in FIRST_BITS]


def _bits(matrix: StoredMatrix) -> int:
    assert matrix.target.grid is not None
    return matrix.target.grid.bits


def matmul(x: Tensor, repacked: dict[str, Tensor], matrix: StoredMatrix) -> Tensor:
    """x (T, I) -> x Wᵀ (T, O)."""
    words, scales, zeros = repacked["words"], repacked["scales"], repacked.get("zeros")
    return _matmul(x, words, scales, zeros, _bits(matrix), matrix.shape[0], group_size(matrix))


def expand(repacked: dict[str, Tensor], matrix: StoredMatrix, out: Tensor) -> None:
    """Write the dense weight to `out` (O, I)."""
    words, scales, zeros = repacked["words"], repacked["scales"], repacked.get("zeros")
    _expand(words, scales, zeros, _bits(matrix), group_size(matrix), out)


@torch.library.custom_op("mspc::codes_matmul", mutates_args=())
def _matmul(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, num_rows: int, group_size: int
) -> Tensor:
    with device_of(x):
        y: Tensor = on_gpu("codes").matmul(x, words, scales, zeros, bits, num_rows, group_size)
    return y


@_matmul.register_fake
def _(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, num_rows: int, group_size: int
) -> Tensor:
    return x.new_empty(len(x), num_rows)


@torch.library.custom_op("mspc::codes_expand", mutates_args=("out",))
def _expand(words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, out: Tensor) -> None:
    with device_of(out):
        on_gpu("codes").expand(words, scales, zeros, bits, group_size, out)
