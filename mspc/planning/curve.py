"""The loss curve of a matrix: the predicted loss of pruning and quantizing it."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy

from mspc.storage.files import write_json


@dataclass(frozen=True)
class Curve:
    """Predicted increase of the loss (nats per token) of one matrix, at sparsities that ascend from above 0.

    `quantization` is the further increase when the kept weights are quantized: for each number of bits,
    (sparsity, loss) pairs that ascend from sparsity 0.
    """

    sparsities: tuple[float, ...]
    losses: tuple[float, ...]
    quantization: dict[int, tuple[tuple[float, float], ...]] = field(default_factory=dict)

    def at(self, sparsity: float, bits: int | None = None) -> float:
        """Predicted loss at any sparsity. Logarithms of losses are interpolated linearly.

        Below the first sparsity, the power law through the first two points holds.
        """
        more = 0.0 if bits is None else self._quantized(sparsity, bits)
        if sparsity <= 0:
            return more
        logs = [_log(loss) for loss in self.losses]
        first, second = self.sparsities[0], self.sparsities[-1] if len(logs) == 1 else self.sparsities[1]
        if sparsity < first:
            power = max((logs[1] - logs[0]) / math.log(second / first), 1.0) if len(logs) > 1 else 1.0
            return more + math.exp(logs[0] + power * math.log(sparsity / first))
        return more + math.exp(float(numpy.interp(sparsity, self.sparsities, logs)))

    def _quantized(self, sparsity: float, bits: int) -> float:
        """The loss of quantization, interpolated; constant beyond the last sparsity that was measured."""
        sparsities, losses = zip(*self.quantization[bits], strict=True)
        return math.exp(float(numpy.interp(sparsity, sparsities, [_log(loss) for loss in losses])))


def _log(loss: float) -> float:
    return math.log(max(loss, 1e-300))


def write_curves(file: Path, curves: dict[str, Curve]) -> None:
    write_json(file, {name: asdict(curve) for name, curve in curves.items()})


def read_curves(file: Path) -> dict[str, Curve]:
    return {name: curve_from(row) for name, row in json.loads(file.read_text()).items()}


def curve_from(row: dict[str, Any]) -> Curve:
    """The curve that `asdict` made a row of JSON of."""
    quantization = {
        int(bits): tuple((float(sparsity), float(loss)) for sparsity, loss in points)
        for bits, points in row["quantization"].items()
    }
    return Curve(tuple(map(float, row["sparsities"])), tuple(map(float, row["losses"])), quantization)
