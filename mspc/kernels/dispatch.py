"""Chooses how to multiply by a repacked matrix, by the number of tokens.

    fused        the kernel of the format, which reads the compressed weight once; for up to its MAX_TOKENS
    expanded     the dense weight is written to a temporary buffer, and torch multiplies; for any number of tokens. It
                 moves the dense weight twice more than a dense model does, so it is slower at tens of tokens. On a CPU
                 the buffer is a strip of rows that stays in the cache
    cusparselt   sparse tensor cores, for bfloat16 matrices of 2:4 and many tokens, if their copy of the weight is held

A schedule holds these choices. `guessed` needs no measurement; `measure` times all methods on the device and writes the
fastest to the user's cache (`timings`). A schedule is made before the product, which is one operator (`product`).

Here, and only here, a product runs in Triton, in C++ or in torch: in Triton where the tensors are on a GPU (or its
interpreter is on), in C++ where they were repacked for the CPU, else by `reference`.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from mspc.formats.description import StoredMatrix
from mspc.kernels import Kernel, cusparselt, reference, timings
from mspc.kernels.cpu import kernel as cpu
from mspc.kernels.launch import launches
from mspc.kernels.timings import Choice

ANY_NUMBER = 2**62
MEASURED_TOKENS = tuple(2**i for i in range(13))
COPY = "cusparselt"
"""Name of the tensor that holds the copy for cuSPARSELt, next to those of the kernel."""


def matmul(
    x: Tensor,
    kernel: Kernel,
    repacked: dict[str, Tensor],
    matrix: StoredMatrix,
    schedule: tuple[Choice, ...],
    planes: int = 2,
) -> Tensor:
    """x (T, I) -> x Wᵀ (T, O), for any T, in the dtype that kernel, tensors and schedule were made for.

    On a CPU x may be (..., I), and `planes` is that of `cpu.product`.
    """
    num_rows, num_columns = matrix.shape
    num_tokens = x.numel() // num_columns
    if num_tokens == 0:
        return x.new_empty(*x.shape[:-1], num_rows)
    for choice in schedule:
        if num_tokens <= choice.up_to:
            break
    return multiply(choice, x, kernel, repacked, matrix, planes)


def multiply(
    choice: Choice, x: Tensor, kernel: Kernel, repacked: dict[str, Tensor], matrix: StoredMatrix, planes: int = 2
) -> Tensor:
    """x (T, I) -> x Wᵀ (T, O) by one method."""
    if kernel is cpu and choice.method == "fused":
        return cpu.product(x, repacked, matrix, planes)
    if choice.method == "cusparselt":
        return cusparselt.matmul(x, repacked[COPY], choice.algorithm)
    if choice.method == "expanded":
        if kernel is cpu:
            return cpu.multiply_expanded(x, repacked, matrix)
        return linear(x, expand(kernel, repacked, matrix, x.dtype))
    assert choice.method == "fused"
    if launches(x):
        return kernel.matmul(x, repacked, matrix)
    return reference.matmul(x, kernel.unrepack(repacked, matrix), matrix)


def expand(kernel: Kernel, repacked: dict[str, Tensor], matrix: StoredMatrix, dtype: torch.dtype) -> Tensor:
    """The dense weight (O, I) on the device of the repacked tensors, rounded to `dtype`."""
    weight = torch.empty(matrix.shape, dtype=dtype, device=device_of(repacked))
    if kernel is cpu or launches(weight):
        kernel.expand(repacked, matrix, weight)
    else:
        weight.copy_(reference.weight(kernel.unrepack(repacked, matrix), matrix))
    return weight


def copy_for_cusparselt(
    kernel: Kernel, repacked: dict[str, Tensor], matrix: StoredMatrix, dtype: torch.dtype
) -> Tensor | None:
    """The weight in the format of cuSPARSELt, or None if matrix or device do not allow it."""
    if not cusparselt.fits(matrix, dtype) or cusparselt.missing(device_of(repacked)):
        return None
    return cusparselt.compress(expand(kernel, repacked, matrix, dtype))


def schedule(
    kernel: Kernel, repacked: dict[str, Tensor], matrix: StoredMatrix, dtype: torch.dtype, measured: bool = False
) -> tuple[Choice, ...]:
    """The choices for `matmul`: those in the cache of measurements for this GPU, else guessed ones.

    `measured` measures them first if the cache has none. The last choice is for any number of tokens.
    """
    device, choices = device_of(repacked), None
    if device.type == "cuda":
        key = timings.device_key(device), timings.matrix_key(matrix, dtype)
        choices = timings.read(*key)
        if choices is None and measured:
            choices = measure(kernel, repacked, matrix, dtype)
            timings.write(*key, choices)
    return usable(choices or guessed(kernel, repacked, matrix), kernel, repacked)


def usable(choices: list[Choice], kernel: Kernel, repacked: dict[str, Tensor]) -> tuple[Choice, ...]:
    """Choices limited to this layer. The cache may come from one with a copy, or a kernel that took more tokens."""
    limited = [
        choice._replace(up_to=min(choice.up_to, kernel.MAX_TOKENS)) if choice.method == "fused" else choice
        for choice in choices
        if choice.method in ("fused", "expanded") or (choice.method == "cusparselt" and COPY in repacked)
    ]
    return *limited, Choice(ANY_NUMBER, "expanded", 0)


def guessed(kernel: Kernel, repacked: dict[str, Tensor], matrix: StoredMatrix) -> list[Choice]:
    """The kernel for as many tokens as it takes, then cuSPARSELt if its copy is there."""
    choices = [Choice(cpu.fused_up_to() if kernel is cpu else kernel.MAX_TOKENS, "fused", 0)]
    if COPY in repacked:
        algorithms = cusparselt.algorithms(matrix.shape, device_of(repacked))
        choices += [Choice(up_to, "cusparselt", algorithm) for up_to, algorithm in algorithms]
        choices[-1] = choices[-1]._replace(up_to=ANY_NUMBER)
    return choices


def milliseconds(call: Callable[[], Tensor]) -> float:
    """The median time of a few calls, each with a cold cache."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=40, return_mode="median"))


def measure(
    kernel: Kernel,
    repacked: dict[str, Tensor],
    matrix: StoredMatrix,
    dtype: torch.dtype,
    time: Callable[[Callable[[], Tensor]], float] = milliseconds,
) -> list[Choice]:
    """Time every usable method for 1, 2, 4, ... tokens. Returns the fastest ones."""
    device = device_of(repacked)
    choices: list[Choice] = []
    for num_tokens in MEASURED_TOKENS:
        x = torch.randn(num_tokens, matrix.shape[1], device=device).to(dtype)
        candidates = [Choice(num_tokens, "expanded", 0)]
        if num_tokens <= kernel.MAX_TOKENS:
            candidates.append(Choice(num_tokens, "fused", 0))
        if COPY in repacked:
            candidates.append(Choice(num_tokens, "cusparselt", cusparselt.search(x, repacked[COPY])))
        took = {choice: time(partial(multiply, choice, x, kernel, repacked, matrix)) for choice in candidates}
        best = min(candidates, key=lambda choice: took[choice])
        if choices and choices[-1][1:] == best[1:]:
            choices.pop()
        choices.append(best)
    choices[-1] = choices[-1]._replace(up_to=ANY_NUMBER)
    return choices


def device_of(repacked: dict[str, Tensor]) -> torch.device:
    return next(iter(repacked.values())).device
