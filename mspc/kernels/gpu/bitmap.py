"""Products with unstructured matrices, and their expansion. Layout and cost: `mspc.kernels.bitmap`.

Every column of a word of the bitmap is a lane. Its bit tells if it has a weight. The number of set bits below it is the
index of that weight, so that the lanes of a word load neighbouring values.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mspc.kernels import launch


@triton.jit
def count_bits(word, PTX: tl.constexpr):
    if PTX:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)
    else:
        word = word.to(tl.uint32, bitcast=True)
        word -= (word >> 1) & 0x55555555
        word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
        word = (word + (word >> 4)) & 0x0F0F0F0F
        return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def kept_weights(kept_ptr, words_ptr, bases_ptr, ranks_ptr, zero, row, word, present, num_words, num_bases,
                 BITS: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """Weights of the 32 columns of each `word` of each `row`, in one more dimension; 0 if not kept.

    They are values of 16 bits, or codes less `zero` in float32.
    """
    column = tl.arange(0, 32)
    bits = tl.load(words_ptr + row * num_words + word, mask=present, other=0)
    base = tl.load(bases_ptr + row * num_bases + word // 8, mask=present, other=0)
    rank = tl.load(ranks_ptr + row * num_words + word, mask=present, other=0).to(tl.int32)
    bits = tl.expand_dims(bits, -1)
    kept = (bits >> column) & 1 == 1
    number = tl.expand_dims(base + rank, -1) + count_bits(bits & ((1 << column) - 1), PTX)
    if BITS == 16:
        return tl.load(kept_ptr + number, mask=kept, other=0)
    else:
        number = number.to(tl.uint32)  # not negative, so that a division is a shift
        bit = number % 8 * BITS
        byte = kept_ptr + number // 8 * BITS + bit // 8
        code = tl.load(byte, mask=kept, other=0).to(tl.int32)
        if BITS == 3:  # it may lie in two bytes
            code |= tl.load(byte + 1, mask=kept, other=0).to(tl.int32) << 8
        code = (code >> (bit % 8).to(tl.int32)) & (2**BITS - 1)
        return tl.where(kept, code - zero, 0).to(tl.float32)


@triton.jit
def of_group(ptr, row, word, present, NUM_GROUPS: tl.constexpr, GROUP_WORDS: tl.constexpr):
    """The scale or the zero point of each `word` of each `row`."""
    return tl.load(ptr + row * NUM_GROUPS + word // GROUP_WORDS, mask=present, other=0)


@triton.jit(do_not_specialize=["num_tokens"])
def bitmap_matmul(
    inputs_ptr,
    kept_ptr,
    words_ptr,
    bases_ptr,
    ranks_ptr,
    scales_ptr,
    zeros_ptr,
    outputs_ptr,
    num_tokens,
    num_rows,
    num_columns,
    num_words,
    num_bases,
    symmetric_zero,
    BITS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    TOKENS: tl.constexpr,
    S: tl.constexpr,
    PTX: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Multiply 16 rows; each warp takes one of S words at a time."""
    DTYPE: tl.constexpr = inputs_ptr.dtype.element_ty
    OPERAND: tl.constexpr = tl.float32 if WIDE else DTYPE
    rows = tl.program_id(0) * 16 + tl.arange(0, 16)
    row = tl.minimum(rows, num_rows - 1)[None, :].to(tl.int64)
    token = tl.arange(0, TOKENS)
    sums = tl.zeros([S, 16, TOKENS], tl.float32)
    for first in tl.range(0, num_words, S):
        word = (first + tl.arange(0, S))[:, None]
        present = word < num_words
        zero = symmetric_zero
        if not SYMMETRIC:
            zero = of_group(zeros_ptr, row, word, present, NUM_GROUPS, GROUP_WORDS).to(tl.int32)[:, :, None]
        weight = kept_weights(
            kept_ptr, words_ptr, bases_ptr, ranks_ptr, zero, row, word, present, num_words, num_bases, BITS, PTX
        )
        column = (word * 32 + tl.arange(0, 32)[None, :])[:, :, None]
        there = (column < num_columns) & (token < num_tokens)[None, None, :]
        x = tl.load(inputs_ptr + token[None, None, :] * num_columns + column, mask=there, other=0)
        product = tl.dot(weight.to(OPERAND), x.to(OPERAND), input_precision="ieee")
        if BITS < 16:
            scale = of_group(scales_ptr, row, word, present, NUM_GROUPS, GROUP_WORDS).to(tl.float32)
            product *= scale[:, :, None]
        sums += product
    y = tl.sum(sums, axis=0).to(DTYPE)
    to = outputs_ptr + token[None, :] * num_rows + rows[:, None]
    tl.store(to, y, mask=(token < num_tokens)[None, :] & (rows < num_rows)[:, None])


@triton.jit
def bitmap_expand(
    kept_ptr,
    words_ptr,
    bases_ptr,
    ranks_ptr,
    scales_ptr,
    zeros_ptr,
    weight_ptr,
    num_rows,
    num_columns,
    num_words,
    num_bases,
    symmetric_zero,
    BITS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    PTX: tl.constexpr,
):
    """Expand four rows of eight words."""
    rows = (tl.program_id(0) * 4 + tl.arange(0, 4))[:, None]
    row = rows.to(tl.int64)
    word = (tl.program_id(1) * 8 + tl.arange(0, 8))[None, :]
    present = (rows < num_rows) & (word < num_words)
    zero = symmetric_zero
    if not SYMMETRIC:
        zero = of_group(zeros_ptr, row, word, present, NUM_GROUPS, GROUP_WORDS).to(tl.int32)[:, :, None]
    weight = kept_weights(
        kept_ptr, words_ptr, bases_ptr, ranks_ptr, zero, row, word, present, num_words, num_bases, BITS, PTX
    )
    if BITS < 16:
        weight *= of_group(scales_ptr, row, word, present, NUM_GROUPS, GROUP_WORDS).to(tl.float32)[:, :, None]
    column = (word * 32)[:, :, None] + tl.arange(0, 32)[None, None, :]
    to = weight_ptr + row[:, :, None] * num_columns + column
    tl.store(to, weight.to(weight_ptr.dtype.element_ty), mask=(rows < num_rows)[:, :, None] & (column < num_columns))


def matmul(
    x: Tensor,
    kept: Tensor,
    words: Tensor,
    bases: Tensor,
    ranks: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bits: int,
) -> Tensor:
    """x (T, I) -> (T, O); the other arguments as `mspc.kernels.bitmap` has them."""
    num_tokens, num_columns = x.shape
    num_rows = len(words)
    y = torch.empty(num_tokens, num_rows, dtype=x.dtype, device=x.device)
    bitmap_matmul[(triton.cdiv(num_rows, 16),)](
        x.contiguous(),
        kept,
        words,
        bases,
        ranks,
        words if scales is None else scales,
        words if zeros is None else zeros,
        y,
        num_tokens,
        num_rows,
        num_columns,
        words.shape[1],
        bases.shape[1],
        2 ** (bits - 1),
        **_grid(bits, num_columns, scales, zeros),
        TOKENS=8 if num_tokens <= 8 else 16,
        S=8,
        WIDE=launch.interpreted(),
        num_warps=8,
        num_stages=3
        if bits == 16
        else 1,  # loading ahead goes through shared memory and costs 8 instructions a position
    )
    return y


def expand(
    kept: Tensor,
    words: Tensor,
    bases: Tensor,
    ranks: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bits: int,
    out: Tensor,
) -> None:
    num_rows, num_columns = out.shape
    bitmap_expand[(triton.cdiv(num_rows, 4), triton.cdiv(words.shape[1], 8))](
        kept,
        words,
        bases,
        ranks,
        words if scales is None else scales,
        words if zeros is None else zeros,
        out,
        num_rows,
        num_columns,
        words.shape[1],
        bases.shape[1],
        2 ** (bits - 1),
        **_grid(bits, num_columns, scales, zeros),
    )


def _grid(bits: int, num_columns: int, scales: Tensor | None, zeros: Tensor | None) -> dict[str, int | bool]:
    num_groups = 1 if scales is None else scales.shape[1]
    return {
        "BITS": bits,
        "NUM_GROUPS": num_groups,
        # A single group has all words; the last word may be shorter than 32 columns.
        "GROUP_WORDS": triton.cdiv(num_columns, 32) if num_groups == 1 else num_columns // num_groups // 32,
        "SYMMETRIC": zeros is None,
        "PTX": launch.has_ptx(),
        "enable_fp_fusion": True,
    }
