"""Loss curves of a model: what every matrix would cost at a few sparsities, measured in the dense model."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from mspc.allocators.curves import Curve
from mspc.blocks import batches_of
from mspc.checkpoint import write_json
from mspc.errors import InputError
from mspc.models import StreamedModel
from mspc.recipe import MIXED_OF, MIXED_PATTERN, Recipe
from mspc.report import Reporter
from mspc.solvers import SOLVERS, SolverOptions
from mspc.solvers.admm import error_path
from mspc.solvers.quadratic import quadratic
from mspc.types import NM, Matrix, Pattern, Target, Unstructured
from mspc.walk import walk

SPARSITIES = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0)
KEEPS = (14, 12, 10, 8, 6, 4, 2, 1)


def patterns_of(recipe: Recipe) -> list[Pattern]:
    if recipe.pattern == MIXED_PATTERN:
        return [NM(keep, MIXED_OF) for keep in KEEPS]
    return [Unstructured(sparsity) for sparsity in SPARSITIES]


def measure_curves(
    model: StreamedModel,
    ids: Tensor,
    matrices: Sequence[Sequence[Matrix]],
    fisher: dict[str, Tensor],
    recipe: Recipe,
    options: SolverOptions,
    reporter: Reporter,
) -> dict[str, Curve]:
    """The curve of each matrix by name: 1/2 tr(S dW H dW^T) a token, with dW from a short run of the solver."""
    patterns = patterns_of(recipe)
    curves = {}
    with reporter.stage("Loss curves", sum(map(len, matrices))) as step:
        for visit in walk(model, batches_of(model, ids), matrices):
            name, weight = visit.matrix.name, visit.weight.float()
            stats = replace(visit.stats, fisher=fisher[name].to(weight.device))
            if recipe.solver in ("kfac", "admm"):
                losses = [loss for _, loss in error_path(weight, stats, patterns, options.damp, name)]
            else:
                form = quadratic(weight, stats, stats.fisher, options.damp, name)
                solve = SOLVERS[str(recipe.solver)]
                solved = [solve(weight, stats, Target(pattern), options, name).weight for pattern in patterns]
                losses = [form.loss(result * form.scale) for result in solved]
            per_token = [loss / 2 / stats.num_tokens for loss in losses]
            rising = [max(per_token[: i + 1]) for i in range(len(per_token))]
            curves[name] = Curve(tuple(pattern.sparsity for pattern in patterns), tuple(rising))
            step(name)
    return curves


def write_curves(file: Path, curves: dict[str, Curve]) -> None:
    write_json(file, {name: {"sparsities": c.sparsities, "losses": c.losses} for name, c in curves.items()})


def read_curves(file: Path) -> dict[str, Curve]:
    try:
        return {
            name: Curve(tuple(map(float, row["sparsities"])), tuple(map(float, row["losses"])))
            for name, row in json.loads(file.read_text()).items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} cannot be read as a measurement ({error!r}); delete it to measure again.") from error
