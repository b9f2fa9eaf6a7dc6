"""Products with int4 matrices, and their expansion. Layout and cost: `mspc.kernels.int4`; method: `fragments`."""

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
    load_zero,
    store_sums,
)
from mspc.kernels.gpu.tiling import fragment_options, tiles_of

SYMMETRIC_ZERO = 8


@triton.jit(do_not_specialize=["num_tokens"])
def int4_matmul(
    inputs_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    outputs_ptr,
    num_tokens,
    num_rows,
    symmetric_zero,  # an argument, because ptxas makes a constant anew wherever it is used
    NUM_COLUMNS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    WORDS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    TOKENS: tl.constexpr,
    S: tl.constexpr,
    PTX: tl.constexpr,
    WIDE: tl.constexpr,
):
    DTYPE: tl.constexpr = inputs_ptr.dtype.element_ty
    NUM_BLOCKS: tl.constexpr = (NUM_COLUMNS + 127) // 128
    tile = tl.program_id(0)
    flat = tl.arange(0, S * 128)
    block = flat // 128
    word_offsets = tl.max_contiguous(tl.multiple_of(block * 256 + flat % 128, 4), 4)
    words = words_ptr + tile.to(tl.int64) * NUM_BLOCKS * 256 + word_offsets
    inputs = input_pointers(inputs_ptr, num_tokens, NUM_COLUMNS, S, TOKENS, WORDS)
    scales = scales_ptr + tile * NUM_GROUPS * 16
    zeros = zeros_ptr + tile * NUM_GROUPS * 2
    # One step ahead, because a warp that waits for its weights has nothing else to do.
    upper, lower = load_words(words, block, 0, NUM_BLOCKS, S)
    sums = tl.zeros([S, 16, TOKENS], tl.float32)
    for first in tl.range(0, NUM_BLOCKS, S, loop_unroll_factor=2):
        word = lane_words(upper, lower, S)
        words += S * 256
        upper, lower = load_words(words, block, first + S, NUM_BLOCKS, S)
        for n in tl.static_range(4):
            if n % WORDS == 0:
                scale = load_scale(scales, first, n, S, NUM_BLOCKS, GROUP_BLOCKS, WORDS)
                zero = symmetric_zero
                if not SYMMETRIC:
                    zero = load_zero(zeros, first, n, S, NUM_BLOCKS, GROUP_BLOCKS, WORDS)
                partial = tl.zeros([S, 16, TOKENS], tl.float32)
            x0, x1 = load_input_slabs(inputs, first, n, NUM_COLUMNS, S, TOKENS, WORDS, WIDE)
            pairs = dequantize(word[n], zero, DTYPE, PTX)
            partial = add_word(partial, pairs, x0, x1, S, DTYPE, WIDE)
            if n % WORDS == WORDS - 1:
                sums += partial * scale
        inputs += S * 128
    store_sums(outputs_ptr, sums, tile, num_tokens, num_rows, TOKENS, DTYPE)


@triton.jit
def load_words(words, block, first, NUM_BLOCKS: tl.constexpr, S: tl.constexpr):
    """Rows 0-7 and 8-15 of S blocks from block `first`; none behind the last block."""
    left = first + block < NUM_BLOCKS
    if NUM_BLOCKS % S == 0:
        left = first < NUM_BLOCKS
    return tl.load(words, mask=left, other=0), tl.load(words + 128, mask=left, other=0)


@triton.jit
def int4_expand(
    words_ptr,
    scales_ptr,
    zeros_ptr,
    weight_ptr,
    num_rows,
    num_columns,
    NUM_BLOCKS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    WORDS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):
    """One block of a tile to W (16, 128), eight columns a lane: the places of `int4_matmul`, by the columns."""
    tile, block = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, 16)
    natural = tl.arange(0, 16)
    group, quarter, n = natural // (4 * WORDS), natural // WORDS % 4, natural % WORDS
    place = quarter * 4 + group * WORDS + n
    words = words_ptr + (tile.to(tl.int64) * NUM_BLOCKS + block) * 256
    word = tl.load(words + row[:, None] * 16 + place[None, :])
    group_of_row = block // GROUP_BLOCKS * (4 // WORDS) + group
    of_tile = tile * NUM_GROUPS + group_of_row[None, :]
    scale = tl.load(scales_ptr + of_tile * 16 + row[:, None]).to(tl.float32)
    eight = tl.arange(0, 8)
    code = (word[:, :, None] >> (eight // 2 * 4 + eight % 2 * 16)[None, None, :]) & 15
    if SYMMETRIC:
        value = (code - 8).to(tl.float32)
    else:
        zero = tl.load(zeros_ptr + of_tile * 2 + row[:, None] // 8) >> (row[:, None] % 8 * 4) & 15
        value = (code - zero[:, :, None]).to(tl.float32)
    rows = (tile * 16 + row)[:, None, None]
    columns = (block * 128 + natural * 8)[None, :, None] + eight[None, None, :]
    to = weight_ptr + rows.to(tl.int64) * num_columns + columns
    weight = (value * scale[:, :, None]).to(weight_ptr.dtype.element_ty)
    tl.store(to, weight, mask=(rows < num_rows) & (columns < num_columns))


def matmul(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, num_rows: int, group_size: int) -> Tensor:
    """x (T, I) -> (T, O); the other arguments as `mspc.kernels.int4` has them."""
    num_tokens, num_columns = x.shape
    y = torch.empty(num_tokens, num_rows, dtype=x.dtype, device=x.device)
    int4_matmul[(len(words),)](
        x.contiguous(),
        words,
        scales,
        scales if zeros is None else zeros,
        y,
        num_tokens,
        num_rows,
        SYMMETRIC_ZERO,
        NUM_COLUMNS=num_columns,
        NUM_GROUPS=scales.shape[1],
        SYMMETRIC=zeros is None,
        **tiles_of(group_size),
        **fragment_options(num_tokens, len(words), words.shape[1]),
    )
    return y


def expand(words: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, out: Tensor) -> None:
    num_tiles, num_blocks = words.shape[:2]
    int4_expand[(num_tiles, num_blocks)](
        words,
        scales,
        scales if zeros is None else zeros,
        out,
        *out.shape,
        NUM_BLOCKS=num_blocks,
        NUM_GROUPS=scales.shape[1],
        SYMMETRIC=zeros is None,
        enable_fp_fusion=True,
        **tiles_of(group_size),
    )
