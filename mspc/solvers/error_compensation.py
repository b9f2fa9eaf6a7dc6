"""Compensation for the errors of earlier matrices, whose outputs are no longer those of the dense model.

With Z the inputs in the dense model and X the actual ones, the best dense weights for X are those with the least
|| W Z - W^ X ||^2: W* = W + W (Z - X) X^T (X X^T)^-1. Solvers then compress W*. The method is quantization error
propagation (Arai and Ichikawa, arXiv:2504.09629), whose share in [0, 1] of the way to W* is `share`.
"""

from torch import Tensor

from mspc.numerics.linalg import inverse_factor, precise_matmul
from mspc.threads import matmul
from mspc.types import GramStats


def compensated(weight: Tensor, stats: GramStats, share: float, damp: float, name: str) -> tuple[Tensor, float]:
    """W + share (W* - W) for a weight (O, I), and the damp of the inverse. W itself if the input shift is not known.

    Raises every error of `inverse_factor`.
    """
    if stats.input_shift is None or share == 0:
        return weight, damp
    inverse = inverse_factor(stats, damp, name)
    with precise_matmul():
        change = matmul(matmul(matmul(weight, stats.input_shift), inverse.factor.T), inverse.factor)
        return weight + share * change, inverse.damp
