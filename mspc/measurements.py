"""Sensitivities of a model, measured once: kept in a folder, another budget finds them there.

A measurement is named by the hash of everything that it depends on, so a folder may hold those of many models.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mspc.blocks import batches_of
from mspc.checkpoint import write_json
from mspc.errors import InputError
from mspc.gradients import HessianTrace, SquaredGradient, reverse_walk
from mspc.models import StreamedModel
from mspc.recipe import Recipe
from mspc.report import Reporter
from mspc.sensitivity import RunningMean, converged
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
    names = [matrix.name for of_block in matrices for matrix in of_block]
    key = identity | {
        "sensitivity": recipe.sensitivity,
        "dtype": str(model.dtype),
        "matrices": hashlib.sha256("\n".join(names).encode()).hexdigest(),
    }
    if recipe.sensitivity != "gram":
        key |= {
            "sequences": recipe.sensitivity_sequences,
            "probes": recipe.sensitivity_probes,
            "seed": recipe.seed,
        }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    file = folder / f"sensitivity-{digest}.json" if folder else None
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
                    means[sample.matrix.name].add(sample.value)
                    step(sample.matrix.name)
                if converged(means.values(), TOLERANCE):
                    return means
    return means
