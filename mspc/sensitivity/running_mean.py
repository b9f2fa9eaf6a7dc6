"""Mean and standard error of numbers that arrive one by one (Welford 1962)."""

import math
from collections.abc import Iterable
from statistics import median


class RunningMean:
    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, 0.0, 0.0

    def add(self, value: float) -> None:
        self.count += 1
        difference = value - self.mean
        self.mean += difference / self.count
        self._squares += difference * (value - self.mean)

    @property
    def standard_error(self) -> float:
        """Of the mean; infinite until there are two values."""
        if self.count < 2:
            return math.inf
        return math.sqrt(self._squares / (self.count - 1) / self.count)


def converged(means: Iterable[RunningMean], tolerance: float) -> bool:
    """Whether the standard error of the median matrix is below `tolerance` of its mean.

    The allocators rank matrices whose sensitivities differ by orders of magnitude, so more would buy nothing.
    """
    return median(m.standard_error / max(abs(m.mean), 1e-300) for m in means) <= tolerance
