"""The plan: pattern, sparsity and grid of each matrix, as JSON that can be read, edited and passed back.

Each matrix has one line. `name`, `pattern`, `sparsity`, `bits`, `group_size` and `symmetric` decide the result; `shape`
and `sensitivity` are information (see `PlannedMatrix`).
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mspc.errors import InputError, unknown
from mspc.formats.targets import target_from_dict, target_to_dict
from mspc.storage.files import write_text
from mspc.types import Matrix, PlannedMatrix

FORMAT_VERSION = 1
KEYS = ("name", "shape", "pattern", "sparsity", "bits", "group_size", "symmetric", "sensitivity")


def write_plan(path: Path, plan: Sequence[PlannedMatrix]) -> None:
    rows = [
        {"name": matrix.name, "shape": matrix.shape, **target_to_dict(matrix.target), "sensitivity": matrix.sensitivity}
        for matrix in plan
    ]
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    write_text(path, f'{{"format_version": {FORMAT_VERSION}, "matrices": [\n{lines}\n]}}\n')


def read_plan(path: Path, matrices: Sequence[Matrix]) -> list[PlannedMatrix]:
    """The plan for exactly these matrices, in their order.

    Raises InputError for a line that is invalid or comes twice, for an unknown matrix, and for a missing one.
    """
    if not path.is_file():
        raise InputError(f"Plan {path} does not exist (looked for {path.absolute()}).")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        version, rows = document.get("format_version", FORMAT_VERSION), document["matrices"]
        by_name = {str(row["name"]): row for row in rows}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"Plan {path} cannot be read ({error!r}). Give a plan.json, edited or not.") from error
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
            f"Plan {path} leaves out {', '.join(missing[:3])} and {len(missing)} in all. Add a line for every matrix "
            "(sparsity 0 and bits 16 leave it dense), or leave it out with --skip."
        )
    return [_planned(path, matrix, by_name[matrix.name]) for matrix in matrices]


def _planned(path: Path, matrix: Matrix, row: dict[str, Any]) -> PlannedMatrix:
    try:
        return PlannedMatrix(matrix.name, matrix.shape, target_from_dict(row), row.get("sensitivity"))
    except (InputError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"Plan {path}, {matrix.name}: {str(error).removesuffix('.')}.") from error
