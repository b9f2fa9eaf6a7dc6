"""Products with matrices that stay compressed. Every format has a module with the functions of `Kernel`.

The tensors of docs/sparse-format.md are repacked once for the device, with the bytes of the file and a little padding,
and unrepacked to be saved. `dispatch` calls the kernels of a GPU there, and `reference`, which is slow, elsewhere. On a
CPU `cpu` takes all formats, where its library can be built.
"""

from typing import Protocol

import torch
from torch import Tensor

from mspc.formats.description import StoredMatrix
from mspc.kernels import bitmap, codes, nm, sparse24
from mspc.kernels.cpu import kernel as cpu

__all__ = ["KERNELS", "ON_CPU", "Kernel", "kernel_for"]


class Kernel(Protocol):
    """The functions that a module of `KERNELS` has."""

    MAX_TOKENS: int
    """Most tokens of one product; for more, expand the weight and multiply."""

    def supports(self, matrix: StoredMatrix, dtype: torch.dtype) -> bool:
        """Tell if inputs of this dtype can be multiplied by such a matrix."""

    def repack(self, stored: dict[str, Tensor], matrix: StoredMatrix) -> dict[str, Tensor]:
        """Put the stored tensors, which are on the CPU, in the order of the device. The caller moves the result."""

    def unrepack(self, repacked: dict[str, Tensor], matrix: StoredMatrix) -> dict[str, Tensor]:
        """Invert `repack` bit for bit, from any device to the CPU."""

    def matmul(self, x: Tensor, repacked: dict[str, Tensor], matrix: StoredMatrix) -> Tensor:
        """x (T, I) -> x Wᵀ (T, O) in the dtype of x on its GPU, T <= MAX_TOKENS. Traceable and capturable."""

    def expand(self, repacked: dict[str, Tensor], matrix: StoredMatrix, out: Tensor) -> None:
        """Write the dense weight (O, I), rounded to the dtype of `out`, to `out` on its GPU."""


KERNELS: dict[str, Kernel] = {"sparse24": sparse24, "nm": nm, "codes": codes, "bitmap": bitmap}
"""Kernels of GPUs by name, the fastest first where several support a matrix."""
ON_CPU: dict[str, Kernel] = {"cpu": cpu}


def kernel_for(matrix: StoredMatrix, dtype: torch.dtype, device: str = "cuda") -> str | None:
    """The name of the fastest kernel for inputs of this dtype on a type of device, or None if none supports them."""
    kernels = ON_CPU if device == "cpu" else KERNELS
    return next((name for name, kernel in kernels.items() if kernel.supports(matrix, dtype)), None)
