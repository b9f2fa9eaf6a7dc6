"""`bench` measures the decoders of a request one after the other, and compares them with the baselines of the run."""

import datetime
import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch

from mspc import threads
from mspc.api import evaluate
from mspc.bench.decoder import Decoder, Operations, OuterLayers, add_norm, gated, rotate
from mspc.bench.measure import measure_decode, measure_prefill
from mspc.bench.models import (
    SEED,
    compute_dtype,
    engine_of,
    format_of,
    model_decoder,
    random_decoder,
    random_outer,
    stored_dtype,
)
from mspc.bench.request import Candidate, Plan, Request, make_plan
from mspc.bench.timing import WARM_UPS, Ceilings, clocks, describe_device, measure_ceilings, versions
from mspc.errors import InputError, MspcError
from mspc.progress import Console, Progress, log
from mspc.runtime.loading import INPUTS
from mspc.storage.manifest import predicted_time, was_recovered

TEXT = "builtin"
"""The text of perplexities."""
SCHEMA = 1
CPU_LABEL = "CPU, weights in huge pages"

Save = Callable[[dict[str, Any]], None]


def bench(request: Request, *, progress: Progress | None = None, save: Save | None = None) -> dict[str, Any]:
    """The result that docs/benchmark.md describes. `save` receives the result so far after each decoder.

    Raises InputError for a request that cannot be measured, before it measures, and MspcError if memory runs out.
    """
    progress = progress or Console()
    plan = make_plan(request)
    for reason in plan.left_out:
        log.info(f"torch's int4 is left out: {reason}")
    # Graphs and kernels run on the current device, which --device cuda:1 does not change.
    on_device = torch.cuda.device(plan.device) if plan.device.type == "cuda" else nullcontext()
    with on_device, threads.of_torch(request.threads):
        return run(request, plan, progress, save)


def run(request: Request, plan: Plan, progress: Progress, save: Save | None) -> dict[str, Any]:
    """The measurements of a plan."""
    operations, kind = choose_operations(plan.device)
    with progress.stage("Ceilings of the device", 1) as step:
        ceilings = measure_ceilings(plan.device, compute_dtype(plan.device), plan.repeats)
        step("")
    result = header(request, plan, kind, ceilings)
    for group in plan.groups:
        outer = None
        rows: list[dict[str, Any]] = []
        for candidate in group:
            if candidate.format is None:
                outer = None  # a model has its own, and this would count as its memory
            elif outer is None:
                outer = random_outer(candidate.shape, plan.length, plan.device)
            row = measure(candidate, plan, outer, operations, ceilings, progress)
            rows.append(row)
            result["rows"].append(row)
            compare(rows)
            if save is not None:
                save(result)
    return result


def header(request: Request, plan: Plan, operations: str, ceilings: Ceilings) -> dict[str, Any]:
    """All of a result but its rows."""
    device = plan.device
    return {
        "schema": SCHEMA,
        "date": datetime.date.today().isoformat(),
        "label": CPU_LABEL if device.type == "cpu" else "CUDA graphs",
        "versions": versions(),
        "device": describe_device(device),
        "configuration": asdict(request)
        | {
            "device": str(device),
            "dtype": name_of(compute_dtype(device)),
            "batches": list(plan.batches),
            "contexts": list(plan.contexts),
            "prefills": list(plan.prefills),
            "repeats": plan.repeats,
            "warm_ups": WARM_UPS[device.type],
            "cuda_graphs": device.type == "cuda",
            "pieces": operations,
            "seed": SEED,
            "perplexity": None if plan.evaluation is None else {"text": TEXT, **asdict(plan.evaluation)},
            "left_out": list(plan.left_out),
        },
        "ceilings": {"copy_bytes_per_second": ceilings.copy, "gemm_flops": ceilings.gemm},
        "rows": [],
    }


def choose_operations(device: torch.device) -> tuple[Operations, str]:
    """The operations between products: on CUDA one compiled kernel each, plain ones if that fails or on a CPU."""
    if device.type != "cuda":
        return Operations(), "plain"
    compiled = Operations().compiled()
    x = torch.ones(1, 1, 8, device=device)
    try:
        with torch.no_grad():
            compiled.add_norm(x, x, x[0, 0], 1e-5)
            compiled.rotate(x.repeat(1, 1, 3), x[0], x[0], 1, 1, None, 1e-5)
            compiled.gated(x)
    except Exception as error:  # whatever a compiler that is missing or broken raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.info(f"Norms and rotations are not compiled, which costs every format the same time: {reason}")
        return Operations(add_norm, rotate, gated), "plain"
    return compiled, "compiled"


def measure(
    candidate: Candidate,
    plan: Plan,
    outer: OuterLayers | None,
    operations: Operations,
    ceilings: Ceilings,
    progress: Progress,
) -> dict[str, Any]:
    """One row of the result."""
    device, steps = plan.device, len(plan.batches) * len(plan.contexts) + len(plan.prefills)
    with progress.stage(f"{candidate.shape.name}, {candidate.name}", steps + 1) as step:
        try:
            decoder = make(candidate, plan, outer, operations)
            step("made")
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            row = empty_row(candidate, decoder)
            for context in plan.contexts:
                for batch in plan.batches:
                    row["decode"].append(measure_decode(decoder, batch, context, plan.repeats, ceilings))
                    step(f"batch {batch}, context {context}")
            row["clocks"] = clocks(device)
            for tokens in plan.prefills:
                row["prefill"].append(measure_prefill(decoder, tokens, plan.repeats, ceilings))
                step(f"prefill {tokens}")
        except torch.OutOfMemoryError as error:
            raise MspcError(
                f"{candidate.name}: the memory of {device} was not enough ({str(error).splitlines()[0]}). Choose "
                "smaller --shapes, --batch, --context or --prefill. The --json file has the rows before this one."
            ) from error
    if device.type == "cuda":
        row["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    del decoder
    if device.type == "cuda":
        gc.collect()  # CUDA graphs, and the memory that they hold
        torch.cuda.empty_cache()
    if candidate.folder is not None and plan.evaluation is not None:
        inputs = plan.inputs if row["engine"].endswith("int8 inputs") else INPUTS[0]
        row["perplexity"] = perplexity_of(candidate, plan, progress, inputs)
    return row


def make(candidate: Candidate, plan: Plan, outer: OuterLayers | None, operations: Operations) -> Decoder:
    if candidate.folder is not None:
        return model_decoder(candidate.folder, plan.length, plan.device, operations, plan.inputs)
    assert candidate.format is not None
    assert outer is not None
    return random_decoder(candidate.shape, candidate.format, outer, operations, plan.inputs)


def empty_row(candidate: Candidate, decoder: Decoder) -> dict[str, Any]:
    """A row without measurements."""
    shape = candidate.shape
    weights = shape.block_weights * shape.blocks
    return {
        "name": candidate.name,
        "model": shape.name,
        "shape": asdict(shape),
        "format": candidate.format or format_of(decoder),
        "random_weights": candidate.folder is None,
        "recovered": candidate.folder is not None and was_recovered(candidate.folder),
        "stored_dtype": None if candidate.folder is None else name_of(stored_dtype(candidate.folder)),
        "baseline": candidate.baseline,
        "engine": engine_of(decoder),
        "weight_bytes": decoder.stored_bytes(),
        "bits_per_weight": 8 * decoder.weight_bytes()["linears"] / weights,
        "repacked_bits_per_weight": 8 * decoder.repacked_bytes() / weights,
        "copied_bits_per_weight": 8 * decoder.copied_bytes() / weights,
        "peak_memory_bytes": None,
        "clocks": None,
        "perplexity": None,
        "predicted": None if candidate.folder is None else predicted_time(candidate.folder),
        "decode": [],
        "prefill": [],
    }


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def perplexity_of(candidate: Candidate, plan: Plan, progress: Progress, inputs: str = INPUTS[0]) -> float | None:
    """Perplexity of the model of a folder on test text, or None if it has no tokenizer."""
    assert candidate.folder is not None
    assert plan.evaluation is not None
    try:
        measured = evaluate(
            candidate.folder, TEXT, device=str(plan.device), progress=progress, inputs=inputs,
            **asdict(plan.evaluation),
        )  # fmt: skip
    except InputError as error:
        log.info(f"{candidate.name}: no perplexity. {error}")
        return None
    return measured.perplexity


def compare(rows: list[dict[str, Any]]) -> None:
    """Set the `speedup` of every step of the rows of one shape: time of each baseline / its own."""
    baselines = {row["baseline"]: row for row in rows if row["baseline"]}
    for row in rows:
        for stage in ("decode", "prefill"):
            for number, step in enumerate(row[stage]):
                step["speedup"] = {
                    name: baseline[stage][number]["seconds"]["median"] / step["seconds"]["median"]
                    for name, baseline in baselines.items()
                }
