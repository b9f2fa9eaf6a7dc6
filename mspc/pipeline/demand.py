"""The memory and disk that a run needs, by the estimates with which its stages divide the memory themselves.

`peak` is the memory that a run with as much free memory as it likes takes at most, `need` that without which it fails:
suspended passes and Grams that are kept are given up where memory is short.
"""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mspc.formats.description import StoredMatrix
from mspc.model.streamed import StreamedModel
from mspc.passes.blocks import BUFFERS
from mspc.passes.gradients import fisher_block_size
from mspc.passes.perplexity import LOGITS_AT_ONCE
from mspc.passes.together import FEW
from mspc.passes.walk import BUFFERS_HELD
from mspc.pipeline.outer import planned_outer
from mspc.pipeline.rates import LARGEST_KEPT
from mspc.pipeline.recovery_stage import memory_of_training
from mspc.pipeline.solve_blocks import num_together
from mspc.pipeline.stage_work import keeps_grams, recovered_tokens
from mspc.pipeline.workload import Workload
from mspc.planning.allocation import INTERPOLATIONS
from mspc.planning.search import memory_of_search
from mspc.settings import SEARCH
from mspc.solvers.quadratic import solver_bytes
from mspc.storage.carrying import belongs
from mspc.storage.checkpoint import Checkpoint, StoredType
from mspc.storage.sizes import bytes_in, file_bytes
from mspc.types import MatricesByBlock, Matrix, PlannedMatrix, flatten

BASE = {"cpu": 550_000_000, "cuda": 2_500_000_000}
"""Bytes of a process that has loaded torch, transformers and a text, by type of device. On CUDA it is an estimate."""
HEAD_COPIES, SCORED_COPIES, COMPARED_COPIES = 3, 3, 6
"""Copies of logits in float32: for their gradient, their loss, and the divergence of two models."""
MOST_LOCAL = 8
"""Ranks of one machine, where more take part."""
WAITING = 3
"""Sums of chunks of the text that wait for others."""
SHARD = 5e9
"""Bytes of a file of weights, at most, where the files are not there: those of large models are about that large."""
MANIFEST_BYTES, PLAN_BYTES, OTHER_BYTES = 900, 330, 5000
"""Bytes of a matrix in the manifest and in plan.json, and of what else a run writes."""


@dataclass(frozen=True)
class Demand:
    """Bytes by place, of one rank. `host` is the memory of the process; without a GPU it has everything."""

    host_peak: int
    host_need: int
    device_peak: int
    device_need: int
    disk_need: int
    """The output with all that is next to it while the run is made."""
    disk_free: int | None
    """Free bytes where the output goes; None if that is not known."""
    peak_stage: str
    """The stage with the peak of the memory."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Parts:
    """Bytes of one stage: always in host memory, on the device, and only where there is room for them."""

    host: float = 0
    device: float = 0
    spare: float = 0
    """On the device."""
    mapped: float = 0
    """Pages of files, which the system takes back when it needs them."""


def demand_of(load: Workload, out: Path | None) -> Demand:
    """The demand of a run whose output goes to `out` or, with None, to a place that is not known."""
    base, kept, factors = BASE[load.device.type], kept_factors(load), fisher_bytes(load)
    stages = {title: parts for title, parts in _stages(load).items() if parts}
    host_need = base + kept + max(parts.host + (parts.device if on_cpu(load) else 0) for parts in stages.values())
    spare_of = {title: min(parts.spare, load.free_bytes / 2) for title, parts in stages.items()}
    peaks = {
        title: base + factors + parts.host + parts.mapped + (parts.device + spare_of[title] if on_cpu(load) else 0)
        for title, parts in stages.items()
    }
    peak_stage = max(peaks, key=lambda title: peaks[title])
    device_need = 0 if on_cpu(load) else max(parts.device for parts in stages.values())
    device_peak = 0 if on_cpu(load) else max(parts.device + spare_of[title] for title, parts in stages.items())
    return Demand(
        int(peaks[peak_stage]), int(host_need), int(device_peak), int(device_need), disk_bytes(load),
        None if out is None else free_disk(out), peak_stage,
    )  # fmt: skip


def on_cpu(load: Workload) -> bool:
    return load.device.type == "cpu"


def fisher_bytes(load: Workload) -> int:
    """Bytes of the output Fisher factors, which stay in host memory or in files of --spill for the whole run."""
    if not (load.settings.needs_fisher or load.settings.needs_curves):
        return 0
    return sum(4 * matrix.shape[0] * fisher_block_size(matrix.shape[0]) for matrix in load.flat)


def kept_factors(load: Workload) -> int:
    """Those in memory that the system cannot take back."""
    return fisher_bytes(load) if load.spill is None else 0


def _stages(load: Workload) -> dict[str, _Parts | None]:
    settings = load.settings
    widest = max(load.flat, key=lambda matrix: solver_bytes(matrix.shape))
    block = max(load.block_numel) * load.itemsize
    width = max(max(matrix.shape) for matrix in load.flat)
    passing = BUFFERS * width * min(load.batch_tokens, max(load.tokens, load.test_tokens)) * load.itemsize
    walking = passing + load.shown_width * load.batch_tokens * load.itemsize
    of_sequence = load.length * load.vocabulary * 4
    outer = load.outer_numel * load.itemsize
    measured, validation = load.measured_tokens, load.validation_tokens
    scored = SCORED_COPIES * min(of_sequence, 4 * LOGITS_AT_ONCE)
    grams = sum(group[0].shape[1] ** 2 for groups in load.groups for group in groups)
    plans = 1 + len(INTERPOLATIONS)
    curves = settings.needs_curves
    at_once = min(load.threads, FEW)
    return {
        "Checking weights": _Parts(mapped=min(load.source_bytes / len(load.model.source.shards()), SHARD)),
        "Trying the dense model": _Parts(
            load.batch_tokens * load.hidden * load.itemsize, max(block + passing, outer + scored)
        ),
        "Gradients": _gradients(load, block, passing, outer) if settings.needs_fisher or curves else None,
        "Loss curves": _Parts(
            measured / load.parts * load.hidden * load.itemsize,
            block * (load.ranks > 1) + block + walking + at_once * solver_bytes(widest.shape),
            12 * grams * keeps_grams(load),
        )
        if curves
        else None,
        "Search (seconds)": _Parts(*memory_of_search(load.model, load.dtype, validation, load.matrices))
        if curves and settings.allocator == SEARCH
        else None,
        "Validating plans": _Parts(
            (1 + plans) * validation / load.parts * load.hidden * load.itemsize,
            max(
                block + walking + at_once * solver_bytes(widest.shape),
                outer + COMPARED_COPIES * of_sequence * load.threads,
            ),
            12 * grams * keeps_grams(load),
        )
        if settings.validates_plans and not settings.has_budget
        else None,
        "Compressing": _compressing(load, block, passing, widest),
        "Recovering": _recovering(load) if settings.recover else None,
        "Evaluating": _Parts(
            2 * load.test_tokens * load.hidden * load.itemsize * (load.spill is None),
            max(2 * block + passing, 2 * outer + 2 * scored * load.threads),
        )
        if settings.eval
        else None,
    }


def _gradients(load: Workload, block: float, passing: float, outer: float) -> _Parts:
    states, hidden = states_of_gradients(load), states_of_gradients(load) / (load.blocks + 2)
    summed = WAITING * fisher_bytes(load)
    measured = min(load.measured_tokens, load.batch_tokens)
    device = max(
        block + 2 * passing * measured / load.batch_tokens,
        outer + HEAD_COPIES * measured * load.vocabulary * 4 * load.threads,
    )
    spilled = load.spill is not None
    return _Parts(2 * hidden, device, mapped=states + summed) if spilled else _Parts(states + summed, device)


def states_of_gradients(load: Workload) -> float:
    """Bytes of the states before all blocks, of the batches that are there at once; zero without gradients."""
    if not fisher_bytes(load):
        return 0.0
    at_once = min(load.measured_tokens / load.parts, load.batch_tokens * load.threads)
    return at_once * load.hidden * (load.blocks + 2) * load.itemsize


def _compressing(load: Workload, block: float, passing: float, widest: Matrix) -> _Parts:
    settings = load.settings
    streams = 2 if settings.propagation or settings.reconstruct else 1
    # Memory of the gradients that the C library has not given back, and that is in pieces too small to be used again.
    gradients = 2 * passing * min(load.measured_tokens / load.batch_tokens, 1)
    left = gradients if passing / BUFFERS < LARGEST_KEPT and fisher_bytes(load) and on_cpu(load) else 0
    tokens = load.tokens / load.parts
    hidden = tokens * load.hidden * load.itemsize * (load.spill is None)
    held = BUFFERS_HELD * max(load.shown_width, *(matrix.shape[1] for matrix in load.flat)) * load.itemsize
    batch = min(load.batch_tokens, tokens)
    stored = max(load.block_numel) * (load.stored_itemsize + 2) * 2  # the block that is written, and the one solved
    solver = _solved_at_once(load) + 8 * widest.shape[1] ** 2  # and a Gram and its shift
    batches = (num_together(matrix, settings, load.device) * solver_bytes(matrix.shape) for matrix in load.flat)
    return _Parts(
        streams * hidden + stored + left,
        streams * (block + held * batch) + passing * batch / load.batch_tokens + solver,
        streams * held * (tokens - batch) + max(max(batches) - solver, 0),
    )


def _solved_at_once(load: Workload) -> int:
    """Bytes of the solvers of matrices with one input, or of experts, as many as threads work on at once."""
    threads = min(load.threads, FEW) if load.ranks == 1 and on_cpu(load) else 1
    most = 0
    for group in (group for of_block in load.groups for group in of_block):
        each = sorted((solver_bytes(matrix.shape) for matrix in group), reverse=True)
        each = each if group[0].index is None else each[:1] * FEW
        most = max(most, sum(each[:threads]))
    return most


def _recovering(load: Workload) -> _Parts:
    hidden = recovered_tokens(load) * load.hidden * load.itemsize
    return _Parts(hidden, memory_of_training(load.model, load.dtype, load.plan, load.settings))


def disk_bytes(load: Workload) -> int:
    """Bytes of the output, and of measurements and spilled activations next to it until the run is complete."""
    streams = 2 if load.settings.propagation or load.settings.reconstruct else 1
    spilled = streams * load.tokens * load.hidden * load.itemsize * (load.spill is not None)
    of_rank = 0.0 if load.spill is None else states_of_gradients(load) + (1 + WAITING) * fisher_bytes(load)
    return int(output_bytes(load) + fisher_bytes(load) + spilled + min(load.ranks, MOST_LOCAL) * of_rank)


def free_disk(out: Path) -> int:
    """Free bytes of the file system that a folder is or will be in."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def output_bytes(load: Workload) -> int:
    """Bytes of the output folder; under a size budget at most."""
    saved = sum(one.saved_bytes for one in planned_outer(load.model, load.settings, ()))
    if not load.settings.has_budget or load.settings.has_time_budget:
        return artifact_bytes(load.model, load.matrices, load.plan) - saved
    others = artifact_bytes(load.model, load.matrices, ()) - saved
    return others + budget_bytes(load, others)


def artifact_bytes(model: StreamedModel, matrices: MatricesByBlock, plan: Sequence[PlannedMatrix]) -> int:
    """Bytes of the output folder for a plan; without one, those of all but the matrices."""
    source, flat = model.source, flatten(matrices)
    key_of = {matrix.name: model.tensor_key(matrix) for matrix in flat}
    size = sum(unchanged_bytes(source.shards(), source.types(), model.compressed_keys(flat)))
    planned = {matrix.name: matrix for matrix in plan}
    for of_block in matrices if plan else ():
        types: dict[str, StoredType] = {}
        for matrix in of_block:
            types |= stored_types(planned[matrix.name], source.types()[key_of[matrix.name]][0])
        size += file_bytes(types) if types else 0
    size += (MANIFEST_BYTES + PLAN_BYTES) * len(flat) + OTHER_BYTES
    return size + (carried_bytes(source.folder) if isinstance(source, Checkpoint) else 0)


def budget_bytes(load: Workload, others: int) -> int:
    """Bytes that a size budget leaves for the matrices; `others` are those of the other weights."""
    if load.settings.bits_per_weight is not None:
        return int(load.settings.bits_per_weight * sum(matrix.numel for matrix in load.flat) / 8)
    return max(load.settings.target_bytes - others, 0)


def unchanged_bytes(
    shards: Mapping[str, Sequence[str]], types: Mapping[str, StoredType], compressed: Iterable[str]
) -> list[int]:
    """Bytes of each file of weights that are not compressed."""
    left = set(compressed)
    rest = ({key: types[key] for key in keys if key not in left} for keys in shards.values())
    return [file_bytes(of_shard) for of_shard in rest if of_shard]


def stored_types(planned: PlannedMatrix, dtype: str) -> dict[str, StoredType]:
    """The tensors of a matrix in an artifact, by name."""
    stored = StoredMatrix(planned.shape, planned.target.pattern, planned.target.grid, getattr(torch, dtype))
    return {
        f"{planned.name}.{part}": (str(kind).removeprefix("torch."), shape)
        for part, (kind, shape) in stored.tensors().items()
        if part != "row_offsets"
    }


def carried_bytes(folder: Path) -> int:
    """Bytes of the files of a model that are no weights and travel with it."""
    return sum(bytes_in(path) for path in folder.iterdir() if path.is_file() and belongs(path.name))
