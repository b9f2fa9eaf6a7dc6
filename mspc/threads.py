"""Threads of the CPU: how many there may be, and pieces of work that they share.

Operations of torch share their work among threads, which wait for each other at the end of each operation. Where
another process has one of the cores, all of them wait for the thread that lost it, at every operation. Inside `using`
each operation of torch runs on one thread, and `run` gives whole pieces of work to threads. A thread that has lost its
core then holds up its own piece only. No piece depends on the number of threads, so no bit of a result does.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from mspc import cgroups, ranks
from mspc.errors import InputError
from mspc.memory import free_memory, share

T = TypeVar("T")
R = TypeVar("R")

ROWS = 1536
"""Rows of a matrix that are one piece of work. In a sweep, more would not stay in the cache of a core."""
TILES = 8
"""Pieces of a product that ranks share, at most where `ROWS` allows it."""
LEAST_ROWS = {"cpu": 256, "cuda": 2048}
"""Rows of such a piece, at least, on a CPU and on any other device: less would take longer in all."""


@dataclass(frozen=True, slots=True)
class Helpers:
    """The threads that help the calling one."""

    executor: ThreadPoolExecutor
    size: int
    lanes: tuple[ThreadPoolExecutor, ...]
    """Executors of one thread each, for work that cannot go on in another thread."""


_helpers: ContextVar[Helpers | None] = ContextVar("helpers", default=None)


def check(asked: object) -> None:
    """Raises InputError for a number of threads that is no whole number above 0; None is no number asked for."""
    if asked is not None and (isinstance(asked, bool) or not isinstance(asked, int) or asked < 1):
        raise InputError(f"threads must be a whole number, at least 1, not {asked!r}. Leave it out to use every core.")


def count(asked: int | None = None) -> int:
    """The number asked for, else what torch was told (by OMP_NUM_THREADS, too), within the cores of the process."""
    check(asked)
    if asked is not None:
        return asked
    told = torch.get_num_threads()
    return told if os.environ.get("OMP_NUM_THREADS") else min(told, available())


def available() -> int:
    """The number of cores that this process may use, by its affinity and by the quota of its cgroups, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(quota) for quota in _quotas())]))


def _quotas() -> Iterator[float]:
    """Cores that each cgroup of this process allows, by `cpu.max` or `cpu.cfs_quota_us`."""
    for folder, version_2 in cgroups.folders("cpu"):
        with suppress(OSError, ValueError):
            yield from _quota_of(folder, version_2=version_2)


def _quota_of(folder: Path, *, version_2: bool) -> Iterator[float]:
    if version_2:
        quota, period = (folder / "cpu.max").read_text().split()
    else:
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    if quota not in ("max", "-1"):
        yield int(quota) / int(period)


@contextmanager
def using(asked: int | None, device: torch.device, *, precise: bool = True) -> Iterator[int]:
    """Inside, `run` has `asked` threads (None: see `count`), and an operation of torch has one. Yields the number.

    Operations are as precise as their dtypes; if `precise` is False, autocast and the precision of products are the
    caller's. On a GPU nothing changes: there the operations are large, and the CPU only starts them.
    """
    number = count(asked)
    if device.type != "cpu":
        yield number
        return
    before, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    token = None
    try:
        with ExitStack() as stack:
            if precise:
                stack.enter_context(torch.autocast("cpu", enabled=False))
                # Of the whole process: where threads changed and restored it, they would disturb each other.
                torch.set_float32_matmul_precision("highest")
            if number > 1:
                share()
                sizes = (number - 1, *[1] * number)
                pool, *lanes = [stack.enter_context(ThreadPoolExecutor(n, initializer=one_thread)) for n in sizes]
                token = _helpers.set(Helpers(pool, number - 1, tuple(lanes)))
            yield number
    finally:
        if token is not None:
            _helpers.reset(token)
        torch.set_num_threads(before)
        if precise:
            torch.set_float32_matmul_precision(precision)


@contextmanager
def of_torch(asked: int | None) -> Iterator[None]:
    """Inside, an operation of torch has `asked` threads (None: see `count`), where its speed is what is measured."""
    before = torch.get_num_threads()
    torch.set_num_threads(count(asked))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread() -> None:
    """Give the operations of torch in this thread one thread each; it is a setting of each thread."""
    torch.set_num_threads(1)


def run(function: Callable[[T], R], items: Iterable[T], bytes_each: int = 0) -> Iterator[R]:
    """Yield function(item) for each item, in their order, with the threads of `using`; without any, one by one.

    The calling thread works as well, and helpers that are busy are not waited for, so `function` may call `run` itself.
    The error of an item is raised in its place. Modes of torch are those of the calling thread. Where an item takes
    `bytes_each` of memory, no more are worked on at once than `fitting` allows.
    """
    helpers, items = _helpers.get(), list(items)
    function = ranks.apart(function) if len(items) > 1 else function
    if helpers is None or len(items) < 2:
        yield from map(function, items)
        return
    results = deque[Future[R]](Future() for _ in items)
    # A helper that is cancelled stays in the queue of its executor until a thread is free. It refers to what is `left`
    # alone, which is cleared, or the tensors of every product would wait there with it.
    left = deque((result, partial(function, item)) for result, item in zip(results, items, strict=True))

    def work_on_one() -> bool:
        try:
            result, call = left.popleft()
        except IndexError:
            return False
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)
            if not isinstance(error, Exception):
                raise
        return True

    def help_out(grad: bool, inference: bool, autocast: bool, dtype: torch.dtype) -> None:
        with (
            torch.inference_mode(inference),
            torch.set_grad_enabled(grad),
            torch.autocast("cpu", dtype=dtype, enabled=autocast),
        ):
            while work_on_one():
                pass

    autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast
    size = min(helpers.size, len(items) - 1, fitting(bytes_each) - 1)
    helping = [helpers.executor.submit(partial(copy_context().run, help_out, *modes)) for _ in range(size)]
    try:
        while results:
            result = results.popleft()
            while not result.done() and work_on_one():
                pass
            yield result.result()
    finally:
        left.clear()
        for helper in helping:
            if not helper.cancel():
                helper.result()


def run_all(function: Callable[[T], object], items: Iterable[T], bytes_each: int = 0) -> None:
    """`run` for its effect."""
    for _ in run(function, items, bytes_each):
        pass


def fitting(bytes_each: int = 0) -> int:
    """The number of pieces of work of this size that there are threads for, and half of the free memory. At least 1."""
    helpers = _helpers.get()
    if helpers is None:
        return 1
    most = len(helpers.lanes)
    return most if bytes_each == 0 else max(1, min(most, free_memory(torch.device("cpu")) // 2 // bytes_each))


def on_lane(number: int, function: Callable[[], R]) -> Future[R]:
    """Start function() in a thread that is the same for the same number; without the threads of `using`, call it."""
    helpers = _helpers.get()
    if helpers is not None:
        return helpers.lanes[number % len(helpers.lanes)].submit(function)
    called: Future[R] = Future()
    called.set_result(function())
    return called


def pieces(tensor: Tensor, dim: int = 0, rows: int = 1) -> Sequence[Tensor]:
    """Views of a tensor, `ROWS` rows each whatever the number of threads; `rows` belong to one index of `dim`.

    On a GPU it is one piece.
    """
    return tensor.split(max(1, ROWS // rows), dim) if tensor.device.type == "cpu" else [tensor]


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for a (R, K) and b (K, C), or (N, R, K) and (N, K, C), in pieces, which ranks share in `ranks.together`."""

    def multiply(some: slice, out: Tensor) -> None:
        torch.matmul(a[some], b if a.ndim == 2 else b[some], out=out)

    return in_rows(multiply, a.new_empty(*a.shape[:-1], b.shape[-1]))


def in_rows(fill: Callable[[slice, Tensor], object], result: Tensor) -> Tensor:
    """A result (R, C) or (N, R, C) after fill(some, result[some]) for pieces of it, which ranks share as products."""
    each = 1 if result.ndim == 2 else result.shape[1]
    count = min(TILES, len(result) * each // LEAST_ROWS["cpu" if result.device.type == "cpu" else "cuda"])
    if result.device.type == "cpu":
        count = max(count, -(-len(result) * each // ROWS))
    size = max(1, -(-len(result) // max(count, 1)))
    starts = [*range(0, len(result), size), len(result)]
    own, edges = ranks.share_of(len(starts) - 1) if len(starts) > 2 else (range(1), [])
    pieces_of = [slice(*starts[number : number + 2]) for number in own]
    run_all(lambda some: fill(some, result[some]), pieces_of)
    if edges:
        ranks.share(result, [starts[edge] for edge in edges])
    return result
