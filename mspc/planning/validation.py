"""Validating plans before one is chosen: the divergence of each from the dense model, on text used for nothing else.

All plans are validated in one walk through the dense model. Each matrix gets approximate weights from a few iterations
of the solver; fewer iterations would make pruning look worse compared with quantization. The weights are quantized if
the plans differ in bits. The validation text passes each block once for every plan.
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


def validate_plans(
    visits: DenseWalk,
    validation: Tensor,
    fisher: Mapping[str, Tensor],
    plans: Mapping[str, Sequence[PlannedMatrix]],
    options: SolverOptions,
    progress: Progress,
) -> dict[str, float]:
    """KL divergence from the dense model on `validation` (N, T), in nats per token, by name of the plan.

    `visits` has the Grams, and `fisher` the Fisher factors by matrix name.
    """
    model = visits.model
    targets = {name: {matrix.name: matrix.target for matrix in plan} for name, plan in plans.items()}
    quantizes = len({target.bits for by_name in targets.values() for target in by_name.values()}) > 1
    dense = batches_of(model, validation)
    streams = {name: batches_of(model, validation) for name in plans}
    weights: dict[str, dict[Matrix, Tensor]] = {name: {} for name in plans}
    passed = 0
    with progress.stage("Validating plans", sum(map(len, visits.matrices))) as step:
        # When a group ends, the walk has left this block, so the block can be loaded again.
        for index, in_block in groupby(visits, key=lambda visit: visit.block):
            for visit in in_block:
                form = _form(visit, fisher, options)
                for name, by_name in targets.items():
                    target = by_name[visit.matrix.name]
                    if not quantizes:
                        target = Target(target.pattern)
                    weights[name][visit.matrix] = approximate_weights(visit, form, target, options)
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


def approximate_weights(visit: Visit, form: Quadratic, target: Target, options: SolverOptions) -> Tensor:
    """Weights (O, I) with about the loss that the solver would reach."""
    kept, _ = next(error_path(form, [target.pattern]))
    if target.grid is None:
        return kept
    return obs(kept, replace(visit.stats, output_fisher=None), target, options, visit.matrix.name, kept != 0).weight


def _pass(model: StreamedModel, index: int, batches: Sequence[Batch], weights: Mapping[Matrix, Tensor]) -> None:
    """Pass batches through a block whose matrices have these weights; the others are dense."""
    with model.loaded(index) as block:
        for matrix, weight in weights.items():
            install(matrix_of(model, block, index, matrix), weight)
        advance(model, index, block, batches)
