"""Products with 2:4 matrices of 16-bit values or int4 codes, and their expansion. Layout: `mspc.kernels.sparse24`.

The kept pair of a group of four columns is in one register, and its two 2-bit indices tell where its halves go. A first
`prmt` looks the indices of two groups up in a table, whose entries are selectors of bytes. With a selector, a second
`prmt` copies the halves of the pair, or zeros, to two columns.

Index a is of columns 0 and 2, index b of columns 1 and 3; (first, second) are the halves of the pair:

    a   column 0   column 2      b   column 1   column 3
    0   first      -             0   second     -
    1   -          first         1   -          second
    2   first      second        2   -          -
    3   -          -             3   first      second
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mspc.kernels.gpu.dequantize import dequantize
from mspc.kernels.gpu.fragments import (
    add_word,
    input_pointers,
    lane_words,
    load_input_slabs,
    load_scale,
    load_words,
    load_zero,
    store_sums,
)
from mspc.kernels.gpu.tiling import fragment_options, tiles_of

SYMMETRIC_ZERO = 8
# Selectors of the bytes of a half, by index: 10 first, 32 second, 44 the zeros of the other operand.
COLUMN0_OF_A, COLUMN1_OF_B = 0x44104410, 0x10444432
COLUMN2_OF_A, COLUMN3_OF_B = 0x44321044, 0x32443244

SELECT = tl.constexpr("""{
    prmt.b32 $0, $3, $4, $2;
    prmt.b32 $1, $5, $6, $2;
}""")
PLACE = tl.constexpr("""{
    .reg .b32 zeros;
    mov.b32 zeros, 0;
    prmt.b32 $0, $2, zeros, $3;
    prmt.b32 $1, $2, zeros, $4;
}""")


@triton.jit
def place_pair(pair, selector0, selector1):
    """Columns 0 and 1, and columns 2 and 3, of groups whose kept pairs are `pair`."""
    return tl.inline_asm_elementwise(
        PLACE, "=&r,=r,r,r,r", [pair, selector0, selector1], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
    )


@triton.jit
def two_groups(pair0, pair1, indices, selectors, PTX: tl.constexpr):
    """Columns (0, 1) and (2, 3) of two groups. `selectors` are the four of this module.

    The low 16 bits of `indices` are a, b, a, b, four bits each. a is below 4, and 4 is added to b.
    """
    if PTX:
        selector0, selector1 = tl.inline_asm_elementwise(
            SELECT,
            "=&r,=r,r,r,r,r,r",
            [indices, selectors[0], selectors[1], selectors[2], selectors[3]],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        first = place_pair(pair0, selector0, selector1)
        second = place_pair(pair1, selector0 >> 16, selector1 >> 16)
        return first[0], first[1], second[0], second[1]
    else:
        first01, first23 = place_plainly(pair0, indices)
        second01, second23 = place_plainly(pair1, indices >> 8)
        return first01, first23, second01, second23


@triton.jit
def place_plainly(pair, indices):
    a, b = indices & 3, (indices >> 4) & 3
    first, second = pair & 0xFFFF, (pair >> 16) & 0xFFFF
    column0 = tl.where((a == 0) | (a == 2), first, 0)
    column1 = tl.where(b == 0, second, tl.where(b == 3, first, 0))
    column2 = tl.where(a == 1, first, tl.where(a == 2, second, 0))
    column3 = tl.where((b == 1) | (b == 3), second, 0)
    return column0 | (column1 << 16), column2 | (column3 << 16)


@triton.jit
def load_pairs(pairs, first, S: tl.constexpr, NUM_BLOCKS: tl.constexpr):
    """Both halves of a quarter, four pairs each, of S blocks from block `first`."""
    flat = tl.arange(0, S * 128)
    block = first + flat // 128
    pointers = pairs + tl.max_contiguous(tl.multiple_of(block * 512 + flat % 128, 4), 4)
    upper0 = tl.load(pointers, mask=block < NUM_BLOCKS, other=0)
    upper1 = tl.load(pointers + 128, mask=block < NUM_BLOCKS, other=0)
    lower0 = tl.load(pointers + 256, mask=block < NUM_BLOCKS, other=0)
    lower1 = tl.load(pointers + 384, mask=block < NUM_BLOCKS, other=0)
    return lane_words(upper0, lower0, S), lane_words(upper1, lower1, S)


@triton.jit
def word_indices(indices, n: tl.constexpr):
    """Indices of the two groups of word n. Words 0 and 1 have the low two bits of each four, words 2 and 3 the rest."""
    return (((indices >> (n // 2 * 2)) & 0x33333333) | 0x40404040) >> (n % 2 * 16)


@triton.jit(do_not_specialize=["num_tokens"])
def sparse24_matmul(
    inputs_ptr,
    kept_ptr,
    indices_ptr,
    scales_ptr,
    zeros_ptr,
    outputs_ptr,
    num_tokens,
    num_rows,
    symmetric_zero,
    # These are arguments, because ptxas would build a constant again at every use.
    column0,
    column1,
    column2,
    column3,
    NUM_COLUMNS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    WORDS: tl.constexpr,
    CODES: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    TOKENS: tl.constexpr,
    S: tl.constexpr,
    PTX: tl.constexpr,
    WIDE: tl.constexpr,
):
    DTYPE: tl.constexpr = inputs_ptr.dtype.element_ty
    NUM_BLOCKS: tl.constexpr = (NUM_COLUMNS + 127) // 128
    tile = tl.program_id(0)
    kept = kept_ptr + tile.to(tl.int64) * NUM_BLOCKS * (128 if CODES else 512)
    indices = indices_ptr + tile.to(tl.int64) * NUM_BLOCKS * 64
    selectors = column0, column1, column2, column3
    inputs = input_pointers(inputs_ptr, num_tokens, NUM_COLUMNS, S, TOKENS, WORDS)
    sums = tl.zeros([S, 16, TOKENS], tl.float32)
    for first in tl.range(0, NUM_BLOCKS, S, loop_unroll_factor=2):
        all_indices = load_words(indices, first, S, NUM_BLOCKS, 1)[0]
        halves = load_words(kept, first, S, NUM_BLOCKS, 2) if CODES else load_pairs(kept, first, S, NUM_BLOCKS)
        partial = sums
        for n in tl.static_range(4):
            if CODES and n % WORDS == 0:
                scale = load_scale(scales_ptr + tile * NUM_GROUPS * 16, first, n, S, NUM_BLOCKS, GROUP_BLOCKS, WORDS)
                zero = symmetric_zero
                if not SYMMETRIC:
                    zero = load_zero(zeros_ptr + tile * NUM_GROUPS * 2, first, n, S, NUM_BLOCKS, GROUP_BLOCKS, WORDS)
                partial = tl.zeros([S, 16, TOKENS], tl.float32)
            if n % 2 == 0:
                pairs = halves[n // 2]
            if CODES and (n % 2 == 0 or n % WORDS == 0):  # again if words 2 i and 2 i + 1 differ in zero points
                pairs = dequantize(halves[n // 2], zero, DTYPE, PTX)
            word = two_groups(pairs[n % 2 * 2], pairs[n % 2 * 2 + 1], word_indices(all_indices, n), selectors, PTX)
            x0, x1 = load_input_slabs(inputs, first, n, NUM_COLUMNS, S, TOKENS, WORDS, WIDE)
            partial = add_word(partial, word, x0, x1, S, DTYPE, WIDE)
            if CODES and n % WORDS == WORDS - 1:
                sums += partial * scale
        if not CODES:
            sums = partial
        inputs += S * 128
    store_sums(outputs_ptr, sums, tile, num_tokens, num_rows, TOKENS, DTYPE)


@triton.jit
def sparse24_expand(
    kept_ptr,
    indices_ptr,
    scales_ptr,
    zeros_ptr,
    weight_ptr,
    num_rows,
    num_columns,
    NUM_BLOCKS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    WORDS: tl.constexpr,
    CODES: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):
    """Expand one block of a tile to W (16, 128), eight columns a lane, with the order of `sparse24_matmul` inverted."""
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    tile, block = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, 16)[:, None, None]
    natural = tl.arange(0, 16)[None, :, None]
    column = tl.arange(0, 8)[None, None, :]
    group, word = natural // (4 * WORDS), natural // (4 * WORDS) * WORDS + natural % WORDS
    quarter = natural // WORDS % 4
    pair = word % 2 * 2 + column // 4  # of the four of half a quarter
    of_tile = tile.to(tl.int64) * NUM_BLOCKS + block

    indices = tl.load(indices_ptr + of_tile * 64 + row // 8 * 32 + row % 8 * 4 + quarter)
    index = (indices >> (8 * pair + column % 2 * 4 + word // 2 * 2)) & 3
    # Two bits for each value of the index: the column holds 0 none, 1 the first, 2 the second of the pair.
    holds_even = tl.where(column % 4 == 0, 0b00_01_00_01, 0b00_10_01_00)
    holds_odd = tl.where(column % 4 == 1, 0b01_00_00_10, 0b10_00_10_00)
    holds = tl.where(column % 2 == 0, holds_even, holds_odd)
    which = (holds >> (2 * index)) & 3
    second = (which == 2).to(tl.int32)
    if CODES:
        codes = tl.load(kept_ptr + of_tile * 128 + row // 8 * 64 + row % 8 * 8 + quarter * 2 + word // 2)
        code = (codes >> (4 * pair + 16 * second)) & 15
        group_of_row = tile * NUM_GROUPS + block // GROUP_BLOCKS * (4 // WORDS) + group
        scale = tl.load(scales_ptr + group_of_row * 16 + row).to(tl.float32)
        zero = 8
        if not SYMMETRIC:
            zero = tl.load(zeros_ptr + group_of_row * 2 + row // 8) >> (4 * (row % 8)) & 15
        weight = ((code - zero).to(tl.float32) * scale).to(DTYPE)
    else:
        kept = tl.load(kept_ptr + of_tile * 512 + row // 8 * 256 + word // 2 * 128 + row % 8 * 16 + quarter * 4 + pair)
        weight = (kept >> (16 * second)).to(tl.int16).to(DTYPE, bitcast=True)
    weight = tl.where(which > 0, weight, tl.zeros_like(weight))
    rows = tile * 16 + row
    columns = block * 128 + natural * 8 + column
    tl.store(
        weight_ptr + rows.to(tl.int64) * num_columns + columns, weight, mask=(rows < num_rows) & (columns < num_columns)
    )


def matmul(
    x: Tensor,
    kept: Tensor,
    indices: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    num_rows: int,
    group_size: int,
) -> Tensor:
    """x (T, I) -> (T, O); the other arguments as `mspc.kernels.sparse24` has them."""
    num_tokens, num_columns = x.shape
    y = torch.empty(num_tokens, num_rows, dtype=x.dtype, device=x.device)
    sparse24_matmul[(len(kept),)](
        x.contiguous(),
        kept,
        indices,
        kept if scales is None else scales,
        kept if zeros is None else zeros,
        y,
        num_tokens,
        num_rows,
        SYMMETRIC_ZERO,
        COLUMN0_OF_A,
        COLUMN1_OF_B,
        COLUMN2_OF_A,
        COLUMN3_OF_B,
        NUM_COLUMNS=num_columns,
        NUM_GROUPS=1 if scales is None else scales.shape[1],
        CODES=scales is not None,
        SYMMETRIC=zeros is None,
        **tiles_of(group_size),
        **fragment_options(num_tokens, len(kept), kept.shape[1]),
    )
    return y


def expand(
    kept: Tensor, indices: Tensor, scales: Tensor | None, zeros: Tensor | None, group_size: int, out: Tensor
) -> None:
    num_tiles, num_blocks = kept.shape[:2]
    sparse24_expand[(num_tiles, num_blocks)](
        kept,
        indices,
        kept if scales is None else scales,
        kept if zeros is None else zeros,
        out,
        *out.shape,
        NUM_BLOCKS=num_blocks,
        NUM_GROUPS=1 if scales is None else scales.shape[1],
        CODES=scales is not None,
        SYMMETRIC=zeros is None,
        enable_fp_fusion=True,
        **tiles_of(group_size),
    )
