"""Supports found by ADMM, then exact weights on them by conjugate gradients.

The method of ALPS (Meng et al., arXiv:2406.07831): minimize || (W - B) X ||^2 over B with so many nonzeros. Inputs are
first scaled so that the Gram has a unit diagonal, G = D^-1 H D^-1; the square of a weight is then what it is worth
alone. With the multiplier V and the sparse copy Z of B, one iteration is

    B = (G + rho 1)^-1 (G B0 - V + rho Z);   Z = the largest of B + V / rho;   V = V + rho (B - Z)

and rho grows until the support stays. One eigendecomposition of G serves every rho. Where kept weights are rounded, the
OBS sweep does that on the support found here. Tensors inside are transposed, (I, O), as in the sweep.
"""

import torch
from torch import Tensor

from mspc.errors import SingularGramError
from mspc.linalg import check_finite, precise_matmul, regularized
from mspc.masks import check_divides, num_pruned, prune_n_of_m, select
from mspc.solvers.obs import obs
from mspc.solvers.options import SolverOptions
from mspc.types import NM, CompressedLinear, GramStats, Pattern, Target

FIRST_RHO = 0.1
ROUND = 3
"""Iterations with one rho."""
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""rho's factor where more than this share of the support changed in a round."""
CG_STEPS = 10


def admm(weight: Tensor, stats: GramStats, target: Target, options: SolverOptions, name: str) -> CompressedLinear:
    """(O, I) -> pruned (and rounded) weights on a support that is searched for over the whole matrix.

    Raises InputError when the pattern or the group size does not divide I, ActivationError and SingularGramError for
    a Gram that cannot be used.
    """
    check_divides(target.pattern, weight.shape[1], name)
    check_finite(stats, name)
    weight = weight.float()
    gram, dead = regularized(stats.gram, options.damp)
    scale = gram.diagonal().sqrt()
    gram = gram / scale[:, None] / scale
    with precise_matmul():
        mask, solution = _search(gram, _scaled(weight, scale, dead), target.pattern, dead, options, name)
        solution = _refine(gram, _scaled(weight, scale, dead), mask, solution)
    kept = torch.where(mask, solution / scale[:, None], 0.0)
    kept[dead] = torch.where(mask, weight.T, 0.0)[dead]  # nothing depends on them
    if bool(mask.all()):
        kept = weight.T
    kept, mask = kept.T.contiguous(), mask.T.contiguous()
    if target.grid is None:
        return CompressedLinear(kept, mask, target, None, options.damp)
    # These are the best on the support, so the loss of rounding them adds to theirs, and the sweep sees to it alone.
    return obs(kept, stats, target, options, name, mask)


def _scaled(weight: Tensor, scale: Tensor, dead: Tensor) -> Tensor:
    """The target B0 (I, O); weights of dead inputs are worth nothing."""
    return torch.where(dead[:, None], 0.0, weight.T * scale[:, None])


def _search(
    gram: Tensor, target: Tensor, pattern: Pattern, dead: Tensor, options: SolverOptions, name: str
) -> tuple[Tensor, Tensor]:
    """Mask and weights (I, O) after `options.iterations`, or when a round did not change the support."""
    try:
        eigenvalues, vectors = torch.linalg.eigh(gram)
    except RuntimeError as error:  # LinAlgError is one, and torch does not export it
        raise SingularGramError(
            f"{name}: the Gram matrix of {len(gram)} inputs has no eigendecomposition ({error}); calibrate on more "
            "text (--num-sequences, --sequence-length) or raise --damp."
        ) from error
    wanted = gram @ target
    rho, multiplier = FIRST_RHO, torch.zeros_like(target)
    support = _largest(target, pattern)
    sparse, settled = target * support, support
    for iteration in range(1, options.iterations + 1):
        rotated = vectors.T @ (wanted - multiplier + rho * sparse)
        dense = vectors @ rotated.div_((eigenvalues + rho)[:, None])
        shifted = dense + multiplier / rho
        support = _largest(shifted, pattern)
        sparse = shifted * support
        multiplier += rho * (dense - sparse)
        if iteration % ROUND == 0:
            changed = float((support != settled).float().mean())
            if changed == 0:
                break
            rho *= next(factor for share, factor in GROWTH if changed > share)
            settled = support
    score = (dense + multiplier / rho).square().T if options.iterations else target.square().T
    score[:, dead] = -1.0
    mask = select(score, pattern, per_row=False).T.contiguous()
    return mask, sparse * mask


def _largest(values: Tensor, pattern: Pattern) -> Tensor:
    """Where the largest magnitudes lie, bool (I, O). Ties may make it a few more than the pattern says."""
    if isinstance(pattern, NM):
        return prune_n_of_m(values.abs().T.contiguous(), pattern).T
    count = num_pruned(values.numel(), pattern.sparsity)
    if count == 0:
        return torch.ones_like(values, dtype=torch.bool)
    magnitudes = values.abs()
    return magnitudes > magnitudes.flatten().kthvalue(count).values


def _refine(gram: Tensor, target: Tensor, mask: Tensor, solution: Tensor) -> Tensor:
    """Conjugate gradients for G B = G B0 on the support, all columns at once; the diagonal of G is 1 already."""
    residual = (gram @ (target - solution)) * mask
    direction = residual.clone()
    norm = residual.square().sum(0)
    for _ in range(CG_STEPS):
        image = (gram @ direction) * mask
        curvature = (direction * image).sum(0)
        step = torch.where(curvature > 0, norm / curvature.clamp_min(torch.finfo(norm.dtype).tiny), 0.0)
        solution = solution + step * direction
        residual = residual - step * image
        following = residual.square().sum(0)
        ratio = torch.where(norm > 0, following / norm.clamp_min(torch.finfo(norm.dtype).tiny), 0.0)
        direction = residual + ratio * direction
        norm = following
    return solution
