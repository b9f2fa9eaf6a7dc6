"""Seconds per GB of bf16 weights between solving a matrix and having it on disk, on the CPU.

    python benchmarks/commit_speed.py [--repeats 3] [--threads 1 2] [--json FILE]

`before` is the work that the solve loop once did itself: pack, unpack, check, digest, write. `loop` is what is left
of it in the loop (`as_stored` and the check for infinity), and `background` is what the committing thread does. The
matrices are the k_proj and q_proj of a block of an 8B model, with random weights, since only bytes matter here. The
three are measured in turn in one process. CPU seconds leave out waiting for the disk and for other processes.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy
import torch
from rich.console import Console
from rich.table import Table

from mspc.formats.layout import as_stored, digest, pack, unpack
from mspc.pipeline.solve_blocks import SolvedMatrix, commit_block
from mspc.storage.files import sha256_of, write_tensors
from mspc.storage.journal import Journal
from mspc.types import NM, Codes, CompressedLinear, Grid, Matrix, PlannedMatrix, Target, Unstructured

SHAPES = {"k_proj": (1024, 4096), "q_proj": (4096, 4096)}
GB = sum(2 * rows * columns for rows, columns in SHAPES.values()) / 1e9
GB_OF_8B = 16
INT4 = Grid(4, 128)
TARGETS = {
    "50%": Target(Unstructured(0.5)), "2:4": Target(NM(2, 4)), "2:4+int4": Target(NM(2, 4), INT4),
    "50%+int4": Target(Unstructured(0.5), INT4), "int4": Target(Unstructured(0.0), INT4),
}  # fmt: skip
DTYPE = torch.bfloat16
PARTS = ("before", "loop", "background")


def random_matrix(shape: tuple[int, int], target: Target) -> CompressedLinear:
    """One random weight of every two is kept, which is 50% and 2:4 alike, or all are."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    first = torch.rand(rows, columns // 2, generator=generator) < 0.5
    mask = torch.stack([first, ~first], -1).view(shape)
    if target.pattern.sparsity == 0:
        mask = torch.ones_like(mask)
    if target.grid is None:
        return CompressedLinear(weight * mask, mask, target)
    values = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    scales = torch.rand(rows, columns // 128, generator=generator).half()
    codes = Codes(torch.where(mask, values, 8), scales, torch.full_like(scales, 8, dtype=torch.uint8))
    return CompressedLinear(weight, mask, target, codes)


def before(matrices: dict[str, CompressedLinear], folder: Path) -> None:
    """Do all that the loop did until the change."""
    tensors = {}
    for name, matrix in matrices.items():
        packed = pack(matrix, DTYPE)
        back = unpack(packed, SHAPES[name], matrix.target, DTYPE)
        assert bool(back.weight.isfinite().all())
        digest(back)
        int(back.mask.sum())
        int((back.weight == 0).sum())
        tensors |= {f"{name}.{part}": tensor for part, tensor in packed.items()}
    write_tensors(folder / "before", tensors)
    sha256_of(folder / "before")


def loop(matrices: dict[str, CompressedLinear]) -> list[SolvedMatrix]:
    solved = []
    for name, matrix in matrices.items():
        stored = as_stored(matrix, DTYPE)
        assert bool(torch.stack(stored.weight.aminmax()).isfinite().all())
        planned = PlannedMatrix(name, SHAPES[name], matrix.target)
        solved.append(SolvedMatrix(Matrix(f"{name}.weight", SHAPES[name]), planned, stored, 0.0, 0.0, 0))
    return solved


def background(solved: list[SolvedMatrix], folder: Path) -> None:
    model = SimpleNamespace(tensor_key=lambda matrix: matrix.parameter)
    commit_block(model, 0, solved, folder, Journal.start(folder, {}), {})


def seconds_of(action: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock, and of the CPU."""
    begin, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - begin, time.process_time() - cpu


Seconds = dict[str, dict[str, list[float]]]


def measured(matrices: dict[str, CompressedLinear], repeats: int, folder: Path) -> Seconds:
    """Seconds per GB of each repeat, in ascending order, by clock and part."""
    solved = loop(matrices)
    parts = {
        "before": lambda: before(matrices, folder),
        "loop": lambda: loop(matrices),
        "background": lambda: background(solved, folder),
    }
    runs = [{part: seconds_of(action) for part, action in parts.items()} for _ in range(repeats)]
    return {
        clock: {part: sorted(run[part][i] / GB for run in runs) for part in parts}
        for i, clock in enumerate(("wall", "cpu"))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, default=Path("out/commit_speed.json"))
    args = parser.parse_args()
    rows = []
    table = Table(
        "target",
        "threads",
        *PARTS,
        *(f"{part}, CPU" for part in PARTS),
        *(f"8B {part}, CPU" for part in PARTS),
        box=None,
    )
    with tempfile.TemporaryDirectory(prefix="mspc-commit-") as folder:
        for name, target in TARGETS.items():
            matrices = {matrix: random_matrix(shape, target) for matrix, shape in SHAPES.items()}
            for threads in args.threads:
                torch.set_num_threads(threads)
                result = measured(matrices, args.repeats, Path(folder))
                rows.append({"target": name, "threads": threads, "seconds_per_gb": result})
                spreads = [
                    f"{statistics.median(values):.2f} ({values[0]:.2f}-{values[-1]:.2f})"
                    for clock in result.values()
                    for values in clock.values()
                ]
                totals = (f"{GB_OF_8B * statistics.median(values):.0f} s" for values in result["cpu"].values())
                table.add_row(name, str(threads), *spreads, *totals)
    result = {
        "date": date.today().isoformat(),
        "hardware": f"CPU, {os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f} at the end",
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "torch": torch.__version__, "numpy": numpy.__version__, "python": platform.python_version(),
        "shapes": SHAPES, "gb": GB, "dtype": "bfloat16", "grid": "4 bits, groups of 128, symmetric",
        "repeats": args.repeats, "rows": rows,
    }  # fmt: skip
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
