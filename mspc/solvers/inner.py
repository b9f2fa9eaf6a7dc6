"""The inner problem of an ADMM iteration: the minimum in B, exact or one step nearer to it.

Every iteration solves S X G + rho X = V for X, with V and rho a little different from the iteration before. Without an
output factor (S = 1) that is a product with (G + rho)^-1. With one, the eigenvectors of S, in blocks of few outputs,
make the rows independent:

    x_i (s_i G + rho) = v_i

The eigenvectors of G would solve them for every rho, too. But they take much longer than a Cholesky factor, and LAPACK
finds none of more than 32,766 inputs. So X is not solved for, but takes one step from where it was: preconditioned
conjugate gradients, stopped after the first of them, as in inexact ADMM (Boyd et al. 2011, section 3.4.4). The
preconditioner (G + `SHIFT`)^-1 is the same for all outputs and every rho, as each row has the step size that is best
for it. So a Gram is factored once. A step P = R (G + `SHIFT`)^-1 takes one product of its size, as P G, which says what
it changes, is R - `SHIFT` P.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mspc.solvers.quadratic import SHIFT, Quadratic
from mspc.threads import matmul

Inner = Callable[[Tensor, float], Tensor]
"""A function of V (O, I) and rho, called once an iteration."""


def inner(form: Quadratic, wanted: Tensor) -> Inner:
    """The inner problem of `form`, with B0 as its first X. `wanted` is S B0 G (O, I).

    Raises SingularGramError for a Gram that is not positive definite with `SHIFT` on its diagonal.
    """
    return form.solve if form.outputs is None else Steps(form, wanted)


class Steps:
    """X (O, I) in the eigenvectors of S, and a step of it at every call. Raises SingularGramError as `inner` does."""

    def __init__(self, form: Quadratic, wanted: Tensor) -> None:
        of_outputs, self.vectors = form.output_spectrum()
        self.form, self.inverse, self.of_outputs = form, form.preconditioner(), of_outputs[:, None]
        self.values = form.between(self.vectors.mT, form.target)
        self.image = form.between(self.vectors.mT, wanted)

    def __call__(self, values: Tensor, rho: float) -> Tensor:
        residual = self.form.between(self.vectors.mT, values) - self.image
        residual.sub_(self.values, alpha=rho)
        step = matmul(residual, self.inverse)
        gain, square = (residual * step).sum(1, keepdim=True), step.square().sum(1, keepdim=True)
        # step (G + SHIFT) is the residual, so the image of the step needs no product.
        curvature = self.of_outputs * (gain - SHIFT * square) + rho * square
        length = torch.where(curvature > 0, gain / curvature, 0.0)  # a row that is solved has neither
        self.values.addcmul_(length, step)
        self.image.addcmul_(length * self.of_outputs, residual.sub_(step, alpha=SHIFT))
        return self.form.between(self.vectors, self.values)
