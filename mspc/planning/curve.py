"""The loss curve of a matrix: what pruning and rounding it is predicted to cost."""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy

from mspc.errors import InputError
from mspc.storage.files import write_json


@dataclass(frozen=True)
class Curve:
    """Predicted increase of the loss (nats a token) of one matrix at some sparsities, ascending from above 0.

    `rounding` says how much more rounding what is kept costs: for some bits, (sparsity, loss) ascending from 0.
    `curvature` is the mean diagonal of the Gauss-Newton matrix of the weights, which trace rank ranks by.
    """

    sparsities: tuple[float, ...]
    losses: tuple[float, ...]
    rounding: dict[int, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    curvature: float = 0.0

    def at(self, sparsity: float, bits: int = 16) -> float:
        """Straight between the logarithms of the losses; below the first sparsity, the power law of the first two."""
        more = 0.0 if bits == 16 else self._rounded(sparsity, bits)
        if sparsity <= 0:
            return more
        logs = [_log(loss) for loss in self.losses]
        first, second = self.sparsities[0], self.sparsities[-1] if len(logs) == 1 else self.sparsities[1]
        if sparsity < first:
            power = max((logs[1] - logs[0]) / math.log(second / first), 1.0) if len(logs) > 1 else 1.0
            return more + math.exp(logs[0] + power * math.log(sparsity / first))
        return more + math.exp(float(numpy.interp(sparsity, self.sparsities, logs)))

    def weighed(self, weight: float) -> "Curve":
        """The curve with `weight` times the losses of rounding."""
        rounding = {bits: tuple((s, weight * loss) for s, loss in points) for bits, points in self.rounding.items()}
        return replace(self, rounding=rounding)

    def _rounded(self, sparsity: float, bits: int) -> float:
        """Likewise; beyond the last sparsity that was measured it stays."""
        sparsities, losses = zip(*self.rounding[bits], strict=True)
        return math.exp(float(numpy.interp(sparsity, sparsities, [_log(loss) for loss in losses])))


def _log(loss: float) -> float:
    return math.log(max(loss, 1e-300))


def write_curves(file: Path, curves: dict[str, Curve]) -> None:
    write_json(file, {name: asdict(curve) for name, curve in curves.items()})


def read_curves(file: Path) -> dict[str, Curve]:
    try:
        return {name: _curve_from(row) for name, row in json.loads(file.read_text()).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} cannot be read as a measurement ({error!r}); delete it to measure again.") from error


def _curve_from(row: dict[str, Any]) -> Curve:
    rounding = {
        int(bits): tuple((float(sparsity), float(loss)) for sparsity, loss in points)
        for bits, points in row["rounding"].items()
    }
    return Curve(
        tuple(map(float, row["sparsities"])), tuple(map(float, row["losses"])), rounding, float(row["curvature"])
    )
