"""A forward pass of one batch through one block that pauses before every matrix and hands out the input of that matrix.

Between pauses the forward pass is suspended in a greenlet. A weight that is installed at a pause is used when the pass
goes on, and nothing is computed twice. Where suspended passes would not fit in memory, a pass is discarded after each
pause and run again for the next one, with the same result.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from typing import NamedTuple

import torch
from greenlet import error as OtherThreadError
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from mspc.model.experts import Product
from mspc.threads import on_lane
from mspc.types import Matrix


class Pause(NamedTuple):
    """A matrix and its input; for an expert's matrix, the rest of what is known before its product."""

    matrix: Matrix
    inputs: Tensor
    product: Product | None = None


class PausedForward:
    """One run of `forward`, a block on one batch. `kept` suspends it at pauses; otherwise it is run again for each.

    A suspended pass cannot go on in another thread, so each has a `lane`. `chunk` is that of its batch.
    """

    def __init__(self, forward: Callable[[], Tensor], kept: bool, lane: int = 0, chunk: int = 0) -> None:
        self.forward, self.kept, self.lane, self.chunk = forward, kept, lane, chunk
        self.running: greenlet | None = None
        self.reached: list[Pause | Tensor] = []
        self.count = 0

    def run_to(self, number: int) -> Pause | Tensor:
        """Pause `number`, counted from 0, or the block's output after the last one. Numbers must not decrease."""
        return self.start_to(number).result()

    def start_to(self, number: int) -> Future[Pause | Tensor]:
        """`run_to` in the thread of its lane."""
        return on_lane(self.lane, partial(self._run_to, number))

    def _run_to(self, number: int) -> Pause | Tensor:
        if self.running is None:
            self.running, self.count = greenlet(self.forward), 0
        with torch.no_grad():  # not inside the greenlet: the mode would stay set while that is suspended
            while self.count <= number and not self.running.dead:
                self.reached.clear()  # the suspended pass alone decides what stays in memory
                self.reached.append(self.running.switch())
                self.count += 1
        return self.reached[0]

    def discard(self) -> None:
        """Forget the run unless it is kept."""
        if not self.kept:
            self.close()

    def close(self) -> None:
        if self.running is not None:
            on_lane(self.lane, self._close).result()

    def _close(self) -> None:
        self.reached.clear()
        running, self.running = self.running, None
        if running is not None:
            with suppress(OtherThreadError):  # the thread has ended, and the run with it
                running.throw()  # unwinds a suspended run


@contextmanager
def pauses_before(modules: dict[Matrix, nn.Module], all_tokens: bool = False) -> Iterator[None]:
    """Inside, a `PausedForward` pauses before these modules. `all_tokens`: experts are shown all tokens."""

    def pause_at(matrix: Matrix) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            getcurrent().parent.switch(Pause(matrix, args[0]))

        return hook

    def pause_in(module: nn.Module) -> Callable[[Product], None]:
        own = {_place(matrix): matrix for matrix, owner in modules.items() if owner is module}

        def before(product: Product) -> None:
            if matrix := own.get((product.parameter, product.expert)):
                getcurrent().parent.switch(Pause(matrix, product.inputs, product))

        return before

    whole = {matrix: module for matrix, module in modules.items() if matrix.index is None}
    experts = list(dict.fromkeys(module for matrix, module in modules.items() if matrix.index is not None))
    handles = [module.register_forward_pre_hook(pause_at(matrix)) for matrix, module in whole.items()]
    for module in experts:
        module.before_product = pause_in(module)  # type: ignore[assignment]
        module.sees_all = all_tokens  # type: ignore[assignment]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in experts:
            module.before_product = None  # type: ignore[assignment]
            module.sees_all = False  # type: ignore[assignment]


def _place(matrix: Matrix) -> tuple[str, int | None]:
    """The parameter of an expert's matrix, by its name in its module, and the number of the expert."""
    return matrix.parameter.rpartition(".")[2], matrix.index
