"""A support (which weights are kept) by ADMM, then the weights on it by conjugate gradients.

This is the method of ALPS (Meng et al., arXiv:2406.07831) on the quadratic form of `quadratic`. With B0 the target, V
the multiplier and Z the sparse copy of B, one iteration is

    S B G + rho B = S B0 G - V + rho Z, solved for B;   Z = the largest of B + V / rho;   V = V + rho (B - Z)

and rho grows until the support does not change. With an output factor, B takes only a step towards that solution
(`inner`), by one Cholesky factor of the Gram. `admm` is ALPS, which minimizes the squared error of the layer. `kfac`
minimizes the loss of the model, where errors at outputs of little influence cost little; `fisher` does so with the
diagonal of S, and takes no longer than `admm`. If the target has a grid, the OBS sweep quantizes the weights on the
support found here.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mspc.errors import InputError
from mspc.numerics.linalg import precise_matmul
from mspc.numerics.masking import check_divides, kth_lowest, num_pruned, select
from mspc.solvers.inner import Inner, inner
from mspc.solvers.options import SolverOptions
from mspc.solvers.quadratic import Quadratic, quadratic, refine
from mspc.solvers.rounding import Rounding, Rounds, by_itself
from mspc.solvers.two_sided import two_sided
from mspc.types import NM, CompressedLinear, GramStats, Pattern, Target

FIRST_RHO = 0.1
ROUND = 2
"""Iterations with the same rho."""
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""Pairs (share, factor): rho grows by the first factor whose share of the support is below the share that changed."""
CG_STEPS = 5
PATH_RHO, PATH_GROWTH, PATH_ITERATIONS, PATH_CG_STEPS = 0.3, 1.2, 4, 2


def admm_steps(
    weight: Tensor,
    stats: GramStats,
    target: Target,
    options: SolverOptions,
    name: str,
    mask: Tensor | None = None,
    output_fisher: Tensor | None = None,
) -> Rounds:
    """(O, I) -> pruned (and quantized) weights on a support that is searched for over the whole matrix.

    A given `mask` (O, I) is the support, and nothing is searched for.
    The objective is the squared error of the layer, or with `output_fisher` (K, B, B) the loss of the model. Raises
    InputError when the pattern or the group size does not divide I, and ActivationError or SingularGramError for a Gram
    that cannot be used.
    """
    check_divides(target.pattern, weight.shape[1], name)
    weight = weight.float()
    with precise_matmul():
        form = quadratic(weight, stats, output_fisher, options.damp, name)
        if mask is None:
            mask, values = _search(form, target.pattern, options.iterations)
        else:
            values = form.target * mask
        kept = torch.where(mask, form.weight(refine(form, mask, values, CG_STEPS)[0]), 0.0)
    kept[:, form.inputs.dead] = torch.where(mask, weight, 0.0)[:, form.inputs.dead]  # nothing depends on them
    if bool(mask.all()):
        kept = weight
    if target.grid is None:
        return CompressedLinear(kept, mask, target, None, options.damp)
    # `kept` is the best on the support, so the total loss is its own plus that of its distance to the codes.
    if form.outputs is not None:
        return (yield from two_sided(kept, mask, stats, target, options, name))
    return (yield Rounding(kept, mask, stats, target, options, name))


def kfac_steps(
    weight: Tensor, stats: GramStats, target: Target, options: SolverOptions, name: str, mask: Tensor | None = None
) -> Rounds:
    """`admm` with the loss of the model as its objective. To search or round, `stats` needs an output Fisher factor."""
    searches = target.pattern.sparsity > 0 and mask is None
    if stats.output_fisher is None and (searches or target.grid is not None):
        raise InputError(
            f"{name}: the kfac solver needs the Fisher factor of the outputs. Set GramStats.output_fisher, or use admm."
        )
    return admm_steps(weight, stats, target, options, name, mask, stats.output_fisher)


def fisher_steps(
    weight: Tensor, stats: GramStats, target: Target, options: SolverOptions, name: str, mask: Tensor | None = None
) -> Rounds:
    """`admm` with the error at each output times its mean squared gradient, if `stats` has an output Fisher factor.

    Rows then compete for the weights to keep. A row alone is solved as by `admm`, and so are N:M patterns and codes.
    """
    factor = stats.output_fisher
    diagonal = None if factor is None else factor.diagonal(dim1=-2, dim2=-1).reshape(-1, 1, 1)
    return admm_steps(weight, stats, target, options, name, mask, diagonal)


admm, fisher, kfac = map(by_itself, (admm_steps, fisher_steps, kfac_steps))


def error_path(form: Quadratic, patterns: Sequence[Pattern]) -> Iterator[tuple[Tensor, float]]:
    """Weights (O, I) and their loss for patterns of growing sparsity, a few iterations after the one before."""
    with precise_matmul():
        wanted, multiplier, sparse = form.apply(form.target), torch.zeros_like(form.target), form.target
        solve = inner(form, wanted)
        for pattern in patterns:
            if pattern.sparsity == 1:
                nothing = torch.zeros_like(form.target)
                yield nothing, form.loss(nothing)
                continue
            rho = PATH_RHO
            for _ in range(PATH_ITERATIONS):
                _, support, sparse = _iterate(solve, wanted, multiplier, sparse, rho, pattern)
                rho *= PATH_GROWTH
            values, loss = refine(form, support, sparse, PATH_CG_STEPS)
            yield form.weight(values), float(loss)


def _search(form: Quadratic, pattern: Pattern, iterations: int) -> tuple[Tensor, Tensor]:
    """Mask and scaled weights (O, I), after `iterations`, or after a round that did not change the support."""
    wanted, multiplier = form.apply(form.target), torch.zeros_like(form.target)
    solve, settled = inner(form, wanted), _largest(form.target, pattern)
    sparse, shifted, rho = form.target * settled, form.target, FIRST_RHO
    for iteration in range(1, iterations + 1):
        shifted, support, sparse = _iterate(solve, wanted, multiplier, sparse, rho, pattern)
        if iteration % ROUND == 0:
            changed = float((support != settled).float().mean())
            if changed == 0:
                break
            rho *= next(factor for share, factor in GROWTH if changed > share)
            settled = support
    score = shifted.square()
    score[:, form.inputs.dead] = -1.0
    mask = select(score, pattern, per_row=False)
    return mask, sparse * mask


def _iterate(
    solve: Inner, wanted: Tensor, multiplier: Tensor, sparse: Tensor, rho: float, pattern: Pattern
) -> tuple[Tensor, Tensor, Tensor]:
    """One iteration: B + V / rho, its support, and Z; `multiplier` changes in place."""
    dense = solve((wanted - multiplier).add_(rho * sparse), rho)
    shifted = (multiplier / rho).add_(dense)
    support = _largest(shifted, pattern)
    sparse = shifted * support
    multiplier += dense.sub_(sparse).mul_(rho)
    return shifted, support, sparse


def _largest(values: Tensor, pattern: Pattern) -> Tensor:
    """The positions of the largest magnitudes, bool (O, I). Ties may break the exact count, unlike in `select`."""
    magnitudes = values.abs()
    if isinstance(pattern, NM):
        groups = magnitudes.view(-1, pattern.of)
        kept = groups.topk(pattern.keep, dim=-1, sorted=False).indices
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, kept, True).view_as(values)
    count = num_pruned(values.numel(), pattern.sparsity)
    if count == 0:
        return torch.ones_like(values, dtype=torch.bool)
    return magnitudes > kth_lowest(magnitudes, count)
