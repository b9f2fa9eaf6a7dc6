"""Reads the operands of tensor cores from memory without shared memory, for a few tokens.

A tile is 16 rows of W by a block of 128 columns. A warp multiplies it by its inputs in 8 slabs of 16 columns, one `mma`
m16n8k16 each. W is the left operand, and the tokens are the 8 columns of the right one. The columns of W may be
assigned to the k of the slabs in any order that both operands share. The order here gives every lane whole words of 8
contiguous columns. Weights and inputs are therefore loaded by 16 bytes a lane into the registers that `mma` reads.

Lane (row g of 8, quarter t of 4) holds the words n = 0..3 of quarter t of the rows g and g + 8. Slab 2 n + s is half s
of word n of every quarter.

Triton keeps these layouts: tensors are loaded flat, in its natural order of lanes, and are only reshaped and permuted
before `tl.dot`. Only speed depends on that.

Letters: S is the number of blocks of 128 columns that a program takes at once, one a warp. WORDS is the number of
neighbouring words of a quarter, (columns of a quantization group within the block) / 32, so that no slab mixes groups.
"""

import triton
import triton.language as tl


@triton.jit
def word_column(n: tl.constexpr, WORDS: tl.constexpr):
    """First column of word n of quarter 0; quarter t begins t * 8 * WORDS later."""
    return n // WORDS * 32 * WORDS + n % WORDS * 8


@triton.jit
def lane_columns(S: tl.constexpr, TOKENS: tl.constexpr, WORDS: tl.constexpr):
    """Columns of the inputs of word 0 in one step of a program, flat (TOKENS / 8, S, 8 tokens, 4 quarters, 8)."""
    flat = tl.arange(0, S * TOKENS * 32)
    return (flat // 256 % S) * 128 + (flat // 8 % 4) * (8 * WORDS) + flat % 8


@triton.jit
def input_pointers(
    inputs_ptr,
    num_tokens,
    NUM_COLUMNS: tl.constexpr,
    S: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Pointers to the inputs (T, I) at `lane_columns`. Lanes without a token repeat the last token."""
    flat = tl.arange(0, S * TOKENS * 32)
    token = tl.minimum(flat // (256 * S) * 8 + flat // 32 % 8, num_tokens - 1)
    offsets = token * NUM_COLUMNS + lane_columns(S, TOKENS, WORDS)
    return inputs_ptr + tl.max_contiguous(tl.multiple_of(offsets, 8), 8)


@triton.jit
def load_input_slabs(
    inputs,
    first,
    n: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    S: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The right operands (S, 16, TOKENS) of slabs 2 n and 2 n + 1 of S blocks from block `first`.

    WIDE is for the interpreter, which cannot multiply bfloat16.
    """
    if NUM_COLUMNS % (128 * S) == 0:
        x = tl.load(inputs + word_column(n, WORDS))
    else:
        present = first * 128 + lane_columns(S, TOKENS, WORDS) + word_column(n, WORDS) < NUM_COLUMNS
        x = tl.load(inputs + word_column(n, WORDS), mask=present, other=0)
    if WIDE:
        x = x.to(tl.float32)
    parts = tl.reshape(x, (TOKENS // 8, S, 8, 4, 2, 2, 2))  # tokens / 8, S, token, quarter, slab, pair, half of it
    slab0, slab1 = tl.split(tl.permute(parts, (1, 3, 5, 6, 0, 2, 4)))
    return tl.reshape(slab0, (S, 16, TOKENS)), tl.reshape(slab1, (S, 16, TOKENS))


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
def load_words(words, first, S: tl.constexpr, NUM_BLOCKS: tl.constexpr, PER_LANE: tl.constexpr):
    """PER_LANE (1, 2, 4) words, each (S, 8 rows, 4 quarters, 2 halves of the tile), of S blocks from block `first`.

    In memory they are (blocks, 2 halves, 8 rows, 4 quarters, PER_LANE). After the last block they are 0.
    """
    flat = tl.arange(0, S * 32 * PER_LANE)
    block = first + flat // (32 * PER_LANE)
    offsets = block * (64 * PER_LANE) + flat % (32 * PER_LANE)
    pointers = words + tl.max_contiguous(tl.multiple_of(offsets, PER_LANE), PER_LANE)
    upper = tl.load(pointers, mask=block < NUM_BLOCKS, other=0)
    lower = tl.load(pointers + 32 * PER_LANE, mask=block < NUM_BLOCKS, other=0)
    if PER_LANE == 1:
        return (tl.join(tl.reshape(upper, (S, 8, 4)), tl.reshape(lower, (S, 8, 4))),)
    elif PER_LANE == 2:
        upper0, upper1 = tl.split(tl.reshape(upper, (S, 8, 4, 2)))
        lower0, lower1 = tl.split(tl.reshape(lower, (S, 8, 4, 2)))
        return tl.join(upper0, lower0), tl.join(upper1, lower1)
    else:
        return lane_words(upper, lower, S)


@triton.jit
def load_scale(
    scales,
    first,
    n: tl.constexpr,
    S: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """The scales of word n of S blocks, (S, 16 rows, 1), of the tile at `scales`; 0 after the last block."""
    block = first + tl.arange(0, S)[:, None]
    group = block // GROUP_BLOCKS * (4 // WORDS) + n // WORDS
    pointers = scales + group * 16 + tl.arange(0, 16)[None, :]
    present = block < NUM_BLOCKS
    if NUM_BLOCKS % S == 0:
        present = None
    return tl.load(pointers, mask=present, other=None if present is None else 0).to(tl.float32)[:, :, None]


@triton.jit
def load_zero(
    zeros,
    first,
    n: tl.constexpr,
    S: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """The zero points of the two rows of every lane, (S, 8, 4, 2). An int32 holds those of 8 rows, four bits each.

    They are loaded by 32 bits because a narrower load would make Triton choose another order of k.
    """
    lane = tl.arange(0, S * 32)
    block = tl.minimum(first + lane // 32, NUM_BLOCKS - 1)
    pointers = zeros + (block // GROUP_BLOCKS * (4 // WORDS) + n // WORDS) * 2
    shift = lane // 4 % 8 * 4
    upper = tl.reshape(tl.load(pointers) >> shift & 15, (S, 8, 4))
    lower = tl.reshape(tl.load(pointers + 1) >> shift & 15, (S, 8, 4))
    return tl.join(upper, lower)


@triton.jit
def add_word(sums, pairs, x0, x1, S: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """Add the products of the two slabs of a word to `sums` (S, 16 rows, TOKENS)."""
    sums = tl.dot(weight_slab(pairs[0], pairs[1], S, DTYPE, WIDE), x0, sums, input_precision="ieee")
    return tl.dot(weight_slab(pairs[2], pairs[3], S, DTYPE, WIDE), x1, sums, input_precision="ieee")


@triton.jit
def store_sums(outputs_ptr, sums, tile, num_tokens, num_rows, TOKENS: tl.constexpr, DTYPE: tl.constexpr):
    """Add the sums of all warps, (S, 16 rows, TOKENS), and store them to the rows of a tile of the outputs (T, O)."""
    y = tl.sum(sums, axis=0).to(DTYPE)
    token = tl.arange(0, TOKENS)[None, :]
    row = tile * 16 + tl.arange(0, 16)[:, None]
    tl.store(outputs_ptr + token * num_rows + row, y, mask=(token < num_tokens) & (row < num_rows))
