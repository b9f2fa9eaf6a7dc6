"""Linear algebra of Gram matrices: sums, inverse factors, and the output error."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from mspc.errors import ActivationError, SingularGramError
from mspc.threads import matmul, pieces, run, run_all
from mspc.types import GramStats

GRAM_STRIP = 256
"""Rows of a Gram that are computed at once, each only up to the end of its diagonal block."""


@contextmanager
def precise_matmul(*, tf32: bool = False) -> Iterator[None]:
    """Compute products in full float32 inside, as TF32 corrupts Gram matrices. The setting is restored on exit.

    `tf32` allows TF32, for numbers that it does not round.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def exact_in_tf32(x: Tensor) -> bool:
    """Tell if a GPU multiplies these numbers by TF32 without rounding them: those of 16 bits have no more digits."""
    return x.is_cuda and x.itemsize == 2


def add_gram(gram: Tensor, x: Tensor) -> None:
    """Add x^T x of inputs (T, I) to the lower triangle of `gram` (I, I) float32. Call `symmetrize` at the end."""
    with precise_matmul(tf32=exact_in_tf32(x)):
        x = x.float()

        def add(start: int) -> None:
            strip = slice(start, start + GRAM_STRIP)
            gram[strip, : strip.stop].addmm_(x[:, strip].T, x[:, : strip.stop])

        run_all(add, reversed(range(0, len(gram), GRAM_STRIP)))  # the longest first


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a^T b for a (T, I) float32, b (T, J) to `total` (I, J) float32."""
    with precise_matmul(tf32=exact_in_tf32(b)):
        for part in in_two_parts(a) if exact_in_tf32(b) else (a,):
            _add_product(total, part, b.float())


def in_two_parts(a: Tensor) -> tuple[Tensor, Tensor]:
    """Two float32 tensors with this sum, such that rounding them to TF32 changes it by 2^-19 of each number at most."""
    high = a.bfloat16().float()
    return high, a - high


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    def add(start: int) -> None:
        some = slice(start, start + GRAM_STRIP)
        total[some].addmm_(a[:, some].T, b)

    run_all(add, range(0, len(total), GRAM_STRIP))


def symmetrize(gram: Tensor) -> Tensor:
    """The symmetric matrix with this lower triangle."""
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
    """A copy of `gram` that can be inverted, and the dead inputs, which were always zero.

    damp * (mean live diagonal) is added to the diagonal. A dead input gets that mean, independent of all others.
    """
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

    With J the exchange matrix, the Cholesky factor L of J A J gives A = R R^T for the upper R = J L J, so U = R^-1.
    That is one factorization; inverting and factoring again takes three.
    """
    lower, info = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if int(info):
        return None
    upper = lower.flip(0, 1)
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    inverse = torch.cat(
        list(run(lambda columns: torch.linalg.solve_triangular(upper, columns, upper=True), pieces(identity, dim=1))), 1
    )
    return inverse if bool(inverse.isfinite().all()) else None


def check_finite(stats: GramStats, name: str) -> None:
    """Raises ActivationError, naming the matrix, for a Gram with NaN or infinity in it."""
    if not bool(stats.gram.isfinite().all()):
        raise ActivationError(
            f"{name}: its inputs contain NaN or infinity (Gram of {stats.num_tokens} tokens); the model overflows in "
            "this precision. Try --dtype float32, and check that the model itself has a finite perplexity."
        )


def inverse_factor(stats: GramStats, damp: float, name: str) -> InverseFactor:
    """The inverse factor with the first damping that works: damp, 10 damp, then 10 damp in float64. It is made once.

    The result holds the damp and the precision. Raises ActivationError for a Gram that is not finite, and
    SingularGramError if none works.
    """
    with stats.lock:
        if damp not in stats.inverses_by_damp:
            stats.inverses_by_damp[damp] = _inverse_factor(stats, damp, name)
        found: InverseFactor = stats.inverses_by_damp[damp]
        return found


def _inverse_factor(stats: GramStats, damp: float, name: str) -> InverseFactor:
    gram = stats.gram
    check_finite(stats, name)
    for rung_damp, precision in ((damp, torch.float32), (10 * damp, torch.float32), (10 * damp, torch.float64)):
        damped, dead = regularized(gram.to(precision), rung_damp)
        factor = upper_inverse_factor(damped)
        if factor is not None:
            return InverseFactor(factor.float(), damped.diagonal().float(), dead, rung_damp, precision)
    raise SingularGramError(
        f"{name}: the Gram matrix of {len(gram)} inputs over {stats.num_tokens} tokens is not positive definite, even "
        f"with damp {10 * damp:g} in float64. Calibrate on more text (--num-sequences, --sequence-length) or raise "
        "--damp."
    )


def output_error(weight: Tensor, compressed: Tensor, gram: Tensor) -> float:
    """|| (W - W^) X ||^2 / || W X ||^2 in float64, from the Gram X X^T. 0 is exact; a matrix of zeros has 1."""
    gram = gram.double()
    difference = (weight - compressed).double()
    reference = weight.double()
    error = (matmul(difference, gram) * difference).sum()
    scale = (matmul(reference, gram) * reference).sum()
    return float(error / scale) if scale > 0 else 0.0
