"""Polishing quantized weights: float64 least squares for the scales, all single changes of a code by brute force."""

import pytest
import torch
from oracles import damped, problem

from mspc.numerics.quant import dequantize
from mspc.solvers import SolverOptions
from mspc.solvers.obs import obs
from mspc.solvers.polish import descend, polish, refit_scales
from mspc.types import Grid, Target, Unstructured

GRIDS = [Grid(4, 16), Grid(3, None), Grid(2, 16, symmetric=False), Grid(8, 32)]


def rounded(grid, sparsity=0.3, seed=0):
    case = problem(seed, 12, 64)
    found = obs(case.weight, case.stats, Target(Unstructured(sparsity), grid), SolverOptions(), "q_proj")
    return case, found, damped(case.stats.gram, 0.01)


def errors(wanted, codes, gram):
    """The error of each row, in float64."""
    difference = (wanted - dequantize(codes)).double()
    return ((difference @ gram.double()) * difference).sum(1)


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_no_row_is_worse_and_the_whole_is_better(grid, sparsity):
    case, before, gram = rounded(grid, sparsity)
    after = polish(case.weight, before, case.stats, 0.01)
    old, new = errors(case.weight, before.codes, gram), errors(case.weight, after.codes, gram)
    assert bool((new <= old * (1 + 1e-4)).all())
    assert float(new.sum()) < 0.98 * float(old.sum())
    assert torch.equal(after.weight, dequantize(after.codes))
    assert torch.equal(after.mask, before.mask)
    assert bool((after.weight[~after.mask] == 0).all())
    assert int(after.codes.values.max()) < 2**grid.bits
    assert torch.equal(after.codes.zeros, before.codes.zeros)


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
def test_scales_are_those_of_least_squares(grid):
    """Oracle: lstsq in float64 on each row, with L^T of H = L L^T as the design; float16 keeps 11 bits."""
    case, found, gram = rounded(grid)
    codes = refit_scales(case.weight, gram.float(), found.codes)
    num_rows, num_groups = codes.scales.shape
    half = torch.linalg.cholesky(gram.double()).T
    for row in range(num_rows):
        levels = found.codes.values[row].view(num_groups, -1).double() - found.codes.zeros[row, :, None].double()
        design = half @ torch.block_diag(*levels[:, :, None])
        best = torch.linalg.lstsq(design, half @ case.weight[row].double()).solution
        torch.testing.assert_close(codes.scales[row].double(), best, rtol=2e-3, atol=1e-6)


def test_strips_of_rows_change_nothing(monkeypatch):
    case, found, gram = rounded(Grid(4, 16))
    whole = refit_scales(case.weight, gram.float(), found.codes).scales
    monkeypatch.setattr("mspc.solvers.polish.STRIP", 80)  # five rows of four groups
    torch.testing.assert_close(refit_scales(case.weight, gram.float(), found.codes).scales, whole)


def test_codes_settle_where_no_single_change_helps():
    """Oracle: every other code of every kept weight, once passes change nothing more."""
    case, found, gram = rounded(Grid(3, 16))
    codes = found.codes
    for _ in range(50):
        following = descend(case.weight, gram.float(), codes, found.mask, 7)
        if torch.equal(following.values, codes.values):
            break
        codes = following
    least = errors(case.weight, codes, gram)
    for column in range(64):
        for code in range(8):
            values = codes.values.clone()
            values[found.mask[:, column], column] = code
            changed = type(codes)(values, codes.scales, codes.zeros)
            assert bool((errors(case.weight, changed, gram) >= least * (1 - 1e-5)).all())


def test_a_group_without_weights_keeps_its_scale():
    case, found, gram = rounded(Grid(4, 16))
    empty = found.codes.values.clone()
    empty[:, :16] = found.codes.zeros[:, :1]
    codes = refit_scales(case.weight, gram.float(), type(found.codes)(empty, found.codes.scales, found.codes.zeros))
    assert torch.equal(codes.scales[:, 0], found.codes.scales[:, 0])
    assert bool(codes.scales.isfinite().all())
