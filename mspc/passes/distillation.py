"""Distillation: a model is trained towards the predictions of a dense one, without labels.

The loss is KL(dense || model), taken some positions at a time, as the logits of a batch may take gigabytes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

POSITIONS = 256
"""Positions that have their logits in memory at once."""
BETAS = (0.9, 0.95)
LARGEST_NORM = 1.0
WARM_UP = 20
"""Steps over which the learning rate grows, but at most a fifth of all."""
CHECKS = 10
"""Validations of a run, evenly spaced, and one before it."""
PATIENCE = 3
"""Validations without progress after which a run ends."""

Head = Callable[[Tensor], Tensor]
"""Outputs (N, D) of the last block to log-probabilities (N, V) float32, by a model's own norm and head."""


@dataclass
class Validations:
    """The mean KL divergence from the dense model on validation text by step, in nats per token."""

    divergences: dict[int, float] = field(default_factory=dict)

    def add(self, step: int, divergence: float) -> bool:
        """Note the divergence after a step. True if it is the first, or the least so far; a later NaN never is."""
        self.divergences[step] = divergence
        return self.best_step() == step

    def best_step(self) -> int:
        first = next(iter(self.divergences))
        finite = [step for step, found in self.divergences.items() if math.isfinite(found)]
        return min(finite, key=lambda step: self.divergences[step], default=first)

    def goes_on(self) -> bool:
        """False if the last ones brought no progress."""
        best = self.best_step()
        return sum(step > best for step in self.divergences) < PATIENCE


def is_checked(step: int, steps: int) -> bool:
    """Tell if the model is validated after a step, counted from 1."""
    return step % -(-steps // CHECKS) == 0 or step == steps


def progress_line(step: int, divergence: float) -> str:
    return f"Recovering: step {step}, KL from the dense model {divergence:.4g} nats per token on validation text."


def orders(num_sequences: int, batch_size: int, steps: int, seed: int) -> list[Tensor]:
    """The numbers of the sequences of each step: every round passes all of them in a new random order."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-steps * batch_size // num_sequences)
    order = torch.cat([torch.randperm(num_sequences, generator=generator) for _ in range(rounds)])
    return list(order[: steps * batch_size].split(batch_size))


def rates(steps: int, highest: float) -> list[float]:
    """The learning rate of each step: a linear warm-up times a cosine that ends near 0."""
    warm_up = min(WARM_UP, max(steps // 5, 1))
    return [
        highest * min(1.0, (step + 1) / warm_up) * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)
    ]


def head_gradients(
    expected: Head,
    actual: Head,
    wanted: Tensor,
    states: Tensor,
    trained: Sequence[nn.Parameter],
    count: int,
    size: int = POSITIONS,
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of the divergence over `count` at the outputs `states` (N, D) of the last block, and of `trained`.

    `wanted` (N, D) are the outputs of the dense model. `size` positions have logits at once. A parameter that the head
    does not use has the gradient None.
    """
    at_states, at_trained = torch.empty_like(states), list[Tensor | None]([None] * len(trained))
    for given, part, into in zip(wanted.split(size), states.detach().split(size), at_states.split(size), strict=True):
        with torch.no_grad():
            p = expected(given)
        with torch.enable_grad():
            q = actual(part.requires_grad_())
        # The gradient of sum(exp(p) (p - q)) at q is -exp(p).
        towards = p.to(q.device).exp_().div_(-count)
        found = torch.autograd.grad(q, [part, *trained], towards, allow_unused=True)
        into.copy_(found[0])
        at_trained = [added(a, b) for a, b in zip(at_trained, found[1:], strict=True)]
    return at_states, at_trained


def added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two gradients. Either may be missing."""
    return b if a is None else a if b is None else a + b
