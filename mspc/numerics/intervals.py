"""Confidence intervals of means."""

import math
import statistics
from collections.abc import Sequence
from functools import cache

LEVEL = 0.95
"""Share of samples whose interval holds the true mean."""
MOST_DEGREES = 1000
"""Degrees of freedom above which t and the normal distribution differ by less than 0.2%."""

Interval = tuple[float, float]


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Student's t-interval of the mean of a sample, at `LEVEL`; None for one value, and where values are not finite.

    It assumes independent values whose mean is about normal.
    """
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    mean = statistics.fmean(values)
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


@cache
def t_quantile(degrees: int) -> float:
    """The t with P(|T| <= t) = `LEVEL` for this number of degrees of freedom."""
    low, high = 0.0, 13.0  # one degree needs 12.7
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (low, middle) if _within(middle, min(degrees, MOST_DEGREES)) > LEVEL else (middle, high)
    return high


def _within(t: float, degrees: int) -> float:
    """P(|T| <= t), a finite sum (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = total = (cosine if odd else 1.0) if degrees > 1 else 0.0
    for k in range(2 + odd, degrees, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
