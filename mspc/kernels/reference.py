"""The reference of every kernel: the same product in torch, from the stored tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear

from mspc.formats import layout
from mspc.formats.decoding import STRIP, decode_rows, strips
from mspc.formats.description import StoredMatrix

DEVICE_STRIP = 2**21
"""Weights decoded at a time where launches cost more than memory; a strip then needs about 50 MB."""


def weight(stored: dict[str, Tensor], matrix: StoredMatrix) -> Tensor:
    """The dense weight (O, I) on the CPU, not rounded: float32 where there are codes."""
    dtype = matrix.dtype if matrix.target.grid is None else torch.float32
    return layout.unpack(stored, matrix.shape, matrix.target, dtype).weight


def matmul(x: Tensor, stored: dict[str, Tensor], matrix: StoredMatrix) -> Tensor:
    """x (T, I) -> x Wᵀ (T, O), summed in float32."""
    return (x.float() @ weight(stored, matrix).float().to(x.device).T).to(x.dtype)


def in_strips(x: Tensor, stored: Mapping[str, Tensor], matrix: StoredMatrix) -> Tensor:
    """x (T, I) -> x Wᵀ (T, O), decoding a strip of rows of W at a time."""
    num_weights = STRIP if x.device.type == "cpu" else DEVICE_STRIP
    parts = [
        linear(x, decode_rows(stored, matrix, first, last).to(x.dtype))
        for first, last in strips(matrix.shape, num_weights)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def decoded(stored: Mapping[str, Tensor], matrix: StoredMatrix) -> Tensor:
    """The dense weight (O, I) in the dtype of the matrix, made on the device of the stored tensors."""
    return decode_rows(stored, matrix, 0, matrix.shape[0])
