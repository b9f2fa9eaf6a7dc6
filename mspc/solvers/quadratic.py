"""The loss of changing a matrix, as a quadratic form, scaled so that every weight alone is worth its square.

    loss(W^) = tr(S (W^ - W) H (W^ - W)^T)

H (I, I) is the Gram of the inputs. S (O, O), the second moment of the gradients at the outputs, makes H and S the
Kronecker-factored Fisher information of the matrix (Martens and Grosse, arXiv:1503.05671), so that the loss is that of
the model and not the squared error of the layer, S = 1. S is block-diagonal, (K, B, B) with O = K B.

Both factors are divided by their diagonals: G = D^-1 H D^-1, and the same for S; the target becomes B = T W D, with T
the square root of the diagonal of S.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mspc.errors import SingularGramError
from mspc.linalg import check_finite, regularized
from mspc.types import GramStats

OUTPUT_DAMP = 0.05
"""Added to the diagonal of S, as a share of its mean: a few dozen sequences estimate it."""


@dataclass(frozen=True)
class Quadratic:
    """`target` (O, I); the factors `gram` (I, I) and `outputs` (K, B, B) or None; their eigenvalues and vectors."""

    target: Tensor
    gram: Tensor
    outputs: Tensor | None
    eigenvalues: Tensor
    vectors: Tensor
    output_eigenvalues: Tensor
    output_vectors: Tensor | None
    scale: Tensor
    """(O, I) or what broadcasts to it: scaled weights are weights times this."""
    dead: Tensor

    def apply(self, values: Tensor) -> Tensor:
        """S X H of scaled values (O, I)."""
        return self.between(self.outputs, values @ self.gram)

    def between(self, factor: Tensor | None, values: Tensor) -> Tensor:
        """Multiply the outputs by a block-diagonal factor (K, B, B)."""
        if factor is None:
            return values
        return (factor @ values.view(len(factor), -1, values.shape[1])).view_as(values)

    def solve(self, values: Tensor, rho: float) -> Tensor:
        """X of S X H + rho X = values."""
        transposed = None if self.output_vectors is None else self.output_vectors.mT
        rotated = self.between(transposed, values @ self.vectors)
        rotated /= self.output_eigenvalues[:, None] * self.eigenvalues + rho
        return self.between(self.output_vectors, rotated) @ self.vectors.T

    def loss(self, values: Tensor) -> float:
        """tr(S E H E^T) of scaled weights, with E their distance from the target."""
        error = values - self.target
        return float((self.apply(error) * error).sum(dtype=torch.float64))

    def weight(self, values: Tensor) -> Tensor:
        return values / self.scale


def quadratic(weight: Tensor, stats: GramStats, outputs: Tensor | None, damp: float, name: str) -> Quadratic:
    """The form at `weight` (O, I) float32. Raises ActivationError and SingularGramError for statistics of no use."""
    check_finite(stats, name)
    gram, dead = regularized(stats.gram, damp)
    scale = gram.diagonal().sqrt()
    gram = gram / scale[:, None] / scale
    eigenvalues, vectors = _eigen(gram, name)
    output_eigenvalues, output_vectors = torch.ones(len(weight), device=weight.device), None
    scales = scale[None, :]
    if outputs is not None:
        diagonal = outputs.diagonal(dim1=-2, dim2=-1)
        mean = float(diagonal.mean())  # 0 where nothing depends on the matrix
        outputs = outputs + torch.diag_embed(torch.full_like(diagonal, OUTPUT_DAMP * mean or 1.0))
        output_scale = outputs.diagonal(dim1=-2, dim2=-1).sqrt()
        outputs = outputs / output_scale[:, :, None] / output_scale[:, None, :]
        blocks, output_vectors = _eigen(outputs, name)
        output_eigenvalues = blocks.flatten()
        scales = output_scale.flatten()[:, None] * scales
    target = torch.where(dead, 0.0, weight * scales)  # weights of dead inputs are worth nothing
    return Quadratic(
        target, gram, outputs, eigenvalues, vectors, output_eigenvalues, output_vectors, scales, dead
    )  # fmt: skip


def _eigen(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
    try:
        eigenvalues, vectors = torch.linalg.eigh(matrix)
    except RuntimeError as error:  # LinAlgError is one, and torch does not export it
        raise SingularGramError(
            f"{name}: a matrix of {matrix.shape[-1]} columns of its statistics has no eigendecomposition ({error}); "
            "calibrate on more text (--num-sequences, --sequence-length) or raise --damp."
        ) from error
    return eigenvalues.clamp_min(0.0), vectors
