"""Measuring loss curves: a short run of the solver at a few sparsities of each matrix of the dense model."""

from dataclasses import asdict, replace
from itertools import accumulate, chain

import torch
from torch import Tensor

from mspc import ranks, threads
from mspc.numerics.linalg import precise_matmul
from mspc.passes.own_work import own_work
from mspc.passes.together import Visit
from mspc.passes.walk import DenseWalk
from mspc.planning.curve import Curve, curve_from
from mspc.planning.curve_estimate import estimated_curve
from mspc.progress import Progress
from mspc.settings import BY_ADMM, ESTIMATE, MIXED_OF, MIXED_PATTERN, Settings
from mspc.solvers import SOLVERS, SolverOptions
from mspc.solvers.admm import error_path
from mspc.solvers.obs import sweep_all
from mspc.solvers.quadratic import Quadratic, quadratic, solver_bytes
from mspc.solvers.two_sided import influence
from mspc.types import NM, GramStats, Pattern, Target, Unstructured

SPARSITIES = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0)
KEEPS = (14, 12, 10, 8, 6, 4, 2, 1)
QUANTIZED = (0, 1, 2, 4)
"""Points where the loss of quantization is measured under a size budget: 0 is the dense matrix, n the n-th pattern."""
SWEPT_BITS = (4, 3, 2)
SAMPLED = 2
"""Number of blocks of the Fisher factor that a curve is measured on, if there are more."""


def patterns_of(settings: Settings) -> list[Pattern]:
    if settings.fixed_pattern is not None:
        return [settings.fixed_pattern]
    if settings.pattern == MIXED_PATTERN:
        return [NM(keep, MIXED_OF) for keep in KEEPS]
    return [Unstructured(sparsity) for sparsity in SPARSITIES]


def measure_curves(
    dense: DenseWalk,
    fisher: dict[str, Tensor],
    settings: Settings,
    options: SolverOptions,
    progress: Progress,
) -> dict[str, Curve]:
    """The curve of each matrix by name: 1/2 tr(S dW H dW^T) per token, with dW from a short run of the solver."""
    curves = {}

    def measure(visit: Visit) -> Curve:
        name, weight = visit.matrix.name, visit.weight.float()
        stats = replace(visit.stats, output_fisher=fisher[name].to(weight.device))
        if settings.allocator == ESTIMATE:
            return estimated_curve(weight, stats, patterns_of(settings), settings.damp, name)
        return curve_of(weight, stats, settings, options, name)

    with progress.stage("Loss curves", sum(map(len, dense.matrices))) as step, precise_matmul():
        for few, _ in own_work(dense):
            memory = max((solver_bytes(visit.matrix.shape) for visit in few), default=0)
            for visit, curve in zip(few, threads.run(measure, few, memory), strict=True):
                curves[visit.matrix.name] = curve
                step(visit.matrix.name)
    if ranks.size() == 1:
        return curves
    own = {name: asdict(curve) for name, curve in curves.items()}
    return {name: curve_from(row) for rows in ranks.of_each(own) for name, row in rows.items()}


def curve_of(weight: Tensor, stats: GramStats, settings: Settings, options: SolverOptions, name: str) -> Curve:
    """The curve of one matrix (O, I). Under a size budget it has the loss of quantization too."""
    patterns = patterns_of(settings)
    form = quadratic(weight, stats, stats.output_fisher, options.damp, name)
    half_tokens = 1 / (2 * max(stats.num_tokens, 1))
    if stats.output_fisher is not None and not bool(stats.output_fisher.any()):
        half_tokens = 0.0  # nothing depends on its outputs, but the form would weigh them equally
    elif stats.output_fisher is not None and len(stats.output_fisher) > SAMPLED:
        sample, sample_stats = _sampled(weight, stats)
        sample_form = quadratic(sample, sample_stats, sample_stats.output_fisher, options.damp, name)
        if (removed := sample_form.loss(torch.zeros_like(sample))) > 0:
            half_tokens *= form.loss(torch.zeros_like(weight)) / removed
            weight, stats, form = sample, sample_stats, sample_form
    if settings.solver in BY_ADMM:
        path = error_path(form, patterns)
    else:
        solve = SOLVERS[str(settings.solver)]
        pruned = (solve(weight, stats, Target(pattern), options, name).weight for pattern in patterns)
        path = ((result, form.loss(result * form.scale)) for result in pruned)
    losses, kept = list[float](), dict[int, Tensor]()
    for i, (result, loss) in enumerate(chain([(weight, 0.0)], path)):
        losses.append(loss)
        if settings.has_budget and i in QUANTIZED:
            kept[i] = result
    quantized: dict[int, list[tuple[float, float]]] = {}
    for bits in SWEPT_BITS if settings.has_budget else ():
        target = Target(Unstructured(0.0), settings.grid_for(weight.shape[1], bits))
        swept = sweep_all(list(kept.values()), stats, target, options, name)
        if settings.solver == "kfac":
            pairs = zip(kept.values(), swept, strict=True)
            more = [rounding_loss(result - pruned, form, stats) for pruned, result in pairs]
        else:
            more = [form.loss(result * form.scale) - losses[i] for i, result in zip(kept, swept, strict=True)]
        sparsities = [patterns[i - 1].sparsity if i else 0.0 for i in kept]
        quantized[bits] = [(s, max(loss, 0.0) * half_tokens) for s, loss in zip(sparsities, more, strict=True)]
        if bits == 4:  # 16 times as many levels: 1/256 of the squared error
            quantized[8] = [(s, loss / 256) for s, loss in quantized[bits]]
    return Curve(
        tuple(pattern.sparsity for pattern in patterns),
        tuple(loss * half_tokens for loss in list(accumulate(losses, max))[1:]),  # a short run may not rise everywhere
        {bits: tuple(losses_at) for bits, losses_at in quantized.items()},
    )


def rounding_loss(error: Tensor, form: Quadratic, stats: GramStats) -> float:
    """The loss of an error (O, I) by one-sided rounding if rounding is two-sided: tr(D E H E^T), D as in `influence`.

    Two-sided sweeps for every number of bits would take longer than all else.
    """
    assert stats.output_fisher is not None
    scaled = torch.where(form.inputs.dead, 0.0, error * form.inputs.scale)
    of_rows = (threads.matmul(scaled, form.inputs.gram) * scaled).sum(1)
    return float((influence(stats.output_fisher) * of_rows).sum(dtype=torch.float64))


def _sampled(weight: Tensor, stats: GramStats) -> tuple[Tensor, GramStats]:
    """`SAMPLED` blocks of outputs at equal distances: their rows of the weight, and the statistics."""
    fisher = stats.output_fisher
    assert fisher is not None
    count = len(fisher)
    indices = [count * (2 * i + 1) // (2 * SAMPLED) for i in range(SAMPLED)]
    return weight.view(count, -1, weight.shape[1])[indices].flatten(0, 1), replace(stats, output_fisher=fisher[indices])
