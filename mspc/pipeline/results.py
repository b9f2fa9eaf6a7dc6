"""The outcome of a run, for its manifest: sparsity, bits, sizes, files and matrices."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mspc.model.streamed import StreamedModel
from mspc.pipeline.cost import sizes
from mspc.planning.allocation import planned_sparsity
from mspc.settings import Settings
from mspc.storage.artifact import UNCHANGED
from mspc.storage.checkpoint import Checkpoint
from mspc.storage.files import sha256_of
from mspc.storage.journal import Journal
from mspc.storage.manifest import MANIFEST, MatrixEntry
from mspc.types import PlannedMatrix


def results(
    settings: Settings, plan: Sequence[PlannedMatrix], checkpoint: Checkpoint, model: StreamedModel, journal: Journal,
    folder: Path, cost: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The parts of the manifest, with `cost`, what the run took, in its place."""
    rows = [row for block in journal.results for row in block["matrices"]]
    numel = sum(row["shape"][0] * row["shape"][1] for row in rows)
    files = {block["file"]: block["sha256"] for block in journal.results}
    replaced = {block["file"] for block in journal.blocks} - files.keys()
    outer = journal.outer or {"outer": []}
    if outer["outer"]:
        files[outer["file"]] = outer["sha256"]
    for path in sorted((folder / UNCHANGED).glob("*.safetensors")):
        files[f"{UNCHANGED}/{path.name}"] = sha256_of(path)
    entries = [MatrixEntry.from_row(row, MANIFEST) for row in (*rows, *outer["outer"])]
    return {
        "sparsity": {
            "requested": _requested_sparsity(settings, plan),
            "achieved": sum(row["pruned"] for row in rows) / numel,
        },
        "bits_per_weight": 8 * sum(row["bytes"] for row in rows) / numel,
        **_allocation(journal.entries[0]["allocation"]),
        "bytes": sizes(folder, checkpoint, model, entries, replaced),
        **cost,
        "files": files,
        "matrices": rows,
        **({"outer": outer["outer"]} if outer["outer"] else {}),
    }


def _allocation(how: dict[str, Any]) -> dict[str, Any]:
    """The choice of the plan and, under a budget in time, the prediction."""
    rest = {name: value for name, value in how.items() if name != "time"}
    return {"allocation": rest, **({"time": how["time"]} if "time" in how else {})}


def _requested_sparsity(settings: Settings, plan: Sequence[PlannedMatrix]) -> float:
    planned = settings.plan is not None or settings.has_budget or settings.keep_zeros
    return planned_sparsity(plan) if planned else settings.target_sparsity
