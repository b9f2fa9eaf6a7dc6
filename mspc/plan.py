"""The plan: pattern, sparsity and grid of every matrix, as JSON that a person can read, edit and pass back.

One matrix a line. Only `name`, `pattern`, `sparsity`, `bits`, `group_size` and `symmetric` decide anything; `shape` and
`sensitivity` are there for the reader.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mspc.checkpoint import write_text
from mspc.errors import InputError, unknown
from mspc.recipe import ROW
from mspc.types import Grid, Matrix, Pattern, PlannedMatrix, Target, Unstructured, parse_nm

FORMAT_VERSION = 1
KEYS = ("name", "shape", "pattern", "sparsity", "bits", "group_size", "symmetric", "sensitivity")


def target_to_dict(target: Target) -> dict[str, Any]:
    grid = target.grid
    values: dict[str, Any] = {"pattern": str(target.pattern), "sparsity": target.pattern.sparsity}
    if grid is None:
        return values | {"bits": 16}
    return values | {"bits": grid.bits, "group_size": grid.group_size or ROW, "symmetric": grid.symmetric}


def target_from_dict(row: dict[str, Any]) -> Target:
    pattern: Pattern
    if type(row.get("sparsity", 0)) not in (int, float):
        raise InputError(f"sparsity must be a number, not {row['sparsity']!r}")
    if row.get("pattern", "unstructured") == "unstructured":
        if "sparsity" not in row:
            raise InputError("its sparsity is missing")
        pattern = Unstructured(row["sparsity"])
    else:
        pattern = parse_nm(str(row["pattern"]))
        if abs(row.get("sparsity", pattern.sparsity) - pattern.sparsity) > 5e-5:
            raise InputError(f"pattern {pattern} fixes the sparsity at {pattern.sparsity:g}, not {row['sparsity']:g}")
    bits = row.get("bits", 16)
    if bits not in (16, 8, 4, 3, 2):
        raise InputError(f"bits must be 16, 8, 4, 3 or 2, not {bits}")
    size, symmetric = row.get("group_size", ROW), row.get("symmetric", True)
    if size != ROW and (type(size) is not int or size < 1):
        raise InputError(f"group_size must be a whole number from 1 or {ROW!r}, not {size!r}")
    if type(symmetric) is not bool:
        raise InputError(f"symmetric must be true or false, not {symmetric!r}")
    grid = Grid(int(bits), None if size == ROW else size, symmetric)
    return Target(pattern, None if bits == 16 else grid)


def write_plan(path: Path, plan: Sequence[PlannedMatrix]) -> None:
    rows = [
        {"name": matrix.name, "shape": matrix.shape, **target_to_dict(matrix.target), "sensitivity": matrix.sensitivity}
        for matrix in plan
    ]
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    write_text(path, f'{{"format_version": {FORMAT_VERSION}, "matrices": [\n{lines}\n]}}\n')


def read_plan(path: Path, matrices: Sequence[Matrix]) -> list[PlannedMatrix]:
    """The plan for exactly these matrices, in their order.

    Raises InputError for a line that makes no sense or comes twice, a matrix the model does not have, and one that the
    plan leaves out.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        version, rows = document.get("format_version", FORMAT_VERSION), document["matrices"]
        by_name = {str(row["name"]): row for row in rows}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"Plan {path} cannot be read ({error!r}); expected the format of a plan.json.") from error
    if version != FORMAT_VERSION:
        raise InputError(f"Plan {path} has format {version}, and this mspc reads {FORMAT_VERSION}.")
    twice = [name for name, count in Counter(str(row["name"]) for row in rows).items() if count > 1]
    if twice:
        raise InputError(f"Plan {path} has more than one line for {', '.join(twice[:3])}.")
    names = {matrix.name for matrix in matrices}
    for name, row in by_name.items():
        if name not in names:
            raise InputError(f"Plan {path}: {unknown('matrix', name, names)}")
        for key in row:
            if key not in KEYS:
                raise InputError(f"Plan {path}, {name}: {unknown('key', key, KEYS)}")
    missing = [matrix.name for matrix in matrices if matrix.name not in by_name]
    if missing:
        raise InputError(
            f"Plan {path} leaves out {', '.join(missing[:3])} and {len(missing)} in all: every matrix needs "
            "a line (sparsity 0 and bits 16 prune and round nothing), or --skip."
        )
    return [_planned(path, matrix, by_name[matrix.name]) for matrix in matrices]


def _planned(path: Path, matrix: Matrix, row: dict[str, Any]) -> PlannedMatrix:
    try:
        return PlannedMatrix(matrix.name, matrix.shape, target_from_dict(row), row.get("sensitivity"))
    except (InputError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"Plan {path}, {matrix.name}: {str(error).removesuffix('.')}.") from error
