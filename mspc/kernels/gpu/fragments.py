"""Tensor-core operands read from memory without shared memory, for at most a few tokens.

A tile is 16 rows of W by a block of 128 columns. A warp multiplies it by its inputs in 8 slabs of 16 columns, one `mma`
m16n8k16 each, with W as the left operand and the tokens as the 8 columns of the right one. Which column of W goes to
which k of which slab is free, as long as both operands agree; the choice made here gives every lane whole words of 8
contiguous columns, so that weights and inputs are loaded by 16 bytes a lane straight into the registers that `mma`
reads. Lane (row g of 8, quarter t of 4) holds of the rows g and g + 8 the words n = 0..3 of quarter t; slab 2 n + s is
the half s of word n of every quarter.

Triton keeps the layouts by itself: tensors are loaded flat, where its order of lanes is the natural one, and are only
reshaped and permuted on the way to `tl.dot`. Nothing depends on that but speed.

Letters: S blocks of 128 columns that a program takes at once, one a warp; WORDS words of a quarter that lie side by
side, which is (columns of a quantization group within the block) / 32, so that a slab never mixes groups.
"""

import triton
import triton.language as tl


@triton.jit
def word_column(n: tl.constexpr, WORDS: tl.constexpr):
    """The column at which word n of quarter 0 begins; quarter t begins t * 8 * WORDS later."""
    return n // WORDS * 32 * WORDS + n % WORDS * 8


@triton.jit
def lane_columns(S: tl.constexpr, TOKENS: tl.constexpr, WORDS: tl.constexpr):
    """Columns of the inputs of word 0 that a program reads in one step, flat (TOKENS / 8, S, 8 tokens, 4 quarters, 8)."""
    flat = tl.arange(0, S * TOKENS * 32)
    return (flat // 256 % S) * 128 + (flat // 8 % 4) * (8 * WORDS) + flat % 8


@triton.jit
def lane_tokens(S: tl.constexpr, TOKENS: tl.constexpr):
    """Token of each of them."""
    flat = tl.arange(0, S * TOKENS * 32)
    return flat // (256 * S) * 8 + flat // 32 % 8


@triton.jit
def input_slabs(inputs, S: tl.constexpr, TOKENS: tl.constexpr, WIDE: tl.constexpr):
    """The right operands (S, 16, TOKENS) of slabs 2 n and 2 n + 1, from the inputs of word n as `lane_columns` has
    them. WIDE is for the interpreter, which cannot multiply bfloat16."""
    if WIDE:
        inputs = inputs.to(tl.float32)
    parts = tl.reshape(inputs, (TOKENS // 8, S, 8, 4, 2, 2, 2))  # tokens / 8, S, token, quarter, slab, pair, which
    first, second = tl.split(tl.permute(parts, (1, 3, 5, 6, 0, 2, 4)))
    return tl.reshape(first, (S, 16, TOKENS)), tl.reshape(second, (S, 16, TOKENS))


@triton.jit
def weight_slab(pair0, pair1, S: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """The left operand (S, 16, 16) of a slab: int32 (S, 8 rows, 4 quarters, 2 halves of the tile), each two weights."""
    low = tl.join(half(pair0, 0, DTYPE), half(pair1, 0, DTYPE))
    high = tl.join(half(pair0, 1, DTYPE), half(pair1, 1, DTYPE))
    slab = tl.reshape(tl.permute(tl.join(low, high), (0, 3, 1, 2, 4, 5)), (S, 16, 16))
    if WIDE:
        slab = slab.to(tl.float32)
    return slab


@triton.jit
def half(pair, which: tl.constexpr, DTYPE: tl.constexpr):
    """The weight in the low or the high 16 bits."""
    return (pair >> (16 * which)).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def both(low, high):
    """Two weights as one int32."""
    return (low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def lane_words(upper, lower, S: tl.constexpr):
    """Rows 0-7 and 8-15 of tiles, flat (S, 8 rows, 4 quarters, 4 words) -> the four words, each (S, 8, 4, 2)."""
    even0, odd0 = tl.split(tl.reshape(upper, (S, 8, 4, 2, 2)))
    even1, odd1 = tl.split(tl.reshape(lower, (S, 8, 4, 2, 2)))
    upper0, upper2 = tl.split(even0)
    upper1, upper3 = tl.split(odd0)
    lower0, lower2 = tl.split(even1)
    lower1, lower3 = tl.split(odd1)
    return tl.join(upper0, lower0), tl.join(upper1, lower1), tl.join(upper2, lower2), tl.join(upper3, lower3)


@triton.jit
def row_zeros(zeros, row, S: tl.constexpr):
    """The zero points of the two rows of every lane, (S, 8, 4, 2): four bits a row, rows 0-7 and rows 8-15 in an int32.

    They are loaded by 32 bits because a narrower load would make Triton choose another order of k.
    """
    upper = tl.load(zeros) >> (4 * row) & 15
    lower = tl.load(zeros + 1) >> (4 * row) & 15
    return tl.join(tl.reshape(upper, (S, 8, 4)), tl.reshape(lower, (S, 8, 4)))
