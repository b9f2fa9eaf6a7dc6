"""Confidence intervals of means: tables of Student's t, and how often intervals hold the true mean."""

import math

import pytest
import torch

from mspc.numerics.intervals import mean_interval, t_quantile

TABLE = {1: 12.7062, 2: 4.3027, 3: 3.1824, 5: 2.5706, 10: 2.2281, 15: 2.1314, 30: 2.0423, 60: 2.0003, 120: 1.9799}


@pytest.mark.parametrize(("degrees", "expected"), TABLE.items())
def test_quantiles_are_those_of_the_tables(degrees, expected):
    assert t_quantile(degrees) == pytest.approx(expected, abs=5e-5)


def test_many_degrees_are_nearly_the_normal_distribution():
    assert 1.95996 < t_quantile(10**7) < 1.963


def test_the_interval_is_the_textbook_formula():
    values = [1.0, 2.0, 4.0, 7.0]  # mean 3.5, variance 7
    low, high = mean_interval(values)
    assert (low + high) / 2 == pytest.approx(3.5)
    assert (high - low) / 2 == pytest.approx(3.18245 * math.sqrt(7 / 4), rel=1e-5)


@pytest.mark.parametrize("values", [[1.0], [1.0, math.inf], [math.nan, 1.0, 2.0]], ids=str)
def test_what_has_no_interval(values):
    assert mean_interval(values) is None


def sample(name: str, count: int, size: int) -> torch.Tensor:
    """Samples (count, size) of a distribution with mean 1."""
    generator = torch.Generator().manual_seed(0)
    if name == "normal":
        return 1 + torch.randn(count, size, generator=generator, dtype=torch.float64)
    return torch.empty(count, size, dtype=torch.float64).exponential_(generator=generator)


@pytest.mark.parametrize(
    ("name", "size", "least", "most"),
    [("normal", 4, 0.94, 0.96), ("normal", 16, 0.94, 0.96), ("exponential", 16, 0.90, 0.95)],
)
def test_intervals_hold_the_true_mean_as_often_as_they_say(name, size, least, most):
    """Oracle: 2000 samples. A skewed distribution is held a little less often."""
    held = [low < 1 < high for low, high in (mean_interval(values) for values in sample(name, 2000, size).tolist())]
    assert least < sum(held) / len(held) < most
