"""2:4 products of many tokens in 8-bit floats (e4m3) on sparse tensor cores, by cuSPARSELt through torch.

Twice the arithmetic of bfloat16, for inputs and weights that are rounded to three bits of mantissa: each by up to 2^-4
of itself, or 2^-10 of its scale where it is small. So it is never taken unasked. It needs a copy of the weight, 5 bits
each. No GPU has run it yet.

Scales are one a row of the weight, and one a token, so that no token's result depends on another. They are multiplied
in afterwards, in the pass that rounds to the dtype of the inputs: cuSPARSELt's alpha is one number, which torch reads
on the host and no CUDA graph allows, or one a row, and those of the tokens need the pass anyway. The product before it
is in bfloat16, whose range it does not leave, for an error of up to 2^-8 more.
"""

from functools import cache

import torch
from torch import Tensor
from torch.cuda import device_of

from mspc.formats.description import StoredMatrix
from mspc.kernels import cusparselt
from mspc.kernels.cusparselt import fastest_by_tokens
from mspc.kernels.launch import on_gpu
from mspc.types import NM

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""Of e4m3: the largest number of a row is scaled to it."""
SMALLEST = 1e-30
"""Rows whose numbers are all smaller are scaled as if one were as large."""
FEW_TOKENS = 32
"""So many are multiplied by the weight as it is stored, and nothing is rounded."""
TAKES = "matrices of 2:4, 16-bit or int4, with sizes that are multiples of 32, in bfloat16 or float16"
SIZES, TOKENS = 32, 16
"""It multiplies matrices whose sizes are multiples of the one, by multiples of the other of tokens."""


def fits(description: StoredMatrix) -> bool:
    return description.target.pattern == NM(2, 4) and all(size % SIZES == 0 for size in description.shape)


def missing(device: torch.device) -> str | None:
    """Why `device` cannot do it, in words; None where it can."""
    if reason := cusparselt.missing(device):
        return reason
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        return f"the compute capability of {device} is {capability[0]}.{capability[1]}, and 8.9 is needed"
    needed = 602 if capability >= (9, 0) else 800  # its release notes: fp8 came in 0.6.2, and that of Ada in 0.8.0
    if (version := torch.backends.cusparselt.version() or 0) < needed:
        return f"cuSPARSELt is version {version}, and {needed} is needed on {device}"
    return None


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (n, k) to e4m3 (n, k) and scales (n,) float32, whose product it nearly is."""
    x = x.float()
    largest = x.abs().amax(1).clamp(min=SMALLEST)
    limit = torch.full_like(largest, LARGEST)  # by a number, torch would divide in two roundings
    return (x * (limit / largest)[:, None]).to(E4M3), largest / limit


def twin(x: Tensor, weight: Tensor) -> Tensor:
    """x (T, I), weight (O, I) -> x W^T (T, O), both rounded as on the device, summed in float32."""
    (inputs, of_tokens), (codes, of_rows) = rounded(x), rounded(weight)
    return ((inputs.float() @ codes.float().T) * of_tokens[:, None] * of_rows).to(x.dtype)


def compress(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The dense weight (O, I), of which two of four are zero, in the format of the library, and scales (O,)."""
    codes, scales = rounded(weight)
    return torch._cslt_compress(codes), scales


@cache
def algorithms(shape: tuple[int, int], device: torch.device) -> tuple[tuple[int, int], ...]:
    """`(tokens, algorithm)`: the fastest for up to so many, ascending; searched for once, with random numbers."""
    return fastest_by_tokens(
        shape, device, lambda weight: compress(weight)[0], lambda x: rounded(x)[0], out_dtype=torch.bfloat16
    )


def matmul(x: Tensor, compressed: Tensor, scales: Tensor, algorithm: int) -> Tensor:
    """x (T, I) -> (T, O), in the dtype of x. Traceable and capturable."""
    return _matmul(x, compressed, scales, algorithm)


@torch.library.custom_op("mspc::fp8_matmul", mutates_args=())
def _matmul(x: Tensor, compressed: Tensor, scales: Tensor, algorithm: int) -> Tensor:
    kernels = on_gpu("fp8")
    with device_of(x):
        inputs, of_tokens = kernels.rounded(x, TOKENS)
        product = torch._cslt_sparse_mm(
            compressed, inputs.T, out_dtype=torch.bfloat16, transpose_result=True, alg_id=algorithm
        )
        y: Tensor = kernels.scaled(product, of_tokens, scales, x.dtype)
    return y


@_matmul.register_fake
def _(x: Tensor, compressed: Tensor, scales: Tensor, algorithm: int) -> Tensor:
    return x.new_empty(len(x), len(scales))
