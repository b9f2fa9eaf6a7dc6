"""Budgets in time and budgets of bytes for one model: predicted loss against milliseconds a token, and some measured.

    mspc timings MODEL --out serve.json
    python benchmarks/time_budgets.py MODEL --timings serve.json --curves CURVES.json --json OUT.json --plot OUT.png

Plans are made as `compress` makes them, from loss curves that a run left in its folder of measurements. Every plan gets
the time that the timings predict. With --measure N, decoders with random weights in the targets of some plans are timed
as `mspc bench` times them, in turns; with one thread these are times of the processor. --depths takes the curves of
another model, from its block at the same depth, for shapes that have no weights.
"""

import argparse
import datetime
import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch import nn

from mspc.bench.decoder import Block, Decoder, Operations
from mspc.bench.formats import Source
from mspc.bench.measure import decode_step
from mspc.bench.mixtures import PARTS, random_layer
from mspc.bench.models import SEED, copy_of, random_outer, shape_with
from mspc.bench.timing import versions
from mspc.formats.description import StoredMatrix
from mspc.model.outline import outlined
from mspc.pipeline.in_time import token_work
from mspc.planning.allocation import allocate_bytes, choose_group_size
from mspc.planning.curve import Curve, read_curves
from mspc.planning.time_budget import TimeBudget
from mspc.planning.timings import CONTEXT, read_timings
from mspc.recipe import Recipe
from mspc.types import NM, Grid, MatricesByBlock, PlannedMatrix, Target, Unstructured, flatten

BITS_PER_WEIGHT = (2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75, 4.0, 4.25, 5.0, 6.0, 8.0)
DENSE = Unstructured(0.0)
UNIFORM = {
    "int8": (DENSE, 8), "int4": (DENSE, 4), "int3": (DENSE, 3), "2:4+int4": (NM(2, 4), 4),
    "50%+int4": (Unstructured(0.5), 4), "70%+int4": (Unstructured(0.7), 4),
}  # fmt: skip
MEASURED = ("bytes 3.25", "bytes 4.25", "int8", "int4", "int3", "2:4+int4", "50%+int4", "70%+int4")
STEPS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for name in ("timings", "curves", "json", "plot"):
        parser.add_argument(f"--{name}", type=Path, required=name != "plot")
    parser.add_argument("--measure", type=int, default=0, metavar="TURNS", help="time decoders in some plans so often")
    parser.add_argument("--depths", action="store_true", help="take curves of another model by depth")
    options = parser.parse_args()
    model = outlined(options.model)
    matrices = model.matrices(())
    settings = choose_group_size(Recipe(speedup=1.0).settings(), matrices)
    budget = TimeBudget(settings, token_work(model, matrices, (), ()), read_timings(options.timings))
    curves = read_curves(options.curves)
    if options.depths:
        curves = by_depth(curves, matrices)
    plans = dict(all_plans(budget, matrices, curves))
    rows = [row_of(name, plan, budget, curves) for name, plan in plans.items()]
    result = {
        "date": datetime.date.today().isoformat(), "model": Path(options.model).resolve().name,
        "versions": versions(), "timings": budget.timings.origin, "group_size": settings.group_size,
        "curves": "of another model, by depth" if options.depths else "of this model",
        "batch": 1, "context": CONTEXT, "rest_ms": budget.timings.rest_ms, "head_ms": budget.head_ms,
        "bfloat16": budget.baseline, "load": os.getloadavg(), "rows": rows,
    }  # fmt: skip
    if options.measure:
        chosen = [*MEASURED, *[name for name in plans if name.startswith("time")][1::3]]
        measure({name: plans[name] for name in chosen}, budget, rows, options.measure)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        plot(result, options.plot)


def by_depth(curves: dict[str, Curve], matrices: MatricesByBlock) -> dict[str, Curve]:
    """For every matrix the curve of the one with its role in another model, at the same share of the depth."""
    blocks = 1 + max(int(name.split(".")[2]) for name in curves)
    found = {}
    for index, in_block in enumerate(matrices):
        other = round(index * (blocks - 1) / (len(matrices) - 1))
        for matrix in in_block:
            role = matrix.name.split(".", 3)[3]
            found[matrix.name] = curves[f"model.layers.{other}.{role}"]
    return found


def all_plans(
    budget: TimeBudget, matrices: MatricesByBlock, curves: dict[str, Curve]
) -> Iterator[tuple[str, list[PlannedMatrix]]]:
    """Uniform plans, plans by bytes, and for the time of each the plan by time."""
    times = []
    for name, (pattern, bits) in UNIFORM.items():
        target = Target(pattern, Grid(bits, budget.settings.group_size))
        plan = [PlannedMatrix(one.name, one.shape, target) for one in budget.work.matrices]
        times.append(budget.ms_of(plan))
        yield name, plan
    numel = sum(matrix.numel for matrix in flatten(matrices))
    for bits_per_weight in BITS_PER_WEIGHT:
        settings = replace(budget.settings, speedup=None, bits_per_weight=bits_per_weight)
        plan = allocate_bytes(settings, matrices, curves, int(bits_per_weight * numel / 8), budget.work.dtype)
        times.append(budget.ms_of(plan))
        yield f"bytes {bits_per_weight:g}", plan
    for ms in sorted(times):
        one = replace(budget, settings=replace(budget.settings, speedup=None, ms_per_token=ms))
        yield f"time {ms:.3f}", one.allocate(curves)


def row_of(name: str, plan: list[PlannedMatrix], budget: TimeBudget, curves: dict[str, Curve]) -> dict[str, Any]:
    numel = sum(matrix.numel for matrix in plan)
    bits = [matrix.target.bits or 16 for matrix in plan]
    return {
        "name": name,
        "loss": sum(curves[one.name].at(one.target.pattern.sparsity, one.target.bits) for one in plan),
        "predicted_ms": budget.ms_of(plan),
        "sparsity": sum(one.numel * one.target.pattern.sparsity for one in plan) / numel,
        "bits": sum(one.numel * number for one, number in zip(plan, bits, strict=True)) / numel,
    }


def measure(plans: dict[str, list[PlannedMatrix]], budget: TimeBudget, rows: list[dict[str, Any]], turns: int) -> None:
    """Add the milliseconds of a token to rows: quartiles over turns, each with every plan."""
    of_rows, samples = {row["name"]: row for row in rows}, {name: list[float]() for name in plans}
    threads = budget.timings.threads
    torch.set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    for _ in range(turns):
        for name, plan in plans.items():
            samples[name] += seconds_of(plan, budget, clock)
    for name, found in samples.items():
        low, middle, high = (1e3 * value for value in quantiles(found, n=4))
        of_rows[name] |= {"measured_ms": {"quarter": low, "median": middle, "three_quarters": high}}
        predicted = of_rows[name]["predicted_ms"]
        print(f"{name}: predicted {predicted:.3f}, measured {middle:.3f} ({middle / predicted - 1:+.1%})", flush=True)


@torch.no_grad()
def seconds_of(plan: list[PlannedMatrix], budget: TimeBudget, clock: Any) -> list[float]:
    shape = shape_with("timed", budget.work.sizes, tied=True)
    outer = random_outer(shape, CONTEXT + 1, torch.device("cpu"))
    ones = torch.ones(shape.hidden)
    blocks = [Block(linears, (ones, ones.clone()), None) for linears in linears_of(plan, budget)]
    step, found = decode_step(Decoder(shape, outer, blocks, Operations()), 1, CONTEXT), []
    for _ in range(STEPS + 1):
        begin = clock()
        step()
        found.append(clock() - begin)
    return found[1:]


def linears_of(plan: list[PlannedMatrix], budget: TimeBudget) -> Iterator[dict[str, nn.Module]]:
    """Layers of every block in the targets of a plan, with random weights, joined as the bench joins them."""
    source, made = Source.seeded(SEED, torch.device("cpu")), dict[str, nn.Module]()
    blocks: dict[int, dict[str, PlannedMatrix]] = {}
    for one in plan:
        number, part = one.name.split(".", 3)[2:]
        blocks.setdefault(int(number), {})[part] = one

    def layer(of_input: list[PlannedMatrix]) -> nn.Module:
        """A copy of the layers in these targets, in memory of its own."""
        key = "".join(f"{one.shape}{one.target}" for one in of_input)
        if key not in made:
            described = [StoredMatrix(o.shape, o.target.pattern, o.target.grid, budget.work.dtype) for o in of_input]
            made[key] = random_layer(described, source, torch.float32)
        return copy_of(made[key])

    for of_block in blocks.values():
        yield {name: layer([of_block[part] for part in parts]) for name, parts in PARTS.items()}


def plot(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis, rows = figure.subplots(), result["rows"]
    points = [(row["predicted_ms"], row["loss"]) for row in rows if row["name"].startswith("time")]
    axis.plot(*zip(*points, strict=True), "-o", markersize=4, label="budget in time")
    for row in rows:
        kind, _, bits = row["name"].partition(" ")
        if kind in UNIFORM or kind == "bytes":
            where = row["predicted_ms"], row["loss"]
            axis.plot(*where, "C1s" if bits else "k.", markersize=4 if bits else 6)
            axis.annotate(bits or kind, where, fontsize="x-small", xytext=(4, 3), textcoords="offset points")
    axis.plot([], [], "C1s", markersize=4, label="budget of bytes, with its bits per weight")
    axis.plot([], [], "k.", label="the same format in all matrices")
    axis.set_yscale("log")
    axis.set(
        xlabel="predicted ms a token (batch 1, context 128, head and attention included)",
        ylabel="predicted loss, nats a token",
    )
    axis.set_title(f"{result['model']}, curves {result['curves']}\n{result['timings']}", fontsize="small")
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
