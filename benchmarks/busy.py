"""CPU seconds and wall time of the demo on a busy machine, where other processes spin.

python benchmarks/busy.py [--spinning 0 1 2 4] [--threads 1 2] [--repeats 3] [--tree DIR] [--json FILE]

Each run is `python examples/demo.py` in a process of its own, with its user and system seconds from the kernel. The
last column is these seconds over those of one thread with nothing else. `--tree` is another checkout, to compare
with. The threads are given as OMP_NUM_THREADS. Nothing else should run: the first row is the quiet machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
SPIN = "while True: pass"
LONGEST = 1800.0
"""Seconds after which a run is given up."""


@contextmanager
def spinning(count: int) -> Iterator[None]:
    """`count` other processes inside. Each would use a whole core."""
    processes = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(tree: Path, threads: int) -> dict[str, float]:
    """Seconds of one run of the demo: `user`, `system` and `wall`."""
    variables = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(tree / "examples" / "demo.py"), "--out", f"{folder}/demo"]
        begin, before = time.monotonic(), os.times()
        done = subprocess.run(command, env=variables, cwd=tree, capture_output=True, text=True, timeout=LONGEST)
        wall, after = time.monotonic() - begin, os.times()
    if done.returncode:
        sys.exit(f"The demo failed:\n{done.stderr}")
    user, system = after.children_user - before.children_user, after.children_system - before.children_system
    return {"user": user, "system": system, "wall": wall}


def measure(tree: Path, threads: int, beside: int, repeats: int) -> dict[str, float | None]:
    """Medians over the repeats. Without figures if a run took longer than `LONGEST`."""
    row: dict[str, float | None] = {"threads": threads, "spinning": beside, "user": None, "system": None, "wall": None}
    with spinning(beside):
        try:
            runs = [run(tree, threads) for _ in range(repeats)]
        except subprocess.TimeoutExpired:
            return row
    return row | {name: statistics.median(one[name] for one in runs) for name in ("user", "system", "wall")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spinning", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tree", type=Path, default=ROOT, help="checkout to measure")
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args()
    rows = []
    table = Table(title=f"examples/demo.py on {os.cpu_count()} cores, medians of {args.repeats}")
    for heading in ("threads", "spinning", "user s", "system s", "wall s", "CPU / quiet, 1 thread"):
        table.add_column(heading, justify="right")
    quiet = None
    for threads in args.threads:
        for beside in args.spinning:
            row = measure(args.tree.resolve(), threads, beside, args.repeats)
            rows.append(row)
            print(row, flush=True)
            cpu = None if row["user"] is None or row["system"] is None else row["user"] + row["system"]
            quiet = quiet or cpu  # the first row
            shown = [
                f"over {LONGEST:.0f}" if row[name] is None else f"{row[name]:.1f}"
                for name in ("user", "system", "wall")
            ]
            ratio = f"{cpu / quiet:.2f}" if cpu and quiet else ""
            table.add_row(str(threads), str(beside), *shown, ratio)
    Console(width=100).print(table)
    if args.json:
        result = {"date": date.today().isoformat(), "cores": os.cpu_count(), "repeats": args.repeats, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
