"""Validating plans before one is chosen: the divergence of each from the dense model, on text used for nothing else.

All plans are validated in one walk through the dense model. Each matrix gets approximate weights from a few iterations
of the solver; fewer iterations would make pruning look worse compared with quantization. The weights are quantized if
the plans differ in bits. The validation text passes each block once for every plan.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from mspc import threads
from mspc.model.streamed import StreamedModel
from mspc.numerics.linalg import precise_matmul
from mspc.passes.blocks import Batch, advance, batches_of
from mspc.passes.perplexity import mean_divergences
from mspc.passes.walk import DenseWalk, Visit, by_few, install, matrix_of
from mspc.progress import Progress
from mspc.solvers import SolverOptions
from mspc.solvers.admm import error_path
from mspc.solvers.obs import sweep_all
from mspc.solvers.quadratic import quadratic, solver_bytes
from mspc.types import Matrix, PlannedMatrix, Target, Unstructured


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

    def approximate(visit: Visit) -> dict[str, Tensor]:
        wanted = {name: by_name[visit.matrix.name] for name, by_name in targets.items()}
        if not quantizes:
            wanted = {name: Target(target.pattern) for name, target in wanted.items()}
        return dict(zip(wanted, approximate_weights(visit, fisher, list(wanted.values()), options), strict=True))

    with progress.stage("Validating plans", sum(map(len, visits.matrices))) as step, precise_matmul():
        # When a group ends, the walk has left this block, so the block can be loaded again.
        for index, in_block in groupby(by_few(visits), key=lambda few: few[0].block):
            for few in in_block:
                memory = max(solver_bytes(visit.matrix.shape) for visit in few)
                for visit, found in zip(few, threads.run(approximate, few, memory), strict=True):
                    for name, weight in found.items():
                        weights[name][visit.matrix] = weight
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


def approximate_weights(
    visit: Visit, fisher: Mapping[str, Tensor], targets: Sequence[Target], options: SolverOptions
) -> list[Tensor]:
    """Weights (O, I) with about the loss that the solver would reach, for each target."""
    weight, name = visit.weight.float(), visit.matrix.name
    form = quadratic(weight, visit.stats, fisher[name].to(weight.device), options.damp, name)
    kept = {target.pattern: torch.empty(0) for target in targets}
    for pattern in kept:
        kept[pattern], _ = next(error_path(form, [pattern]))
    found = {target: kept[target.pattern] for target in targets}
    for grid in dict.fromkeys(target.grid for target in targets if target.grid is not None):
        of_grid = [target for target in found if target.grid == grid]
        swept = sweep_all(
            [found[target] for target in of_grid], visit.stats, Target(Unstructured(0.0), grid), options, name
        )
        found |= zip(of_grid, swept, strict=True)
    return [found[target] for target in targets]


def _pass(model: StreamedModel, index: int, batches: Sequence[Batch], weights: Mapping[Matrix, Tensor]) -> None:
    """Pass batches through a block whose matrices have these weights; the others are dense."""
    with model.loaded(index) as block:
        for matrix, weight in weights.items():
            install(matrix_of(model, block, index, matrix), weight)
        advance(model, index, block, batches)
