"""Every criterion against its definition: from the inputs X, from the inverse, or from the loss it predicts."""

import pytest
import torch
from oracles import damped, least_squares, loss, problem

from mspc.published.criteria import CRITERIA


def score(criterion: str, case, gram: torch.Tensor) -> torch.Tensor:
    """The criterion in float64, so that only its formula is tested."""
    return CRITERIA[criterion].score(case.weight.double(), gram.diagonal(), torch.linalg.inv(gram).diagonal())


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


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_zero_weights_score_zero_and_nothing_is_nan(criterion):
    """By every definition a weight that is zero already costs nothing to remove."""
    case = problem(6, 8, 16)
    case.weight[2], case.weight[:, 5] = 0, 0
    got = CRITERIA[criterion].score(case.weight, case.stats.gram.diagonal(), torch.ones(16))
    assert bool(got.isfinite().all())
    assert torch.equal(got == 0, case.weight == 0)
    assert bool((got >= 0).all())
