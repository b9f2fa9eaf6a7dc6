"""2:4 matrices of 16-bit values or int4 codes, for 1 to 32 tokens.

Layout (`tiles`): the bytes of the file, with O padded to 16 and I to 128. A group of four columns holds a pair of kept
weights, and two indices of two bits, a and b (`gpu.sparse24`).

    indices   int32 (tiles, blocks, 2 halves of 8 rows, 8, 4 quarters): indices of the 8 groups of a quarter; a of group
              g is at bit 8 (g mod 4) + 2 (g div 4), b four bits higher
    kept      codes: int32 (tiles, blocks, 2, 8, 4, 2 halves of a quarter); the first code of group g of four is at bit
              4 g, the second 16 bits higher
              values: pairs as int32 (tiles, blocks, 2, 2 halves of a quarter, 8, 4, 4 groups)
    scales, zeros: as in `mspc.kernels.codes`

Memory: 0.391 bytes a weight with int4 at groups of 128, 1.125 with values. Thread instructions a dense position on
sm_90, counted (tests), for 1 to 8 tokens: with int4 2.4 for float16 inputs, 2.6 for bfloat16, 2.7 if asymmetric; 1.8
with values. For 32 tokens they are 3.4 and 2.4. The products are dense ones on tensor cores, and `prmt` puts the zeros
in. Sparse tensor cores (`mma.sp`) would halve the products, which are not the limit. Sums are as in
`mspc.kernels.codes`.
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
from mspc.types import NM

__all__ = ["MAX_TOKENS", "expand", "matmul", "repack", "supports", "unrepack"]

# For each choice of two columns (first, second): indices a and b, and if the pair holds the second weight first.
KEPT_COLUMNS = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
INDICES_A, INDICES_B = [0, 2, 0, 1, 3, 1], [0, 2, 1, 0, 3, 1]
SWAPPED = [False, False, False, True, False, False]
INDEX_BITS = [bit + high for high in (0, 2) for bit in range(0, 32, 4)]
"""First bit of a and b of each group of a quarter, in turn."""
CODE_BITS = [4 * group + 16 * which for group in range(4) for which in range(2)]
"""First bit of the first and the second code of each of four groups, in turn."""


def supports(matrix: StoredMatrix, dtype: torch.dtype) -> bool:
    target = matrix.target
    with_values = target.grid is None and dtype == matrix.dtype
    return (
        target.pattern == NM(2, 4)
        and dtype in (torch.bfloat16, torch.float16)
        and (with_values or (target.grid is not None and target.grid.bits == 4))
        and tiles_fit(matrix)
    )


def repack(stored: dict[str, Tensor], matrix: StoredMatrix) -> dict[str, Tensor]:
    num_rows, num_kept = matrix.shape[0], matrix.shape[1] // 2
    columns = unpack_rows(stored["indices"], 2, num_kept).view(num_rows, -1, 2).long()
    which = _choice_of_columns()[columns[..., 0] * 4 + columns[..., 1]]
    swapped = torch.tensor(SWAPPED)[which][..., None]
    indices = torch.stack([torch.tensor(INDICES_A)[which], torch.tensor(INDICES_B)[which]], -1).to(torch.uint8)
    repacked = {"indices": _indices(to_tiles(indices.view(num_rows, num_kept), matrix, 4))}
    if matrix.target.grid is None:
        pairs = stored["values"].view(num_rows, -1, 2).view(torch.int16)
        pairs = torch.where(swapped, pairs.flip(-1), pairs).view(num_rows, num_kept)
        tiled = to_tiles(pairs, matrix, 4).unflatten(4, (4, 2, 2))  # quarter, half of it, word
        repacked["kept"] = _blocks(tiled.permute(0, 3, 1, 5, 2, 4, 6, 7).contiguous().view(torch.int32), matrix)
        return repacked
    codes = unpack_rows(stored["codes"], 4, num_kept).view(num_rows, -1, 2)
    codes = torch.where(swapped, codes.flip(-1), codes).view(num_rows, num_kept)
    of_half = to_tiles(codes, matrix, 4).unflatten(4, (4, 2, 2)).flatten(-2)
    words = join_fields(of_half, CODE_BITS).permute(0, 3, 1, 2, 4, 5)
    repacked["kept"] = _blocks(words.contiguous(), matrix)
    return {**repacked, **repack_grid(stored, matrix)}


def unrepack(repacked: dict[str, Tensor], matrix: StoredMatrix) -> dict[str, Tensor]:
    tiles, blocks = num_tiles(matrix), num_blocks(matrix)
    num_rows, num_kept = matrix.shape[0], matrix.shape[1] // 2
    words = repacked["indices"].cpu().view(tiles, blocks, 2, 8, 4).permute(0, 2, 3, 1, 4)
    fields = split_fields(words, INDEX_BITS, 2).unflatten(-1, (4, 4)).flatten(4, 5)
    indices = from_tiles(fields, matrix, num_kept).reshape(num_rows, -1, 2).long()
    which = _choice_of_indices()[indices[..., 0] * 4 + indices[..., 1]]
    swapped = torch.tensor(SWAPPED)[which][..., None]
    columns = torch.tensor(KEPT_COLUMNS)[which].to(torch.uint8).view(num_rows, num_kept)
    stored = {"indices": pack_rows(columns, 2)}
    kept = repacked["kept"].cpu()
    if matrix.target.grid is None:
        tiled = kept.view(torch.int16).view(tiles, blocks, 2, 2, 8, 4, 2, 4).permute(0, 2, 4, 1, 5, 3, 6, 7)
        pairs = from_tiles(tiled.flatten(4, 6), matrix, num_kept).reshape(num_rows, -1, 2)
        values = torch.where(swapped, pairs.flip(-1), pairs).view(num_rows, num_kept)
        return {**stored, "values": values.view(matrix.dtype)}
    words = kept.view(tiles, blocks, 2, 8, 4, 2).permute(0, 2, 3, 1, 4, 5)
    tiled = split_fields(words, CODE_BITS, 4).to(torch.uint8).unflatten(-1, (2, 4)).flatten(4, 6)
    codes = from_tiles(tiled, matrix, num_kept).reshape(num_rows, -1, 2)
    codes = torch.where(swapped, codes.flip(-1), codes).view(num_rows, num_kept)
    return {**stored, "codes": pack_rows(codes, 4), **unrepack_grid(repacked, matrix)}


def _indices(tiled: Tensor) -> Tensor:
    """(tiles, 2, 8, blocks, 16 words, a b a b) -> int32 (tiles, blocks, 64)."""
    of_quarter = tiled.unflatten(4, (4, 4)).flatten(-2)
    return join_fields(of_quarter, INDEX_BITS).permute(0, 3, 1, 2, 4).flatten(2).contiguous()


def _blocks(kept: Tensor, matrix: StoredMatrix) -> Tensor:
    return kept.view(num_tiles(matrix), num_blocks(matrix), -1)


def _choice_of_columns() -> Tensor:
    """Number of the choice of two columns, at 4 first + second."""
    choices = torch.zeros(16, dtype=torch.long)
    for which, (first, second) in enumerate(KEPT_COLUMNS):
        choices[4 * first + second] = which
    return choices


def _choice_of_indices() -> Tensor:
    """Number of the choice of two columns, at 4 a + b."""
    choices = torch.zeros(16, dtype=torch.long)
    choices[torch.tensor(INDICES_A) * 4 + torch.tensor(INDICES_B)] = torch.arange(6)
    return choices


def matmul(x: Tensor, repacked: dict[str, Tensor], matrix: StoredMatrix) -> Tensor:
    """x (T, I) -> x Wᵀ (T, O)."""
    kept, indices, num_rows = repacked["kept"], repacked["indices"], matrix.shape[0]
    return _matmul(x, kept, indices, repacked.get("scales"), repacked.get("zeros"), num_rows, group_size(matrix))


def expand(repacked: dict[str, Tensor], matrix: StoredMatrix, out: Tensor) -> None:
    """Write the dense weight to `out` (O, I)."""
    kept, indices = repacked["kept"], repacked["indices"]
    _expand(kept, indices, repacked.get("scales"), repacked.get("zeros"), group_size(matrix), out)


@torch.library.custom_op("mspc::sparse24_matmul", mutates_args=())
def _matmul(
    x: Tensor,
    kept: Tensor,
    indices: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    num_rows: int,
    group_size: int,
) -> Tensor:
    with device_of(x):
        y: Tensor = on_gpu("sparse24").matmul(x, kept, indices, scales, zeros, num_rows, group_size)
    return y


@_matmul.register_fake
def _(
    x: Tensor,
    kept: Tensor,
    indices: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    num_rows: int,
    group_size: int,
) -> Tensor:
    return x.new_empty(len(x), num_rows)


@torch.library.custom_op("mspc::sparse24_expand", mutates_args=("out",))
def _expand(
    kept: Tensor, indices: Tensor, scales: Tensor | None, zeros: Tensor | None, group_size: int, out: Tensor
) -> None:
    with device_of(out):
        on_gpu("sparse24").expand(kept, indices, scales, zeros, group_size, out)
