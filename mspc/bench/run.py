"""`bench` measures the decoders and engines of a request, and compares them with the baselines of the run."""

import datetime
import gc
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mspc import threads
from mspc.api import evaluate
from mspc.bench.decoder import Decoder, Operations, OuterLayers, add_norm, gated, rotate
from mspc.bench.formats import DENSE
from mspc.bench.measure import (
    TOKENS,
    Contender,
    decode_on_cuda,
    measure_decode,
    measure_prefill,
    of_decoder,
    prefill_on_cuda,
)
from mspc.bench.mixtures import is_mixture, mixture_decoder
from mspc.bench.models import (
    SEED,
    TINYGEMM,
    TORCH16,
    compute_dtype,
    model_decoder,
    outer_bytes,
    random_decoder,
    random_outer,
    with_head,
)
from mspc.bench.peers.running import contender_of
from mspc.bench.request import Candidate, Plan, Request, has_codes, make_plan, needed_bytes
from mspc.bench.rows import compare, empty_row, name_of, peer_row
from mspc.bench.timing import WARM_UPS, Ceilings, clocks, describe_device, measure_ceilings, versions
from mspc.errors import InputError, MspcError
from mspc.memory import free_memory
from mspc.progress import Console, Progress, Step, log
from mspc.runtime.loading import INPUTS
from mspc.sizes import in_words

TEXT = "builtin"
"""The text of perplexities."""
SCHEMA = 1
TO_MAKE = 1.25
"""Memory that a row takes while it is made, relative to that which it keeps."""
CPU_LABEL = "CPU, weights in huge pages"

Rows = list[dict[str, Any]]
Save = Callable[[dict[str, Any], Rows], None]


def bench(request: Request, *, progress: Progress | None = None, save: Save | None = None) -> dict[str, Any]:
    """The result that docs/benchmark.md describes. `save` receives the result so far, and the rows that are new in it.

    Raises InputError for a request that cannot be measured, before it measures, and MspcError if memory runs out.
    """
    progress = progress or Console()
    plan = make_plan(request)
    for reason in plan.left_out:
        log.info(reason)
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
        measured: dict[str, dict[str, Any]] = {}
        for number, lot in enumerate(lots(plan, group)):
            if any(candidate.folder is not None for candidate in lot) and plan.device.type == "cuda":
                outer = None  # a model has its own, and this would count as its memory
            elif outer is None and any(candidate.folder is None for candidate in lot):
                outer = random_outer(lot[0].shape, plan.length, plan.device)
            rows = measure(lot, plan, outer, operations, ceilings, progress)
            before = len(result["rows"]) - len(measured)
            measured |= {row["name"]: row for row in rows}
            for row in rows:
                row["lot"] = number
            of_group = [measured[candidate.name] for candidate in group if candidate.name in measured]
            result["rows"][before:] = of_group
            compare(of_group)
            evaluate_rows(lot, rows, plan, progress, save and (lambda new: save(result, new)))
    return result


def lots(plan: Plan, group: Sequence[Candidate]) -> list[list[Candidate]]:
    """The candidates that are in memory and measured at once: one on a GPU, as many as fit on a CPU, smallest first."""
    if plan.device.type != "cpu":
        return [[candidate] for candidate in group]
    shape, dtype = group[0].shape, compute_dtype(plan.device)
    room = free_memory(plan.device) / TO_MAKE - outer_bytes(shape, dtype)
    found: list[list[Candidate]] = [[]]
    left = room
    for candidate in sorted(group, key=lambda candidate: needed_bytes(plan, candidate)):
        needed = needed_bytes(plan, candidate)
        if found[-1] and needed > left:
            found.append([])
            left = room
        found[-1].append(candidate)
        left -= needed
    if len(found) > 1:
        log.warning(
            f"Rows of {shape.name} do not fit into memory at once: {in_words(max(0, int(room)))} are free. "
            f"They are measured in {len(found)} lots, and only those of one lot take turns. Choose fewer with --format "
            "and --peers."
        )
    return [sorted(lot, key=group.index) for lot in found]


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
            "tokens_of_a_round": TOKENS if device.type == "cpu" else None,
            "head_bits": plan.head_bits,
            "cuda_graphs": device.type == "cuda",
            "pieces": operations,
            "seed": SEED,
            "perplexity": None if plan.evaluation is None else {"text": TEXT, **asdict(plan.evaluation)},
            "left_out": list(plan.left_out),
        },
        "ceilings": {
            "copy_bytes_per_second": ceilings.copy,
            "read_bytes_per_second": ceilings.read,
            "gemm_flops": ceilings.gemm,
        },
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
    lot: Sequence[Candidate],
    plan: Plan,
    outer: OuterLayers | None,
    operations: Operations,
    ceilings: Ceilings,
    progress: Progress,
) -> Rows:
    """Rows of the result without perplexity: on a CPU measured in turns, on CUDA of a lot of one."""
    names = lot[0].name if len(lot) == 1 else "all in turns"
    try:
        with ExitStack() as stack:
            made = []
            for candidate in lot:
                with progress.stage(f"{candidate.shape.name}, {candidate.name}", 1) as step:
                    try:
                        made.append(make(candidate, plan, outer, operations, stack))
                    except MspcError as error:
                        if candidate.peer is None or not plan.any_peers:
                            raise
                        log.warning(f"{candidate.name} is left out: {error}")
                    step("made")
            rows = [row for row, _ in made]
            steps = len(plan.batches) * len(plan.contexts) + len(plan.prefills)
            with progress.stage(f"{lot[0].shape.name}, {names}, measured", steps) as step:
                if plan.device.type == "cuda":
                    ((row, decoder),) = made
                    assert isinstance(decoder, Decoder)
                    measure_on_cuda(row, decoder, plan, ceilings, step)
                else:
                    contenders = [of_decoder(one) if isinstance(one, Decoder) else one for _, one in made]
                    measure_on_cpu(rows, contenders, plan, ceilings, step)
    except torch.OutOfMemoryError as error:
        raise MspcError(
            f"{names}: the memory of {plan.device} was not enough ({str(error).splitlines()[0]}). Choose smaller "
            "--shapes, --batch, --context or --prefill. The --json file has the rows before."
        ) from error
    if plan.device.type == "cuda":
        del made, decoder
        gc.collect()  # CUDA graphs, and the memory that they hold
        torch.cuda.empty_cache()
    return rows


def make(
    candidate: Candidate, plan: Plan, outer: OuterLayers | None, operations: Operations, stack: ExitStack
) -> tuple[dict[str, Any], Decoder | Contender]:
    """The row of a candidate without measurements, and what is to be measured; `stack` ends its process, if any."""
    if candidate.peer is not None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mspc-bench-")))
        contender, version = stack.enter_context(contender_of(candidate, plan, folder))
        return peer_row(candidate, contender, version), contender
    decoder = decoder_of(candidate, plan, outer, operations)
    return empty_row(candidate, decoder), decoder


def decoder_of(candidate: Candidate, plan: Plan, outer: OuterLayers | None, operations: Operations) -> Decoder:
    if candidate.folder is not None:
        return model_decoder(candidate.folder, plan.length, plan.device, operations, plan.inputs)
    shape, name = candidate.shape, candidate.format
    assert name is not None
    assert outer is not None
    if name == TORCH16:
        return random_decoder(shape, DENSE, random_outer(shape, plan.length, plan.device, torch.bfloat16), operations)
    if plan.head_bits < 16 and (name == TINYGEMM or has_codes(candidate)):
        outer = with_head(outer, plan.head_bits, plan.inputs)
    maker = mixture_decoder if is_mixture(name) else random_decoder
    return maker(shape, name, outer, operations, plan.inputs)


def measure_on_cuda(row: dict[str, Any], decoder: Decoder, plan: Plan, ceilings: Ceilings, step: Step) -> None:
    torch.cuda.reset_peak_memory_stats(plan.device)
    for context in plan.contexts:
        for batch in plan.batches:
            row["decode"].append(decode_on_cuda(decoder, batch, context, plan.repeats, ceilings))
            step(f"batch {batch}, context {context}")
    row["clocks"] = clocks(plan.device)
    for tokens in plan.prefills:
        row["prefill"].append(prefill_on_cuda(decoder, tokens, plan.repeats, ceilings))
        step(f"prefill {tokens}")
    row["peak_memory_bytes"] = torch.cuda.max_memory_allocated(plan.device)


def measure_on_cpu(rows: Rows, contenders: list[Contender], plan: Plan, ceilings: Ceilings, step: Step) -> None:
    for context in plan.contexts:
        for batch in plan.batches:
            pairs = [(row, one) for row, one in zip(rows, contenders, strict=True) if one.takes(batch)]
            found = measure_decode([one for _, one in pairs], batch, context, plan.repeats, ceilings)
            for (row, _), of_row in zip(pairs, found, strict=True):
                row["decode"].append(of_row)
            step(f"batch {batch}, context {context}")
    for tokens in plan.prefills:
        for row, of_row in zip(rows, measure_prefill(contenders, tokens, plan.repeats, ceilings), strict=True):
            row["prefill"].append(of_row)
        step(f"prefill {tokens}")


def evaluate_rows(
    lot: Sequence[Candidate], rows: Rows, plan: Plan, progress: Progress, save: Callable[[Rows], None] | None
) -> None:
    """Add the perplexity of models, and tell each row when all of it is known."""
    judged = {one.name: one for one in lot if plan.evaluation is not None and one.folder is not None}
    if save is not None:
        save([row for row in rows if row["name"] not in judged])
    for row in rows:
        if row["name"] in judged:
            inputs = plan.inputs if row["engine"].endswith("int8 inputs") else INPUTS[0]
            row["perplexity"] = perplexity_of(judged[row["name"]], plan, progress, inputs)
            if save is not None:
                save([row])


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
