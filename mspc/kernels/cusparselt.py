"""2:4 products on sparse tensor cores by NVIDIA's cuSPARSELt through torch, for many tokens, where arithmetic limits.

It needs a copy of the weight in its own format, 9 bits a weight. Its default algorithm is rarely the fastest, so one is
searched for every shape. It is not used for float16, in which it was reported to crash on H100.
"""

import warnings
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from mspc.formats.description import StoredMatrix
from mspc.types import NM, Target

TOKENS = 8
"""The number of tokens of a product is padded to a multiple of this."""
TAKES = "16-bit matrices of 2:4 with sizes that are multiples of 16, in bfloat16"
SEARCHED_TOKENS = tuple(2**i for i in range(6, 13))


def fits(matrix: StoredMatrix, dtype: torch.dtype) -> bool:
    """Tell if cuSPARSELt multiplies inputs of this dtype by such a matrix."""
    is_24 = matrix.target == Target(NM(2, 4), None)
    return is_24 and dtype == torch.bfloat16 and all(size % 16 == 0 for size in matrix.shape)


def missing(device: torch.device) -> str | None:
    """The reason why `device` cannot run it, or None if it can."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip:
        return f"{device} is no CUDA device"
    if not torch.backends.cusparselt.is_available():
        return "this torch has no cuSPARSELt"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"the compute capability of {device} is {capability[0]}.{capability[1]}, and 8.0 is needed"
    return None


def compress(weight: Tensor) -> Tensor:
    """The dense 2:4 weight (O, I) in the format of the library."""
    return torch._cslt_compress(weight)


def search(x: Tensor, compressed: Tensor) -> int:
    """The fastest algorithm for inputs of the shape of x (T, I)."""
    with warnings.catch_warnings():  # torch announces its removal, and has no public replacement
        warnings.simplefilter("ignore")
        return torch._cslt_sparse_mm_search(compressed, _padded(x).T, transpose_result=True)


@cache
def algorithms(shape: tuple[int, int], device: torch.device) -> tuple[tuple[int, int], ...]:
    """`(tokens, algorithm)`, ascending: the fastest for up to that number of tokens, searched with random numbers."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(shape, generator=generator, device=device).bfloat16()
    weight[:, 0::4] = weight[:, 2::4] = 0
    packed = compress(weight)
    return tuple(
        (n, search(torch.randn(n, shape[1], generator=generator, device=device).bfloat16(), packed))
        for n in SEARCHED_TOKENS
    )


def matmul(x: Tensor, compressed: Tensor, algorithm: int) -> Tensor:
    """x (T, I) -> x Wᵀ (T, O)."""
    y = torch._cslt_sparse_mm(compressed, _padded(x).T, transpose_result=True, alg_id=algorithm)
    return y[: len(x)]


def _padded(x: Tensor) -> Tensor:
    return pad(x, (0, 0, 0, -len(x) % TOKENS)).contiguous()
