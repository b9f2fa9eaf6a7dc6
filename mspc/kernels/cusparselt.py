"""2:4 products on sparse tensor cores by NVIDIA's cuSPARSELt, through torch: for many tokens, where arithmetic limits.

It needs a copy of the weight in its own format, 9 bits a weight. The algorithm that it takes unasked is rarely the
fastest, so one is searched for every shape. Not for float16, in which it was reported to crash on H100.
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mspc.formats.description import StoredMatrix
from mspc.types import NM

TOKENS = 8
"""It multiplies by multiples of so many."""


def usable(description: StoredMatrix, dtype: torch.dtype) -> bool:
    """Whether there is a device that can, and the matrix has a shape that it takes."""
    return (
        description.target.pattern == NM(2, 4)
        and description.target.grid is None
        and dtype == torch.bfloat16
        and all(size % 16 == 0 for size in description.shape)
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() >= (8, 0)
        and torch.backends.cusparselt.is_available()
    )


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


def matmul(x: Tensor, compressed: Tensor, algorithm: int) -> Tensor:
    """x (T, I) -> (T, O)."""
    y = torch._cslt_sparse_mm(compressed, _padded(x).T, transpose_result=True, alg_id=algorithm)
    return y[: len(x)]


def _padded(x: Tensor) -> Tensor:
    return pad(x, (0, 0, 0, -len(x) % TOKENS)).contiguous()
