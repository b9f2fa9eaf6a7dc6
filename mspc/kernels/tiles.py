"""Matrices as tiles of 16 rows by 128 columns, in the order in which `mspc.kernels.gpu.fragments` reads them.

A block of 128 columns is 16 words of 8 columns, four words to each quarter of the lanes of a warp. The four words of a
quarter are neighbours in memory. A product takes a slab of 16 columns, some from every quarter. `word_order` puts the
words apart in the matrix such that every slab lies within one quantization group.
"""

from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import pad

from mspc.formats.bits import pack_rows, unpack_rows
from mspc.formats.description import StoredMatrix
from mspc.types import Grid

ROWS, COLUMNS, WORD = 16, 128, 8
MAX_TOKENS = 32


def num_tiles(matrix: StoredMatrix) -> int:
    return ceil(matrix.shape[0] / ROWS)


def num_blocks(matrix: StoredMatrix) -> int:
    return ceil(matrix.shape[1] / COLUMNS)


def tiles_fit(matrix: StoredMatrix) -> bool:
    """Tell if inputs can be loaded by words, and every slab is within one group."""
    size = group_size(matrix)
    return matrix.shape[1] % WORD == 0 and (size in (32, 64) or size % COLUMNS == 0)


def group_size(matrix: StoredMatrix) -> int:
    """Columns that share a scale: all columns of the tiles if a row is one group or there is no grid."""
    num_columns, grid = matrix.shape[1], matrix.target.grid
    size = num_columns if grid is None else grid.group_size or num_columns
    return size if size < num_columns else COLUMNS * num_blocks(matrix)


def num_groups(matrix: StoredMatrix) -> int:
    """Groups of a row of tiles, including groups of padding."""
    return COLUMNS * num_blocks(matrix) // group_size(matrix)


def word_order(matrix: StoredMatrix) -> Tensor:
    """The words of a block, 0 to 15, in the order of memory: four of quarter 0, four of quarter 1, ..."""
    together = min(group_size(matrix), COLUMNS) // 32  # words of a quarter that are neighbours
    words = torch.arange(16).view(4 // together, 4, together)
    return words.transpose(0, 1).flatten()


def to_tiles(entries: Tensor, matrix: StoredMatrix, per_word: int) -> Tensor:
    """(O, n), `per_word` entries a word -> (tiles, 2 halves of 8 rows, 8, blocks, 16 words in their order, per_word).

    Padding is zero.
    """
    tiles, blocks = num_tiles(matrix), num_blocks(matrix)
    num_rows, num_entries = entries.shape
    padded = pad(entries, (0, blocks * 16 * per_word - num_entries, 0, tiles * ROWS - num_rows))
    return padded.view(tiles, 2, 8, blocks, 16, per_word)[:, :, :, :, word_order(matrix)]


def from_tiles(tiled: Tensor, matrix: StoredMatrix, num_entries: int) -> Tensor:
    """Invert `to_tiles`: the entries (O, num_entries)."""
    natural = torch.empty_like(tiled)
    natural[:, :, :, :, word_order(matrix)] = tiled
    return natural.view(-1, natural[0, 0, 0].numel())[: matrix.shape[0], :num_entries]


def repack_grid(stored: dict[str, Tensor], matrix: StoredMatrix) -> dict[str, Tensor]:
    """`scales` float16 (tiles, groups, 16 rows), and `zeros` if asymmetric.

    Zeros are int32 (tiles, groups, 2), four bits for each of 8 rows; with int8 they are (2, tiles, groups, 2), the low
    four bits, then the high ones.
    """
    tiles, groups = num_tiles(matrix), num_groups(matrix)
    scales = stored["scales"]
    padding = (0, groups - scales.shape[1], 0, tiles * ROWS - len(scales))
    repacked = {"scales": pad(scales, padding).view(tiles, ROWS, groups).transpose(1, 2).contiguous()}
    if "zeros" in stored:
        bits = _bits(matrix)
        zeros = pad(unpack_rows(stored["zeros"], bits, scales.shape[1]), padding).view(tiles, 2, 8, groups)
        zeros = zeros.permute(0, 3, 1, 2)
        nibbles = zeros if bits <= 4 else torch.stack([zeros & 15, zeros >> 4])
        repacked["zeros"] = join_fields(nibbles, range(0, 32, 4))
    return repacked


def unrepack_grid(repacked: dict[str, Tensor], matrix: StoredMatrix) -> dict[str, Tensor]:
    """Invert `repack_grid`."""
    num_rows, groups = matrix.shape[0], real_groups(matrix)
    scales = repacked["scales"].cpu().transpose(1, 2).flatten(0, 1)[:num_rows, :groups]
    stored = {"scales": scales.contiguous()}
    if "zeros" in repacked:
        bits = _bits(matrix)
        nibbles = split_fields(repacked["zeros"].cpu(), range(0, 32, 4), 4)  # tiles, groups, half, row
        fields = nibbles if bits <= 4 else nibbles[0] | nibbles[1] << 4
        zeros = fields.permute(0, 2, 3, 1).flatten(0, 2)[:num_rows, :groups]
        stored["zeros"] = pack_rows(zeros.to(torch.uint8).contiguous(), bits)
    return stored


def _bits(matrix: StoredMatrix) -> int:
    assert matrix.target.grid is not None
    return matrix.target.grid.bits


def real_groups(matrix: StoredMatrix) -> int:
    grid: Grid | None = matrix.target.grid
    return 1 if grid is None or grid.group_size is None else matrix.shape[1] // grid.group_size


def join_fields(fields: Tensor, first_bits: range | list[int]) -> Tensor:
    """Small integers (..., n) -> int32 (...): field i at bit `first_bits[i]`."""
    words = torch.zeros(fields.shape[:-1], dtype=torch.int32)
    for i, first_bit in enumerate(first_bits):
        words |= fields[..., i].int() << first_bit
    return words


def split_fields(words: Tensor, first_bits: range | list[int], bits: int) -> Tensor:
    """Invert `join_fields`: int32 (..., n)."""
    return torch.stack([(words >> bit) & (2**bits - 1) for bit in first_bits], -1)
