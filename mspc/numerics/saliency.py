"""Scores of weights: the cost of removing one. Higher = keep.

A score is a function of the weight W (O, I), the diagonal of H = X X^T and that of H^-1, both (I,), and returns (O, I).
Inside the OBS sweep H is the Gram of the columns that are not settled yet.

    obs         w^2 / [H^-1]_jj                                         Hassibi and Stork 1993; eq. 2 of 2310.09499
    isc         w^2 (H_jj + 1 / [H^-1]_jj)                              Shao, Liu, Qian, arXiv:2310.09499, eq. 4

For a positive definite H, 1 / [H^-1]_jj <= H_jj, so w^2 H_jj <= isc <= 2 w^2 H_jj. The code released with 2310.09499
divides by the square root of [H^-1]_jj; this is the paper's formula. `mspc.published.criteria` holds the scores of
other methods.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

Score = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Criterion:
    """A score by name. `per_row` compares weights within their row only; `needs_inverse` means that it reads H^-1."""

    name: str
    score: Score = field(repr=False)
    per_row: bool = False
    needs_inverse: bool = False


def obs(weight: Tensor, diagonal: Tensor, inverse_diagonal: Tensor) -> Tensor:
    return weight.square() / inverse_diagonal


def isc(weight: Tensor, diagonal: Tensor, inverse_diagonal: Tensor) -> Tensor:
    return weight.square() * (diagonal + 1 / inverse_diagonal)


OBS = Criterion("obs", obs, needs_inverse=True)
ISC = Criterion("isc", isc, needs_inverse=True)
