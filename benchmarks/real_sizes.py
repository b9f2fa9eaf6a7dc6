"""Bytes of a result of quality_real.py: of its compressed matrices, and of all its weights.

Both are counted for the layout that holds the result, by the same rules for every tool:

    manifest  mspc: what its sparse export takes
    zeros     kept weights in the dtype of the model, and one bit a weight that says which they are. With `row_offsets`,
              a file also has 64 bits a row, which are no part of `matrix_bytes`
    grid      codes of the same number of bits, and a 16-bit scale a group
    written   bytes that the job has written down, because it made the file's layout itself
"""

import json
import math
from pathlib import Path
from typing import Any

from mspc.storage.checkpoint import Checkpoint
from mspc.storage.sizes import tensor_bytes


def matrices(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the matrices in the blocks of a checkpoint."""
    return {
        name: tuple(shape)
        for name, (_, shape) in Checkpoint(folder).types().items()
        if len(shape) == 2 and ".layers." in name
    }


def sizes(rule: dict[str, Any], dense: Path, reference: Path) -> dict[str, Any]:
    """`matrix_bytes`, `weight_bytes` (of everything) and `bits_per_weight` of the matrices."""
    found = matrices(reference)
    weights = sum(math.prod(shape) for shape in found.values())
    types = Checkpoint(reference).types()
    rest = sum(tensor_bytes(kind) for name, kind in types.items() if name not in found)
    if rule["kind"] == "manifest":
        manifest = json.loads(Path(rule["file"]).read_text(encoding="utf-8"))
        inside = sum(row["bytes"] for row in manifest["matrices"])
        everything = manifest["bytes"]["sparse_export"]
    elif rule["kind"] == "written":
        written = json.loads(Path(rule["file"]).read_text(encoding="utf-8"))
        inside, everything = written["matrix_bytes"], written["weight_bytes"]
    elif rule["kind"] == "dense":
        inside = sum(tensor_bytes(types[name]) for name in found)
        everything = inside + rest
    else:
        inside = _of_zeros(dense, reference, list(found)) if rule["kind"] == "zeros" else _of_grid(found, rule)
        rows = sum(shape[0] + 1 for shape in found.values())
        everything = inside + rest + (8 * rows if rule.get("row_offsets") else 0)
    return {"matrix_bytes": inside, "weight_bytes": everything, "bits_per_weight": 8 * inside / weights}


def _of_zeros(dense: Path, reference: Path, names: list[str]) -> int:
    """Bytes in the dtype of the reference, whatever that of the folder with the zeros is."""
    types, total = Checkpoint(reference).types(), 0
    for name, tensor in Checkpoint(dense).read(names):
        kept = int((tensor != 0).sum())
        total += tensor_bytes((types[name][0], (kept,))) + tensor.numel() // 8
    return total


def _of_grid(found: dict[str, tuple[int, ...]], rule: dict[str, Any]) -> int:
    bits, group = rule["bits"], rule["group_size"]
    return sum(rows * (columns * bits // 8 + columns // group * 2) for rows, columns in found.values())
