"""The twin of every kernel: what it computes, in torch, from the stored tensors."""

import torch
from torch import Tensor

from mspc.formats import layout
from mspc.formats.description import StoredMatrix


def weight(stored: dict[str, Tensor], description: StoredMatrix) -> Tensor:
    """The dense weight (O, I) on the CPU, without rounding: float32 where there are codes."""
    dtype = description.dtype if description.target.grid is None else torch.float32
    return layout.unpack(stored, description.shape, description.target, dtype).weight


def matmul(x: Tensor, stored: dict[str, Tensor], description: StoredMatrix) -> Tensor:
    """x (T, I) -> (T, O), summed in float32."""
    return (x.float() @ weight(stored, description).float().to(x.device).T).to(x.dtype)
