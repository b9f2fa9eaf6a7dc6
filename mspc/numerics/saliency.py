"""Scores of weights: what removing one costs. Higher = keep.

Every criterion is a function of the weight W (O, I), the diagonal of H = X X^T and that of H^-1, both (I,), and returns
a score (O, I). Inside the OBS sweep H is the Gram of the columns not yet settled.

    magnitude   |w|
    wanda       |w| sqrt(H_jj)                                          Sun et al., arXiv:2306.11695, per row
    ria         (|w| / sum of its row + |w| / sum of its column) H_jj^(1/4)   Zhang et al., ICLR 2024, per row
    obs         w^2 / [H^-1]_jj                                         Hassibi and Stork 1993; eq. 2 of 2310.09499
    isc         w^2 (H_jj + 1 / [H^-1]_jj)                              Shao, Liu, Qian, arXiv:2310.09499, eq. 4

For a positive definite H, 1 / [H^-1]_jj <= H_jj, so w^2 H_jj <= isc <= 2 w^2 H_jj. (The code released with
2310.09499 divides by the square root of [H^-1]_jj; this is the paper's formula.)
"""

from collections.abc import Callable

from torch import Tensor

Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]


def magnitude(weight: Tensor, diagonal: Tensor, inverse_diagonal: Tensor) -> Tensor:
    return weight.abs()


def wanda(weight: Tensor, diagonal: Tensor, inverse_diagonal: Tensor) -> Tensor:
    return weight.abs() * diagonal.sqrt()


def ria(weight: Tensor, diagonal: Tensor, inverse_diagonal: Tensor) -> Tensor:
    size = weight.abs()
    tiny = 1e-30  # a row or column of zeros scores zero, not NaN
    relative = size / size.sum(0, keepdim=True).clamp(min=tiny) + size / size.sum(1, keepdim=True).clamp(min=tiny)
    return relative * diagonal.sqrt().sqrt()


def obs(weight: Tensor, diagonal: Tensor, inverse_diagonal: Tensor) -> Tensor:
    return weight.square() / inverse_diagonal


def isc(weight: Tensor, diagonal: Tensor, inverse_diagonal: Tensor) -> Tensor:
    return weight.square() * (diagonal + 1 / inverse_diagonal)


CRITERIA: dict[str, Criterion] = {"isc": isc, "magnitude": magnitude, "obs": obs, "ria": ria, "wanda": wanda}
COMPARED_PER_ROW = frozenset({"ria", "wanda"})
