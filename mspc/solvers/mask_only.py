"""Zero the weights of lowest score and update none. With a grid, kept weights go to their nearest code."""

import torch
from torch import Tensor

from mspc.numerics.linalg import check_finite, inverse_factor, regularized
from mspc.numerics.masking import check_divides, select
from mspc.numerics.quant import dequantize, round_to_nearest
from mspc.solvers.options import SolverOptions
from mspc.types import CompressedLinear, GramStats, Target


def mask_only(
    weight: Tensor, stats: GramStats, target: Target, options: SolverOptions, name: str, mask: Tensor | None = None
) -> CompressedLinear:
    """(O, I) -> the same weights with the lowest-scored ones zero, or those that a given `mask` removes.

    Raises InputError when the pattern or the group size does not divide I, and every error of `inverse_factor`.
    """
    check_divides(target.pattern, weight.shape[1], name)
    weight, criterion = weight.float(), options.criterion
    damp, precision = 0.0, torch.float32
    if criterion.needs_inverse:
        factor = inverse_factor(stats, options.damp, name)
        diagonal, inverse_diagonal, dead = factor.diagonal, factor.inverse_diagonal, factor.dead
        damp, precision = factor.damp, factor.precision
    else:
        check_finite(stats, name)
        regular, dead = regularized(stats.gram, 0.0)
        diagonal = regular.diagonal()
        inverse_diagonal = 1 / diagonal
    if mask is None:
        score = criterion.score(weight, diagonal, inverse_diagonal)
        score[:, dead] = -1.0
        mask = select(score, target.pattern, per_row=criterion.per_row)
    codes = None
    kept = torch.where(mask, weight, 0.0)
    if target.grid is not None:
        codes = round_to_nearest(kept, mask, diagonal, target.grid, name)
        kept = dequantize(codes)
    return CompressedLinear(kept, mask, target, codes, damp, precision)
