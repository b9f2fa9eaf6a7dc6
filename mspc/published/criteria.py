"""Published scores of weights, and the table of all criteria. The arguments are those of `mspc.numerics.saliency`.

magnitude   |w|
wanda       |w| sqrt(H_jj)                                          Sun et al., arXiv:2306.11695, per row
ria         (|w| / sum of its row + |w| / sum of its column) H_jj^(1/4)   Zhang et al., ICLR 2024, per row
"""

from torch import Tensor

from mspc.numerics.saliency import ISC, OBS, Criterion


def magnitude(weight: Tensor, diagonal: Tensor, inverse_diagonal: Tensor) -> Tensor:
    return weight.abs()


def wanda(weight: Tensor, diagonal: Tensor, inverse_diagonal: Tensor) -> Tensor:
    return weight.abs() * diagonal.sqrt()


def ria(weight: Tensor, diagonal: Tensor, inverse_diagonal: Tensor) -> Tensor:
    size = weight.abs()
    tiny = 1e-30  # a row or column of zeros scores zero, not NaN
    relative = size / size.sum(0, keepdim=True).clamp(min=tiny) + size / size.sum(1, keepdim=True).clamp(min=tiny)
    return relative * diagonal.sqrt().sqrt()


CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        ISC,
        Criterion("magnitude", magnitude),
        OBS,
        Criterion("ria", ria, per_row=True),
        Criterion("wanda", wanda, per_row=True),
    )
}
