"""ADMM against exact float64 least squares on its own support, the OBS sweep, and all supports of a small problem."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from oracles import code_product, damped, least_squares, loss, problem, row_losses

from mspc.errors import ActivationError, InputError, SingularGramError
from mspc.numerics.saliency import OBS
from mspc.solvers import SOLVERS, SolverOptions
from mspc.solvers.admm import admm
from mspc.solvers.quadratic import OUTPUT_DAMP
from mspc.types import NM, GramStats, Grid, Target, Unstructured

PATTERNS = [Unstructured(0.5), Unstructured(0.7), NM(2, 4), NM(5, 16)]


def solve(case, target, **options):
    return admm(case.weight, case.stats, target, SolverOptions(**options), "q_proj")


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_weights_are_nearly_the_best_on_their_support(pattern):
    case = problem(0, 24, 64)
    found = solve(case, Target(pattern))
    gram = damped(case.stats.gram, 0.01)
    best = loss(case.weight - least_squares(case.weight, found.mask, gram), gram)
    assert best <= loss(case.weight - found.weight, gram) <= 1.02 * best


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_support_is_better_than_that_of_the_sweep(pattern, seed):
    case = problem(seed, 24, 64)
    swept = SOLVERS["obs"](case.weight, case.stats, Target(pattern), SolverOptions(criterion=OBS), "q_proj")
    found = solve(case, Target(pattern))
    gram = damped(case.stats.gram, 0.01)
    assert loss(case.weight - found.weight, gram) < 0.9 * loss(case.weight - swept.weight, gram)


def test_near_the_best_of_all_supports():
    """Oracle: least squares on each of the 70 supports of one row of 8."""
    ranks = []
    for seed in range(10):
        case = problem(seed, 1, 8)
        gram = damped(case.stats.gram, 0.01)
        masks = torch.zeros(70, 8, dtype=torch.bool)
        for mask, kept in zip(masks, combinations(range(8), 4), strict=True):
            mask[list(kept)] = True
        weights = case.weight.expand(70, 8)
        losses = row_losses(weights - least_squares(weights, masks, gram), gram)
        found = loss(case.weight - solve(case, Target(Unstructured(0.5))).weight, gram)
        ranks.append(int((losses * 1.001 < found).sum()))
    assert sorted(ranks)[5] <= 1
    assert max(ranks) <= 10


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.99, 1.0])
def test_counts_are_exact(sparsity):
    case = problem(3, 16, 32)
    found = solve(case, Target(Unstructured(sparsity)))
    assert int((~found.mask).sum()) == round(16 * 32 * sparsity)
    assert not found.weight[~found.mask].any()
    if sparsity == 0:
        assert torch.equal(found.weight, case.weight)


def test_groups_keep_n_of_m():
    found = solve(problem(4, 16, 32), Target(NM(2, 4)))
    assert (found.mask.view(16, 8, 4).sum(-1) == 2).all()


def test_dead_inputs_go_first_and_what_is_left_of_them_stays():
    case = problem(5, 8, 16, dead=(3, 7))
    half = solve(case, Target(Unstructured(0.5)))
    assert not half.mask[:, [3, 7]].any()
    few = solve(case, Target(Unstructured(0.0625)))
    assert int((~few.mask).sum()) == 8
    left = few.mask[:, [3, 7]]
    assert torch.equal(few.weight[:, [3, 7]][left], case.weight[:, [3, 7]][left])


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
@pytest.mark.parametrize("group_size", [16, 64])
def test_rounding_obeys_the_support(pattern, group_size):
    case = problem(6, 24, 64)
    grid = Grid(4, group_size)
    found = solve(case, Target(pattern, grid))
    assert torch.equal(found.mask, solve(case, Target(pattern)).mask)
    assert not found.weight[~found.mask].any()
    assert torch.equal(found.weight.double(), code_product(found.codes))
    gram = damped(case.stats.gram, 0.01)
    swept = SOLVERS["obs"](case.weight, case.stats, Target(pattern, grid), SolverOptions(criterion=OBS), "q_proj")
    assert loss(case.weight - found.weight, gram) < loss(case.weight - swept.weight, gram)


def test_bad_input_is_refused():
    case = problem(7, 8, 18)
    with pytest.raises(InputError, match=r"q_proj: the pattern 2:4 needs in features divisible by 4, got 18"):
        solve(case, Target(NM(2, 4)))
    spoiled = GramStats(case.stats.gram.clone().fill_(float("nan")), 4)
    with pytest.raises(ActivationError, match="q_proj"):
        admm(case.weight, spoiled, Target(Unstructured(0.5)), SolverOptions(), "q_proj")


def test_a_gram_that_is_none_is_an_error_that_names_the_matrix():
    gram = torch.eye(16) - 0.5 * (1 - torch.eye(16))  # least eigenvalue 1.5 - 8
    with pytest.raises(SingularGramError, match=r"q_proj: .* not positive definite .* raise --damp"):
        admm(torch.ones(8, 16), GramStats(gram, 64), Target(Unstructured(0.5)), SolverOptions(), "q_proj")


def with_fisher(case):
    """The statistics with a Fisher factor of blocks of 8 outputs, and the damped diagonal of the factor."""
    factor = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(1))
    factor = factor @ factor.mT * torch.tensor([0.01, 1.0, 30.0])[:, None, None]
    diagonal = factor.diagonal(dim1=-2, dim2=-1).flatten()
    return replace(case.stats, output_fisher=factor), diagonal + OUTPUT_DAMP * diagonal.mean()


def test_fisher_weighs_each_output_by_its_gradient():
    """Oracle: admm on rows times the square roots of the weights, divided by them."""
    case = problem(0, 24, 64)
    stats, importance = with_fisher(case)
    scale, target = importance.sqrt()[:, None], Target(Unstructured(0.5))
    found = SOLVERS["fisher"](case.weight, stats, target, SolverOptions(), "q_proj")
    expected = admm(scale * case.weight, case.stats, target, SolverOptions(), "q_proj")
    assert torch.equal(found.mask, expected.mask)
    torch.testing.assert_close(found.weight, expected.weight / scale, rtol=1e-3, atol=1e-4)
    gram = damped(case.stats.gram, 0.01)
    plain = solve(case, target)
    assert not torch.equal(plain.mask, found.mask)
    loss_of, loss_of_plain = (
        row_losses(case.weight - one.weight, gram) @ importance.double() for one in (found, plain)
    )
    assert loss_of < 0.9 * loss_of_plain


@pytest.mark.parametrize(
    "target", [Target(NM(2, 4)), Target(Unstructured(0.0), Grid(4, 16)), Target(NM(2, 4), Grid(4, 16))]
)
def test_fisher_solves_rows_that_do_not_compete_as_admm(target):
    """Oracle: admm, whose masks and codes are the same for rows of any size."""
    case = problem(0, 24, 64)
    found = SOLVERS["fisher"](case.weight, with_fisher(case)[0], target, SolverOptions(), "q_proj")
    expected = solve(case, target)
    assert float((found.mask == expected.mask).float().mean()) > 0.98  # products are rounded differently
    gram = damped(case.stats.gram, 0.01)
    assert loss(case.weight - found.weight, gram) == pytest.approx(loss(case.weight - expected.weight, gram), rel=0.02)
    without = SOLVERS["fisher"](case.weight, case.stats, target, SolverOptions(), "q_proj")
    assert torch.equal(without.weight, expected.weight)
