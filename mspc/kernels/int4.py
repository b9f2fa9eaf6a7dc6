"""Matrices of int4 codes without zeros, for 1 to 32 tokens.

Layout (`tiles`): the bytes of the file, with O padded to 16 and I to 128.

    words    int32 (tiles, blocks, 16 rows, 16 words), 8 codes each: code c of a word has the bits of nibble
             0, 4, 1, 5, 2, 6, 3, 7, so that a shift and a mask give pairs of neighbours
    scales   float16 (tiles, groups, 16 rows)
    zeros    int32 (tiles, groups, 2), if asymmetric: four bits for each of 8 rows

Cost: 0.516 bytes a weight at groups of 128. Thread instructions a weight on sm_90, counted (tests): 1.6 with float16
inputs, 1.9 with bfloat16, 2.0 asymmetric, whether for 1 token or 8, because the products run on tensor cores (2.2 up to
16 tokens, 2.7 up to 32); a kernel on the other units takes 3.5 for one token and more for each further one. Products of
codes and inputs are exact and summed in float32, scales are applied to the sums of their groups.
"""

import torch
from torch import Tensor
from torch.cuda import device_of

from mspc.formats.bits import pack_rows, unpack_rows
from mspc.formats.description import StoredMatrix
from mspc.kernels import plain
from mspc.kernels.launch import launches, on_gpu
from mspc.kernels.tiles import (
    MAX_TOKENS,
    arrange_grid,
    from_tiles,
    group_size,
    join_fields,
    num_blocks,
    num_tiles,
    restore_grid,
    split_fields,
    tiles_fit,
    to_tiles,
)

__all__ = ["MAX_TOKENS", "arrange", "expand", "matmul", "restore", "supports", "twin"]

PLACES = [0, 16, 4, 20, 8, 24, 12, 28]
"""First bit of each code of a word."""


def supports(description: StoredMatrix, dtype: torch.dtype) -> bool:
    target = description.target
    is_int4 = target.pattern.sparsity == 0 and target.grid is not None and target.grid.bits == 4
    return is_int4 and dtype in (torch.bfloat16, torch.float16) and tiles_fit(description)


def arrange(stored: dict[str, Tensor], description: StoredMatrix) -> dict[str, Tensor]:
    codes = to_tiles(unpack_rows(stored["codes"], 4, description.shape[1]), description, 8)
    words = join_fields(codes, PLACES).permute(0, 3, 1, 2, 4)
    shape = (num_tiles(description), num_blocks(description), 16, 16)
    return {"words": words.contiguous().view(shape), **arrange_grid(stored, description)}


def restore(arranged: dict[str, Tensor], description: StoredMatrix) -> dict[str, Tensor]:
    words = arranged["words"].cpu().unflatten(2, (2, 8)).permute(0, 2, 3, 1, 4)
    codes = from_tiles(split_fields(words, PLACES, 4).to(torch.uint8), description, description.shape[1])
    return {"codes": pack_rows(codes.contiguous(), 4), **restore_grid(arranged, description)}


def matmul(x: Tensor, arranged: dict[str, Tensor], description: StoredMatrix) -> Tensor:
    """x (T, I) -> (T, O)."""
    if not launches(x):
        return twin(x, arranged, description)
    size = group_size(description)
    return _matmul(x, arranged["words"], arranged["scales"], arranged.get("zeros"), description.shape[0], size)


def twin(x: Tensor, arranged: dict[str, Tensor], description: StoredMatrix) -> Tensor:
    return plain.matmul(x, restore(arranged, description), description)


def expand(arranged: dict[str, Tensor], description: StoredMatrix, out: Tensor) -> None:
    """The dense weight, to `out` (O, I)."""
    if not launches(out):
        out.copy_(plain.weight(restore(arranged, description), description))
        return
    _expand(arranged["words"], arranged["scales"], arranged.get("zeros"), group_size(description), out)


@torch.library.custom_op("mspc::int4_matmul", mutates_args=())
def _matmul(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, num_rows: int, group_size: int) -> Tensor:
    with device_of(x):
        y: Tensor = on_gpu("int4").matmul(x, words, scales, zeros, num_rows, group_size)
    return y


@_matmul.register_fake
def _(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, num_rows: int, group_size: int) -> Tensor:
    return x.new_empty(len(x), num_rows)


@torch.library.custom_op("mspc::int4_expand", mutates_args=("out",))
def _expand(words: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, out: Tensor) -> None:
    with device_of(out):
        on_gpu("int4").expand(words, scales, zeros, group_size, out)
