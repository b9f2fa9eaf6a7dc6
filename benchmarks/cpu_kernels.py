"""Ratios of the products on a CPU, of several formats and instruction sets, in turns in one process.

    python benchmarks/cpu_kernels.py [--seconds 60] [--matrices 24] [--tokens 1] [--isas avx512] [--all]

`--isas avx2,portable` measures both with every format; the default is the best set. `--all` adds formats, and torch's
own products with the dense weight. CPU seconds of the process, so that a busy machine disturbs little; memory and
caches that others use disturb it still.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import linear

from mspc.formats.description import StoredMatrix
from mspc.kernels.cpu import kernel, library, memory
from mspc.types import NM, Grid, Unstructured

SHAPE = 8192, 2048
FORMATS = {
    "dense int4": (Unstructured(0.0), Grid(4, 128)),
    "2:4 + int4": (NM(2, 4), Grid(4, 128)),
    "60% + int4": (Unstructured(0.6), Grid(4, 128)),
    "70% + int4": (Unstructured(0.7), Grid(4, 128)),
}
MORE = {
    "dense int8": (Unstructured(0.0), Grid(8, 128)),
    "dense int3": (Unstructured(0.0), Grid(3, 128)),
    "dense int2": (Unstructured(0.0), Grid(2, 128)),
    "2:4 + int8": (NM(2, 4), Grid(8, 128)),
    "60% + int3": (Unstructured(0.6), Grid(3, 128)),
    "60% + int8": (Unstructured(0.6), Grid(8, 128)),
    "dense bfloat16": (Unstructured(0.0), None),
    "2:4 bfloat16": (NM(2, 4), None),
    "60% bfloat16": (Unstructured(0.6), None),
}
Copies = list[dict[str, torch.Tensor]]


def repacked_copies(pattern: NM | Unstructured, grid: Grid | None, number: int) -> tuple[StoredMatrix, Copies]:
    """A random matrix, and copies of it in different memory."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from kernel_cases import stored

    matrix = StoredMatrix(SHAPE, pattern, grid, torch.bfloat16)
    first = kernel.repack(stored(matrix), matrix)
    return matrix, [first, *({part: copied(tensor) for part, tensor in first.items()} for _ in range(number - 1))]


def copied(tensor: torch.Tensor) -> torch.Tensor:
    return memory.zeros(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)


def multiply(isa: str, x: torch.Tensor, matrix: StoredMatrix, copies: Copies) -> None:
    os.environ["MSPC_CPU_ISA"] = isa
    for copy in copies:
        kernel.product(x, copy, matrix)


def multiply_dense(x: torch.Tensor, weights: list[torch.Tensor]) -> None:
    for weight in weights:
        linear(x, weight)


def read(copies: list[torch.Tensor]) -> None:
    for copy in copies:
        copy.sum()


def all_calls(isas: list[str], tokens: int, number: int, more: bool) -> dict[str, Callable[[], None]]:
    x, calls = torch.randn(tokens, SHAPE[1]), {}
    for name, (pattern, grid) in (FORMATS | MORE if more else FORMATS).items():
        matrix, copies = repacked_copies(pattern, grid, number)
        for isa in isas:  # with tensors of its own, in the same memory
            views = [{part: tensor.view_as(tensor) for part, tensor in copy.items()} for copy in copies]
            calls[f"{name}, {isa}"] = partial(multiply, isa, x, matrix, views)
        if name == "dense int4":
            words = [copy["kept"][: copy["kept"].numel() // 8 * 8].view(torch.int64) for copy in copies]
            calls["plain read of dense int4"] = partial(read, words)
    for dtype in (torch.bfloat16, torch.float32) if more else ():
        weights = [memory.zeros(SHAPE[0] * SHAPE[1] * dtype.itemsize).view(dtype).view(SHAPE) for _ in range(number)]
        calls[f"torch, dense {str(dtype)[6:]}"] = partial(multiply_dense, x.to(dtype), weights)
    return calls


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--matrices", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--isas", default=library.ISAS[library.isa()])
    parser.add_argument("--all", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    calls = all_calls(given.isas.split(","), given.tokens, given.matrices, given.all)
    took: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + given.seconds
    while time.perf_counter() < end:
        for name, call in calls.items():
            before = time.process_time()
            call()
            took[name].append(1000 * (time.process_time() - before) / given.matrices)
    print(f"{given.matrices} matrices of {SHAPE}, {given.tokens} tokens, CPU ms a matrix")
    base = statistics.median(next(iter(took.values())))
    for name, of_name in took.items():
        low, middle, high = statistics.quantiles(of_name, n=10)[0], statistics.median(of_name), max(of_name)
        print(f"{name:26} {middle:.3f} (p10 {low:.3f}, most {high:.3f}, n {len(of_name)})  x{base / middle:.2f}")


if __name__ == "__main__":
    main()
