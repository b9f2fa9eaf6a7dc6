"""The solver that only masks: what it keeps it keeps bit by bit, what it drops is what sorting by hand drops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import Problem, best_n_of_m, code_product, damped, drop_lowest, few, problem, score_of

from mspc.errors import ActivationError, InputError, SingularGramError
from mspc.published.criteria import CRITERIA
from mspc.solvers.mask_only import mask_only
from mspc.solvers.options import SolverOptions
from mspc.types import NM, CompressedLinear, GramStats, Grid, Target, Unstructured

ALL = sorted(CRITERIA)


def masked(case: Problem, target: Target, criterion: str = "isc") -> CompressedLinear:
    return mask_only(case.weight, case.stats, target, SolverOptions(criterion=CRITERIA[criterion]), "q_proj")


def hessian_of(criterion: str, gram: torch.Tensor) -> torch.Tensor:
    """Criteria that need an inverse score with the damped Gram, the others with the Gram as it is."""
    return damped(gram, 0.01 if criterion in ("isc", "obs") else 0.0)


@pytest.mark.parametrize("criterion", ["isc", "magnitude", "obs"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.95, 1.0])
def test_mask_over_the_matrix_equals_sorting_float64_scores(criterion, sparsity):
    case = problem(1, 16, 33)
    result = masked(case, Target(Unstructured(sparsity)), criterion)
    gram = hessian_of(criterion, case.stats.gram)
    score = score_of(criterion, case.weight.double(), gram.diagonal(), torch.linalg.inv(gram).diagonal())
    assert torch.equal(result.mask, drop_lowest(score, round(16 * 33 * sparsity)))
    assert torch.equal(result.weight, torch.where(result.mask, case.weight, 0))
    assert not bool(result.weight[~result.mask].signbit().any())  # -0.0 would not survive packing by mask
    assert result.codes is None


@pytest.mark.parametrize("criterion", ["ria", "wanda"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.95, 1.0])
def test_mask_per_row_equals_sorting_each_row(criterion, sparsity):
    """Oracle: float64 scores; every row loses its share of the exact count, rounded down or up."""
    case = problem(2, 16, 33)
    result = masked(case, Target(Unstructured(sparsity)), criterion)
    score = score_of(criterion, case.weight.double(), case.stats.gram.double().diagonal(), torch.ones(33))
    counts = (~result.mask).sum(1).tolist()
    assert sum(counts) == round(16 * 33 * sparsity)
    for row, count in enumerate(counts):
        assert abs(count - 33 * sparsity) <= 1
        assert torch.equal(result.mask[row], drop_lowest(score[row], count))
    assert torch.equal(result.weight, torch.where(result.mask, case.weight, 0))


@pytest.mark.parametrize("criterion", ALL)
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(4, 8), NM(4, 4)], ids=repr)
def test_n_of_m_mask_equals_the_best_of_all_subsets(criterion, pattern):
    case = problem(3, 8, 32)
    result = masked(case, Target(pattern), criterion)
    gram = hessian_of(criterion, case.stats.gram)
    score = score_of(criterion, case.weight.double(), gram.diagonal(), torch.linalg.inv(gram).diagonal())
    assert torch.equal(result.mask, best_n_of_m(score, pattern))
    assert torch.equal(result.weight, torch.where(result.mask, case.weight, 0))


@few
@given(
    st.sampled_from(ALL),
    st.integers(1, 9),
    st.integers(1, 40),
    st.floats(0, 1),
    st.sets(st.integers(0, 39), max_size=20),
    st.integers(0, 99),
)
def test_counts_are_exact_and_dead_inputs_go_first(criterion, num_rows, num_columns, sparsity, dead, seed):
    """By counting: while a dead weight is kept, no live one is pruned (row by row for wanda and ria)."""
    dead = sorted(j for j in dead if j < num_columns)
    case = problem(seed, num_rows, num_columns, dead)
    result = masked(case, Target(Unstructured(sparsity)), criterion)
    assert int((~result.mask).sum()) == round(num_rows * num_columns * sparsity)
    is_dead = torch.zeros(num_columns, dtype=torch.bool)
    is_dead[dead] = True
    if criterion in ("ria", "wanda"):
        starved = result.mask[:, is_dead].any(1) & (~result.mask[:, ~is_dead]).any(1)
        assert not bool(starved.any())
    else:
        assert not (bool(result.mask[:, is_dead].any()) and bool((~result.mask[:, ~is_dead]).any()))


def test_dead_inputs_go_first_in_n_of_m_groups():
    """By hand: columns 1 and 2 of every four are dead, so 2:4 keeps 0 and 3."""
    case = problem(4, 8, 16, dead=[j for j in range(16) if j % 4 in (1, 2)])
    for criterion in ALL:
        result = masked(case, Target(NM(2, 4)), criterion)
        assert torch.equal(result.mask, torch.tensor([True, False, False, True]).repeat(8, 4))


@pytest.mark.parametrize("grid", [Grid(4, 16), Grid(3, None, symmetric=False), Grid(2, 32), Grid(8, 8)], ids=repr)
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=repr)
def test_grid_rounds_the_kept_weights(pattern, grid):
    """Oracles: the mask without grid, Python arithmetic on the codes, and half a scale of error inside the range."""
    case = problem(5, 16, 32)
    result = masked(case, Target(pattern, grid))
    assert torch.equal(result.mask, masked(case, Target(pattern)).mask)
    assert result.codes is not None
    assert torch.equal(result.weight.double(), code_product(result.codes))
    assert bool((result.weight[~result.mask] == 0).all())
    inside = result.mask & (result.codes.values > 0) & (result.codes.values < 2**grid.bits - 1)
    scales = result.codes.scales.float().repeat_interleave(32 // result.codes.scales.shape[1], 1)
    assert bool(((result.weight - case.weight).abs() <= scales * 0.50001)[inside].all())


@pytest.mark.parametrize("target", [Target(Unstructured(0.5)), Target(NM(2, 4), Grid(4, 16))], ids=repr)
def test_inputs_are_not_changed(target):
    case = problem(7, dead=[3])
    copies = case.weight.clone(), case.stats.gram.clone()
    for criterion in ALL:
        masked(case, target, criterion)
    assert torch.equal(case.weight, copies[0])
    assert torch.equal(case.stats.gram, copies[1])


def test_errors_name_the_matrix():
    case = problem(8, num_columns=36)
    for target in (Target(NM(4, 8)), Target(Unstructured(0.5), Grid(4, 16))):
        with pytest.raises(InputError, match=r"layers\.1\.q_proj"):
            mask_only(case.weight, case.stats, target, SolverOptions(), "layers.1.q_proj")
    indefinite = GramStats(torch.tensor([[1.0, 5.0], [5.0, 1.0]]), 3)
    with pytest.raises(SingularGramError, match=r"layers\.1\.q_proj"):
        mask_only(torch.ones(2, 2), indefinite, Target(Unstructured(0.5)), SolverOptions(), "layers.1.q_proj")


@pytest.mark.parametrize("criterion", ALL)
def test_gram_that_is_not_finite_is_refused_whatever_the_criterion(criterion):
    """By the docstring of the solver: it raises what the inverse raises. (Scales need the Gram, even for magnitude.)"""
    stats = GramStats(torch.full((4, 4), float("nan")), 3)
    target, options = Target(Unstructured(0.5), Grid(4, 4)), SolverOptions(criterion=CRITERIA[criterion])
    with pytest.raises(ActivationError, match=r"layers\.1\.q_proj"):
        mask_only(torch.ones(2, 4), stats, target, options, "layers.1.q_proj")


def test_damp_of_the_inverse_is_reported_and_zero_where_none_was_needed():
    case, target = problem(9), Target(Unstructured(0.5))
    damps = {c: masked(case, target, c).damp for c in ALL}
    assert damps == {"isc": 0.01, "magnitude": 0.0, "obs": 0.01, "ria": 0.0, "wanda": 0.0}
