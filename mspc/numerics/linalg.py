"""The linear algebra that everything rests on: the inverse factor of a Gram matrix and the output error."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from mspc.errors import ActivationError, SingularGramError
from mspc.types import GramStats

GRAM_STRIP = 256
"""Columns of a Gram that are computed at once; the part above its diagonal is left out, up to a strip."""


@contextmanager
def precise_matmul() -> Iterator[None]:
    """Full float32 products inside (TF32 corrupts Gram matrices); the caller's setting is restored on exit."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def add_gram(gram: Tensor, inputs: Tensor) -> None:
    """Add x^T x of `inputs` (T, I) to the lower triangle of `gram` (I, I), and some of the upper: see `symmetrize`."""
    for start in range(0, len(gram), GRAM_STRIP):
        strip = slice(start, start + GRAM_STRIP)
        gram[strip, : strip.stop].addmm_(inputs[:, strip].T, inputs[:, : strip.stop])


def symmetrize(gram: Tensor) -> Tensor:
    """The whole symmetric matrix of its lower triangle."""
    lower = gram.tril()
    return lower + lower.tril(-1).T


@dataclass(frozen=True, slots=True)
class InverseFactor:
    """Upper triangular `factor` U (I, I) float32 with U^T U = (H + damp mean(diag H) 1)^-1.

    `diagonal` (I,) is that of the damped H; `dead` (I,) marks inputs that were always zero.
    """

    factor: Tensor
    diagonal: Tensor
    dead: Tensor
    damp: float
    precision: torch.dtype

    @property
    def inverse_diagonal(self) -> Tensor:
        """diag of the damped H^-1, (I,)."""
        return self.factor.square().sum(0)


def regularized(gram: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """A copy of `gram` that can be inverted, and the dead inputs: damp x the mean live diagonal is added to the
    diagonal, and an input that never was nonzero gets the mean, so it is independent of all others."""
    diagonal = gram.diagonal()
    dead = diagonal <= 0
    live = diagonal[~dead]
    mean = live.mean() if live.numel() else torch.ones((), dtype=gram.dtype, device=gram.device)
    damped = gram.clone()
    damped.diagonal().add_(damp * mean)
    damped.diagonal()[dead] = mean * (1 + damp)
    return damped, dead


def upper_inverse_factor(matrix: Tensor) -> Tensor | None:
    """Upper U with U^T U = matrix^-1, or None if the matrix is not numerically positive definite.

    With J the exchange matrix, the Cholesky factor L of J A J gives A = R R^T for the upper R = J L J, so U = R^-1: one
    factorization where inverting and factoring again takes three.
    """
    lower, info = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if int(info):
        return None
    upper = lower.flip(0, 1)
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    inverse = torch.linalg.solve_triangular(upper, identity, upper=True)
    return inverse if bool(inverse.isfinite().all()) else None


def check_finite(stats: GramStats, name: str) -> None:
    """Raises ActivationError, naming the matrix, for a Gram with NaN or infinity in it."""
    if not bool(stats.gram.isfinite().all()):
        raise ActivationError(
            f"{name}: its inputs contain NaN or infinity (Gram of {stats.num_tokens} tokens); the model overflows in "
            "this precision: try --dtype float32, and check that the model itself evaluates to a finite perplexity."
        )


def inverse_factor(stats: GramStats, damp: float, name: str) -> InverseFactor:
    """The inverse factor by a damping ladder: damp, 10 damp, then 10 damp in float64. The rung is in the result.

    Raises ActivationError for a Gram that is not finite and SingularGramError when the ladder ends.
    """
    gram = stats.gram
    check_finite(stats, name)
    for rung_damp, precision in ((damp, torch.float32), (10 * damp, torch.float32), (10 * damp, torch.float64)):
        damped, dead = regularized(gram.to(precision), rung_damp)
        factor = upper_inverse_factor(damped)
        if factor is not None:
            return InverseFactor(factor.float(), damped.diagonal().float(), dead, rung_damp, precision)
    raise SingularGramError(
        f"{name}: the Gram matrix of {len(gram)} inputs over {stats.num_tokens} tokens is not positive definite, even "
        f"with damp {10 * damp:g} in float64; calibrate on more text (--num-sequences, --sequence-length) or raise "
        "--damp."
    )


def output_error(weight: Tensor, compressed: Tensor, gram: Tensor) -> float:
    """|| (W - W^) X ||^2 / || W X ||^2 in float64, from the Gram X X^T. 0 is exact, 1 is as bad as a zero matrix."""
    gram = gram.double()
    difference = (weight - compressed).double()
    reference = weight.double()
    error = ((difference @ gram) * difference).sum()
    scale = ((reference @ gram) * reference).sum()
    return float(error / scale) if scale > 0 else 0.0
