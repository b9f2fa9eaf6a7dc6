"""The sweep with a grid and in activation order, against arithmetic on codes, sorted columns and plain rounding."""

import pytest
import torch
from oracles import (
    Problem,
    code_product,
    damped,
    problem,
    run_obs,
)

from mspc.numerics.linalg import output_error
from mspc.numerics.quant import fit_groups
from mspc.solvers.mask_only import mask_only
from mspc.solvers.options import SolverOptions
from mspc.types import NM, GramStats, Grid, Target, Unstructured

GRIDS = [
    Grid(2, 32),
    Grid(3, 64),
    Grid(4, 128),
    Grid(4, None),
    Grid(8, 64),
    Grid(2, 64, symmetric=False),
    Grid(3, None, symmetric=False),
    Grid(4, 32, symmetric=False),
    Grid(8, 128, symmetric=False),
]


@pytest.mark.parametrize("pattern", [Unstructured(0.0), Unstructured(0.5), NM(2, 4)], ids=repr)
@pytest.mark.parametrize("grid", GRIDS, ids=repr)
def test_weight_is_the_product_of_its_codes_and_better_than_rounding_to_nearest(grid, pattern):
    """Oracles: Python arithmetic on the codes, and the error of masking and rounding without feedback."""
    case = problem(18, 24, 256)
    target = Target(pattern, grid)
    result = run_obs(case, target)
    codes = result.codes
    assert codes is not None
    num_groups = 256 // (grid.group_size or 256)
    assert codes.values.shape == (24, 256)
    assert codes.scales.shape == codes.zeros.shape == (24, num_groups)
    assert all(t.is_contiguous() for t in (codes.values, codes.scales, codes.zeros))
    assert torch.equal(result.weight.double(), code_product(codes))
    zeros = codes.zeros.repeat_interleave(256 // num_groups, 1)
    assert torch.equal(codes.values[~result.mask], zeros[~result.mask])
    assert int(codes.values.max()) < 2**grid.bits
    assert not bool(result.weight[~result.mask].any())
    plain = mask_only(case.weight, case.stats, target, SolverOptions(), "q_proj")
    error, plain_error = (output_error(case.weight, r.weight, case.stats.gram) for r in (result, plain))
    assert error < plain_error


def test_sizes_of_groups_that_cross_blocks():
    """By counting and by the code product: groups of 256 and of 96 do not lie in blocks of 128."""
    for num_columns, size in ((512, 256), (288, 96), (200, 200), (200, 40)):
        case = problem(19, 8, num_columns)
        result = run_obs(case, Target(Unstructured(0.5), Grid(4, size)))
        assert result.codes is not None
        assert result.codes.scales.shape == (8, num_columns // size)
        assert torch.equal(result.weight.double(), code_product(result.codes))
        assert int((~result.mask).sum()) == 4 * num_columns


@pytest.mark.parametrize("options", [{}, {"activation_order": True}], ids=repr)
def test_static_groups_are_fitted_on_the_weights_as_they_came(options):
    """Oracle: `fit_groups` of the whole weight, with the damped diagonal as importance."""
    case = problem(20, 16, 192)
    for grid in (Grid(4, None), Grid(3, 96, symmetric=False)):
        codes = run_obs(case, Target(Unstructured(0.0), grid), **options).codes
        diagonal = damped(case.stats.gram, 0.01).diagonal().float()
        everything = torch.ones_like(case.weight, dtype=torch.bool)
        scales, zeros = fit_groups(case.weight, everything, diagonal, grid, "q_proj")
        assert codes is not None
        assert torch.equal(codes.scales, scales)
        assert torch.equal(codes.zeros, zeros)


def test_first_group_is_fitted_before_anything_moved_and_the_next_one_after():
    """Oracle: `fit_groups` of the original weight agrees in the first group and, feedback being at work, not later."""
    case = problem(21, 16, 128)
    grid = Grid(3, 32)
    codes = run_obs(case, Target(Unstructured(0.0), grid)).codes
    everything = torch.ones_like(case.weight, dtype=torch.bool)
    diagonal = damped(case.stats.gram, 0.01).diagonal().float()
    scales, _ = fit_groups(case.weight, everything, diagonal, grid, "q_proj")
    assert codes is not None
    assert torch.equal(codes.scales[:, 0], scales[:, 0])
    assert not torch.equal(codes.scales[:, 1], scales[:, 1])


# Activation order


@pytest.mark.parametrize("sparsity", [0.0, 0.4, 0.7])
def test_activation_order_is_the_sweep_over_sorted_columns(sparsity):
    """Oracle: sort the columns by their inputs by hand, sweep in that order, and sort back. (One block: how the blocks
    share the budget is another matter.)"""
    case = problem(22, 16, 120, dead=[17])
    order = torch.tensor(sorted(range(120), key=lambda j: -float(case.stats.gram[j, j])))
    ordered = Problem(case.weight[:, order], case.inputs[order], GramStats(case.stats.gram[order][:, order], 480))
    expected = run_obs(ordered, Unstructured(sparsity))
    result = run_obs(case, Unstructured(sparsity), activation_order=True)
    assert torch.equal(result.mask[:, order], expected.mask)
    assert torch.equal(result.weight[:, order], expected.weight)


@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(3, None, symmetric=False)], ids=repr)
def test_activation_order_with_grid_keeps_the_groups_of_columns(grid):
    """Oracles: the code product in column order, and the error of the natural order, which settles the inputs that
    matter most with fewer columns left to correct them."""
    case = problem(23, 24, 192)
    target = Target(Unstructured(0.0), grid)
    result, natural = run_obs(case, target, activation_order=True), run_obs(case, target)
    assert result.codes is not None
    assert torch.equal(result.weight.double(), code_product(result.codes))
    error, natural_error = (output_error(case.weight, r.weight, case.stats.gram) for r in (result, natural))
    assert error < natural_error


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("grid", [None, Grid(4, 32)], ids=repr)
def test_pruning_in_activation_order_is_better_than_no_update(grid, seed):
    """Oracle: the error of masking without feedback. The inputs differ in size, and so should the shares of blocks."""
    case = problem(seed, 24, 256)
    target = Target(Unstructured(0.5), grid)
    result = run_obs(case, target, activation_order=True)
    assert int((~result.mask).sum()) == 24 * 128
    plain = mask_only(case.weight, case.stats, target, SolverOptions(), "q_proj")
    error, plain_error = (output_error(case.weight, r.weight, case.stats.gram) for r in (result, plain))
    assert error < plain_error
