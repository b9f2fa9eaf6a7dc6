"""Timings of this CPU for one model: its products by shape, format and sparsity, its head, and the rest of a token.

Each product is timed by passes over as many copies as the model has bytes (`MOST_BYTES` at most), as a token reads all
weights once. A large matrix is timed by some of its rows, as the products stream rows. With one thread the time is that
of the processor, to which other processes do not count; with more it is that of the clock. They still take caches and
bandwidth, so the lower quartile counts.
"""

import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import TypeVar

import torch
from torch import Tensor, nn

from mspc.errors import InputError, StorageError
from mspc.formats import layout
from mspc.formats.description import StoredMatrix
from mspc.kernels.cpu import building, memory
from mspc.kernels.cpu.library import ISAS, isa, library
from mspc.kernels.cpu.step import one_by_one
from mspc.model.outline import outlined
from mspc.pipeline.in_time import token_work
from mspc.pipeline.rates import device_name
from mspc.planning.allocation import choose_group_size
from mspc.planning.time_budget import TimeBudget
from mspc.planning.timings import (
    DENSE,
    MASK,
    TORCH,
    TWO_FOUR,
    Product,
    Timings,
    name_of,
    read_timings,
    write_timings,
)
from mspc.planning.token_work import Size, Sizes, TokenWork
from mspc.progress import Event, Progress, as_progress, log
from mspc.recipe import Recipe
from mspc.runtime.joined import DenseLinear
from mspc.runtime.linear import SparseLinear
from mspc.runtime.stand_in import lookup_seconds, rest_seconds
from mspc.settings import HEAD_BITS, Settings
from mspc.storage.files import cache_folder
from mspc.threads import count as count_threads
from mspc.threads import of_torch
from mspc.types import BITS, NM, Codes, CompressedLinear, Grid, Target, Unstructured
from mspc.version import __version__

SPARSITIES = (1 / 32, 0.25, 0.5, 0.75, 31 / 32)
"""Shares of zeros behind a mask that are timed; others are interpolated."""
MOST_WEIGHTS = 2**21
"""Weights of a product that is timed; of a larger matrix some rows stand for all."""
MOST_BYTES, LEAST_BYTES = 2**27, 2**20
"""Bytes of the copies that a pass reads."""
PASSES = 5
REST_IN, MOST_OF_BLOCKS = "int4", 2**29
"""The format of the products between which the rest of a token is timed, and the most bytes of their blocks."""
ROWS = 16
"""Rows of a block of the products in C++."""
SEED = 0
COMPUTED = torch.float32
"""The dtype of inputs on a CPU."""
Layers = TypeVar("Layers", bound=nn.Module)


def known_or_measured(work: TokenWork, settings: Settings, asked: int | None, progress: Progress) -> Timings:
    """The timings of this CPU for this model: those that were kept for as many threads, else measured now, and kept.

    Raises InputError where the products in C++ are not there.
    """
    number = count_threads(asked)
    _check()
    path = _file(work, settings, number)
    if path.is_file():
        with suppress(InputError):  # a damaged one
            found = read_timings(path)
            log.info(f"Timings: taken from {path}, of {found.date}.")
            return found
    found = measured(work, settings, number, progress)
    with suppress(StorageError):  # a cache that cannot be written: they are measured again next time
        write_timings(path, found)
    return found


def time_products(
    model: str | Path, recipe: Recipe | None = None, *, out: str | Path, threads: int | None = None,
    progress: bool | Callable[[Event], object] | Progress = True,
) -> TimeBudget:  # fmt: skip
    """Time what a token of a model takes on this CPU, in seconds to a minute, by config.json alone.

    Args:
        model: Checkpoint folder, .gguf file, or hub id.
        recipe: Its `group_size` and `asymmetric` count, which a run with the timings must have, too.
        out: JSON file to write, which `Recipe(timings=...)` takes on any machine.
        threads: Threads of the CPU that will serve. None: OMP_NUM_THREADS, or the cores that the process may use.
        progress: See `mspc.compress`.

    Returns a budget whose `ms_of` predicts the time of any plan. Raises InputError for a model that is not like Llama,
    and without the products in C++.
    """
    found = outlined(str(model))
    asked = {} if recipe is None else {name: getattr(recipe, name) for name in ("group_size", "asymmetric")}
    matrices = found.matrices(())
    settings = choose_group_size(Recipe(speedup=1.0, **asked).settings(), matrices)
    work = token_work(found, matrices, (), ())
    _check()
    number = count_threads(threads)
    timings = measured(work, settings, number, as_progress(progress))
    for path in (_file(work, settings, number), Path(out)):
        write_timings(path, timings)
    return TimeBudget(settings, work, timings)


def _check() -> None:
    if library() is None:
        raise InputError(
            "A budget in time needs the products in C++ of this CPU, and they are not there. Install g++ 11 or newer, "
            "or bring the timings of a machine that has them (timings)."
        )


def kernels() -> str:
    """The version of all that products depend on."""
    return f"mspc {__version__}, torch {torch.__version__}, {ISAS[isa()]}, kernels {building.fingerprint() % 2**32:08x}"


def _file(work: TokenWork, settings: Settings, number: int) -> Path:
    """The file in the cache for all that the timings depend on."""
    sizes = sorted({*work.linears, work.head_size})
    key = [
        device_name(torch.device("cpu")), number, kernels(), asdict(work.sizes), sizes, sum(map(_numel, work.linears)),
        str(work.dtype), settings.group_size, settings.asymmetric, settings.rows_if_needed,
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "timings" / f"{digest}.json"


def measured(work: TokenWork, settings: Settings, number: int, progress: Progress) -> Timings:
    """Measure them, in seconds to a minute."""
    wanted, products = list(_wanted(work)), {}
    clock = clock_of(number)
    with (
        of_torch(number),
        torch.no_grad(),
        progress.stage("Timing products", len(wanted) + 1) as step,
    ):
        for product in wanted:
            products[product] = 1e3 * seconds_of(product, work, settings, clock)
            step(f"{product.kind} {product.numbers}")
        of_products = sum(products[Product(size, DENSE, REST_IN)] for size in work.sizes.linears) / 1e3
        rest = rest_seconds(work.sizes, list(_blocks(work.sizes, settings)), of_products, clock)
        lookup = lookup_seconds(work.sizes.hidden, clock)
        step("attention, norms and the rest")
    return Timings(
        device_name(torch.device("cpu")), number, kernels(), date.today().isoformat(), settings.group_size,
        not settings.asymmetric, work.sizes, 1e3 * rest, 1e3 * lookup, products,
    )  # fmt: skip


def _blocks(sizes: Sizes, settings: Settings) -> Iterator[list[SparseLinear]]:
    """The layers of as many blocks as there is room for, two at least, at addresses of their own."""
    first = {size: _sparse_layer(Product(size, DENSE, REST_IN), settings) for size in set(sizes.linears)}
    num_bytes = sum(buffer.nbytes for size in sizes.linears for buffer in first[size].buffers())
    for _ in range(min(sizes.blocks, max(2, MOST_OF_BLOCKS // num_bytes))):
        yield [_copy_of(first[size]) for size in sizes.linears]


def clock_of(number: int) -> Callable[[], float]:
    """Seconds of the processor in this thread, which does all work if there is one; else those of the clock."""
    return time.thread_time if number == 1 else time.perf_counter


def _numel(size: Size) -> int:
    return size[0] * size[1]


def _wanted(work: TokenWork) -> Iterator[Product]:
    """All products of a token in any format that a plan may choose, and those of the baselines."""
    dtypes = dict.fromkeys((name_of(work.dtype), "bfloat16"))
    numbers = [*dtypes, *(f"int{bits}" for bits in BITS)]
    for size in sorted(set(work.linears)):
        for number in numbers:
            yield Product(size, DENSE, number)
            if size[1] % 4 == 0:
                yield Product(size, TWO_FOUR, number)
            yield from (Product(size, MASK, number, sparsity) for sparsity in SPARSITIES)
        yield from (Product(size, TORCH, name_of(dtype)) for dtype in (COMPUTED, torch.bfloat16))
    head = work.head_size
    yield from (Product(head, TORCH, name_of(dtype)) for dtype in (COMPUTED, torch.bfloat16))
    yield from (Product(head, DENSE, number) for number in (*dtypes, *(f"int{bits}" for bits in HEAD_BITS)))


def _others(work: TokenWork, size: Size) -> int:
    """Bytes that a token reads apart from products of one kind, about: the matrices for a head, or else the head."""
    return sum(map(_numel, work.linears)) // 2 if size == work.head_size else _numel(work.head_size)


def seconds_of(product: Product, work: TokenWork, settings: Settings, clock: Callable[[], float]) -> float:
    """Seconds of a product as a part of a token: by passes over copies at addresses of their own.

    Rows that are left out count as much as those that are timed, and the start of a call counts once.
    """
    rows, columns = product.shape
    part = min(rows, max(ROWS, MOST_WEIGHTS // columns // ROWS * ROWS))
    layer = layer_of(replace(product, shape=(part, columns)), settings)
    num_bytes = sum(buffer.nbytes for buffer in layer.buffers())
    same = rows * columns if product.shape == work.head_size else sum(map(_numel, work.linears))
    read = same * num_bytes // (part * columns) + _others(work, product.shape)
    count = max(1, min(max(read, LEAST_BYTES), MOST_BYTES) // num_bytes)
    copies = [layer, *(_copy_of(layer) for _ in range(count - 1))]
    x = torch.randn(1, 1, columns, generator=torch.Generator().manual_seed(SEED)).to(_inputs_of(product))
    found = _seconds_of_call(copies, x, clock)
    if part == rows:
        return found
    small = [layer_of(replace(product, shape=(ROWS, columns)), settings)] * 64
    start = min(_seconds_of_call(small, x, clock), found)
    return start + (found - start) * rows / part


def _seconds_of_call(layers: list[nn.Module], x: Tensor, clock: Callable[[], float]) -> float:
    """The lower quartile over passes of the mean over layers, after a pass that warms up.

    Compressed layers run one after the other in C++, as in a step, and those of torch in Python.
    """
    found, sparse = [], [layer for layer in layers if isinstance(layer, SparseLinear)]
    run: Callable[[], None] = partial(_run, layers, x)
    if sparse:
        run = one_by_one(x.flatten(), [layer.repacked() for layer in sparse], sparse[0].matrix)
    for _ in range(PASSES + 1):
        begin = clock()
        run()
        found.append((clock() - begin) / len(layers))
    return quantiles(found[1:], n=4, method="inclusive")[0]


def _run(layers: list[nn.Module], x: Tensor) -> None:
    for layer in layers:
        layer(x)


def _inputs_of(product: Product) -> torch.dtype:
    return getattr(torch, product.numbers) if product.kind == TORCH else COMPUTED


def _copy_of(layer: Layers) -> Layers:
    """A copy in other memory, in huge pages as all weights are that the bench measures."""
    twin = copy.copy(layer)  # a deep copy takes longer than all that is timed
    twin._buffers = {
        name: buffer if buffer is None else memory.copied(buffer) for name, buffer in layer._buffers.items()
    }
    return twin


def layer_of(product: Product, settings: Settings) -> nn.Module:
    """A layer with random weights, prepared for this CPU."""
    if product.kind == TORCH:
        weight = torch.randn(product.shape, generator=torch.Generator().manual_seed(SEED)).to(
            getattr(torch, product.numbers)
        )
        return DenseLinear(memory.copied(weight))
    return _sparse_layer(product, settings)


def _sparse_layer(product: Product, settings: Settings) -> SparseLinear:
    generator = torch.Generator().manual_seed(SEED)
    mask, pattern = _mask_of(product, generator)
    grid, dtype, codes = None, torch.bfloat16, None
    weight = torch.randn(product.shape, generator=generator)
    if product.numbers.startswith("int"):
        grid = settings.grid_for(product.shape[1], int(product.numbers[3:]))
        assert grid is not None
        codes = _codes(product.shape, grid, generator)
    else:
        dtype = getattr(torch, product.numbers)
    matrix = StoredMatrix(product.shape, pattern, grid, dtype)
    stored = layout.pack(CompressedLinear(weight, mask, Target(pattern, grid), codes), dtype)
    layer = SparseLinear.of(layout.with_offsets(stored, matrix, "a random matrix"), matrix)
    layer.prepare(COMPUTED, "cpu")
    return layer


def _mask_of(product: Product, generator: torch.Generator) -> tuple[Tensor, Unstructured | NM]:
    """A random mask (O, I) of the kind, and its pattern."""
    rows, columns = product.shape
    if product.kind == DENSE:
        return torch.ones(product.shape, dtype=torch.bool), Unstructured(0.0)
    drawn = torch.rand(product.shape, generator=generator)
    if product.kind == TWO_FOUR:
        ranks = drawn.view(rows, columns // 4, 4).argsort(-1).argsort(-1)
        return (ranks < 2).view(product.shape), NM(2, 4)
    mask = drawn >= product.sparsity
    return mask, Unstructured(1 - int(torch.count_nonzero(mask)) / mask.numel())


def _codes(shape: Size, grid: Grid, generator: torch.Generator) -> Codes:
    rows, columns = shape
    groups = columns // (grid.group_size or columns)
    values = torch.randint(2**grid.bits, shape, dtype=torch.uint8, generator=generator)
    scales = torch.rand((rows, groups), generator=generator).half()
    return Codes(values, scales, torch.full((rows, groups), 2 ** (grid.bits - 1), dtype=torch.uint8))
