"""Sensitivities, gradients and loss curves of a model, measured once: kept in a folder, another budget finds them.

A measurement is named by the hash of everything that it depends on, so a folder may hold those of many models.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mspc.allocators.curves import Curve
from mspc.blocks import TOKENS_PER_BATCH, batches_of
from mspc.checkpoint import write_json, write_tensors
from mspc.curves import measure_curves, patterns_of, read_curves, write_curves
from mspc.errors import InputError
from mspc.gradients import FisherFactor, HessianTrace, SquaredGradient, reverse_walk
from mspc.models import StreamedModel
from mspc.recipe import Recipe
from mspc.report import Reporter
from mspc.sensitivity import RunningMean, converged
from mspc.solvers import SolverOptions
from mspc.types import Matrix
from mspc.walk import walk

SEQUENCES_PER_ROUND = 8
TOLERANCE = 0.1


def sensitivities(
    model: StreamedModel,
    ids: Tensor,
    matrices: Sequence[Sequence[Matrix]],
    recipe: Recipe,
    identity: dict[str, Any],
    folder: Path | None,
    reporter: Reporter,
) -> dict[str, float]:
    """Sensitivity by matrix name; read from `folder` if it was measured before, else measured and kept there.

    `identity` says which model and text this is; `ids` (N, T) are the calibration sequences.
    """
    key = _key(model, matrices, identity) | {"sensitivity": recipe.sensitivity}
    if recipe.sensitivity != "gram":
        key |= {
            "sequences": recipe.sensitivity_sequences,
            "probes": recipe.sensitivity_probes,
            "seed": recipe.seed,
        }
    file = folder / f"sensitivity-{_digest(key)}.json" if folder else None
    if file and file.is_file():
        reporter.say(f"Sensitivity: taken from {file}.")
        return _read(file)
    if recipe.sensitivity == "gram":
        means = _gram(model, ids, matrices, reporter)
    else:
        means = _by_gradients(model, ids[: recipe.sensitivity_sequences], matrices, recipe, reporter)
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
    matrices: Sequence[Sequence[Matrix]],
    recipe: Recipe,
    identity: dict[str, Any],
    folder: Path | None,
    reporter: Reporter,
) -> dict[str, Tensor]:
    """The Fisher factor of every matrix by name (see `FisherFactor`), in host memory; kept in `folder` likewise."""
    key = _key(model, matrices, identity) | {"sequences": recipe.sensitivity_sequences}
    file = folder / f"fisher-{_digest(key)}.safetensors" if folder else None
    if file and file.is_file():
        reporter.say(f"Gradients: taken from {file}.")
        return _read_tensors(file)
    ids = ids[: recipe.sensitivity_sequences]
    sums: dict[str, Tensor] = {}
    rounds = ids.split(max(1, TOKENS_PER_BATCH // ids.shape[1]))
    with reporter.stage("Gradients", len(rounds) * sum(map(len, matrices))) as step:
        for part in rounds:
            for sample in reverse_walk(model, part, matrices, FisherFactor(model, matrices)):
                name, value = sample.matrix.name, sample.value.cpu() * (len(part) / len(ids))
                sums[name] = sums[name].add_(value) if name in sums else value
                step(name)
    if file:
        write_tensors(file, sums)
    return sums


def loss_curves(
    model: StreamedModel,
    ids: Tensor,
    matrices: Sequence[Sequence[Matrix]],
    fisher: dict[str, Tensor],
    recipe: Recipe,
    options: SolverOptions,
    identity: dict[str, Any],
    folder: Path | None,
    reporter: Reporter,
) -> dict[str, Curve]:
    """The loss curve of every matrix by name; kept in `folder` likewise."""
    method = {
        "patterns": [str(pattern) + str(pattern.sparsity) for pattern in patterns_of(recipe)],
        "solver": "admm" if recipe.solver in ("admm", "kfac") else [recipe.solver, recipe.criterion],
        "damp": recipe.damp,
        "sequences": recipe.sensitivity_sequences,
        "rounding": [recipe.group_size, recipe.asymmetric] if recipe.has_budget else None,
    }
    file = folder / f"curves-{_digest(_key(model, matrices, identity) | method)}.json" if folder else None
    if file and file.is_file():
        reporter.say(f"Loss curves: taken from {file}.")
        return read_curves(file)
    ids = ids[: recipe.sensitivity_sequences]
    curves = measure_curves(model, ids, matrices, fisher, recipe, options, reporter)
    if file:
        write_curves(file, curves)
    return curves


def _key(model: StreamedModel, matrices: Sequence[Sequence[Matrix]], identity: dict[str, Any]) -> dict[str, Any]:
    names = [matrix.name for of_block in matrices for matrix in of_block]
    return identity | {
        "dtype": str(model.dtype),
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


def _gram(
    model: StreamedModel, ids: Tensor, matrices: Sequence[Sequence[Matrix]], reporter: Reporter
) -> dict[str, RunningMean]:
    means: dict[str, RunningMean] = {}
    with reporter.stage("Sensitivity (gram)", sum(map(len, matrices))) as step:
        for visit in walk(model, batches_of(model, ids), matrices):
            means[visit.matrix.name] = RunningMean()
            means[visit.matrix.name].add(float(visit.stats.gram.diagonal().mean()) / visit.stats.num_tokens)
            step(visit.matrix.name)
    return means


def _by_gradients(
    model: StreamedModel, ids: Tensor, matrices: Sequence[Sequence[Matrix]], recipe: Recipe, reporter: Reporter
) -> dict[str, RunningMean]:
    """Samples by the reverse walk, some sequences a round, until their mean has converged or the text is used up."""
    means = {matrix.name: RunningMean() for of_block in matrices for matrix in of_block}
    probes = recipe.sensitivity_probes if recipe.sensitivity == "hutchinson" else 1
    with reporter.stage(f"Sensitivity ({recipe.sensitivity})", probes * len(ids) * len(means)) as step:
        for probe in range(probes):
            for first in range(0, len(ids), SEQUENCES_PER_ROUND):
                part = ids[first : first + SEQUENCES_PER_ROUND]
                kind = HessianTrace(recipe.seed) if recipe.sensitivity == "hutchinson" else SquaredGradient()
                for sample in reverse_walk(model, part, matrices, kind, probe * len(ids) + first):
                    means[sample.matrix.name].add(float(sample.value))
                    step(sample.matrix.name)
                if converged(means.values(), TOLERANCE):
                    return means
    return means
