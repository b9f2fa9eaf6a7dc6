"""Measures everything on a GPU with one command, which can be cut off and run again.

    python benchmarks/gpu.py [--parts ceilings kernels ...] [--minutes 30] [--results DIR]
    python benchmarks/gpu.py --dry-run          every part at tiny sizes on the CPU

The parts, by value: the ceilings of the device; each kernel against float64; decoding and prefill of 1B and 8B models;
every layer by itself, next to the time that its bytes take; cuSPARSELt; compression. Each part writes

    <results>/<part>_<gpu>_<date>.json    with versions, configuration and commit; .md, the same as a table; .png

after every unit that it measures. An interruption says what is done and what is next. A second run measures the units
that the newest files lack, and last the units that failed. No unit begins after `--minutes`. A failure is noted, the
other units go on, and the exit code is 1. The script ends after a fault that takes the device from this process, such
as an illegal address. The times of models are next to those that were predicted before any measurement
(docs/benchmark.md).
"""

import argparse
import datetime
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_parts import PARTS, TINY, Result, Slot

from mspc.bench import formats, plots, run, tables, timing
from mspc.bench.rows import compare
from mspc.storage.files import write_atomically, write_json, write_text

HERE = Path(__file__).parent


def file_of(part: str, gpu: str, results: Path) -> Path:
    """The newest file of a part, if it is of today or not finished; else a new one."""
    today = datetime.date.today().isoformat()
    for path in sorted(results.glob(f"{part}_{gpu}_*.json"), reverse=True)[:1]:
        if path.stem.endswith(today) or not json.loads(path.read_text())["finished"]:
            return path
    return results / f"{part}_{gpu}_{today}.json"


def header(part: str, slot: Slot) -> Result:
    return {
        "part": part,
        "date": datetime.date.today().isoformat(),
        "command": f"python benchmarks/gpu.py {' '.join(sys.argv[1:])}".strip(),
        "versions": timing.versions(),
        "device": timing.describe_device(slot.device),
        "configuration": {
            "dtype": str(slot.dtype),
            "repeats": slot.repeats,
            "warm_ups": timing.WARM_UPS[slot.device.type],
            "group_size": formats.GROUP_SIZE,
            "dry_run": slot.is_dry,
        },
        "finished": False,
        "units": {},
    }


def commit() -> str | None:
    done = subprocess.run(["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or None


def failed_before(result: Result, name: str) -> bool:
    return "error" in result["units"].get(name, {})


def has_failed(path: Path) -> bool:
    """Tell if a unit of a file failed."""
    result = json.loads(path.read_text()) if path.is_file() else {"units": {}}
    return any(failed_before(result, name) for name in result["units"])


def check_usable(device: torch.device) -> None:
    """Exit if a fault has taken the device from this process."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:
        sys.exit(f"The device is lost to this process; run the same command again, it goes on after this. {error}")


def run_part(part: str, slot: Slot, path: Path, deadline: float) -> list[str]:
    """Measure the units that the file lacks, and write it after each one. Returns a line for every failure."""
    result = json.loads(path.read_text()) if path.is_file() else header(part, slot)
    failed = []
    for name, measure in sorted(PARTS[part](slot), key=lambda unit: failed_before(result, unit[0])):
        if name in result["units"] and not failed_before(result, name):
            continue
        if time.monotonic() > deadline:
            print(f"{part}: out of time before {name}; the same command goes on there", flush=True)
            break
        begin = time.monotonic()
        try:
            found = measure()
        except Exception as error:  # one format that a device refuses must not cost the others
            found = {"error": f"{type(error).__name__}: {error}"}
        where = {"seconds": time.monotonic() - begin, "commit": commit(), "clocks": timing.clocks(slot.device)}
        result["units"][name] = where | found
        is_bad = "error" in found or bool(found.get("wrong"))
        failed += [f"{part}, {name}: {found.get('error', 'wrong results')}"] if is_bad else []
        write(result, path)
        print(f"{part}, {name}: {where['seconds']:.1f} s{', FAILED' * is_bad}", flush=True)
        check_usable(slot.device)
    else:
        result["finished"] = not any("error" in unit for unit in result["units"].values())
        write(result, path)
    try:
        draw(result, path.with_suffix(".png"))
    except Exception as error:  # such as no matplotlib
        failed.append(f"{part}, its figure: {type(error).__name__}: {error}")
    return failed


def where_it_stands(order: list[str], files: dict[str, Path], slot: Slot) -> Iterator[str]:
    """A line for each part: how many units are measured, in which file, and the first that is not."""
    for part in order:
        units = json.loads(files[part].read_text())["units"] if files[part].is_file() else {}
        left = [name for name, _ in PARTS[part](slot) if name not in units or "error" in units[name]]
        done = f"{len(units) - sum('error' in unit for unit in units.values())} units in {files[part]}"
        yield f"{part}: {done if units else 'nothing'}, {f'{len(left)} left, next {left[0]}' if left else 'complete'}"


def write(result: Result, path: Path) -> None:
    compare(bench_rows(result))
    write_json(path, result)
    write_text(path.with_suffix(".md"), markdown(result))


def draw(result: Result, path: Path) -> None:
    """Draw the figure of a part, if it has one."""
    rows = list(table_rows(result))
    if models := bench_rows(result):
        label = run.CPU_LABEL if result["configuration"]["dry_run"] else "CUDA graphs"
        configuration = {"baseline": "bf16", "dtype": "float32" if result["configuration"]["dry_run"] else "bfloat16"}
        wanted = {"configuration": configuration, "rows": models, "label": label}
        plots.plot(result | wanted, path)
    elif any("x bf16" in row for row in rows):
        plot_layers([row for row in rows if "x bf16" in row], result, path)


def bench_rows(result: Result) -> list[Result]:
    return [unit["bench"] for unit in result["units"].values() if "bench" in unit]


def table_rows(result: Result) -> Iterator[Result]:
    for name, unit in result["units"].items():
        if "error" in unit:
            yield {"unit": name, "error": unit["error"].splitlines()[0]}
        elif "bench" in unit:
            yield from step_rows(unit)
        else:
            yield from unit["rows"]


def step_rows(unit: Result) -> Iterator[Result]:
    """Flat rows of one format. That of the first decoding step has the predicted time."""
    row = unit["bench"]
    for step in [*row["decode"], *row["prefill"]]:
        is_decode = "batch" in step
        predicted = " to ".join(f"{seconds * 1e3:.2f}" for seconds in unit["predicted_seconds"])
        yield {
            "format": row["name"],
            "runs on": row["engine"],
            "step": f"batch {step['batch']}, context {step['context']}" if is_decode else f"prefill {step['tokens']}",
            **{f"{key}, ms": seconds * 1e3 for key, seconds in step["seconds"].items()},
            "bytes alone, ms": step["predicted_seconds"] * 1e3,
            "predicted, ms": predicted if step is row["decode"][0] else "",
            "tokens/s": step["tokens_per_second"]["median"],
            "of copy": step.get("share_of_copy", ""),
            **{f"x {name}": tables.gain(row, step, name) for name in step["speedup"]},
            "peak, GB": (row["peak_memory_bytes"] or 0) / 1e9 or "",
        }


def markdown(result: Result) -> str:
    rows = list(table_rows(result))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"# {result['part']}, {result['device']['name']}, {result['date']}", ""]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    lines += [f"{versions}. {'A dry run: no figure means anything.' * result['configuration']['dry_run']}", ""]
    lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(cell(row.get(column, '')) for column in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"
    return str(value).replace("|", "\\|")


def plot_layers(rows: list[Result], result: Result, path: Path) -> None:
    """Draw the speed of each layer divided by that of the dense one, over tokens."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["layer"] for row in rows))
    figure = Figure(figsize=(5 * min(4, len(names)), 4 * -(-len(names) // 4)), layout="constrained")
    axes = figure.subplots(-(-len(names) // 4), min(4, len(names)), squeeze=False).flat
    for name, axis in zip(names, axes, strict=False):
        of_layer = [row for row in rows if row["layer"] == name]
        for format_name in dict.fromkeys(row.get("format", "2:4") for row in of_layer):
            points = [(row["tokens"], row["x bf16"]) for row in of_layer if row.get("format", "2:4") == format_name]
            axis.plot(*zip(*points, strict=True), marker="o", label=format_name)
        axis.axhline(1.0, color="black", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set(title=name, xlabel="tokens", ylabel="times as fast as bf16")
        axis.legend(fontsize="x-small")
    figure.suptitle(f"{result['part']}, {result['device']['name']}, {result['date']}")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--minutes", type=float, default=30.0, help="begin no unit after this many minutes [30]")
    parser.add_argument(
        "--results", type=Path, help="folder for the files [benchmarks/results; a temporary one for a dry run]"
    )
    parser.add_argument("--dry-run", action="store_true", help="run every part at tiny sizes on the CPU")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    deadline = time.monotonic() + 60 * args.minutes
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit(
            "There is no CUDA device here; run this where there is one, or --dry-run to try every part on the CPU."
        )
    slot = Slot(torch.device("cpu" if args.dry_run else "cuda"), args.dry_run)
    gpu = f"dry-run-{TINY.name}" if args.dry_run else torch.cuda.get_device_name()
    gpu = re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia ")).strip("-")
    with tempfile.TemporaryDirectory(prefix="mspc-gpu-") as temporary:
        results = args.results or (Path(temporary) if args.dry_run else HERE / "results")
        files = {part: file_of(part, gpu, results) for part in args.parts}
        order = sorted(files, key=lambda part: has_failed(files[part]))
        try:
            failed = [line for part in order for line in run_part(part, slot, files[part], deadline)]
        except KeyboardInterrupt:
            print("\nInterrupted.", *where_it_stands(order, files, slot), sep="\n", flush=True)
            is_kept = args.results or not args.dry_run
            print("The same command goes on there." if is_kept else "A dry run without --results keeps nothing.")
            sys.exit(130)
    for line in failed:
        print("FAILED", line)
    sys.exit(bool(failed))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how schedulers end a job
    main()
