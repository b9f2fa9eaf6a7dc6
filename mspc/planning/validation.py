"""Validating plans before one is chosen: the divergence of each from the dense model, on text used for nothing else.

All plans are validated in one walk through the dense model. Each matrix gets approximate weights from a few iterations
of the solver, and none is quantized, as the plans differ in sparsity alone. The validation text passes each block once
for every plan.
"""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from mspc import ranks, threads
from mspc.model.streamed import StreamedModel
from mspc.numerics.linalg import precise_matmul
from mspc.passes.blocks import Batch, advance, own_batches
from mspc.passes.own_work import own_work
from mspc.passes.perplexity import mean_divergences
from mspc.passes.together import Visit
from mspc.passes.walk import DenseWalk, install, matrix_of
from mspc.progress import Progress
from mspc.solvers.admm import error_path
from mspc.solvers.quadratic import quadratic, solver_bytes
from mspc.types import Matrix, Pattern, PlannedMatrix


def validate_plans(
    visits: DenseWalk,
    validation: Tensor,
    fisher: Mapping[str, Tensor],
    plans: Mapping[str, Sequence[PlannedMatrix]],
    damp: float,
    progress: Progress,
) -> dict[str, float]:
    """KL divergence from the dense model on `validation` (N, T), in nats per token, by name of the plan.

    `visits` has the Grams, and `fisher` the Fisher factors by matrix name.
    """
    model = visits.model
    patterns = {name: {matrix.name: matrix.target.pattern for matrix in plan} for name, plan in plans.items()}
    dense = own_batches(model, validation)
    streams = {name: own_batches(model, validation) for name in plans}
    weights: dict[str, dict[str, Tensor]] = {name: {} for name in plans}
    passed = 0

    def approximate(visit: Visit) -> dict[str, Tensor]:
        wanted = {name: by_name[visit.matrix.name] for name, by_name in patterns.items()}
        weight_of = approximate_weights(visit, fisher, set(wanted.values()), damp)
        return {name: weight_of[pattern] for name, pattern in wanted.items()}

    def pass_to(end: int) -> None:
        """Pass the text through the blocks before `end`; the walk has left them, so they can be loaded again."""
        nonlocal passed
        for block in range(passed, end):
            _pass(model, block, dense, {})
            of_block = visits.matrices[block]
            for name, batches in streams.items():
                _pass(model, block, batches, _of_all(weights[name], of_block))
        passed = end

    complete = 0
    with progress.stage("Validating plans", sum(map(len, visits.matrices))) as step, precise_matmul():
        for few, blocks in own_work(visits):
            pass_to(complete)
            memory = max((solver_bytes(visit.matrix.shape) for visit in few), default=0)
            for visit, found in zip(few, threads.run(approximate, few, memory), strict=True):
                for name, weight in found.items():
                    weights[name][visit.matrix.name] = weight
                step(visit.matrix.name)
            complete = blocks[-1] + 1 if blocks else complete
        pass_to(complete)
    pass_to(len(model.blocks))
    return dict(zip(streams, mean_divergences(model, dense, model, list(streams.values())), strict=True))


def approximate_weights(
    visit: Visit, fisher: Mapping[str, Tensor], patterns: Iterable[Pattern], damp: float
) -> dict[Pattern, Tensor]:
    """Weights (O, I) with about the loss that the solver would reach, for each pattern."""
    weight, name = visit.weight.float(), visit.matrix.name
    form = quadratic(weight, visit.stats, fisher[name].to(weight.device), damp, name)
    return {pattern: next(error_path(form, [pattern]))[0] for pattern in patterns}


def _of_all(weights: dict[str, Tensor], matrices: Sequence[Matrix]) -> dict[Matrix, Tensor]:
    """The weights of some matrices, whichever rank made them. They are taken out of `weights`."""
    own = {matrix.name: weights.pop(matrix.name) for matrix in matrices if matrix.name in weights}
    found: dict[str, Tensor] = {}
    for source in range(ranks.size()):
        found |= ranks.from_rank(source, None, own)[1]
    return {matrix: found[matrix.name] for matrix in matrices if matrix.name in found}


def _pass(model: StreamedModel, index: int, batches: Sequence[Batch], weights: Mapping[Matrix, Tensor]) -> None:
    """Pass batches through a block whose matrices have these weights; the others are dense."""
    with model.loaded(index) as block:
        for matrix, weight in weights.items():
            install(matrix_of(model, block, index, matrix), weight)
        advance(model, index, block, batches)
