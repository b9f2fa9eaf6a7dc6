"""Sensitivities, gradients and loss curves of a model, measured once: kept in a folder, another budget finds them.

A measurement is named by the hash of everything that it depends on, so a folder may hold those of many models.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mspc.errors import InputError
from mspc.model.streamed import StreamedModel
from mspc.passes.blocks import TOKENS_PER_BATCH
from mspc.passes.gradients import OutputFisher, reverse_walk
from mspc.passes.walk import DenseWalk
from mspc.planning.curve import Curve, read_curves, write_curves
from mspc.planning.curve_measurement import measure_curves, patterns_of
from mspc.planning.sensitivity import by_exponents, by_gradients, by_gram, by_outliers
from mspc.progress import Progress, log
from mspc.published.allocators import OWN_MEASURES
from mspc.published.outliers import OUTLIER
from mspc.settings import Settings
from mspc.solvers import SolverOptions
from mspc.storage.files import write_json, write_tensors
from mspc.types import MatricesByBlock


def measure_of(settings: Settings) -> str:
    """What the allocator of a recipe goes by: its own measure, or the sensitivity asked for."""
    return OWN_MEASURES.get(str(settings.allocator), settings.sensitivity)


def sensitivities(
    model: StreamedModel,
    ids: Tensor,
    matrices: MatricesByBlock,
    settings: Settings,
    identity: dict[str, Any],
    folder: Path | None,
    progress: Progress,
) -> dict[str, float]:
    """What the allocator goes by, by matrix name; read from `folder` if it was measured before, else kept there.

    `identity` says which model and text this is; `ids` (N, T) are the calibration sequences.
    """
    measure = settings.measure
    key = _key(model, matrices, identity) | {"sensitivity": measure}
    if measure == "exponents":
        key.pop("calibration")  # of the weights alone
    elif measure == "outliers":
        key["threshold"] = OUTLIER
    elif measure != "gram":
        key |= {
            "sequences": settings.sensitivity_sequences,
            "probes": settings.sensitivity_probes,
            "seed": settings.seed,
        }
    file = folder / f"sensitivity-{_digest(key)}.json" if folder else None
    if file and file.is_file():
        log.info(f"Sensitivity: taken from {file}.")
        return _read(file)
    if measure == "gram":
        means = by_gram(model, ids, matrices, progress)
    elif measure == "outliers":
        means = by_outliers(model, ids, matrices, progress)
    elif measure == "exponents":
        means = by_exponents(model, matrices, progress)
    else:
        means = by_gradients(model, ids[: settings.sensitivity_sequences], matrices, settings, progress)
    if file:
        rows = {
            name: {"mean": m.mean, "standard_error": m.standard_error if m.count > 1 else None, "samples": m.count}
            for name, m in means.items()
        }
        write_json(file, {"of": key, "matrices": rows})
    return {name: mean.mean for name, mean in means.items()}


def fisher_factors(
    model: StreamedModel,
    ids: Tensor,
    matrices: MatricesByBlock,
    settings: Settings,
    identity: dict[str, Any],
    folder: Path | None,
    progress: Progress,
) -> dict[str, Tensor]:
    """The Fisher factor of every matrix by name (see `OutputFisher`), in host memory; kept in `folder` likewise."""
    key = _key(model, matrices, identity) | {"sequences": settings.sensitivity_sequences}
    file = folder / f"fisher-{_digest(key)}.safetensors" if folder else None
    if file and file.is_file():
        log.info(f"Gradients: taken from {file}.")
        return _read_tensors(file)
    ids = ids[: settings.sensitivity_sequences]
    sums: dict[str, Tensor] = {}
    rounds = ids.split(max(1, TOKENS_PER_BATCH // ids.shape[1]))
    with progress.stage("Gradients", len(rounds) * sum(map(len, matrices))) as step:
        for part in rounds:
            for sample in reverse_walk(model, part, matrices, OutputFisher()):
                name, value = sample.matrix.name, sample.value.cpu() * (len(part) / len(ids))
                sums[name] = sums[name].add_(value) if name in sums else value
                step(name)
    if file:
        write_tensors(file, sums)
    return sums


def loss_curves(
    dense: DenseWalk,
    fisher: dict[str, Tensor],
    settings: Settings,
    options: SolverOptions,
    identity: dict[str, Any],
    folder: Path | None,
    progress: Progress,
) -> dict[str, Curve]:
    """The loss curve of every matrix by name; kept in `folder` likewise."""
    method = {
        "patterns": [str(pattern) + str(pattern.sparsity) for pattern in patterns_of(settings)],
        "solver": "admm" if settings.solver in ("admm", "kfac") else [settings.solver, settings.criterion],
        "damp": settings.damp,
        "activation_order": settings.activation_order,
        "sequences": settings.sensitivity_sequences,
        "rounding": [settings.group_size, settings.asymmetric] if settings.has_budget else None,
    }
    key = _key(dense.model, dense.matrices, identity) | method
    file = folder / f"curves-{_digest(key)}.json" if folder else None
    if file and file.is_file():
        log.info(f"Loss curves: taken from {file}.")
        return read_curves(file)
    curves = measure_curves(dense, fisher, settings, options, progress)
    if file:
        write_curves(file, curves)
    return curves


def _key(model: StreamedModel, matrices: MatricesByBlock, identity: dict[str, Any]) -> dict[str, Any]:
    names = [matrix.name for of_block in matrices for matrix in of_block]
    return identity | {
        "dtype": str(model.dtype),
        "device": model.device.type,
        "matrices": hashlib.sha256("\n".join(names).encode()).hexdigest(),
    }


def _digest(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read as a measurement ({error}); delete it to measure again.") from error


def _read(file: Path) -> dict[str, float]:
    try:
        return {name: float(row["mean"]) for name, row in json.loads(file.read_text())["matrices"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} cannot be read as a measurement ({error!r}); delete it to measure again.") from error
