"""Seconds of the solvers on experts of one shape: alone, and as one batch, on the CPU.

    python benchmarks/expert_batches.py [--experts 8] [--repeats 3] [--threads 1 2] [--json FILE]

Random weights and Grams, 50% + int4 in groups of 128. `fisher` is the solver of `--effort fast`, `kfac` the default
one. Both ways are measured in turn in one process, and their results are compared bit by bit. With two threads each
works on its own experts, or on its own half of the batch.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from mspc import threads
from mspc.passes.gradients import fisher_block_size
from mspc.solvers import SOLVERS, STEPS, SolverOptions
from mspc.solvers.rounding import largest_batch, together
from mspc.types import CompressedLinear, GramStats, Grid, Target, Unstructured

CPU = torch.device("cpu")
SHAPES = [(256, 128), (256, 256), (1024, 512), (1536, 768), (1536, 2048)]
SOLVER_NAMES = ("fisher", "kfac")
TARGET = Target(Unstructured(0.5), Grid(4, 128))


def experts(count: int, rows: int, columns: int) -> list[tuple[torch.Tensor, GramStats]]:
    generator = torch.Generator().manual_seed(0)
    block = fisher_block_size(rows)
    found = []
    for _ in range(count):
        x = torch.randn(2 * columns, columns, generator=generator)
        x *= 1 + 3 * torch.rand(columns, generator=generator)
        g = torch.randn(rows // block, 2 * block, block, generator=generator) / block
        stats = GramStats(x.T @ x, len(x), output_fisher=g.mT @ g)
        found.append((torch.randn(rows, columns, generator=generator), stats))
    return found


def arguments(case: tuple[torch.Tensor, GramStats]) -> tuple[object, ...]:
    weight, stats = case  # with nothing kept from the time before
    own = GramStats(stats.gram, stats.num_tokens, output_fisher=stats.output_fisher)
    return weight, own, TARGET, SolverOptions(), "expert"


def alone(solver: str, cases: list[tuple[torch.Tensor, GramStats]], _: int) -> list[CompressedLinear]:
    return list(threads.run(lambda case: SOLVERS[solver](*arguments(case)), cases))  # type: ignore[arg-type]


def batched(solver: str, cases: list[tuple[torch.Tensor, GramStats]], number: int) -> list[CompressedLinear]:
    size = min(-(-len(cases) // number), largest_batch(tuple(cases[0][0].shape), CPU))
    batches = [cases[start : start + size] for start in range(0, len(cases), size)]
    parts = threads.run(lambda some: together([STEPS[solver](*arguments(case)) for case in some]), batches)
    return [found for part in parts for found in part]


def timed(work: Callable[[], list[CompressedLinear]]) -> tuple[list[CompressedLinear], float, float]:
    clock, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, time.perf_counter() - clock, time.process_time() - cpu


def row(solver: str, shape: tuple[int, int], number: int, count: int, repeats: int) -> dict[str, object]:
    cases = experts(count, *shape)
    seconds: dict[str, list[float]] = {}
    for _ in range(repeats):
        results = []
        for name, way in (("alone", alone), ("batch", batched)):
            found, clock, cpu = timed(lambda way=way: way(solver, cases, number))  # type: ignore[misc]
            seconds.setdefault(f"{name} clock", []).append(clock)
            seconds.setdefault(f"{name} cpu", []).append(cpu)
            results.append(found)
        if not all(torch.equal(a.weight, b.weight) for a, b in zip(*results, strict=True)):
            raise SystemExit(f"{solver} {shape}: a batch changes bits. Repair it.")
    size = min(-(-count // number), largest_batch(shape, CPU))
    ratios = {
        kind: statistics.median(a / b for a, b in zip(seconds[f"alone {kind}"], seconds[f"batch {kind}"], strict=True))
        for kind in ("clock", "cpu")
    }
    return {"solver": solver, "shape": shape, "threads": number, "batch": size, "speed_up": ratios, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shapes", nargs="+", default=[f"{rows}x{columns}" for rows, columns in SHAPES])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    for text in given.shapes:
        shape = (int(text.split("x")[0]), int(text.split("x")[1]))
        for solver in SOLVER_NAMES:
            for number in given.threads:
                with threads.using(number, CPU):
                    rows.append(row(solver, shape, number, given.experts, given.repeats))
                one = rows[-1]
                print({key: one[key] for key in ("solver", "shape", "threads", "batch", "speed_up")}, flush=True)
    record = {
        "date": date.today().isoformat(),
        "hardware": f"CPU, {os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f} at the end",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "experts": given.experts,
        "target": "50% + int4, groups of 128",
        "rows": rows,
    }
    if given.json:
        given.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
