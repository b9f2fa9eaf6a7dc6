"""How much the loss minds a change of one matrix, per weight. The rank is what allocators use.

    hutchinson  mean diagonal of the Hessian of the cross entropy, z^T H z / n with random signs z (arXiv:2310.09499,
                eq. 5 and 6; signs have less variance than the paper's Gaussian z and the same mean)
    fisher      mean squared gradient of a sequence's loss
    gram        mean diagonal of the layer's own Gram X X^T; needs no gradient

Each is a mean over samples that arrive one by one (`RunningMean`). Allocators that say themselves what is measured for
them have `outliers` (`outlier_share` of the block) or `exponents` (`tail_exponent`; here less is more sensitive).
"""

from mspc.sensitivity.heavy_tail import spectrum, tail_exponent
from mspc.sensitivity.outliers import OUTLIER, outlier_share
from mspc.sensitivity.running_mean import RunningMean, converged

__all__ = ["OUTLIER", "SENSITIVITIES", "RunningMean", "converged", "outlier_share", "spectrum", "tail_exponent"]

SENSITIVITIES = ("fisher", "gram", "hutchinson")
