"""The passage of one batch through one block: it stops before every matrix and hands out what the matrix reads.

The forward pass of the block is suspended in a greenlet meanwhile, so whatever is installed at a stop is used when it
goes on, and nothing is computed twice. Where suspended passes would not fit in memory, a passage forgets everything at
a stop and begins again for the next, with the same result.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from mspc.types import Matrix

Stop = tuple[Matrix, Tensor]


class Passage:
    """One run of `forward`, the block on one batch; `kept` says whether it is suspended at stops or run again."""

    def __init__(self, forward: Callable[[], Tensor], kept: bool) -> None:
        self.forward, self.kept = forward, kept
        self.running: greenlet | None = None
        self.reached: list[Stop | Tensor] = []
        self.count = 0

    def stop(self, number: int) -> Stop | Tensor:
        """Stop `number` from 0, not before the last one: a matrix and its input; or the block's output, after all."""
        if self.running is None:
            self.running, self.count = greenlet(self.forward), 0
        with torch.no_grad():  # set here: what is set inside would stay set while it is suspended
            while self.count <= number and not self.running.dead:
                self.reached.clear()  # so that a suspended pass alone decides what stays in memory
                self.reached.append(self.running.switch())
                self.count += 1
        return self.reached[0]

    def rest(self) -> None:
        """Forget the run if it is not to be kept."""
        if not self.kept:
            self.close()

    def close(self) -> None:
        if self.running is not None:
            self.reached.clear()
            self.running.throw()  # unwinds a suspended run
            self.running = None


@contextmanager
def stops(modules: dict[Matrix, nn.Module]) -> Iterator[None]:
    """Inside, passages stop before these modules."""

    def stop_at(matrix: Matrix) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            getcurrent().parent.switch((matrix, args[0]))

        return hook

    handles = [module.register_forward_pre_hook(stop_at(matrix)) for matrix, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
