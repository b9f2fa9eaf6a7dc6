"""Reading the sparse export (docs/sparse-format.md): every compressed matrix of a folder, one at a time.

Files come from anywhere, so everything is checked before it is used: an error is always an InputError, and nothing is
allocated that the size of the files does not justify.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mspc.checkpoint import Checkpoint
from mspc.errors import InputError
from mspc.formats import canonical
from mspc.plan import target_from_dict
from mspc.types import CompressedLinear

FORMAT_VERSION = 1
DTYPES = ("float32", "bfloat16", "float16")


def read_sparse(folder: Path) -> Iterator[tuple[str, dict[str, Any], CompressedLinear]]:
    """`(name, row, matrix)` for every matrix that the config describes, in its order."""
    rows = read_rows(folder)
    checkpoint = Checkpoint(folder)
    keys = set(checkpoint.keys())
    for name, row in rows.items():
        present = [part for part in PARTS if f"{name}.{part}" in keys]
        stored = dict(zip(present, (t for _, t in checkpoint.read(f"{name}.{part}" for part in present)), strict=True))
        yield name, row, _matrix(name, row, stored)


PARTS = ("values", "codes", "scales", "zeros", "mask", "indices", "row_offsets")


def read_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """What config.json says of every matrix. Raises InputError for what cannot be meant."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))["quantization_config"]
        method, version, rows = config["quant_method"], config["format_version"], config["matrices"]
        shapes = {name: row["shape"] for name, row in rows.items()}
        dtypes = {row["dtype"] for row in rows.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} does not describe a sparse export of mspc ({error!r}).") from error
    if method != "mspc" or type(version) is not int or version < 1:
        raise InputError(f"{path}: quant_method {method!r}, format_version {version!r} is no sparse export of mspc.")
    if version > FORMAT_VERSION:
        raise InputError(f"{folder} has sparse format {version}; this mspc reads up to {FORMAT_VERSION}: upgrade mspc.")
    for name, shape in shapes.items():
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
            raise InputError(f"{path}, {name}: shape must be two whole numbers above 0, not {shape!r}.")
    if unknown := [dtype for dtype in dtypes if dtype not in DTYPES]:
        raise InputError(f"{path}: dtype must be one of {', '.join(DTYPES)}, not {unknown[0]!r}.")
    return dict(rows)


def _matrix(name: str, row: dict[str, Any], stored: dict[str, Tensor]) -> CompressedLinear:
    try:
        target = target_from_dict(row)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    num_out, num_in = row["shape"]
    matrix = canonical.unpack(stored, (num_out, num_in), target, getattr(torch, row["dtype"]), name)
    if canonical.has_mask(target):
        expected = torch.nn.functional.pad(matrix.mask.sum(1).cumsum(0), (1, 0))
        found = stored.get("row_offsets")
        if found is None or not torch.equal(found, expected):
            raise InputError(f"{name}: its row_offsets do not count the bits of its mask.")
    return matrix
