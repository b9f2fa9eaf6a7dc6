"""Two-sided rounding against Schur complements in float64, the loss of the form, and rounding without its feedback."""

from dataclasses import replace

import pytest
import torch
from oracles import code_product, damped, problem
from test_kfac import fisher, model_loss, whole

from mspc.planning.curve_measurement import rounding_loss
from mspc.solvers import SolverOptions
from mspc.solvers.obs import obs
from mspc.solvers.polish import polish
from mspc.solvers.quadratic import damped_outputs, quadratic
from mspc.solvers.rounding import by_itself
from mspc.solvers.two_sided import PARTS, influence, interleaved, parts_of, two_sided
from mspc.types import Grid, Target, Unstructured

OPTIONS = SolverOptions()


def both(seed, num_blocks, size, grid, sparsity=0.0):
    """A problem, its Fisher factor and mask, and its rounding with feedback on both sides and on one."""
    case, factor = problem(seed, num_blocks * size, 64), fisher(seed, num_blocks, size)
    target = Target(Unstructured(sparsity), grid)
    mask = torch.rand(case.weight.shape, generator=torch.Generator().manual_seed(seed)) >= sparsity
    wanted = torch.where(mask, case.weight, 0.0)
    two = by_itself(two_sided)(wanted, mask, replace(case.stats, output_fisher=factor), target, OPTIONS, "q")
    one = polish(wanted, obs(wanted, case.stats, target, OPTIONS, "q", mask), case.stats, OPTIONS.damp)
    return case, factor, wanted, two, one


@pytest.mark.parametrize("size", [1, 3, 8, 20])
def test_influence_is_a_schur_complement(size):
    """Oracle: what is left of the own part of the damped factor when all earlier parts are eliminated, in float64."""
    factor = fisher(3, 2, size)
    for dense, found in zip(damped_outputs(factor).double(), influence(factor).view(2, size), strict=True):
        order, expected = interleaved(size), torch.zeros(size, dtype=torch.float64)
        for part in parts_of(size):
            own, before = order[part], order[: part.start]
            left = dense[own][:, own]
            if len(before):
                cross = dense[own][:, before]
                left = left - cross @ torch.linalg.solve(dense[before][:, before], cross.T)
            expected[own] = left.diagonal()
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)


def test_every_output_is_in_one_part():
    for size in (1, 5, 8, 20, 192, 256):
        assert sorted(interleaved(size).tolist()) == list(range(size))
        covered = [row for part in parts_of(size) for row in range(part.start, part.stop)]
        assert covered == list(range(size))
        assert len(parts_of(size)) == min(PARTS, size)


@pytest.mark.parametrize("grid", [Grid(4, 16), Grid(3, None), Grid(2, 32, symmetric=False)], ids=repr)
@pytest.mark.parametrize("sparsity", [0.0, 0.4])
def test_the_loss_of_the_model_is_lower(grid, sparsity):
    """The form in float64, summed over problems. One part of a block may lose."""
    losses = torch.zeros(2, dtype=torch.float64)
    for seed in range(4):
        case, factor, wanted, two, one = both(seed, 2, 24, grid, sparsity)
        outputs, gram = whole(factor), damped(case.stats.gram, 0.01)
        losses += torch.tensor([model_loss(found.weight - wanted, outputs, gram) for found in (two, one)])
        assert torch.equal(two.weight.double(), code_product(two.codes))
        assert bool((two.weight[~two.mask] == 0).all())
        assert int(two.codes.values.max()) < 2**grid.bits
    assert float(losses[0] / losses[1]) < 0.8


def test_the_influence_predicts_the_loss():
    """The prediction of loss curves, from one-sided rounding, against the loss that two-sided rounding has."""
    ratios = []
    for seed in range(6):
        case, factor, wanted, two, one = both(seed, 2, 24, Grid(3, 16))
        gram = damped(case.stats.gram, 0.01).double()
        error = (one.weight - wanted).double()
        predicted = float((influence(factor) * ((error @ gram) * error).sum(1)).sum())
        stats = replace(case.stats, output_fisher=factor)
        form = quadratic(case.weight, stats, factor, OPTIONS.damp, "q")
        assert rounding_loss(error.float(), form, stats) == pytest.approx(predicted, rel=1e-3)
        ratios.append(predicted / model_loss(two.weight - wanted, whole(factor), gram))
    assert 0.7 < sorted(ratios)[2] < 1.4
    assert min(ratios) > 0.4


def test_independent_outputs_have_no_feedback():
    """Oracle: the sweep and the polish of the whole matrix, bit by bit."""
    case, target = problem(5, 32, 64), Target(Unstructured(0.0), Grid(3, 16))
    mask, factor = torch.ones_like(case.weight, dtype=torch.bool), torch.eye(16).expand(2, 16, 16)
    two = by_itself(two_sided)(case.weight, mask, replace(case.stats, output_fisher=factor), target, OPTIONS, "q")
    one = polish(case.weight, obs(case.weight, case.stats, target, OPTIONS, "q", mask), case.stats, OPTIONS.damp)
    for name in ("values", "scales", "zeros"):
        assert torch.equal(getattr(two.codes, name), getattr(one.codes, name))
    assert torch.equal(two.weight, one.weight)


def test_outputs_that_nothing_depends_on():
    case, target = problem(6, 16, 64), Target(Unstructured(0.0), Grid(4, 16))
    mask = torch.ones_like(case.weight, dtype=torch.bool)
    stats = replace(case.stats, output_fisher=torch.zeros(2, 8, 8))
    assert bool(by_itself(two_sided)(case.weight, mask, stats, target, OPTIONS, "q").weight.isfinite().all())
