"""The share of outliers in a block: weights with scores far above the mean of the block (arXiv:2310.05175)."""

from collections.abc import Sequence

import torch
from torch import Tensor

OUTLIER = 5.0
"""Threshold as a multiple of the mean score, M in the paper."""


def outlier_share(weights: Sequence[Tensor], diagonals: Sequence[Tensor], threshold: float = OUTLIER) -> float:
    """Share of the weights of several matrices (O, I) whose |w_ij| sqrt(H_jj) exceeds `threshold` times the mean.

    `diagonals` (I,) are those of the matrices' Grams over the same tokens. The mean is over all weights.
    """
    numel = sum(weight.numel() for weight in weights)
    pairs = list(zip(weights, diagonals, strict=True))
    mean = sum(float(_scores(*pair).sum(dtype=torch.float64)) for pair in pairs) / numel
    return sum(int((_scores(*pair) > threshold * mean).sum()) for pair in pairs) / numel


def _scores(weight: Tensor, diagonal: Tensor) -> Tensor:
    """Scores (O, I). They are computed twice, because those of a block take twice the memory of its weights."""
    return weight.float().abs() * diagonal.sqrt()
