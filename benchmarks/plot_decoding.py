"""Draw what a real model loses against how fast it decodes, and against its bytes.

    mspc bench MODEL --shapes from-model --format int4,out/mspc-default-3.25-bits --threads 1 --json timings.json
    python benchmarks/plot_decoding.py timings.json benchmarks/results/real/smollm2-135m-instruct --plot decoding.png

The losses are the rows of quality_real.py, and the timings those of `mspc bench`. An artifact is the row after which
its folder is named. Other formats are those of a row by `ROWS`, as their time does not depend on the weights.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from real_report import divergence

ROWS = {
    "int4": "sweep-gptq-int4", "int3": "sweep-gptq-int3", "2:4+int4": "mspc-default-2of4-int4",
    "50%+int4": "mspc-fast-50pc-int4", "llama.cpp Q4_0": "llama.cpp-q4_0",
}  # fmt: skip


def points(timings: Path, rows: Path) -> list[dict[str, Any]]:
    """Name, loss, milliseconds a token and bytes of every timed model that has a row."""
    found = []
    for timed in json.loads(timings.read_text(encoding="utf-8"))["rows"]:
        name = ROWS.get(timed["name"], Path(timed["name"]).name.removesuffix(".gguf"))
        file = rows / f"{name}.json"
        if file.is_file() and timed["decode"] and name != "dense":
            row, step = json.loads(file.read_text(encoding="utf-8")), timed["decode"][0]
            num_bytes = sum(step["bytes"].values()) - step["bytes"]["cache"]
            found.append(
                {"name": name, "loss": divergence(row), "ms": 1000 * step["seconds"]["median"], "bytes": num_bytes}
            )
    return found


def draw(found: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _panel(left, found, "tokens a second, batch 1", lambda point: 1000 / point["ms"])
    _panel(right, found, "MB that a token reads", lambda point: point["bytes"] / 1e6)
    left.set_ylabel("KL divergence from the dense model, nats a token")
    figure.savefig(path, dpi=150)


def _panel(axis: Axes, found: list[dict[str, Any]], label: str, place: Any) -> None:
    for order, point in enumerate(sorted(found, key=place)):  # neighbours have their names above and below
        ours = point["name"].startswith("mspc")
        axis.plot(place(point), point["loss"], "o" if ours else "s", color="tab:blue" if ours else "tab:gray")
        axis.annotate(point["name"], (place(point), point["loss"]), xytext=(0, -12 if order % 2 else 6),
                      textcoords="offset points", ha="center", fontsize=7)  # fmt: skip
    axis.set_yscale("log")
    axis.margins(0.25, 0.12)
    axis.set_xlabel(label)
    axis.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("timings", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--plot", type=Path, required=True)
    given = parser.parse_args()
    found = points(given.timings, given.rows)
    for point in sorted(found, key=lambda point: point["ms"]):
        print(f"{point['name']:44} {point['ms']:7.2f} ms {point['bytes'] / 1e6:7.1f} MB  KL {point['loss']:.3f}")
    draw(found, given.plot)


if __name__ == "__main__":
    main()
