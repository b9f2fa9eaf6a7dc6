"""Measurements of a model for its plan. Each is kept in a folder, where runs with another budget find it.

The name of a file has the hash of everything that the measurement depends on, so a folder may hold several models.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mspc import ranks
from mspc.errors import InputError
from mspc.model.streamed import StreamedModel
from mspc.passes.blocks import BUFFERS, own_parts, stored
from mspc.passes.gradients import TYPICAL, OutputFisher, fisher_block_size, reverse_walk
from mspc.passes.walk import DenseWalk
from mspc.planning.curve import Curve, read_curves, write_curves
from mspc.planning.curve_measurement import measure_curves, patterns_of
from mspc.planning.sensitivity import RunningMean, by_exponents, by_gradients, by_gram, by_outliers
from mspc.planning.solver_options import solver_options
from mspc.progress import Progress, log
from mspc.published.outliers import OUTLIER
from mspc.settings import ALL, BY_ADMM, ESTIMATE, Settings
from mspc.solvers import REVISION
from mspc.solvers.quadratic import OUTPUT_DAMP
from mspc.storage.files import write_json, write_tensors
from mspc.threads import fitting
from mspc.types import MatricesByBlock, Matrix, flatten

T = TypeVar("T")


@dataclass(frozen=True)
class Measurements:
    """Sensitivities, Fisher factors and loss curves of one model, each by matrix name."""

    model: StreamedModel
    ids: Tensor
    """Calibration sequences (N, T)."""
    matrices: MatricesByBlock
    settings: Settings
    identity: dict[str, Any]
    """Hashes of the checkpoint (`source`) and of the calibration text (`calibration`)."""
    folder: Path | None
    """Folder that keeps measurements. None: nothing is kept."""
    progress: Progress
    spill: Path | None = None
    """Folder for the states of gradients, and for Fisher factors while they are summed and later. None: memory."""

    def sensitivities(self) -> dict[str, float]:
        """The measure that the allocator needs (see `mspc.planning.sensitivity`)."""
        settings, measure = self.settings, self.settings.measure
        key = self._key(sensitivity=measure, **(self._route() if measure in ("gram", "outliers") else {}))
        if measure == "exponents":
            key.pop("calibration")  # they depend on the weights alone
        elif measure == "outliers":
            key["threshold"] = OUTLIER
        elif measure != "gram":
            sequences, probes = settings.sensitivity_sequences, settings.sensitivity_probes
            key |= {"sequences": sequences, "probes": probes, "seed": settings.seed}
        rows = self._cached(
            "Sensitivity", "sensitivity-{}.json", key,
            read=_read_rows, write=lambda file, rows: write_json(file, {"of": key, "matrices": rows}),
            measure=lambda: {name: _row(mean) for name, mean in self._means(measure).items()},
        )  # fmt: skip
        return {name: row["mean"] for name, row in rows.items()}

    def fisher_factors(self) -> dict[str, Tensor]:
        """The Fisher factors of the outputs (see `OutputFisher`), in host memory or in files of `spill`."""
        key = self._key(sequences=self.settings.sensitivity_sequences, typical=TYPICAL)
        return self._cached(
            "Gradients", "fisher-{}.safetensors", key,
            read=load_file, write=write_tensors, measure=self._fisher_factors,
        )  # fmt: skip

    def loss_curves(self, dense: DenseWalk, fisher: dict[str, Tensor]) -> dict[str, Curve]:
        """The loss curves, measured in one iteration of `dense`."""
        settings = self.settings
        key = self._key(
            patterns=[str(pattern) + str(pattern.sparsity) for pattern in patterns_of(settings)],
            solver=settings.solver if settings.solver in BY_ADMM else [settings.solver, settings.criterion],
            damp=settings.damp,
            activation_order=settings.activation_order,
            sequences=settings.sensitivity_sequences,
            outputs=[TYPICAL, OUTPUT_DAMP],
            solvers=REVISION,
            quantization=[settings.group_size, settings.asymmetric] if settings.has_budget else None,
            **({"estimated": True} if settings.allocator == ESTIMATE else {}),
            **self._route(),
        )
        return self._cached(
            "Loss curves", "curves-{}.json", key,
            read=read_curves, write=write_curves,
            measure=lambda: measure_curves(dense, fisher, settings, solver_options(settings), self.progress),
        )  # fmt: skip

    def _cached(
        self,
        title: str,
        file_name: str,
        key: dict[str, Any],
        *,
        read: Callable[[Path], T],
        write: Callable[[Path, T], None],
        measure: Callable[[], T],
    ) -> T:
        """The content of the file for `key`, or else a new measurement, which is then written to it."""
        if self.folder is None:
            return measure()
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        file = self.folder / file_name.format(digest)
        if not ranks.by_first(file.is_file):
            value = measure()
            if ranks.is_first():
                write(file, value)
            return value
        log.info(f"{title}: taken from {file}.")
        try:
            return read(file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise InputError(
                f"{file} cannot be read as a measurement ({error!r}). Delete it to measure again."
            ) from error

    def _key(self, **own: Any) -> dict[str, Any]:
        """Everything that a measurement depends on: what all depend on, and what only this one does."""
        names = "\n".join(matrix.name for matrix in flatten(self.matrices))
        common = {
            "dtype": str(self.model.dtype),
            "device": self.model.device.type,
            "matrices": hashlib.sha256(names.encode()).hexdigest(),
        }
        return self.identity | common | own

    def _route(self) -> dict[str, str]:
        """The part of a key about the tokens of Grams of experts."""
        return {"route": self.settings.route} if self.settings.route == ALL else {}

    def _means(self, measure: str) -> dict[str, RunningMean]:
        model, ids, matrices, progress = self.model, self.ids, self.matrices, self.progress
        if measure == "gram":
            return by_gram(model, ids, matrices, progress, self.settings.route == ALL)
        if measure == "outliers":
            return by_outliers(model, ids, matrices, progress, self.settings.route == ALL)
        if measure == "exponents":
            return by_exponents(model, matrices, progress)
        return by_gradients(model, ids[: self.settings.sensitivity_sequences], matrices, self.settings, progress)

    def _fisher_factors(self) -> dict[str, Tensor]:
        ids = self.ids[: self.settings.sensitivity_sequences]
        parts = own_parts(ids)
        at_once = self._batches_at_once(max(part.numel() for _, part in parts))
        sums = {}
        for of_block in filter(None, self.matrices):
            fisher = BlockFisher(of_block, self.spill)
            sums.update(dict.fromkeys((matrix.name for matrix in of_block), fisher))
        with self.progress.stage("Gradients", len(parts) * sum(map(len, self.matrices))) as step:
            for first in range(0, len(parts), at_once):
                chunks, some = zip(*parts[first : first + at_once], strict=True)
                keep = partial(stored, spill=self.spill) if self.spill else Tensor.cpu
                for sample in reverse_walk(self.model, ids, self.matrices, OutputFisher(), parts=some, keep=keep):
                    name, value = sample.matrix.name, sample.value.cpu() * (sample.sequences / len(ids))
                    sums[name].add(chunks[sample.batch], name, value)
                    step(name)
        totals: dict[str, Tensor] = {}
        for fisher in dict.fromkeys(sums.values()):
            totals |= fisher.total()
        return totals

    def _batches_at_once(self, tokens: int) -> int:
        """The number of batches for which there is memory: their states before all blocks, and a backward pass."""
        states = self.model.config.get_text_config().hidden_size * (len(self.model.blocks) + 1)
        widest = max(max(matrix.shape) for matrix in flatten(self.matrices))
        return fitting(tokens * (states + 2 * BUFFERS * widest) * self.model.dtype.itemsize)


class BlockFisher:
    """The sums over the text of the output Fisher factors of a block, one after the other in one tensor."""

    def __init__(self, matrices: Sequence[Matrix], spill: Path | None) -> None:
        self.places: dict[str, tuple[int, tuple[int, int, int]]] = {}
        """The first number of each matrix, and its shape (K, B, B)."""
        size = 0
        for matrix in matrices:
            block = fisher_block_size(rows := matrix.shape[0])
            self.places[matrix.name] = size, (rows // block, block, block)
            size += rows * block
        self.sum = ranks.TextSum(partial(stored, torch.zeros(1).expand(size), spill))

    def add(self, chunk: int, name: str, value: Tensor) -> None:
        self._part(self.sum.of(chunk), name).add_(value)

    def total(self) -> dict[str, Tensor]:
        """The factors (K, B, B) by name, which are on every rank."""
        summed = self.sum.total()
        return {name: self._part(summed, name) for name in self.places}

    def _part(self, numbers: Tensor, name: str) -> Tensor:
        first, shape = self.places[name]
        return numbers[first : first + math.prod(shape)].view(shape)


def _row(mean: RunningMean) -> dict[str, Any]:
    error = mean.standard_error if mean.count > 1 else None
    return {"mean": mean.mean, "standard_error": error, "samples": mean.count}


def _read_rows(file: Path) -> dict[str, Any]:
    rows = json.loads(file.read_text())["matrices"]
    return {name: row | {"mean": float(row["mean"])} for name, row in rows.items()}
