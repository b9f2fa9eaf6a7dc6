"""Products with N:M matrices of 16-bit values, and their expansion. Layout and cost: `mspc.kernels.nm`.

A lane loads eight kept weights of a row, 16 bytes, and gathers their inputs. Slot s of the 32 lanes of a row is 32
consecutive kept weights, whose inputs lie in one or two 128-byte lines. All tensors are flat (rows, lanes), so that
values, indices and gathered inputs have one layout.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mspc.kernels.gpu.fragments import half


@triton.jit
def widen(pair, which: tl.constexpr, DTYPE: tl.constexpr):
    """The low or the high half of an int32 as float32."""
    if DTYPE == tl.bfloat16 and which == 0:
        return (pair << 16).to(tl.float32, bitcast=True)
    elif DTYPE == tl.bfloat16:
        return (pair & -65536).to(tl.float32, bitcast=True)
    else:
        return half(pair, which, DTYPE).to(tl.float32)


@triton.jit
def add_products(sums, inputs, weight, DTYPE: tl.constexpr, TOKENS: tl.constexpr):
    """Add to `sums`, one for each token, the products of `weight` and the inputs of the column at the pointers."""
    if TOKENS == 1:
        return (sums[0] + weight * widen(tl.load(inputs).to(tl.int32), 0, DTYPE),)
    elif TOKENS == 2:
        return two_products(sums[0], sums[1], tl.load(inputs), weight, DTYPE)
    elif TOKENS == 4:
        x = tl.load(inputs)
        low = two_products(sums[0], sums[1], x.to(tl.int32), weight, DTYPE)
        high = two_products(sums[2], sums[3], (x >> 32).to(tl.int32), weight, DTYPE)
        return low[0], low[1], high[0], high[1]
    else:
        low = add_products((sums[0], sums[1], sums[2], sums[3]), inputs, weight, DTYPE, 4)
        high = add_products((sums[4], sums[5], sums[6], sums[7]), inputs + 1, weight, DTYPE, 4)
        return low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]


@triton.jit
def two_products(sum0, sum1, x, weight, DTYPE: tl.constexpr):
    return sum0 + weight * widen(x, 0, DTYPE), sum1 + weight * widen(x, 1, DTYPE)


@triton.jit
def add_tile(
    sums,
    inputs_ptr,
    values,
    index,
    lane,
    start,
    num_lanes,
    num_groups,
    N: tl.constexpr,
    M: tl.constexpr,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    TOKENS: tl.constexpr,
    FULL: tl.constexpr,
):
    """Add the products of a tile from kept weight `start` of its row: FULL, or the last, of `num_lanes` lanes."""
    WORDS: tl.constexpr = 2 if TOKENS == 8 else 1  # of the inputs of a column
    INVERSE: tl.constexpr = 2**20 // N + 1  # exact for the numbers here, which are below 3 * 256
    even, odd = tl.split(tl.reshape(values, (lane.shape[0], 2, 2)))
    pair0, pair2 = tl.split(even)
    pair1, pair3 = tl.split(odd)
    pairs = (pair0, pair1, pair2, pair3)
    inputs = inputs_ptr + start // N * (M * WORDS)
    in_groups = (start % N + lane) * INVERSE
    for slot in tl.static_range(8):
        within = ((index >> (slot * BITS)) & (2**BITS - 1)).to(tl.uint32) * WORDS
        if FULL and 32 % N == 0:
            column = inputs + lane // N * (M * WORDS) + slot * (32 // N * M * WORDS) + within
        else:
            group = (in_groups + slot * num_lanes * INVERSE) >> 20
            if not FULL:
                group = tl.minimum(group, num_groups - 1 - start // N)  # padding is beyond the inputs
            column = inputs + (group.to(tl.uint32) * (M * WORDS) + within)
        sums = add_products(sums, column, widen(pairs[slot // 2], slot % 2, DTYPE), DTYPE, TOKENS)
    return sums


@triton.jit(do_not_specialize=["num_tokens"])
def nm_matmul(
    inputs_ptr,
    values_ptr,
    indices_ptr,
    outputs_ptr,
    num_tokens,
    num_rows,
    num_groups,
    N: tl.constexpr,
    M: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Multiply ROWS rows, one a warp: with more rows a warp, Triton would load neighbouring indices in one lane."""
    DTYPE: tl.constexpr = outputs_ptr.dtype.element_ty
    flat = tl.arange(0, ROWS * 32)
    lane = flat % 32
    first_row = tl.program_id(0) * ROWS
    row = tl.minimum(first_row + flat // 32, num_rows - 1).to(tl.int64)
    flat4 = tl.arange(0, ROWS * 128)
    row4 = tl.minimum(first_row + flat4 // 128, num_rows - 1).to(tl.int64)
    lanes_of_row = tl.cdiv(num_groups * N, 8)
    values = values_ptr + tl.max_contiguous(tl.multiple_of(row4 * (lanes_of_row * 4) + flat4 % 128, 4), 4)
    indices = indices_ptr + row * lanes_of_row + lane
    # Loads are one tile ahead, because a warp has little work while it waits. Padding follows the last row.
    value, index = tl.load(values), tl.load(indices)
    sums = (tl.zeros([ROWS * 32], tl.float32),) * TOKENS
    num_full = num_groups * N // 256  # tiles without padding
    for tile in tl.range(0, num_full, loop_unroll_factor=2):
        values += 128
        indices += 32
        next_value, next_index = tl.load(values), tl.load(indices)
        start = tile * 256
        sums = add_tile(
            sums, inputs_ptr, value, index, lane, start, 32, num_groups, N, M, BITS, DTYPE, TOKENS, FULL=True
        )
        value, index = next_value, next_index
    start = num_full * 256
    num_lanes = lanes_of_row - num_full * 32
    if num_lanes > 0:
        # Idle lanes have zero weights, and take the inputs of lane 0.
        value = tl.where(flat4 % 128 < num_lanes * 4, value, 0)
        index = tl.where(lane < num_lanes, index, 0)
        lane = tl.where(lane < num_lanes, lane, 0)
        sums = add_tile(
            sums, inputs_ptr, value, index, lane, start, num_lanes, num_groups, N, M, BITS, DTYPE, TOKENS, FULL=False
        )
    rows = first_row + tl.arange(0, ROWS)
    for token in tl.static_range(TOKENS):
        y = tl.sum(tl.reshape(sums[token], (ROWS, 32)), axis=1).to(DTYPE)
        if token < num_tokens:
            tl.store(outputs_ptr + token * num_rows + rows, y, mask=rows < num_rows)


@triton.jit
def nm_expand(
    values_ptr,
    indices_ptr,
    weight_ptr,
    num_rows,
    num_columns,
    num_kept,
    N: tl.constexpr,
    M: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Store kept weights at their columns of a weight of zeros."""
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    flat = tl.arange(0, ROWS * 32)
    row = tl.program_id(0) * ROWS + flat // 32
    tile = tl.program_id(1)
    lane = flat % 32
    num_lanes = tl.minimum((num_kept - tile * 256) // 8, 32)
    first = tile * 256 + lane * 8
    present = (row < num_rows) & (lane < num_lanes)
    from_row = row.to(tl.int64) * num_kept
    index = tl.load(indices_ptr + (from_row + first) // 8, mask=present, other=0)
    for slot in tl.static_range(8):
        number = tile * 256 + slot * num_lanes + lane
        within = (index >> (slot * BITS)).to(tl.int32) & (2**BITS - 1)
        column = number // N * M + within
        value = tl.load(values_ptr + from_row + first + slot, mask=present, other=0)
        to = weight_ptr + row.to(tl.int64) * num_columns + column
        tl.store(to, value.to(DTYPE), mask=present & (number < num_columns // M * N))


INDICES = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bits of an index: the integer that holds eight indices."""
COLUMN = {1: torch.int16, 2: torch.int32, 4: torch.int64, 8: torch.int64}
"""By tokens: the integer that holds the inputs of one column, or half of them."""


def matmul(x: Tensor, values: Tensor, indices: Tensor, num_rows: int, keep: int, of: int) -> Tensor:
    """x (T, I) -> (T, O); the other arguments as `mspc.kernels.nm` has them."""
    num_tokens = len(x)
    tokens = 1 << (num_tokens - 1).bit_length()
    # This copies once, and not at all for one token. `pad` would copy even if there is nothing to pad.
    by_column = x.T if tokens == num_tokens else torch.nn.functional.pad(x.T, (0, tokens - num_tokens))
    y = torch.empty(num_tokens, num_rows, dtype=x.dtype, device=x.device)
    bits, _ = sizes(values, indices, num_rows)
    rows = 4 if num_rows < 2**14 else 8
    nm_matmul[(triton.cdiv(num_rows, rows),)](
        by_column.contiguous().view(COLUMN[tokens]),
        values.view(torch.int32),
        indices.view(INDICES[bits]),
        y,
        num_tokens,
        num_rows,
        x.shape[1] // of,
        N=keep,
        M=of,
        BITS=bits,
        ROWS=rows,
        TOKENS=tokens,
        num_warps=rows,
        num_stages=1,
        enable_fp_fusion=True,
    )
    return y


def expand(values: Tensor, indices: Tensor, keep: int, of: int, out: Tensor) -> None:
    num_rows, num_columns = out.shape
    bits, num_kept = sizes(values, indices, num_rows)
    out.zero_()
    nm_expand[(triton.cdiv(num_rows, 4), triton.cdiv(num_kept, 256))](
        values,
        indices.view(INDICES[bits]),
        out,
        num_rows,
        num_columns,
        num_kept,
        N=keep,
        M=of,
        BITS=bits,
        ROWS=4,
        enable_fp_fusion=True,
    )


def sizes(values: Tensor, indices: Tensor, num_rows: int) -> tuple[int, int]:
    """Bits of an index, and kept weights of a row with their padding."""
    return 8 * indices.numel() // values.numel(), (values.numel() - 256) // num_rows
