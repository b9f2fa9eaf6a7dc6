"""The trace of the Hessian by Hutchinson's estimate (arXiv:2310.09499, eq. 5 and 6), as a reverse walk on dual numbers.

Every value travels with its derivative along a direction z of the weights, so the backward pass carries H z next to the
gradient. No second-order graph of the whole model is ever built.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, jvp

from mspc.passes.gradients import BlockRun, Measure, Weights, seed_of


class HessianTrace(Measure):
    """One Hutchinson sample z * (H z) of each matrix, averaged over its weights, with signs z drawn per sequence.

    z covers all matrices at once; the terms between different matrices have mean zero. States and cotangents are
    (2, B, T, D): a value and its derivative along z. The model must have second derivatives
    (`open_model(..., eager=True)`).
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def start(self, hidden: Tensor) -> Tensor:
        return torch.stack([hidden, torch.zeros_like(hidden)])

    def forward(self, run: BlockRun, state: Tensor) -> Tensor:
        hidden, along = state
        return torch.stack(jvp(run, (hidden, run.weights), (along, self.signs(run))))

    def head(self, loss: Callable[[Tensor], Tensor], state: Tensor, predicted: int) -> Tensor:
        hidden, along = state
        return torch.stack(jvp(grad(loss), (hidden,), (along,)))

    def backward(self, run: BlockRun, state: Tensor, cotangent: Tensor) -> tuple[Tensor, Weights]:
        signs = self.signs(run)
        primals, tangents = (state[0], run.weights, cotangent[0]), (state[1], signs, cotangent[1])
        values, derivatives = jvp(run.gradients, primals, tangents)[:2]
        (gradient, _), (gradient_along, products) = values, derivatives
        return torch.stack([gradient, gradient_along]), {name: hz * signs[name] for name, hz in products.items()}

    def signs(self, run: BlockRun) -> Weights:
        """Random signs of every weight of a block; the same when the backward pass asks again."""
        signs = {}
        for name, weight in run.weights.items():
            generator = torch.Generator().manual_seed(seed_of(self.seed, (run.number, run.index), name))
            bits = torch.randint(0, 2, weight.shape, generator=generator, dtype=torch.int8)
            signs[name] = (2 * bits - 1).to(weight)
        return signs
