"""Every criterion against its definition: from the inputs X, from the inverse, or from the loss it predicts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import damped, few, least_squares, loss, problem

from mspc.published.criteria import CRITERIA


def score(criterion: str, case, gram: torch.Tensor) -> torch.Tensor:
    """The criterion in float64, so that only its formula is tested."""
    return CRITERIA[criterion].score(case.weight.double(), gram.diagonal(), torch.linalg.inv(gram).diagonal())


@few
@given(st.integers(0, 999), st.integers(1, 32))
def test_isc_lies_between_one_and_two_times_w2_h(seed, num_columns):
    """Theorem: 1 / [H^-1]_jj <= H_jj for a positive definite H."""
    case = problem(seed, 4, num_columns)
    gram = damped(case.stats.gram, 0.01)
    bound = case.weight.double().square() * gram.diagonal()
    isc = score("isc", case, gram)
    assert bool((bound * (1 - 1e-9) <= isc).all())
    assert bool((isc <= 2 * bound * (1 + 1e-9)).all())


def test_isc_of_independent_inputs_is_two_w2_h():
    """Closed form: a diagonal H has [H^-1]_jj = 1 / H_jj."""
    case = problem(0, 8, 16)
    gram = damped(case.stats.gram, 0.0).diagonal().diag()
    expected = 2 * case.weight.double().square() * gram.diagonal()
    torch.testing.assert_close(score("isc", case, gram), expected)


def test_obs_is_the_loss_of_removing_one_weight_and_solving_for_the_others():
    """Oracle: float64 least squares with that weight held at zero."""
    case = problem(1, 3, 12)
    gram = damped(case.stats.gram, 0.01)
    obs = score("obs", case, gram)
    for row in range(3):
        for column in range(12):
            mask = torch.ones(1, 12, dtype=torch.bool)
            mask[0, column] = False
            weight = case.weight[row : row + 1].double()
            expected = loss(least_squares(weight, mask, gram) - weight, gram)
            assert float(obs[row, column]) == pytest.approx(expected, rel=1e-8)


def test_isc_is_the_loss_of_removing_a_weight_with_and_without_update():
    """Oracle: the loss w^2 H_jj without update plus the loss with the best update."""
    case = problem(2, 1, 6)
    gram = damped(case.stats.gram, 0.01)
    for column in range(6):
        mask = torch.ones(1, 6, dtype=torch.bool)
        mask[0, column] = False
        weight = case.weight.double()
        expected = loss(weight * ~mask, gram) + loss(least_squares(weight, mask, gram) - weight, gram)
        assert float(score("isc", case, gram)[0, column]) == pytest.approx(expected, rel=1e-8)


def test_wanda_is_the_weight_times_the_norm_of_its_input():
    """Oracle: norms of the rows of X."""
    case = problem(3)
    inputs = case.inputs.double()
    expected = case.weight.double().abs() * torch.stack([x.norm() for x in inputs])
    torch.testing.assert_close(score("wanda", case, inputs @ inputs.T), expected)


def test_ria_is_relative_importance_times_the_root_of_the_norm():
    """Oracle: the paper's formula weight by weight, with X."""
    case = problem(4, 5, 7)
    inputs = case.inputs.double()
    size = case.weight.double().abs()
    got = score("ria", case, inputs @ inputs.T)
    for row in range(5):
        for column in range(7):
            share = size[row, column] / size[row].sum() + size[row, column] / size[:, column].sum()
            assert float(got[row, column]) == pytest.approx(float(share * inputs[column].norm() ** 0.5), rel=1e-9)


def test_magnitude_knows_no_inputs():
    """Definition: |w|, whatever the inputs."""
    case = problem(5)
    nothing = torch.zeros(64)
    assert torch.equal(CRITERIA["magnitude"].score(case.weight, nothing, nothing), case.weight.abs())


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_zero_weights_score_zero_and_nothing_is_nan(criterion):
    """By every definition a weight that is zero already costs nothing to remove."""
    case = problem(6, 8, 16)
    case.weight[2], case.weight[:, 5] = 0, 0
    got = CRITERIA[criterion].score(case.weight, case.stats.gram.diagonal(), torch.ones(16))
    assert bool(got.isfinite().all())
    assert torch.equal(got == 0, case.weight == 0)
    assert bool((got >= 0).all())


def test_only_the_criteria_defined_per_row_are_compared_per_row():
    """Wanda and RIA are, by their papers."""
    assert sorted(name for name, criterion in CRITERIA.items() if criterion.per_row) == ["ria", "wanda"]


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_inputs_are_not_changed(criterion):
    case = problem(7)
    copies = case.weight.clone(), case.stats.gram.clone()
    diagonal = case.stats.gram.diagonal()
    CRITERIA[criterion].score(case.weight, diagonal, 1 / diagonal)
    assert torch.equal(case.weight, copies[0])
    assert torch.equal(case.stats.gram, copies[1])
