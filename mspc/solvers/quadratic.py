"""The loss of changing a matrix, as a quadratic form, scaled so that removing one weight costs its square.

    loss(W^) = tr(S (W^ - W) H (W^ - W)^T)

H (I, I) is the Gram of the inputs. S (O, O) is 1 for the squared error of the layer, or the output Fisher factor, the
second moment of the gradients at the outputs. With it, H and S are the Kronecker-factored Fisher information of the
matrix (Martens and Grosse, arXiv:1503.05671), and the loss is that of the model. S is block-diagonal, (K, B, B) with
O = K B.

With D and T the square roots of the diagonals of H and S, the scaled factors are D^-1 H D^-1 and T^-1 S T^-1, and the
target is B = T W D. Where S is diagonal, T^-1 S T^-1 is 1.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from mspc.errors import SingularGramError
from mspc.numerics.linalg import check_finite, regularized
from mspc.threads import in_rows, matmul
from mspc.types import GramStats

OUTPUT_DAMP = 0.3
"""Damping of S as a share of its mean diagonal. It is large because few sequences estimate S."""
SHIFT = 0.3
"""Damping of the scaled H, whose diagonal is 1, in the preconditioner of `inner`. The best of 0.1, 0.3 and 0.6."""
WEIGHTS_HELD, GRAMS_HELD = 20, 5
"""Copies of a weight and of a Gram in float32 that a solver holds at most, estimated."""


@dataclass(frozen=True)
class Inputs:
    """The scaled H, `gram` (I, I); the square root of its diagonal, `scale` (I,); and the dead inputs (I,)."""

    gram: Tensor
    scale: Tensor
    dead: Tensor
    found: list[Tensor] = field(default_factory=list)
    """(G + SHIFT)^-1 once it is made. (A `cached_property` has one lock for all instances.)"""
    lock: AbstractContextManager[Any] = field(default_factory=RLock)


@dataclass(frozen=True)
class Quadratic:
    """`target` (O, I) and the scaled factors `inputs.gram` (I, I) and `outputs` (K, B, B), or None where that is 1."""

    name: str
    target: Tensor
    inputs: Inputs
    outputs: Tensor | None
    scale: Tensor
    """A tensor that broadcasts to (O, I): scaled weights = weights * scale."""
    made: dict[float, Tensor] = field(default_factory=dict)
    """(G + rho)^-1 by rho, or its Cholesky factor, for the latest rho only. Used if `outputs` is None."""
    found: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def apply(self, values: Tensor) -> Tensor:
        """S X H of scaled values (O, I)."""
        return self.between(self.outputs, matmul(values, self.inputs.gram))

    def between(self, factor: Tensor | None, values: Tensor) -> Tensor:
        """Multiply the outputs of `values` (O, I) by a block-diagonal factor (K, B, B)."""
        if factor is None:
            return values
        return matmul(factor, values.view(len(factor), -1, values.shape[1])).view_as(values)

    def output_spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (O,) and vectors (K, B, B) of `outputs`, computed once."""
        assert self.outputs is not None
        if not self.found:
            try:
                eigenvalues, vectors = torch.linalg.eigh(self.outputs)
            except RuntimeError as error:  # LinAlgError is one, and torch does not export it
                raise self._singular(f"has no eigendecomposition ({error})") from error
            self.found.append((eigenvalues.clamp_min(0.0).flatten(), vectors))
        return self.found[0]

    def solve(self, values: Tensor, rho: float) -> Tensor:
        """Solve X G + rho X = values for X (O, I), where S is 1. Raises SingularGramError."""
        if len(values) >= values.shape[1] or values.device.type != "cpu":
            return matmul(values, self.inverse(rho))
        # With fewer rows, two triangular solutions take less time than the inverse, and threads can share them.
        lower = self._latest(rho, self._factor)

        def solve(some: slice, out: Tensor) -> None:
            out.copy_(torch.cholesky_solve(values[some].mT, lower).mT)

        return in_rows(solve, torch.empty_like(values))

    def inverse(self, rho: float) -> Tensor:
        """(G + rho)^-1. Raises SingularGramError."""
        return self._latest(rho, self._inverse)

    def _latest(self, rho: float, make: Callable[[float], Tensor]) -> Tensor:
        if rho not in self.made:
            self.made.clear()
            self.made[rho] = make(rho)
        return self.made[rho]

    def preconditioner(self) -> Tensor:
        """(G + SHIFT)^-1, made once for all matrices with this Gram. Raises SingularGramError."""
        with self.inputs.lock:
            if not self.inputs.found:
                self.inputs.found.append(self._inverse(SHIFT))
            return self.inputs.found[0]

    def _inverse(self, shift: float) -> Tensor:
        return torch.cholesky_inverse(self._factor(shift))

    def _factor(self, shift: float) -> Tensor:
        """The lower Cholesky factor of G + shift."""
        damped = self.inputs.gram.clone()
        damped.diagonal().add_(shift)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info):
            raise self._singular(f"is not positive definite with {shift:g} on its diagonal")
        return lower

    def _singular(self, what: str) -> SingularGramError:
        return SingularGramError(
            f"{self.name}: a matrix of its statistics ({len(self.inputs.gram)} inputs) {what}. Calibrate on more text "
            "(--num-sequences, --sequence-length) or raise --damp."
        )

    def loss(self, values: Tensor) -> float:
        """tr(S E H E^T) of scaled weights, with E their distance from the target. Weights of dead inputs cost 0."""
        error = torch.where(self.inputs.dead, 0.0, values - self.target)
        return float((self.apply(error) * error).sum(dtype=torch.float64))

    def weight(self, values: Tensor) -> Tensor:
        return values / self.scale


def quadratic(weight: Tensor, stats: GramStats, outputs: Tensor | None, damp: float, name: str) -> Quadratic:
    """The form at `weight` (O, I) float32. Raises ActivationError for a Gram that is not finite."""
    inputs = inputs_of(stats, damp, name)
    scales = inputs.scale[None, :]
    if outputs is not None:
        outputs = damped_outputs(outputs)
        output_scale = outputs.diagonal(dim1=-2, dim2=-1).sqrt()
        outputs = outputs / output_scale[:, :, None] / output_scale[:, None, :] if outputs.shape[-1] > 1 else None
        scales = output_scale.flatten()[:, None] * scales
    # Weights of dead inputs cost nothing. `contiguous`, as a weight that is stored transposed is a view.
    target = torch.where(inputs.dead, 0.0, weight * scales).contiguous()
    return Quadratic(name, target, inputs, outputs, scales)


def damped_outputs(outputs: Tensor) -> Tensor:
    """The output Fisher factor (K, B, B) with a share of its mean diagonal added to its diagonal."""
    diagonal = outputs.diagonal(dim1=-2, dim2=-1)
    mean = float(diagonal.mean())  # 0 if nothing depends on the matrix
    return outputs + torch.diag_embed(torch.full_like(diagonal, OUTPUT_DAMP * mean or 1.0))


def solver_bytes(shape: tuple[int, ...]) -> int:
    """Bytes that a solver takes for a matrix (O, I) at most, estimated from its weight and its Gram."""
    num_outputs, num_inputs = shape
    return torch.float32.itemsize * (WEIGHTS_HELD * num_outputs + GRAMS_HELD * num_inputs) * num_inputs


def inputs_of(stats: GramStats, damp: float, name: str) -> Inputs:
    """The scaled Gram of a matrix's inputs, made once. Raises ActivationError for a Gram that is not finite."""
    with stats.lock:
        if damp not in stats.scaled_by_damp:
            check_finite(stats, name)
            gram, dead = regularized(stats.gram, damp)
            scale = gram.diagonal().sqrt()
            stats.scaled_by_damp[damp] = Inputs(gram / scale[:, None] / scale, scale, dead)
        found: Inputs = stats.scaled_by_damp[damp]
        return found


def refine(form: Quadratic, mask: Tensor, values: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Solve S B G = S B0 G on the support, from `values` on, by conjugate gradients. The diagonal is 1 already.

    Independent parts have their own step sizes: rows without an output factor, else its blocks. Returns the new values
    (O, I) and their loss, float64: a step lowers it by norm^2 / curvature, so that it takes no product.
    """
    tiny = torch.finfo(values.dtype).tiny
    num_parts = len(values) if form.outputs is None else len(form.outputs)

    def dot(one: Tensor, other: Tensor) -> Tensor:
        return (one * other).view(num_parts, -1).sum(1)

    def each(numbers: Tensor) -> Tensor:
        return numbers.repeat_interleave(len(values) // num_parts)[:, None]

    error = form.target - values
    residual = form.apply(error)
    loss = (error * residual).sum(dtype=torch.float64)
    residual.mul_(mask)
    direction = residual.clone()
    norm = dot(residual, residual)
    for _ in range(steps):
        image = form.apply(direction).mul_(mask)
        curvature = dot(direction, image)
        length = torch.where(curvature > 0, norm / curvature.clamp_min(tiny), 0.0)
        loss -= (length * norm).sum(dtype=torch.float64)
        step = each(length)
        values = (step * direction).add_(values)
        residual.sub_(image.mul_(step))
        following = dot(residual, residual)
        direction.mul_(each(torch.where(norm > 0, following / norm.clamp_min(tiny), 0.0))).add_(residual)
        norm = following
    return values, loss
