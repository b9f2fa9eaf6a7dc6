"""A target as the keys of a JSON object, in a plan, a manifest and the config of a sparse export.

In memory, a matrix that is not quantized has no grid. Only this module knows that JSON says 16 bits instead.
"""

from typing import Any

from mspc.errors import InputError
from mspc.settings import ROW
from mspc.types import BITS, UNQUANTIZED_BITS, Grid, Pattern, Target, Unstructured, parse_nm


def target_to_dict(target: Target) -> dict[str, Any]:
    """The keys pattern, sparsity and bits; with a grid, group_size and symmetric too."""
    grid = target.grid
    values: dict[str, Any] = {"pattern": str(target.pattern), "sparsity": target.pattern.sparsity}
    if grid is None:
        return values | {"bits": UNQUANTIZED_BITS}
    return values | {"bits": grid.bits, "group_size": grid.group_size or ROW, "symmetric": grid.symmetric}


def target_from_dict(row: dict[str, Any]) -> Target:
    """The inverse; a missing pattern is unstructured, missing bits are 16. Raises InputError for a wrong value."""
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
    bits = row.get("bits", UNQUANTIZED_BITS)
    if bits not in (UNQUANTIZED_BITS, *BITS):
        raise InputError(f"bits must be 16, 8, 4, 3 or 2, not {bits}")
    size, symmetric = row.get("group_size", ROW), row.get("symmetric", True)
    if size != ROW and (type(size) is not int or size < 1):
        raise InputError(f"group_size must be a whole number from 1 or {ROW!r}, not {size!r}")
    if type(symmetric) is not bool:
        raise InputError(f"symmetric must be true or false, not {symmetric!r}")
    grid = Grid(int(bits), None if size == ROW else size, symmetric)
    return Target(pattern, None if bits == UNQUANTIZED_BITS else grid)
