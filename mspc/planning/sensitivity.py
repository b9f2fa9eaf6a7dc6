"""Measures of how strongly the loss depends on each matrix, per weight. Published allocators rank matrices by them.

    hutchinson  mean diagonal of the Hessian of the cross entropy, z^T H z / n with random signs z (arXiv:2310.09499,
                eq. 5 and 6). Signs have less variance than the paper's Gaussian z, and the same mean.
    fisher      mean squared gradient of the loss of a sequence
    gram        mean diagonal of the layer's own Gram X X^T; needs no gradient
    outliers    share of outliers in the block (`outlier_share`); the allocator owl uses it
    exponents   power-law exponent of the spectrum (`tail_exponent`); the allocator alpha uses it. A smaller value means
                a more sensitive matrix; for all others, a larger one does.

Each value is a mean over samples that arrive one by one (`RunningMean`).
"""

import math
from collections.abc import Iterable
from statistics import median

from torch import Tensor

from mspc.errors import InputError
from mspc.model.matrices import skip_option
from mspc.model.streamed import StreamedModel
from mspc.passes.blocks import own_batches
from mspc.passes.gradients import SquaredGradient, reverse_walk
from mspc.passes.walk import matrix_of, walk
from mspc.progress import Progress
from mspc.published.heavy_tail import spectrum, tail_exponent
from mspc.published.hutchinson import HessianTrace
from mspc.published.outliers import outlier_share
from mspc.settings import Settings
from mspc.types import MatricesByBlock, Matrix, flatten

SEQUENCES_PER_ROUND = 8
"""Number of sequences between two checks for convergence."""
TOLERANCE = 0.1
"""Measuring stops at this relative standard error of the median matrix."""


class RunningMean:
    """Mean and standard error of values that arrive one by one."""

    def __init__(self, *values: float) -> None:
        self.count, self.mean, self._squares = 0, 0.0, 0.0
        for value in values:
            self.add(value)

    def add(self, value: float) -> None:
        self.count += 1
        difference = value - self.mean
        self.mean += difference / self.count
        self._squares += difference * (value - self.mean)

    @property
    def standard_error(self) -> float:
        """Standard error of the mean; infinite for fewer than two values."""
        if self.count < 2:
            return math.inf
        return math.sqrt(self._squares / (self.count - 1) / self.count)


def converged(means: Iterable[RunningMean], tolerance: float) -> bool:
    """True if the standard error of the median matrix is at most `tolerance` times its mean.

    Allocators only rank the matrices. Their sensitivities differ by orders of magnitude, so more samples change little.
    """
    return median(m.standard_error / max(abs(m.mean), 1e-300) for m in means) <= tolerance


def by_gram(
    model: StreamedModel, ids: Tensor, matrices: MatricesByBlock, progress: Progress, all_tokens: bool
) -> dict[str, RunningMean]:
    means: dict[str, RunningMean] = {}
    with progress.stage("Sensitivity (gram)", sum(map(len, matrices))) as step:
        for visit in walk(model, own_batches(model, ids), matrices, all_tokens=all_tokens):
            mean = float(visit.stats.gram.diagonal().mean()) / max(visit.stats.num_tokens, 1)
            means[visit.matrix.name] = RunningMean(mean)
            step(visit.matrix.name)
    return means


def by_outliers(
    model: StreamedModel, ids: Tensor, matrices: MatricesByBlock, progress: Progress, all_tokens: bool
) -> dict[str, RunningMean]:
    """Give every matrix the share of outliers in its block."""
    means: dict[str, RunningMean] = {}
    block: list[tuple[Matrix, Tensor, Tensor]] = []
    with progress.stage("Sensitivity (outliers)", sum(map(len, matrices))) as step:
        for visit in walk(model, own_batches(model, ids), matrices, all_tokens=all_tokens):
            block.append((visit.matrix, visit.weight, visit.stats.gram.diagonal().clone()))
            if visit.is_last_of_block:
                seen, weights, diagonals = zip(*block, strict=True)
                share = outlier_share(weights, diagonals)
                means |= {matrix.name: RunningMean(share) for matrix in seen}
                block.clear()
            step(visit.matrix.name)
    return means


def by_exponents(model: StreamedModel, matrices: MatricesByBlock, progress: Progress) -> dict[str, RunningMean]:
    """Raises InputError for a matrix whose spectrum has no exponent."""
    means: dict[str, RunningMean] = {}
    with progress.stage("Sensitivity (exponents)", sum(map(len, matrices))) as step:
        for index, in_block in enumerate(matrices):
            with model.loaded(index) as block:
                for matrix in in_block:
                    exponent = tail_exponent(spectrum(matrix_of(model, block, index, matrix)))
                    if not math.isfinite(exponent):
                        raise InputError(
                            f"{matrix.name}: its eigenvalues have no power law, which the allocator alpha needs. "
                            f"Leave it dense with {skip_option([matrix.name])}, or choose another allocator."
                        )
                    means[matrix.name] = RunningMean(exponent)
                    step(matrix.name)
    return means


def by_gradients(
    model: StreamedModel, ids: Tensor, matrices: MatricesByBlock, settings: Settings, progress: Progress
) -> dict[str, RunningMean]:
    """Sample by reverse walks over a few sequences each, until the means have converged or the text is used up."""
    means = {matrix.name: RunningMean() for matrix in flatten(matrices)}
    probes = settings.sensitivity_probes if settings.sensitivity == "hutchinson" else 1
    with progress.stage(f"Sensitivity ({settings.sensitivity})", probes * len(ids) * len(means)) as step:
        for probe in range(probes):
            for first in range(0, len(ids), SEQUENCES_PER_ROUND):
                part = ids[first : first + SEQUENCES_PER_ROUND]
                kind = HessianTrace(settings.seed) if settings.sensitivity == "hutchinson" else SquaredGradient()
                for sample in reverse_walk(model, part, matrices, kind, probe * len(ids) + first):
                    means[sample.matrix.name].add(float(sample.value))
                    step(sample.matrix.name)
                if converged(means.values(), TOLERANCE):
                    return means
    return means
