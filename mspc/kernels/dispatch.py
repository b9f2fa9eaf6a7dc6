"""Which way to multiply by a compressed matrix, by the number of tokens.

    fused        the kernel of its format, which reads the compressed weight once; for a few tokens
    expanded     the dense weight to a buffer that lives as long as the product, then torch; for any number. It moves
                 the dense weight twice more than a dense model does, so it is slower than one at tens of tokens
    cusparselt   sparse tensor cores, for 2:4 bfloat16 and many tokens } if there is a copy for it,
    tinygemm     torch's own int4 kernel                               } see `with_copies`
    fp8          sparse tensor cores, inputs and weights rounded to e4m3; taken if, and only if, there is its copy

What is taken unasked is a guess; `measure` times all on the device and remembers (`timings`). A `schedule` is made
before, not during, a product, which can then be traced.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from mspc.formats.description import StoredMatrix
from mspc.kernels import Kernel, cusparselt, fp8, kernel_for, timings, tinygemm
from mspc.kernels.launch import launches
from mspc.kernels.timings import Row

ANY_NUMBER = 2**62
MEASURED_TOKENS = tuple(2**i for i in range(13))
COPIES = {"cusparselt": ("cusparselt",), "tinygemm": ("tinygemm", "tinygemm_scales"), "fp8": ("fp8", "fp8_scales")}
"""The tensors beside those of the kernel that a method needs."""
UNASKED = ("cusparselt", "tinygemm")
"""Methods that compute what the stored matrix does, or nearly (`tinygemm`)."""


def schedule(arranged: dict[str, Tensor], description: StoredMatrix, dtype: torch.dtype) -> tuple[Row, ...]:
    """Methods by numbers of tokens, for `matmul`: what was measured on the device of `arranged`, else the guess.

    Only those that have their copies; the last is for any number.
    """
    kernel, device = _kernel(description, dtype), next(iter(arranged.values())).device
    if "fp8" in arranged:
        exact = Row(kernel.MAX_TOKENS, "fused", 0), Row(fp8.FEW_TOKENS, "expanded", 0)
        return *exact, *_searched("fp8", fp8.algorithms(description.shape, device))
    rows = None
    if device.type == "cuda":
        rows = timings.read(timings.device_key(device), timings.matrix_key(description, dtype))
    if rows is None:
        rows = [Row(kernel.MAX_TOKENS, "fused", 0)]
        if "cusparselt" in arranged:
            rows += _searched("cusparselt", cusparselt.algorithms(description.shape, device))
    there = [row for row in rows if set(COPIES.get(row.method, ())) <= arranged.keys()]
    # What was measured may be of an older kernel, and beyond its tokens a kernel computes nothing.
    there = [row._replace(up_to=min(row.up_to, kernel.MAX_TOKENS)) if row.method == "fused" else row for row in there]
    return *there, Row(ANY_NUMBER, "expanded", 0)


def _searched(method: str, algorithms: Sequence[tuple[int, int]]) -> list[Row]:
    """The last is for any number of tokens."""
    rows = [Row(up_to, method, algorithm) for up_to, algorithm in algorithms]
    return [*rows[:-1], rows[-1]._replace(up_to=ANY_NUMBER)]


def matmul(x: Tensor, arranged: dict[str, Tensor], description: StoredMatrix, rows: tuple[Row, ...]) -> Tensor:
    """x (T, I) -> x W^T (T, O), for any T. What is arranged, and the rows, are for the dtype of x."""
    if len(x) == 0:
        return x.new_empty(0, description.shape[0])
    row = next(row for row in rows if len(x) <= row.up_to)
    return METHODS[row.method](x, arranged, description, row.algorithm)


def _kernel(description: StoredMatrix, dtype: torch.dtype) -> Kernel:
    kernel = kernel_for(description, dtype)
    assert kernel is not None, "matrices without a kernel are not arranged"
    return kernel


def with_copies(
    arranged: dict[str, Tensor],
    description: StoredMatrix,
    dtype: torch.dtype,
    methods: Collection[str] = UNASKED,
) -> dict[str, Tensor]:
    """`arranged`, on the device, and the copies that these methods need there, where they can be used at all."""
    found = dict(arranged)
    device = next(iter(arranged.values())).device
    if "cusparselt" in methods and cusparselt.fits(description, dtype) and not cusparselt.missing(device):
        found["cusparselt"] = cusparselt.compress(_expanded_weight(arranged, description, dtype))
    if "tinygemm" in methods and tinygemm.usable(description, dtype):
        stored = _kernel(description, dtype).restore(arranged, description)
        packed = tinygemm.pack(stored, description, arranged["words"].device)
        found["tinygemm"], found["tinygemm_scales"] = packed
    if "fp8" in methods and fp8.fits(description):
        found["fp8"], found["fp8_scales"] = fp8.compress(_expanded_weight(arranged, description, dtype))
    return found


def _expanded_weight(arranged: dict[str, Tensor], description: StoredMatrix, dtype: torch.dtype) -> Tensor:
    device = next(iter(arranged.values())).device
    weight = torch.empty(description.shape, dtype=dtype, device=device)
    _kernel(description, dtype).expand(arranged, description, weight)
    return weight


def _fused(x: Tensor, arranged: dict[str, Tensor], description: StoredMatrix, algorithm: int) -> Tensor:
    return _kernel(description, x.dtype).matmul(x, arranged, description)


def _expanded(x: Tensor, arranged: dict[str, Tensor], description: StoredMatrix, algorithm: int) -> Tensor:
    return linear(x, _expanded_weight(arranged, description, x.dtype))


def _cusparselt(x: Tensor, arranged: dict[str, Tensor], description: StoredMatrix, algorithm: int) -> Tensor:
    return cusparselt.matmul(x, arranged["cusparselt"], algorithm)


def _tinygemm(x: Tensor, arranged: dict[str, Tensor], description: StoredMatrix, algorithm: int) -> Tensor:
    grid = description.target.grid
    assert grid is not None
    assert grid.group_size is not None
    return tinygemm.matmul(x, arranged["tinygemm"], arranged["tinygemm_scales"], grid.group_size)


def _fp8(x: Tensor, arranged: dict[str, Tensor], description: StoredMatrix, algorithm: int) -> Tensor:
    if not launches(x):
        return fp8.twin(x, _expanded_weight(arranged, description, x.dtype))
    return fp8.matmul(x, arranged["fp8"], arranged["fp8_scales"], algorithm)


METHODS: dict[str, Callable[[Tensor, dict[str, Tensor], StoredMatrix, int], Tensor]] = {
    "fused": _fused,
    "expanded": _expanded,
    "cusparselt": _cusparselt,
    "tinygemm": _tinygemm,
    "fp8": _fp8,
}


def tuned(arranged: dict[str, Tensor], description: StoredMatrix, dtype: torch.dtype) -> tuple[Row, ...]:
    """The schedule, measured first if this GPU never did. What rounds is not measured: it was asked for."""
    device = next(iter(arranged.values())).device
    if device.type == "cuda" and "fp8" not in arranged:
        key = timings.device_key(device), timings.matrix_key(description, dtype)
        if timings.read(*key) is None:
            measure(arranged, description, dtype)
    return schedule(arranged, description, dtype)


def milliseconds(call: Callable[[], Tensor]) -> float:
    """The median of a few calls, each with a cold cache."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=40, return_mode="median"))


def measure(
    arranged: dict[str, Tensor],
    description: StoredMatrix,
    dtype: torch.dtype,
    time: Callable[[Callable[[], Tensor]], float] = milliseconds,
) -> list[Row]:
    """Time every method that can be used for 1, 2, 4, ... tokens, and remember the fastest for `schedule`."""
    kernel, device = _kernel(description, dtype), next(iter(arranged.values())).device
    rows: list[Row] = []
    for num_tokens in MEASURED_TOKENS:
        x = torch.randn(num_tokens, description.shape[1], device=device).to(dtype)
        algorithms = {"expanded": 0}
        if num_tokens <= kernel.MAX_TOKENS:
            algorithms["fused"] = 0
        if "cusparselt" in arranged:
            algorithms["cusparselt"] = cusparselt.search(x, arranged["cusparselt"])
        if "tinygemm" in arranged:
            algorithms["tinygemm"] = 0
        took = {
            method: time(partial(METHODS[method], x, arranged, description, algorithm))
            for method, algorithm in algorithms.items()
        }
        best = min(took, key=lambda method: took[method])
        if rows and (rows[-1].method, rows[-1].algorithm) == (best, algorithms[best]):
            rows.pop()
        rows.append(Row(num_tokens, best, algorithms[best]))
    rows[-1] = rows[-1]._replace(up_to=ANY_NUMBER)
    timings.write(timings.device_key(device), timings.matrix_key(description, dtype), rows)
    return rows
