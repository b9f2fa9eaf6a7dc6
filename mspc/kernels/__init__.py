"""Products with matrices that stay compressed: a module for every format, with the functions of `Kernel`.

The tensors of docs/sparse-format.md are arranged once for the device, with the bytes of the file and a little padding,
and restored to be saved. On CUDA, products run in Triton; elsewhere the twin in torch computes the same, slowly.
"""

from typing import Protocol

import torch
from torch import Tensor

from mspc.formats.description import StoredMatrix
from mspc.kernels import bitmap, codes, nm, sparse24

__all__ = ["KERNELS", "Kernel", "kernel_for"]


class Kernel(Protocol):
    """What a module of `KERNELS` has."""

    MAX_TOKENS: int
    """For more, `expand` and multiply."""

    def supports(self, description: StoredMatrix, dtype: torch.dtype) -> bool:
        """Whether inputs of this dtype can be multiplied by such a matrix."""

    def arrange(self, stored: dict[str, Tensor], description: StoredMatrix) -> dict[str, Tensor]:
        """The stored tensors, on the CPU, in the order of the device; to be moved there by the caller."""

    def restore(self, arranged: dict[str, Tensor], description: StoredMatrix) -> dict[str, Tensor]:
        """The inverse, bit for bit, from any device."""

    def matmul(self, x: Tensor, arranged: dict[str, Tensor], description: StoredMatrix) -> Tensor:
        """x (T, I) -> x W^T (T, O) in the dtype of x, for T up to MAX_TOKENS. Traceable and capturable."""

    def twin(self, x: Tensor, arranged: dict[str, Tensor], description: StoredMatrix) -> Tensor:
        """The same in torch, for any T."""

    def expand(self, arranged: dict[str, Tensor], description: StoredMatrix, out: Tensor) -> None:
        """The dense weight, rounded to the dtype of `out` (O, I), which is overwritten."""


KERNELS: dict[str, Kernel] = {"sparse24": sparse24, "nm": nm, "codes": codes, "bitmap": bitmap}
"""By name; of several that support a matrix the first is fastest."""


def kernel_for(description: StoredMatrix, dtype: torch.dtype) -> Kernel | None:
    """The kernel for inputs of this dtype, if there is one."""
    return next((kernel for kernel in KERNELS.values() if kernel.supports(description, dtype)), None)
