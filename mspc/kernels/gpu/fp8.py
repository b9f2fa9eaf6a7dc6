"""What is before and after a product in 8-bit floats: inputs rounded to e4m3, and scales multiplied in.

Each is one pass over inputs or outputs. In torch they are several, with float32 between, as long as the product itself.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024


@triton.jit
def fp8_round(x_ptr, inputs_ptr, scales_ptr, num_tokens, num_columns, COLUMNS: tl.constexpr):
    """A token a program; after the last, zeros. See `mspc.kernels.fp8.rounded`, which is the same bit for bit, but for
    GPUs before sm_90: there Triton rounds to float16 on the way."""
    token = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    x_ptr += token.to(tl.int64) * num_columns
    inputs_ptr += token.to(tl.int64) * num_columns
    end = tl.where(token < num_tokens, num_columns, 0)
    sizes = tl.full([COLUMNS], 1e-30, tl.float32)
    for first in range(0, num_columns, COLUMNS):
        x = tl.load(x_ptr + first + column, mask=first + column < end, other=0)
        sizes = tl.maximum(sizes, tl.abs(x.to(tl.float32)))
    largest = tl.max(sizes, axis=0)
    limit = tl.full([], 448.0, tl.float32)
    inverse = tl.div_rn(limit, largest)
    for first in range(0, num_columns, COLUMNS):
        x = tl.load(x_ptr + first + column, mask=first + column < end, other=0)
        rounded = (x.to(tl.float32) * inverse).to(tl.float8e4nv)
        tl.store(inputs_ptr + first + column, rounded, mask=first + column < num_columns)
    if token < num_tokens:
        tl.store(scales_ptr + token, tl.div_rn(largest, limit))


@triton.jit
def fp8_scale(product_ptr, of_tokens_ptr, of_rows_ptr, outputs_ptr, num_rows, COLUMNS: tl.constexpr):
    token = tl.program_id(0)
    row = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = token.to(tl.int64) * num_rows + row
    product = tl.load(product_ptr + place, mask=row < num_rows).to(tl.float32)
    scale = tl.load(of_tokens_ptr + token) * tl.load(of_rows_ptr + row, mask=row < num_rows)
    tl.store(outputs_ptr + place, (product * scale).to(outputs_ptr.dtype.element_ty), mask=row < num_rows)


def rounded(x: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """x (T, I) to e4m3, T padded to a multiple with zeros, and scales (T,)."""
    num_tokens, num_columns = x.shape
    num_padded = triton.cdiv(num_tokens, multiple) * multiple
    inputs = torch.empty(num_padded, num_columns, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    fp8_round[(num_padded,)](
        x.contiguous(), inputs, scales, num_tokens, num_columns, COLUMNS=COLUMNS, enable_fp_fusion=True
    )
    return inputs, scales


def scaled(product: Tensor, of_tokens: Tensor, of_rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The product (T and padding, O) times both scales: (T, O), rounded once."""
    num_tokens, num_rows = len(of_tokens), len(of_rows)
    y = torch.empty(num_tokens, num_rows, dtype=dtype, device=product.device)
    fp8_scale[(num_tokens, triton.cdiv(num_rows, COLUMNS))](
        product, of_tokens, of_rows, y, num_rows, COLUMNS=COLUMNS, enable_fp_fusion=True
    )
    return y
