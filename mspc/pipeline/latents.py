"""Compressed matrices and vectors as numbers that an optimizer moves: float32 latents, and what is stored of them.

The model runs with what is stored. The gradient of a stored weight is taken as that of its latent, although the
rounding between them has none (straight-through, arXiv:1308.3432). Only kept weights have latents, so zeros stay zero.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mspc.formats import layout
from mspc.numerics.quant import LARGEST_SCALE, SMALLEST_SCALE
from mspc.types import Codes, CompressedLinear

SCALE_RATE = 30.0
"""Learning rate of the relative change of a scale, as a multiple of that of a weight without a grid."""
CODE_RATE = 300.0
"""The same for a code before it is rounded."""


@dataclass(frozen=True)
class Vector:
    """A norm or bias, of any shape, with the dtype of the checkpoint."""

    latent: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, stored: Tensor, device: torch.device) -> "Vector":
        return cls(stored.to(device, torch.float32, copy=True), stored.dtype)

    def latents(self) -> dict[str, tuple[Tensor, float]]:
        """The numbers to move by name, each with its multiple of the learning rate."""
        return {"values": (self.latent, 1.0)}

    def gradients(self, gradient: Tensor) -> dict[str, Tensor]:
        """The gradients of the latents by that of the vector."""
        return {"values": gradient}

    def stored(self) -> Tensor:
        return self.latent.to(self.dtype)


class Weights:
    """A matrix without a grid: a latent (nnz,) of every kept weight, in row-major order."""

    def __init__(self, matrix: CompressedLinear, device: torch.device) -> None:
        self.start, self.mask = matrix, matrix.mask.to(device)
        self.kept = matrix.weight.to(device)[self.mask].float()

    def latents(self) -> dict[str, tuple[Tensor, float]]:
        return {"values": (self.kept, 1.0)}

    def gradients(self, gradient: Tensor) -> dict[str, Tensor]:
        """By the gradient (O, I) of the weights."""
        return {"values": gradient[self.mask]}

    def stored(self) -> CompressedLinear:
        """The matrix as `layout.pack` stores it."""
        weight = torch.zeros(self.mask.shape, device=self.mask.device).masked_scatter_(self.mask, self.kept)
        return layout.as_stored(replace(self.start, weight=weight, mask=self.mask), self.start.weight.dtype)


class QuantizedWeights:
    """A matrix on a grid. Each group has the relative change of its scale as a latent, and zero points stay.

    A kept weight has a latent, too: its distance from the zero point in codes, before it is rounded.
    """

    def __init__(self, matrix: CompressedLinear, device: torch.device) -> None:
        assert matrix.codes is not None
        assert matrix.target.grid is not None
        self.start, self.mask = matrix, matrix.mask.to(device)
        self.levels = 2**matrix.target.grid.bits - 1
        self.zeros, self.first_scales = matrix.codes.zeros.to(device), matrix.codes.scales.to(device).float()
        self.change = torch.zeros_like(self.first_scales)
        self.size = self.mask.shape[1] // self.zeros.shape[1]
        self.kept = matrix.codes.values.to(device)[self.mask].float() - self.per_weight(self.zeros)[self.mask]

    def per_weight(self, of_groups: Tensor) -> Tensor:
        """(O, G) -> (O, I)."""
        return of_groups.repeat_interleave(self.size, 1)

    def latents(self) -> dict[str, tuple[Tensor, float]]:
        return {"codes": (self.kept, CODE_RATE), "scales": (self.change, SCALE_RATE)}

    def scales(self) -> Tensor:
        """The scales (O, G) float16."""
        return (self.first_scales * (1 + self.change)).clamp_(SMALLEST_SCALE, LARGEST_SCALE).half()

    def codes(self) -> Tensor:
        """The codes (O, I), as float32; those of pruned weights are of no account."""
        values = torch.zeros(self.mask.shape, device=self.mask.device).masked_scatter_(self.mask, self.kept)
        return values.round_().add_(self.per_weight(self.zeros)).clamp_(0, self.levels)

    def gradients(self, gradient: Tensor) -> dict[str, Tensor]:
        """By the gradient (O, I) of the weights. A weight is its distance from zero times its scale."""
        distance = (self.codes() - self.per_weight(self.zeros)).mul_(self.mask)
        of_scales = (gradient * distance).view(*self.zeros.shape, self.size).sum(-1) * self.first_scales
        return {"codes": (gradient * self.per_weight(self.first_scales))[self.mask], "scales": of_scales}

    def stored(self) -> CompressedLinear:
        codes = Codes(self.codes().to(torch.uint8), self.scales(), self.zeros)
        moved = replace(self.start, weight=torch.empty(0), mask=self.mask, codes=codes)
        return layout.as_stored(moved, self.start.weight.dtype)


def latents_of(matrix: CompressedLinear, device: torch.device) -> Weights | QuantizedWeights:
    """The latents of a matrix as it is stored, whose weight has the dtype of the checkpoint."""
    return Weights(matrix, device) if matrix.codes is None else QuantizedWeights(matrix, device)
