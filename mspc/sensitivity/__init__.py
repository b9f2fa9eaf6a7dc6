"""How much the loss minds a change of one matrix, per weight. The rank is what allocators use.

    hutchinson  mean diagonal of the Hessian of the cross entropy, z^T H z / n with random signs z (arXiv:2310.09499,
                eq. 5 and 6; signs have less variance than the paper's Gaussian z and the same mean)
    fisher      mean squared gradient of a sequence's loss
    gram        mean diagonal of the layer's own Gram X X^T; needs no gradient

Each is a mean over samples that arrive one by one (`RunningMean`).
"""

from mspc.sensitivity.running_mean import RunningMean, converged

__all__ = ["SENSITIVITIES", "RunningMean", "converged"]

SENSITIVITIES = ("fisher", "gram", "hutchinson")
