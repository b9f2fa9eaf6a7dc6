"""The reference of every kernel: the same product in torch, from the stored tensors."""

import torch
from torch import Tensor

from mspc.formats import layout
from mspc.formats.description import StoredMatrix


def weight(stored: dict[str, Tensor], matrix: StoredMatrix) -> Tensor:
    """The dense weight (O, I) on the CPU, not rounded: float32 where there are codes."""
    dtype = matrix.dtype if matrix.target.grid is None else torch.float32
    return layout.unpack(stored, matrix.shape, matrix.target, dtype).weight


def matmul(x: Tensor, stored: dict[str, Tensor], matrix: StoredMatrix) -> Tensor:
    """x (T, I) -> x Wᵀ (T, O), summed in float32."""
    return (x.float() @ weight(stored, matrix).float().to(x.device).T).to(x.dtype)
