"""What a matrix should compute where its inputs are no longer those of the dense model.

With Z the inputs in the dense model and X the actual ones, the best dense weights for X are those with the least
|| W Z - W^ X ||^2, W* = W + W (Z - X) X^T (X X^T)^-1. Solvers then compress W*, and so make good what earlier matrices
lost (quantization error propagation, Arai and Ichikawa, arXiv:2504.09629, whose share in [0, 1] of the way is `share`).
"""

from torch import Tensor

from mspc.numerics.linalg import inverse_factor, precise_matmul
from mspc.types import GramStats


def propagated(weight: Tensor, stats: GramStats, share: float, damp: float, name: str) -> tuple[Tensor, float]:
    """W + share (W* - W) for a weight (O, I), and the damp it took; W itself where the drift is not known.

    Raises what `inverse_factor` raises.
    """
    if stats.drift is None or share == 0:
        return weight, damp
    inverse = inverse_factor(stats, damp, name)
    with precise_matmul():
        return weight + share * (weight @ stats.drift @ inverse.factor.T @ inverse.factor), inverse.damp
