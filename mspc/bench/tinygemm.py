"""The int4 baseline: torch's own weight-only int4 product (tinygemm on CUDA), with random weights."""

import torch
from torch import Tensor, nn

from mspc.bench.formats import GROUP_SIZE, Source
from mspc.errors import InputError

K_TILES = 8
"""Slices of 16 inputs that CUDA packs together: the largest number that torch takes, and the fastest."""


def check_fits(shape: tuple[int, int], what: str) -> None:
    """Raises InputError, naming `what`, for a matrix that tinygemm does not take."""
    rows, columns = shape
    if rows % 16 or columns % GROUP_SIZE:
        raise InputError(
            f"{what} is {rows} x {columns}, but torch's int4 product needs outputs divisible by 16 and inputs by "
            f"{GROUP_SIZE}. Use --baseline bf16, which leaves it out."
        )


def num_bytes(shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Bytes of the codes, and of a scale and a zero point for each group."""
    numel = shape[0] * shape[1]
    return numel // 2 + 2 * dtype.itemsize * numel // GROUP_SIZE


class TinygemmLinear(nn.Module):
    """y = x Wᵀ with W (O, I) in symmetric int4, groups of 128, in torch's own layout.

    It holds the same numbers as our `int4`, and an unused zero point for each scale.
    """

    packed: Tensor
    scales_and_zeros: Tensor

    def __init__(self, shape: tuple[int, int], source: Source, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        codes = source.stream(shape[0], shape[1], 4)
        if source.device.type == "cuda":
            packed = torch._convert_weight_to_int4pack(codes, K_TILES)
        else:
            unpacked = torch.stack([codes >> 4, codes & 15], -1).view(shape)
            packed = torch._convert_weight_to_int4pack_for_cpu(unpacked.int(), K_TILES)
        std = shape[1] ** -0.5 / ((4**4 - 1) / 12 + 0.25) ** 0.5
        scales = (0.5 + source.uniform((shape[1] // GROUP_SIZE, shape[0]))) * std
        self.register_buffer("packed", packed)
        self.register_buffer("scales_and_zeros", torch.stack([scales, torch.zeros_like(scales)], -1).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), in the dtype of `x`."""
        product = torch._weight_int4pack_mm if x.is_cuda else torch._weight_int4pack_mm_for_cpu
        y = product(x.reshape(-1, self.in_features), self.packed, GROUP_SIZE, self.scales_and_zeros)
        return y.view(*x.shape[:-1], self.out_features)

    def dense(self) -> Tensor:
        """The weight that it multiplies by (O, I), from its own product with the identity."""
        return self(torch.eye(self.in_features, dtype=self.scales_and_zeros.dtype, device=self.packed.device)).T
