"""Ratios of the products on a CPU: dense int4, 2:4+int4, bitmap+int4 and a plain read, in turns in one process.

    python benchmarks/cpu_kernels.py [--seconds 60] [--matrices 24]

CPU seconds of the process, so that a busy machine disturbs little; memory and caches that others use disturb it still.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

from mspc.formats.description import StoredMatrix
from mspc.kernels.cpu import kernel, library
from mspc.types import NM, Grid, Unstructured

SHAPE, GRID = (8192, 2048), Grid(4, 128)
FORMATS = {
    "dense int4": Unstructured(0.0),
    "2:4 + int4": NM(2, 4),
    "60% + int4": Unstructured(0.6),
    "70% + int4": Unstructured(0.7),
}


def repacked_copies(pattern: NM | Unstructured, number: int) -> tuple[StoredMatrix, list[dict[str, torch.Tensor]]]:
    """A random matrix, and copies of it in different memory."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from kernel_cases import stored

    matrix = StoredMatrix(SHAPE, pattern, GRID, torch.bfloat16)
    tensors = stored(matrix)
    return matrix, [kernel.repack(tensors, matrix) for _ in range(number)]


def multiply(x: torch.Tensor, matrix: StoredMatrix, copies: list[dict[str, torch.Tensor]]) -> None:
    for copy in copies:
        kernel.product(x, copy, matrix)


def read(copies: list[torch.Tensor]) -> None:
    for copy in copies:
        copy.sum()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--matrices", type=int, default=24)
    given = parser.parse_args()
    torch.set_num_threads(1)
    x, calls = torch.randn(1, SHAPE[1]), {}
    for name, pattern in FORMATS.items():
        matrix, copies = repacked_copies(pattern, given.matrices)
        calls[name] = partial(multiply, x, matrix, copies)
        if name == "dense int4":
            words = [copy["kept"][: copy["kept"].numel() // 8 * 8].view(torch.int64) for copy in copies]
            calls["plain read of dense int4"] = partial(read, words)
    took: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + given.seconds
    while time.perf_counter() < end:
        for name, call in calls.items():
            before = time.process_time()
            call()
            took[name].append(1000 * (time.process_time() - before) / given.matrices)
    print(f"{library.ISAS[library.isa()]}, {given.matrices} matrices of {SHAPE}, 1 token, CPU ms a matrix")
    base = statistics.median(took["dense int4"])
    for name, of_name in took.items():
        low, middle, high = statistics.quantiles(of_name, n=10)[0], statistics.median(of_name), max(of_name)
        print(f"{name:26} {middle:.3f} (p10 {low:.3f}, most {high:.3f}, n {len(of_name)})  x{base / middle:.2f}")


if __name__ == "__main__":
    main()
