"""How much the loss minds a change of one matrix, per weight. The rank is what allocators use.

    hutchinson  mean diagonal of the Hessian of the cross entropy, z^T H z / n with random signs z (arXiv:2310.09499,
                eq. 5 and 6; signs have less variance than the paper's Gaussian z and the same mean)
    fisher      mean squared gradient of a sequence's loss
    gram        mean diagonal of the layer's own Gram X X^T; needs no gradient

Each is a mean over samples that arrive one by one (`RunningMean`). Allocators that say themselves what is measured for
them have `outliers` (`outlier_share` of the block) or `exponents` (`tail_exponent`; here less is more sensitive).
"""

import math
from collections.abc import Iterable
from statistics import median

from torch import Tensor

from mspc.errors import InputError
from mspc.model.streamed import StreamedModel
from mspc.passes.blocks import batches_of
from mspc.passes.gradients import SquaredGradient, reverse_walk
from mspc.passes.walk import matrix_of, walk
from mspc.progress import Progress
from mspc.published.heavy_tail import spectrum, tail_exponent
from mspc.published.hutchinson import HessianTrace
from mspc.published.outliers import outlier_share
from mspc.settings import Settings
from mspc.types import MatricesByBlock, Matrix

SENSITIVITIES = ("fisher", "gram", "hutchinson")

SEQUENCES_PER_ROUND = 8


TOLERANCE = 0.1


class RunningMean:
    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, 0.0, 0.0

    def add(self, value: float) -> None:
        self.count += 1
        difference = value - self.mean
        self.mean += difference / self.count
        self._squares += difference * (value - self.mean)

    @property
    def standard_error(self) -> float:
        """Of the mean; infinite until there are two values."""
        if self.count < 2:
            return math.inf
        return math.sqrt(self._squares / (self.count - 1) / self.count)


def converged(means: Iterable[RunningMean], tolerance: float) -> bool:
    """Whether the standard error of the median matrix is below `tolerance` of its mean.

    The allocators rank matrices whose sensitivities differ by orders of magnitude, so more would buy nothing.
    """
    return median(m.standard_error / max(abs(m.mean), 1e-300) for m in means) <= tolerance


def by_gram(model: StreamedModel, ids: Tensor, matrices: MatricesByBlock, progress: Progress) -> dict[str, RunningMean]:
    means: dict[str, RunningMean] = {}
    with progress.stage("Sensitivity (gram)", sum(map(len, matrices))) as step:
        for visit in walk(model, batches_of(model, ids), matrices):
            means[visit.matrix.name] = _single(float(visit.stats.gram.diagonal().mean()) / visit.stats.num_tokens)
            step(visit.matrix.name)
    return means


def by_outliers(
    model: StreamedModel, ids: Tensor, matrices: MatricesByBlock, progress: Progress
) -> dict[str, RunningMean]:
    """Every matrix gets the share of its block."""
    means: dict[str, RunningMean] = {}
    of_block: list[tuple[Matrix, Tensor, Tensor]] = []
    with progress.stage("Sensitivity (outliers)", sum(map(len, matrices))) as step:
        for visit in walk(model, batches_of(model, ids), matrices):
            of_block.append((visit.matrix, visit.weight, visit.stats.gram.diagonal().clone()))
            if visit.is_last_of_block:
                seen, weights, diagonals = zip(*of_block, strict=True)
                share = outlier_share(weights, diagonals)
                means |= {matrix.name: _single(share) for matrix in seen}
                of_block.clear()
            step(visit.matrix.name)
    return means


def by_exponents(model: StreamedModel, matrices: MatricesByBlock, progress: Progress) -> dict[str, RunningMean]:
    """Raises InputError for a matrix whose spectrum has no exponent."""
    means: dict[str, RunningMean] = {}
    with progress.stage("Sensitivity (exponents)", sum(map(len, matrices))) as step:
        for index, of_block in enumerate(matrices):
            with model.loaded(index) as block:
                for matrix in of_block:
                    exponent = tail_exponent(spectrum(matrix_of(model, block, index, matrix)))
                    if not math.isfinite(exponent):
                        raise InputError(
                            f"{matrix.name}: its eigenvalues have no power law, which the allocator alpha needs; leave "
                            "it dense with --skip REGEX or choose another allocator."
                        )
                    means[matrix.name] = _single(exponent)
                    step(matrix.name)
    return means


def _single(value: float) -> RunningMean:
    mean = RunningMean()
    mean.add(value)
    return mean


def by_gradients(
    model: StreamedModel, ids: Tensor, matrices: MatricesByBlock, settings: Settings, progress: Progress
) -> dict[str, RunningMean]:
    """Samples by the reverse walk, some sequences a round, until their mean has converged or the text is used up."""
    means = {matrix.name: RunningMean() for of_block in matrices for matrix in of_block}
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
