"""Ranks: processes that share one run, each with a device of its own, as torchrun starts them.

The text is cut into `CHUNKS` chunks, however many ranks there are, and each rank has as many in a row as any other. A
sum over the text is a sum within each chunk first, and then over chunks in a fixed binary tree. So 1, 2, 4 and 8 ranks
add the same numbers in the same order. With more than 8, several ranks have the same text. Collectives move bytes and
add whole numbers only: the order in which NCCL adds floats depends on the number of ranks, and even on chance.

With one rank every function here does nothing, or returns what it is given.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mspc.errors import InputError, MspcError, in_brief

S = TypeVar("S")
T = TypeVar("T")

CHUNKS = 8
"""Parts of the text. A number of ranks divides it or is a multiple of it."""
PATIENCE = timedelta(hours=12)
"""The time that a rank waits for others. One that fails ends its process, which the others notice at once."""
SECONDS_OF_GRACE = 3.0
"""The time that others have to report a failure. A launcher ends all ranks as soon as one has ended."""


class LostRank(MspcError):
    """Another rank ended while this one waited for it."""


@dataclass(frozen=True)
class World:
    """The place of this process among `size` ranks; `local_size` of them run on this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


ONLY = World(0, 1, 0, 1)
_allowed = False
_world: World | None = None
_alone: ContextVar[bool] = ContextVar("alone", default=False)
_together: ContextVar[bool] = ContextVar("together", default=False)


def allow() -> None:
    """Let torchrun decide how many ranks share the work of this process. Without that, it is the only rank."""
    global _allowed
    _allowed = True


def of_environment() -> World:
    """The place that torchrun gave this process by its environment; without torchrun it is the only rank."""
    number = int(os.environ.get("WORLD_SIZE", 1)) if _allowed and "LOCAL_RANK" in os.environ else 1
    if number == 1:
        return ONLY
    rank, local_rank, local_size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    return World(rank, number, local_rank, local_size)


def check(number: int) -> None:
    """Raises InputError for a number of ranks that would not end with the bytes of one."""
    if number < 1 or (CHUNKS % number and number % CHUNKS):
        raise InputError(
            f"{number} ranks cannot share a run: the text has {CHUNKS} chunks, so that any number of ranks ends with "
            f"the same bytes. Choose 1, 2, 4, 8 or a multiple of 8."
        )


def start() -> None:
    """Join the other ranks if torchrun started this process. Raises InputError for a number that cannot be."""
    global _world
    allow()
    joining = of_environment()
    if joining.size == 1 or _world is not None:
        return
    check(joining.size)
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(joining.local_rank % torch.cuda.device_count())
        if torch.cuda.device_count() >= joining.local_size:  # NCCL has no two ranks on one device
            backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=PATIENCE)
    _world = joining


def stop() -> None:
    """Wait until all ranks have come here, and part."""
    global _world
    if _world is not None:
        barrier()
        dist.destroy_process_group()
        _world = None


def size() -> int:
    """The number of ranks that share what is done now."""
    return 1 if _world is None or _alone.get() else _world.size


def place() -> World:
    """The place of this process among the ranks that have joined."""
    return _world or ONLY


def rank() -> int:
    return place().rank


def is_first() -> bool:
    """True for the rank that writes files and messages; also where there is only one."""
    return rank() == 0


@contextmanager
def _set(variable: ContextVar[bool], value: bool) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def alone() -> AbstractContextManager[None]:
    """Inside, nothing is shared: this rank does all that it is asked."""
    return _set(_alone, True)


def together() -> AbstractContextManager[None]:
    """Inside, all ranks do the same work in the same order, so that they may share the rows of a product."""
    return _set(_together, True)


def apart(function: Callable[[S], T]) -> Callable[[S], T]:
    """The function outside of `together`, for work whose order is not known."""

    def called(argument: S) -> T:
        with _set(_together, False):
            return function(argument)

    return called if _together.get() else function


def share_of(number: int) -> tuple[range, list[int]]:
    """The pieces of work of this rank, and the edges of all shares. Outside of `together`, all pieces and no edges."""
    if size() == 1 or not _together.get():
        return range(number), []
    edges = _edges(number)
    return range(edges[rank()], edges[rank() + 1]), edges


def speaks(code: int) -> int | None:
    """Claim the right to report a failure: None for the first rank that does, else the exit code of that one."""
    if _world is None:  # not joined: all ranks fail alike
        return None if of_environment().rank == 0 else code
    store = dist.distributed_c10d._get_default_store()
    try:
        claim = store.compare_set("mspc failed", "", f"{rank()} {code}").decode()
    except RuntimeError:  # the launcher has gone, and with it the store
        return code
    first, known = map(int, claim.split())
    return None if first == rank() else known


def await_report(error: BaseException | None = None) -> None:
    """Give the first rank that failed time to say so, and where one was killed, give it to the launcher."""
    if error is None or isinstance(error, LostRank):
        time.sleep(SECONDS_OF_GRACE)


@contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostRank(
            f"rank {rank()} lost its connection to another rank, which ended or left the network ({in_brief(error)}). "
            "Run the command again: `mspc compress` goes on with --resume."
        ) from error


# The text


def num_groups() -> int:
    """The number of different parts of the text that ranks have."""
    return min(size(), CHUNKS)


def chunks(length: int) -> list[range]:
    """The sequences of each chunk, of `length` in all."""
    edges = [length * i // CHUNKS for i in range(CHUNKS + 1)]
    return [range(begin, end) for begin, end in pairwise(edges)]


def own_chunks() -> range:
    """The numbers of the chunks of this rank."""
    if size() == 1:
        return range(CHUNKS)
    group, each = rank() * num_groups() // size(), CHUNKS // num_groups()
    return range(each * group, each * (group + 1))


def _sources() -> list[int]:
    """The first rank of each part of the text."""
    return list(range(0, size(), size() // num_groups()))


class TextSum:
    """A sum over the text, added in the fixed tree. At most 3 sums of chunks wait for the one that is added to."""

    def __init__(self, zeros: Callable[[], Tensor]) -> None:
        self.zeros = zeros
        self.chunk = own_chunks().start
        self.current: Tensor | None = None
        self.waiting: list[tuple[int, Tensor | None]] = []
        """The level of each in the tree, and the sum; None of chunks without text."""

    def of(self, chunk: int) -> Tensor:
        """The tensor that the next part of the text is to be added to. Chunks never decrease."""
        while self.chunk < chunk:
            self._end_chunk()
        if self.current is None:
            self.current = self.zeros()
        return self.current

    def _end_chunk(self) -> None:
        value, level = self.current, 0
        while self.waiting and self.waiting[-1][0] == level:
            value, level = _added(self.waiting.pop()[1], value), level + 1
        self.waiting.append((level, value))
        self.current, self.chunk = None, self.chunk + 1

    def total(self) -> Tensor:
        """The sum over the text of all ranks, on every rank."""
        while self.chunk < own_chunks().stop:
            self._end_chunk()
        ((_, value),) = self.waiting
        if value is None:
            raise InputError(f"rank {rank()} has no text. Give at least {num_groups()} sequences, or fewer ranks.")
        return _total(value)


def _added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one.add_(other)


def _total(value: Tensor) -> Tensor:
    """The sum of the values of all parts of the text, each a subtree. Every rank adds its share of the elements."""
    if size() == 1:
        return value
    sources, flat = _sources(), _on_wire(value.contiguous().view(-1))
    edges = _edges(flat.numel())
    own, lengths = edges[rank() + 1] - edges[rank()], [b - a for a, b in pairwise(edges)]
    received = flat.new_empty(own * len(sources))
    is_source = rank() in sources
    with _connected():
        dist.all_to_all_single(
            received, flat if is_source else flat[:0],
            [own if source in sources else 0 for source in range(size())],
            lengths if is_source else [0] * size(),
        )  # fmt: skip
    parts = list(received.view(len(sources), own))
    while len(parts) > 1:
        parts = [one.add_(other) for one, other in zip(parts[::2], parts[1::2], strict=True)]
    flat[edges[rank()] : edges[rank() + 1]] = parts[0]
    share(flat, edges)
    return flat.view(value.shape).to(value.device)


def _edges(length: int) -> list[int]:
    """The beginnings of the ranks' shares in `length` things, and the end of the last one."""
    return [length * i // size() for i in range(size() + 1)]


def share(rows: Tensor, edges: Sequence[int]) -> None:
    """Fill a tensor: the rows from `edges[r]` to `edges[r + 1]` are those of rank r."""
    wired = _on_wire(rows)
    with _connected():
        for source, (begin, end) in enumerate(pairwise(edges)):
            if begin < end:
                dist.broadcast(wired[begin:end], source)
    if wired is not rows:
        rows.copy_(wired)


def _on_wire(tensor: Tensor) -> Tensor:
    """The tensor where its backend can send it: gloo sends from host memory."""
    on_device = tensor.device.type == "cpu" or "nccl" in dist.get_backend_config()
    return tensor if on_device else tensor.cpu()


# Small values


def barrier() -> None:
    count(0)


def count(number: int) -> int:
    """The sum of whole numbers over the parts of the text."""
    if size() == 1:
        return number
    summed = torch.tensor([number if rank() in _sources() else 0])
    with _connected():
        dist.all_reduce(summed)
    return int(summed)


def every(condition: bool) -> bool:
    """True if it is so on every rank."""
    if size() == 1:
        return condition
    least = torch.tensor([int(condition)])
    with _connected():
        dist.all_reduce(least, dist.ReduceOp.MIN)
    return bool(least)


def gathered(values: Sequence[T]) -> list[T]:
    """JSON values of each part of the text, in its order."""
    if size() == 1:
        return list(values)
    return [value for source in _sources() for value in from_rank(source, list(values))[0]]


def of_each(value: T) -> list[T]:
    """The JSON value of each rank."""
    return [from_rank(source, value)[0] for source in range(size())]


def by_first(function: Callable[[], T]) -> T:
    """The JSON value that a function returns on the first rank, which runs it alone."""
    if size() == 1:
        return function()
    value: Any = None
    if is_first():
        with alone():
            value = function()
    return from_rank(0, value)[0]


def from_rank(
    source: int, value: Any = None, tensors: Mapping[str, Tensor] | None = None
) -> tuple[Any, dict[str, Tensor]]:
    """A JSON value and tensors as that rank has them, on every rank; what others give is not looked at."""
    mine = dict(tensors or {}) if size() == 1 or rank() == source else {}
    if size() == 1:
        return value, mine
    shapes = [(name, str(t.dtype).removeprefix("torch."), list(t.shape), t.device.type) for name, t in mine.items()]
    told = json.dumps([value, shapes]).encode() if rank() == source else b""
    length = torch.tensor([len(told)])
    with _connected():
        dist.broadcast(length, source)
        buffer = torch.frombuffer(bytearray(told or int(length)), dtype=torch.uint8)
        dist.broadcast(buffer, source)
    value, shapes = json.loads(buffer.numpy().tobytes())
    for name, dtype, shape, device in shapes:
        known = mine.get(name)
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device) if known is None else known.contiguous()
        if tensor.numel():
            wired = _on_wire(tensor.view(-1).view(torch.uint8))
            with _connected():
                dist.broadcast(wired, source)
            if known is None:
                tensor.view(-1).view(torch.uint8).copy_(wired)
        mine.setdefault(name, tensor)
    return value, mine


def owners(costs: Sequence[float]) -> list[int]:
    """The rank of each piece of work: the dearest first, to the rank that has least to do."""
    loads, found = [0.0] * size(), [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        found[item] = loads.index(min(loads))
        loads[found[item]] += costs[item]
    return found
