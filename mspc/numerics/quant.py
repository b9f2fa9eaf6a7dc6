"""Quantization to a grid: fit scales on the kept weights, weights to codes, codes to weights.

Codes are unsigned with an integer zero point, weight = (code - zero) * scale, as in the packed formats of the field. A
symmetric grid has zero = 2^(bits-1). 0.0 is on every grid, so pruned weights have a code.
"""

import torch
from torch import Tensor

from mspc.errors import InputError
from mspc.types import Codes, Grid

SHRINK_STEPS = tuple(1 - 0.02 * i for i in range(26))
"""Ranges tried, as shares of the full range. Clipping the largest weight gives all others more resolution."""
SMALLEST_SCALE = 2.0**-24  # of float16
LARGEST_SCALE = 65504.0


def groups_of(num_columns: int, grid: Grid, name: str = "the matrix") -> int:
    """Number of inputs that share a scale: the group size, or all inputs. Raises InputError if it does not fit."""
    size = grid.group_size or num_columns
    if num_columns % size:
        raise InputError(
            f"{name}: group size {size} does not divide its {num_columns} in features. Choose --group-size "
            f"{_largest_divisor(num_columns)}, 'row' or auto, or leave the matrix dense with --skip."
        )
    return size


def _largest_divisor(num_columns: int) -> int:
    return next((size for size in (128, 64, 32, 16, 8, 4, 2) if num_columns % size == 0), 1)


def fit(weight: Tensor, mask: Tensor, importance: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scales (O,) float16 and zero points (O,) uint8 of one group of every row, for weight and mask (O, S).

    Of all `SHRINK_STEPS`, the range with the least squared error of kept weights is used. `importance` (S,) weighs the
    columns by the energy of their input.
    """
    kept = weight * mask
    levels, middle = 2**grid.bits - 1, 2 ** (grid.bits - 1)
    low, high = kept.amin(1).clamp(max=0), kept.amax(1).clamp(min=0)
    full = (2 * torch.maximum(-low, high) if grid.symmetric else high - low) / levels
    # Symmetric codes reach -middle but not +middle; one wider step holds the largest weight with either sign.
    steps = (levels / 2 / (middle - 1), *SHRINK_STEPS) if grid.symmetric else SHRINK_STEPS
    cost = mask * importance
    best_error = torch.full_like(low, torch.inf)
    for shrink in steps:
        scale = (full * shrink).clamp(SMALLEST_SCALE, LARGEST_SCALE).half().float()
        zero = torch.full_like(scale, middle) if grid.symmetric else (-low * shrink / scale).round().clamp(0, levels)
        rounded = dequantize_group(quantize_group(kept, scale, zero, grid), scale, zero)
        error = rounded.sub_(kept).square_().mul_(cost).sum(1)
        if shrink == steps[0]:
            best_scale, best_zero = scale, zero
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale.half(), best_zero.to(torch.uint8)


def quantize_group(weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Nearest codes, as float: (O, S), scale (O,), zero (O,) -> (O, S)."""
    return (weight / scale[:, None]).add_(zero[:, None]).round_().clamp_(0, 2**grid.bits - 1)


def dequantize_group(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (codes - zero[:, None]) * scale[:, None]


def dequantize(codes: Codes) -> Tensor:
    """Codes -> weight (O, I) float32. Exact: a code has at most 8 bits and a scale 11, so the product fits."""
    num_rows, num_groups = codes.scales.shape
    difference = codes.values.view(num_rows, num_groups, -1).float() - codes.zeros[..., None].float()
    return (difference * codes.scales[..., None].float()).view(num_rows, -1)


def fit_groups(weight: Tensor, mask: Tensor, importance: Tensor, grid: Grid, name: str) -> tuple[Tensor, Tensor]:
    """`fit` for every group of a matrix: scales (O, G) float16 and zeros (O, G) uint8."""
    size = groups_of(weight.shape[1], grid, name)
    fitted = [
        fit(w, m, h, grid)
        for w, m, h in zip(weight.split(size, 1), mask.split(size, 1), importance.split(size), strict=True)
    ]
    return torch.stack([scale for scale, _ in fitted], 1), torch.stack([zero for _, zero in fitted], 1)


def round_to_nearest(weight: Tensor, mask: Tensor, importance: Tensor, grid: Grid, name: str) -> Codes:
    """The nearest codes of a matrix, without error feedback. Pruned weights get their group's zero point."""
    scales, zeros = fit_groups(weight, mask, importance, grid, name)
    size = groups_of(weight.shape[1], grid, name)
    per_column = [t.float().repeat_interleave(size, 1) for t in (scales, zeros)]
    values = ((weight * mask) / per_column[0] + per_column[1]).round().clamp(0, 2**grid.bits - 1)
    return Codes(torch.where(mask, values, per_column[1]).to(torch.uint8), scales, zeros)
