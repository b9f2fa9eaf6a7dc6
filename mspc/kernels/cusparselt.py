"""2:4 products on sparse tensor cores by NVIDIA's cuSPARSELt, through torch: for many tokens, where arithmetic limits.

It needs a copy of the weight in its own format, 9 bits a weight. The algorithm that it takes unasked is rarely the
fastest, so one is searched for every shape. Not for float16, in which it was reported to crash on H100.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mspc.formats.description import StoredMatrix
from mspc.types import NM, Target

TOKENS = 8
"""It multiplies by multiples of so many."""


TAKES = "16-bit matrices of 2:4 with sizes that are multiples of 16, in bfloat16"
SEARCHED_TOKENS = tuple(2**i for i in range(6, 13))


def fits(description: StoredMatrix, dtype: torch.dtype) -> bool:
    return (
        description.target == Target(NM(2, 4), None)
        and dtype == torch.bfloat16
        and all(size % 16 == 0 for size in description.shape)
    )


def missing(device: torch.device) -> str | None:
    """Why `device` cannot do it, in words; None where it can."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip:
        return f"{device} is no CUDA device"
    if not torch.backends.cusparselt.is_available():
        return "this torch has no cuSPARSELt"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"the compute capability of {device} is {capability[0]}.{capability[1]}, and 8.0 is needed"
    return None


def compress(weight: Tensor) -> Tensor:
    """The dense weight (O, I), of which two of four are zero, in the format of the library."""
    return torch._cslt_compress(weight)


def search(x: Tensor, compressed: Tensor) -> int:
    """The fastest algorithm for inputs of this shape."""
    return fastest(compressed, _padded(x).T)


def fastest(compressed: Tensor, inputs: Tensor, **options: Any) -> int:
    """What its search finds, for inputs (I, T) of its own layout; `options` are those of the product."""
    with warnings.catch_warnings():  # that it will be removed; what shall replace it is not in torch's interface
        warnings.simplefilter("ignore")
        return torch._cslt_sparse_mm_search(compressed, inputs, transpose_result=True, **options)


@cache
def algorithms(shape: tuple[int, int], device: torch.device) -> tuple[tuple[int, int], ...]:
    """`(tokens, algorithm)`: the fastest for up to so many, ascending; searched for once, with random numbers."""
    return fastest_by_tokens(shape, device, lambda weight: compress(weight.bfloat16()), lambda x: x.bfloat16())


def fastest_by_tokens(
    shape: tuple[int, int],
    device: torch.device,
    compressed: Callable[[Tensor], Tensor],
    inputs: Callable[[Tensor], Tensor],
    **options: Any,
) -> tuple[tuple[int, int], ...]:
    """`algorithms` of a product whose operands are made from random numbers by two functions."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(shape, generator=generator, device=device)
    weight[:, 0::4] = weight[:, 2::4] = 0
    packed = compressed(weight)
    return tuple(
        (n, fastest(packed, inputs(torch.randn(n, shape[1], generator=generator, device=device)).T, **options))
        for n in SEARCHED_TOKENS
    )


def matmul(x: Tensor, compressed: Tensor, algorithm: int) -> Tensor:
    """x (T, I) -> (T, O)."""
    y = torch._cslt_sparse_mm(compressed, _padded(x).T, transpose_result=True, alg_id=algorithm)
    return y[: len(x)]


def _padded(x: Tensor) -> Tensor:
    return pad(x, (0, 0, 0, -len(x) % TOKENS)).contiguous()
