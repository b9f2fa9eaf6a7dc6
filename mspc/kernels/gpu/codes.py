"""Products with matrices of codes, and their expansion. Layout and cost: `mspc.kernels.codes`; method: `fragments`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mspc.kernels.gpu.dequantize import add_sixteenfold, dequantize
from mspc.kernels.gpu.fragments import (
    add_word,
    input_pointers,
    load_input_slabs,
    load_scale,
    load_words,
    load_zero,
    store_sums,
)
from mspc.kernels.gpu.tiling import fragment_options, tiles_of


@triton.jit
def load_planes(words, first, S: tl.constexpr, NUM_BLOCKS: tl.constexpr, BITS: tl.constexpr):
    """The low and the high plane of S blocks of a tile from block `first`; a single plane is returned twice."""
    LOW: tl.constexpr = 2 if BITS < 4 else 4
    low = load_words(words, first, S, NUM_BLOCKS, LOW)
    high = low
    if BITS > LOW:
        high = load_words(words + NUM_BLOCKS * 64 * LOW, first, S, NUM_BLOCKS, BITS - LOW)
    return low, high


@triton.jit
def nibbles(low, high, n: tl.constexpr, BITS: tl.constexpr):
    """The codes of word n, or the low four bits of each."""
    if BITS == 4 or BITS == 8:
        return low[n]
    codes = (low[n // 2] >> (n % 2 * 2)) & 0x33333333
    if BITS == 2:
        return codes
    third = high[0] << (2 - n) if n < 2 else high[0] >> (n - 2)
    return codes | (third & 0x44444444)


@triton.jit(do_not_specialize=["num_tokens"])
def codes_matmul(
    inputs_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    outputs_ptr,
    num_tokens,
    num_rows,
    symmetric_zero,  # an argument, because ptxas would build a constant again at every use
    BITS: tl.constexpr,
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
    words = words_ptr + tile.to(tl.int64) * NUM_BLOCKS * 64 * BITS
    inputs = input_pointers(inputs_ptr, num_tokens, NUM_COLUMNS, S, TOKENS, WORDS)
    scales = scales_ptr + tile * NUM_GROUPS * 16
    zeros = zeros_ptr + tile * NUM_GROUPS * 2
    high_zeros = zeros + tl.num_programs(0) * NUM_GROUPS * 2
    # One step ahead, because a warp that waits for its weights has nothing else to do.
    next_low, next_high = load_planes(words, 0, S, NUM_BLOCKS, BITS)
    sums = tl.zeros([S, 16, TOKENS], tl.float32)
    UNROLLED: tl.constexpr = 1 if BITS == 8 else 2  # int8 has the bytes of two steps in one
    for first in tl.range(0, NUM_BLOCKS, S, loop_unroll_factor=UNROLLED):
        low, high = next_low, next_high
        next_low, next_high = load_planes(words, first + S, S, NUM_BLOCKS, BITS)
        for n in tl.static_range(4):
            if n % WORDS == 0:
                scale = load_scale(scales, first, n, S, NUM_BLOCKS, GROUP_BLOCKS, WORDS)
                zero, high_zero = symmetric_zero & 15, symmetric_zero >> 4
                if not SYMMETRIC:
                    zero = load_zero(zeros, first, n, S, NUM_BLOCKS, GROUP_BLOCKS, WORDS)
                    if BITS == 8:
                        high_zero = load_zero(high_zeros, first, n, S, NUM_BLOCKS, GROUP_BLOCKS, WORDS)
                partial = tl.zeros([S, 16, TOKENS], tl.float32)
            x0, x1 = load_input_slabs(inputs, first, n, NUM_COLUMNS, S, TOKENS, WORDS, WIDE)
            pairs = dequantize(nibbles(low, high, n, BITS), zero, DTYPE, PTX)
            if BITS == 8:
                pairs = add_sixteenfold(pairs, dequantize(high[n], high_zero, DTYPE, PTX), DTYPE, PTX)
            partial = add_word(partial, pairs, x0, x1, S, DTYPE, WIDE)
            if n % WORDS == WORDS - 1:
                sums += partial * scale
        inputs += S * 128
    store_sums(outputs_ptr, sums, tile, num_tokens, num_rows, TOKENS, DTYPE)


@triton.jit
def codes_expand(
    words_ptr,
    scales_ptr,
    zeros_ptr,
    weight_ptr,
    num_rows,
    num_columns,
    BITS: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    WORDS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):
    """Expand one block of a tile to W (16, 128), eight columns a lane, with the order of `codes_matmul` inverted."""
    LOW: tl.constexpr = 2 if BITS < 4 else 4
    tile, block = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, 16)[:, None, None]
    natural = tl.arange(0, 16)[None, :, None]
    column = tl.arange(0, 8)[None, None, :]
    group, quarter = natural // (4 * WORDS), natural // WORDS % 4
    lane, n = row * 4 + quarter, group * WORDS + natural % WORDS
    low = words_ptr + tile.to(tl.int64) * NUM_BLOCKS * 64 * BITS + block * 64 * LOW
    code = codes_at(low, lane, n, column, LOW)
    group_of_row = tile * NUM_GROUPS + block // GROUP_BLOCKS * (4 // WORDS) + group
    zeros = zeros_ptr + group_of_row * 2 + row // 8
    zero = 2 ** (BITS - 1)
    if not SYMMETRIC:
        zero = tl.load(zeros) >> (row % 8 * 4) & 15
    if BITS > LOW:
        high = words_ptr + tile.to(tl.int64) * NUM_BLOCKS * 64 * BITS + (NUM_BLOCKS * LOW + block * (BITS - LOW)) * 64
        code |= codes_at(high, lane, n, column, BITS - LOW) << LOW
    if BITS == 8 and not SYMMETRIC:
        zero |= (tl.load(zeros + tl.num_programs(0) * NUM_GROUPS * 2) >> (row % 8 * 4) & 15) << 4
    scale = tl.load(scales_ptr + group_of_row * 16 + row).to(tl.float32)
    weight = ((code - zero).to(tl.float32) * scale).to(weight_ptr.dtype.element_ty)
    rows, columns = tile * 16 + row, block * 128 + natural * 8 + column
    to = weight_ptr + rows.to(tl.int64) * num_columns + columns
    tl.store(to, weight, mask=(rows < num_rows) & (columns < num_columns))


@triton.jit
def codes_at(words, lane, n, column, WIDTH: tl.constexpr):
    """The bits of a plane, of WIDTH bits a code, at a column of word n of a lane."""
    word = tl.load(words + lane * WIDTH + n * WIDTH // 4)
    return word >> (column // 2 * 4 + column % 2 * 16 + n % (4 // WIDTH) * WIDTH) & (2**WIDTH - 1)


def matmul(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, num_rows: int, group_size: int
) -> Tensor:
    """x (T, I) -> (T, O); the other arguments as `mspc.kernels.codes` has them."""
    num_tokens, num_columns = x.shape
    num_tiles, num_blocks = len(words), words.shape[1] // (64 * bits)
    y = torch.empty(num_tokens, num_rows, dtype=x.dtype, device=x.device)
    codes_matmul[(num_tiles,)](
        x.contiguous(),
        words,
        scales,
        scales if zeros is None else zeros,
        y,
        num_tokens,
        num_rows,
        2 ** (bits - 1),
        BITS=bits,
        NUM_COLUMNS=num_columns,
        NUM_GROUPS=scales.shape[1],
        SYMMETRIC=zeros is None,
        **tiles_of(group_size),
        **fragment_options(num_tokens, num_tiles, num_blocks),
    )
    return y


def expand(words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, out: Tensor) -> None:
    num_tiles, num_blocks = len(words), words.shape[1] // (64 * bits)
    codes_expand[(num_tiles, num_blocks)](
        words,
        scales,
        scales if zeros is None else zeros,
        out,
        *out.shape,
        BITS=bits,
        NUM_BLOCKS=num_blocks,
        NUM_GROUPS=scales.shape[1],
        SYMMETRIC=zeros is None,
        enable_fp_fusion=True,
        **tiles_of(group_size),
    )
