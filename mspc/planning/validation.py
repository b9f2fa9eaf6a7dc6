"""Trying plans before one is chosen: what each costs the model on text that nothing was measured on.

All plans are tried in one walk through the dense model. Every matrix gets a quick stand-in for the solver, a few of its
iterations (fewer would flatter rounding against pruning), and is rounded if the plans differ in that. The held-out text
goes through each block once for every plan.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from torch import Tensor

from mspc.model.streamed import StreamedModel
from mspc.passes.blocks import Batch, advance, batches_of
from mspc.passes.perplexity import mean_divergences
from mspc.passes.walk import DenseWalk, Visit, install, matrix_of
from mspc.progress import Progress
from mspc.solvers import SolverOptions
from mspc.solvers.admm import error_path
from mspc.solvers.obs import obs
from mspc.solvers.quadratic import Quadratic, quadratic
from mspc.types import Matrix, PlannedMatrix, Target


def try_plans(
    visits: DenseWalk,
    held_out: Tensor,
    fisher: Mapping[str, Tensor],
    plans: Mapping[str, Sequence[PlannedMatrix]],
    options: SolverOptions,
    progress: Progress,
) -> dict[str, float]:
    """KL divergence from the dense model on `held_out` (N, T), nats a token, by name of the plan.

    `visits` give the Grams, `fisher` the Fisher factors by matrix name.
    """
    model = visits.model
    targets = {name: {matrix.name: matrix.target for matrix in plan} for name, plan in plans.items()}
    round_too = len({target.grid for of_plan in targets.values() for target in of_plan.values()}) > 1
    dense = batches_of(model, held_out)
    streams = {name: batches_of(model, held_out) for name in plans}
    weights: dict[str, dict[Matrix, Tensor]] = {name: {} for name in plans}
    passed = 0
    with progress.stage("Trying plans", sum(map(len, visits.matrices))) as step:
        # The walk is at the next block when a group ends, so this one can be loaded again.
        for index, of_block in groupby(visits, key=lambda visit: visit.block):
            for visit in of_block:
                form = _form(visit, fisher, options)
                for name, of_plan in targets.items():
                    target = of_plan[visit.matrix.name]
                    if not round_too:
                        target = Target(target.pattern)
                    weights[name][visit.matrix] = _stand_in(visit, form, target, options)
                step(visit.matrix.name)
            for block in range(passed, index + 1):
                _pass(model, block, dense, {})
                for name, batches in streams.items():
                    _pass(model, block, batches, weights[name] if block == index else {})
            weights = {name: {} for name in plans}
            passed = index + 1
    for block in range(passed, len(model.blocks)):
        for batches in (dense, *streams.values()):
            _pass(model, block, batches, {})
    return dict(zip(streams, mean_divergences(model, dense, model, list(streams.values())), strict=True))


def _form(visit: Visit, fisher: Mapping[str, Tensor], options: SolverOptions) -> Quadratic:
    weight, name = visit.weight.float(), visit.matrix.name
    return quadratic(weight, visit.stats, fisher[name].to(weight.device), options.damp, name)


def _stand_in(visit: Visit, form: Quadratic, target: Target, options: SolverOptions) -> Tensor:
    """Weights (O, I) of about the loss that the solver would reach."""
    kept, _ = next(error_path(form, [target.pattern]))
    if target.grid is None:
        return kept
    return obs(kept, replace(visit.stats, output_fisher=None), target, options, visit.matrix.name, kept != 0).weight


def _pass(model: StreamedModel, index: int, batches: Sequence[Batch], weights: Mapping[Matrix, Tensor]) -> None:
    """Move batches through a block that has these weights, and its own for the rest."""
    with model.loaded(index) as block:
        for matrix, weight in weights.items():
            install(matrix_of(model, block, index, matrix), weight)
        advance(model, index, block, batches)
