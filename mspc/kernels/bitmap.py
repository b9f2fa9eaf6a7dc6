"""Unstructured matrices of 16-bit values or of codes, and N:M matrices of codes, for 1 to 16 tokens.

Layout: the kept weights as in the file, and the number of the first kept weight of every word of 32 columns.

    kept     values (nnz,), or codes uint8 (ceil(nnz b / 8),) of b = 2, 3, 4 or 8 bits, and a byte more where b is 3
    words    int32 (O, ceil(I / 32)): the bitmap
    bases    int32 (O, ceil(I / 256)): kept weights before every 8th word
    ranks    uint8 (O, ceil(I / 32)): kept weights between that and the word
    scales   float16 (O, groups), zeros uint8 (O, groups): with codes

The mask of an N:M matrix is made from its indices. Mask, bases and ranks take 1.375 bits a weight; the indices take 2
at 8:16, 1.25 at 5:16, 1 at 2:4 and 0.25 at 1:16.

Memory: 9.4 bits a weight at 50% with values, 0.375 of them for bases and ranks. Thread instructions a dense position on
sm_90, counted (tests), for 1 to 8 tokens: 15 with values, and 19, 25, 30, 24 with codes of 8, 4, 3, 2 bits.

This kernel makes unstructured masks run compressed; it is not made for speed. Its instructions are per position, not
per kept weight. On a GPU with HBM they take about as long as reading the dense weight. Expect no gain there at 50% and
little at 70%, and no gain with codes. With GDDR memory there may be some. The same sparsity as 8:16 costs a third of
the instructions (`mspc.kernels.nm`).
"""

import torch
from torch import Tensor
from torch.cuda import device_of
from torch.nn.functional import pad

from mspc.formats.bits import pack_bits, pack_rows, unpack_bits, unpack_rows
from mspc.formats.decoding import decode_mask, strips
from mspc.formats.description import StoredMatrix, index_bits, num_bytes
from mspc.kernels.launch import on_gpu
from mspc.types import NM

MAX_TOKENS = 16
WORD, WORDS_OF_BASE = 32, 8


def supports(matrix: StoredMatrix, dtype: torch.dtype) -> bool:
    (num_rows, num_columns), grid = matrix.shape, matrix.target.grid
    if dtype not in (torch.bfloat16, torch.float16) or num_rows * num_columns >= 2**31:
        return False
    if grid is None:
        return matrix.has_mask and dtype == matrix.dtype
    in_words = grid.group_size is None or grid.group_size == num_columns or grid.group_size % WORD == 0
    return (matrix.has_mask or matrix.has_indices) and grid.bits in (2, 3, 4, 8) and in_words


def repack(stored: dict[str, Tensor], matrix: StoredMatrix) -> dict[str, Tensor]:
    grid = matrix.target.grid
    kept, mask = _kept_and_mask(stored, matrix)
    words = pad(mask, (0, -mask.shape[1] % 4)).view(torch.int32)
    bits = pad(unpack_rows(mask, 1, matrix.shape[1]), (0, -matrix.shape[1] % (WORD * WORDS_OF_BASE)))
    counts = bits.view(len(mask), -1, WORDS_OF_BASE, WORD).sum(-1)
    ranks = (counts.cumsum(-1) - counts).flatten(1)[:, : words.shape[1]]
    in_bases = counts.sum(-1).flatten()
    bases = (in_bases.cumsum(0) - in_bases).view(len(mask), -1)
    repacked = {"kept": kept, "words": words, "bases": bases.int(), "ranks": ranks.to(torch.uint8).contiguous()}
    if grid is None:
        return repacked
    if grid.bits == 3:
        repacked["kept"] = pad(kept, (0, 1))
    repacked["scales"] = stored["scales"]
    if "zeros" in stored:
        repacked["zeros"] = unpack_rows(stored["zeros"], grid.bits, stored["scales"].shape[1])
    return repacked


def _kept_and_mask(stored: dict[str, Tensor], matrix: StoredMatrix) -> tuple[Tensor, Tensor]:
    """The kept weights as one stream, and the mask, uint8 (O, ceil(I / 8)), which N:M matrices do not store."""
    if matrix.has_mask:
        return stored["values" if matrix.target.grid is None else "codes"], stored["mask"]
    bits = _bits(matrix)
    masks = [decode_mask(stored, matrix, *rows).to(torch.uint8) for rows in strips(matrix.shape)]
    codes = unpack_rows(stored["codes"], bits, matrix.kept_per_row)
    return pack_bits(codes, bits), torch.cat([pack_rows(mask, 1) for mask in masks])


def unrepack(repacked: dict[str, Tensor], matrix: StoredMatrix) -> dict[str, Tensor]:
    grid, num_columns = matrix.target.grid, matrix.shape[1]
    packed = repacked["words"].cpu().view(torch.uint8)[:, : -(-num_columns // 8)].contiguous()
    mask, kept = unpack_rows(packed, 1, num_columns), repacked["kept"].cpu()
    offsets = pad(mask.sum(1).cumsum(0), (1, 0))
    if grid is None:
        return {"values": kept, "mask": packed, "row_offsets": offsets}
    codes = kept[: num_bytes(int(offsets[-1]), grid.bits)]
    if matrix.has_mask:
        stored = {"codes": codes, "mask": packed, "row_offsets": offsets}
    else:
        assert isinstance(matrix.pattern, NM)
        indices = (torch.arange(num_columns) % matrix.pattern.of).to(torch.uint8).expand_as(mask)[mask.bool()]
        numbers = unpack_bits(codes, grid.bits, len(indices)).view(len(mask), -1)
        packed_indices = pack_rows(indices.view(len(mask), -1), index_bits(matrix.pattern))
        stored = {"codes": pack_rows(numbers, grid.bits), "indices": packed_indices}
    stored["scales"] = repacked["scales"].cpu()
    if "zeros" in repacked:
        stored["zeros"] = pack_rows(repacked["zeros"].cpu(), grid.bits)
    return stored


def matmul(x: Tensor, repacked: dict[str, Tensor], matrix: StoredMatrix) -> Tensor:
    """x (T, I) -> x Wᵀ (T, O)."""
    kept, words, bases, ranks = (repacked[part] for part in ("kept", "words", "bases", "ranks"))
    return _matmul(x, kept, words, bases, ranks, repacked.get("scales"), repacked.get("zeros"), _bits(matrix))


def expand(repacked: dict[str, Tensor], matrix: StoredMatrix, out: Tensor) -> None:
    """Write the dense weight to `out` (O, I)."""
    kept, words, bases, ranks = (repacked[part] for part in ("kept", "words", "bases", "ranks"))
    _expand(kept, words, bases, ranks, repacked.get("scales"), repacked.get("zeros"), _bits(matrix), out)


def _bits(matrix: StoredMatrix) -> int:
    return 16 if matrix.target.grid is None else matrix.target.grid.bits


@torch.library.custom_op("mspc::bitmap_matmul", mutates_args=())
def _matmul(
    x: Tensor,
    kept: Tensor,
    words: Tensor,
    bases: Tensor,
    ranks: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bits: int,
) -> Tensor:
    with device_of(x):
        y: Tensor = on_gpu("bitmap").matmul(x, kept, words, bases, ranks, scales, zeros, bits)
    return y


@_matmul.register_fake
def _(
    x: Tensor,
    kept: Tensor,
    words: Tensor,
    bases: Tensor,
    ranks: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bits: int,
) -> Tensor:
    return x.new_empty(len(x), len(words))


@torch.library.custom_op("mspc::bitmap_expand", mutates_args=("out",))
def _expand(
    kept: Tensor,
    words: Tensor,
    bases: Tensor,
    ranks: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bits: int,
    out: Tensor,
) -> None:
    with device_of(out):
        on_gpu("bitmap").expand(kept, words, bases, ranks, scales, zeros, bits, out)
