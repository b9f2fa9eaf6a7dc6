"""Grids against Python arithmetic, a search over all codes, and the plain scales that a fit must not lose to."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import code_product, few
from torch import Tensor

from mspc.errors import InputError
from mspc.numerics.quant import (
    dequantize,
    fit,
    fit_groups,
    groups_of,
    round_to_nearest,
)
from mspc.types import Codes, Grid

RANGES = {
    "normal": torch.Tensor.clone,
    "positive": torch.Tensor.abs,
    "negative": lambda w: -w.abs(),
    "far from zero": lambda w: w.abs() + 20,
    "heavy tails": lambda w: w**3,
    "ternary": torch.Tensor.sign,
    "zero": torch.zeros_like,
    "tiny": lambda w: w * 1e-9,
    "huge": lambda w: w * 1e9,
    "mixed": lambda w: w * torch.logspace(-12, 8, len(w))[:, None],
}
grids = st.builds(Grid, st.sampled_from([2, 3, 4, 8]), st.sampled_from([4, 8, 16, None]), st.booleans())


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Weight (O, I), mask (O, I) and importance (I,)."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    weight = torch.randn(draw(st.integers(1, 6)), draw(st.sampled_from([16, 48])), generator=generator)
    weight = RANGES[draw(st.sampled_from(sorted(RANGES)))](weight)
    mask = torch.rand(weight.shape, generator=generator) >= draw(st.sampled_from([0.0, 0.5, 1.0]))
    return weight, mask, torch.rand(weight.shape[1], generator=generator) + 0.01


def fit_error(weight: Tensor, mask: Tensor, importance: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Squared error (O,) of the nearest codes, found by trying every code, in float64."""
    levels = (torch.arange(2**grid.bits).double() - zero.double()[:, None]) * scale.double()[:, None]
    distance = (weight.double()[:, :, None] - levels[:, None]).abs().amin(2)
    return (distance.square() * mask * importance.double()).sum(1)


def half(scale: Tensor) -> Tensor:
    return scale.clamp(2.0**-24, 65504).half()


@few
@given(matrices(), grids)
def test_codes_are_in_range_and_multiply_exactly_with_zero_on_every_grid(matrix, grid):
    """Oracle: Python arithmetic on the stored integers and scales."""
    weight, mask, importance = matrix
    codes = round_to_nearest(weight, mask, importance, grid, "q_proj")
    num_groups = weight.shape[1] // (grid.group_size or weight.shape[1])
    assert (codes.values.dtype, codes.scales.dtype, codes.zeros.dtype) == (torch.uint8, torch.float16, torch.uint8)
    assert codes.scales.shape == codes.zeros.shape == (len(weight), num_groups)
    assert int(codes.values.max()) < 2**grid.bits
    assert int(codes.zeros.max()) < 2**grid.bits
    assert bool(codes.scales.isfinite().all())
    assert bool((codes.scales > 0).all())
    if grid.symmetric:
        assert bool((codes.zeros == 2 ** (grid.bits - 1)).all())
    rounded = dequantize(codes)
    assert torch.equal(rounded.double(), code_product(codes))
    zeros = codes.zeros.repeat_interleave(weight.shape[1] // num_groups, 1)
    assert torch.equal(codes.values[~mask], zeros[~mask])
    assert bool((rounded[~mask] == 0).all())
    of_zeros = round_to_nearest(torch.zeros_like(weight), mask, importance, grid, "q_proj")
    assert bool((dequantize(of_zeros) == 0).all())
    assert bool((dequantize(Codes(zeros, codes.scales, codes.zeros)) == 0).all())


@few
@given(matrices(), grids)
def test_rounding_is_to_the_nearest_of_all_codes_and_half_a_scale_at_most(matrix, grid):
    """Oracle: trying all 2^bits codes for every weight."""
    weight, mask, importance = matrix
    codes = round_to_nearest(weight, mask, importance, grid, "q_proj")
    size = weight.shape[1] // codes.scales.shape[1]
    scale = codes.scales.double().repeat_interleave(size, 1)
    zero = codes.zeros.double().repeat_interleave(size, 1)
    levels = (torch.arange(2**grid.bits).double() - zero[..., None]) * scale[..., None]
    got = (weight.double() - dequantize(codes).double()).abs()
    best = (weight.double()[..., None] - levels).abs().amin(2)
    slack = 1e-6 * (weight.abs() + scale)
    assert bool((got <= best + slack)[mask].all())
    inside = mask & (levels[..., 0] <= weight) & (weight <= levels[..., -1])
    assert bool((got <= scale / 2 + slack)[inside].all())


@few
@given(matrices(), st.sampled_from([2, 3, 4, 8]))
def test_a_fit_is_never_worse_than_the_plain_scales(matrix, bits):
    """Min-max; absmax over all 2^bits levels; and absmax on the highest code, the scale of most quantizers."""
    weight, mask, importance = matrix
    kept = weight * mask
    low, high, largest = kept.amin(1).clamp(max=0), kept.amax(1).clamp(min=0), kept.abs().amax(1)
    scale, middle = half((high - low) / (2**bits - 1)), torch.full((len(weight),), 2 ** (bits - 1))
    for symmetric, plain, zero in (
        (False, scale, (-low / scale.float()).round().clamp(0, 2**bits - 1)),
        (True, half(largest * 2 / (2**bits - 1)), middle),
        (True, half(largest / (2 ** (bits - 1) - 1)), middle),
    ):
        grid = Grid(bits, None, symmetric)
        fitted = fit_error(kept, mask, importance, *fit(weight, mask, importance, grid), grid)
        assert bool((fitted <= fit_error(kept, mask, importance, plain, zero, grid) * (1 + 1e-5)).all())


@pytest.mark.parametrize(
    ("symmetric", "bits", "low"),
    [
        (True, 2, -1),
        (True, 3, -3),
        (True, 4, -7),
        (True, 8, -127),
        (False, 2, -1),
        (False, 3, 0),
        (False, 4, -15),
        (False, 8, -100),
    ],
)
def test_weights_on_a_grid_keep_their_values(symmetric, bits, low):
    """Oracle: the weights themselves, as a matrix that was rounded before has them (symmetric: -max to +max)."""
    high = -low if symmetric else low + 2**bits - 1
    weight = torch.arange(low, high + 1).float().repeat(2, 1) * torch.tensor([[0.25], [2.0]])
    grid = Grid(bits, None, symmetric)
    codes = round_to_nearest(weight, torch.ones_like(weight).bool(), torch.ones(weight.shape[1]), grid, "q_proj")
    assert torch.equal(dequantize(codes), weight)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fit_is_close_to_the_best_of_all_scales(bits, symmetric):
    """Oracle: exhaustive search over 100 scales (and every zero point), columns of unequal importance."""
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(16, 32, generator=generator)
    importance = torch.randn(32, generator=generator).exp()
    mask = torch.rand(16, 32, generator=generator) < 0.7
    grid = Grid(bits, None, symmetric)
    kept = weight * mask
    best = torch.full((16,), torch.inf, dtype=torch.float64)
    for share in torch.linspace(0.5, 1, 100):
        for zero in [2 ** (bits - 1)] if symmetric else range(2**bits):
            span = kept.abs().amax(1) * 2 if symmetric else kept.amax(1) - kept.amin(1)
            scale = span * share / (2**bits - 1)
            best = torch.minimum(best, fit_error(kept, mask, importance, scale, torch.full((16,), zero), grid))
    fitted = fit_error(kept, mask, importance, *fit(weight, mask, importance, grid), grid)
    assert float(fitted.sum()) <= (1.03 if symmetric else 1.2) * float(best.sum())


@few
@given(matrices(), grids)
def test_pruned_weights_do_not_move_the_grid(matrix, grid):
    """Oracle: the same matrix with garbage where the mask is False."""
    weight, mask, importance = matrix
    garbage = torch.where(mask, weight, 3 * weight.abs().amax() + 1)
    codes, other = (round_to_nearest(w, mask, importance, grid, "q_proj") for w in (weight, garbage))
    assert all(torch.equal(getattr(codes, name), getattr(other, name)) for name in ("values", "scales", "zeros"))


@few
@given(matrices(), st.booleans(), st.sampled_from([2, 3, 4, 8]))
def test_groups_are_fitted_alone(matrix, symmetric, bits):
    """Oracle: `fit` of each group of columns."""
    weight, mask, importance = matrix
    scales, zeros = fit_groups(weight, mask, importance, Grid(bits, 8, symmetric), "q_proj")
    for group in range(weight.shape[1] // 8):
        part = slice(8 * group, 8 * group + 8)
        scale, zero = fit(weight[:, part], mask[:, part], importance[part], Grid(bits, None, symmetric))
        assert torch.equal(scales[:, group], scale)
        assert torch.equal(zeros[:, group], zero)


def test_group_sizes():
    """By hand; the error names the matrix, both sizes and the largest power of two that fits."""
    assert groups_of(256, Grid(4, 64)) == 64
    assert groups_of(200, Grid(4, None)) == 200
    for num_columns, fits in ((200, 8), (192, 64), (33, 1)):
        with pytest.raises(InputError, match=rf"layers\.1\.q_proj: group size 128 .* {num_columns} .*size {fits}, "):
            groups_of(num_columns, Grid(4, 128), "layers.1.q_proj")
    weight = torch.ones(2, 200)
    with pytest.raises(InputError, match=r"layers\.1\.q_proj"):
        round_to_nearest(weight, weight.bool(), torch.ones(200), Grid(4, 128), "layers.1.q_proj")
