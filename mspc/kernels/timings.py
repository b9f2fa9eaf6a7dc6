"""The cache of measurements: a small JSON file in the user's cache folder, by GPU and versions, then by matrix.

    {"NVIDIA H200, mspc 0.1.0, torch 2.13.0, triton 3.7.1": {"2:4 4096x14336 bfloat16": [[16, "fused", 0], ...]}}

Each choice has the most tokens that its method is fastest for, the method, and the number of its algorithm.
"""

import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mspc.formats.description import StoredMatrix
from mspc.storage.files import cache_folder
from mspc.types import NM
from mspc.version import __version__


class Choice(NamedTuple):
    """A method of `dispatch` for up to `up_to` tokens."""

    up_to: int
    method: str
    algorithm: int


def path() -> Path:
    return cache_folder() / "kernels.json"


def device_key(device: torch.device) -> str:
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return f"{torch.cuda.get_device_name(device)}, mspc {__version__}, torch {torch.__version__}, triton {triton}"


def matrix_key(matrix: StoredMatrix, dtype: torch.dtype) -> str:
    """Pattern, grid and shape of the matrix, dtype of the inputs."""
    grid = matrix.target.grid
    symmetry = "symmetric" if grid is None or grid.symmetric else "asymmetric"
    of_grid = "" if grid is None else f" int{grid.bits} group {grid.group_size} {symmetry}"
    pattern = matrix.target.pattern
    kept = "" if isinstance(pattern, NM) else f" {1 - pattern.sparsity:.0%}"
    return f"{pattern}{kept}{of_grid} {'x'.join(map(str, matrix.shape))} {str(dtype)[6:]}"


def read(device: str, matrix: str) -> list[Choice] | None:
    """The measured choices, or None if nothing was measured for this matrix on this device."""
    try:
        return [Choice(int(up_to), str(method), int(algorithm)) for up_to, method, algorithm in _all()[device][matrix]]
    except (KeyError, TypeError, ValueError):
        return None


def write(device: str, matrix: str, choices: list[Choice]) -> None:
    """Add to the file, or overwrite its choices for this matrix."""
    found = _all()
    found.setdefault(device, {})[matrix] = [list(choice) for choice in choices]
    path().parent.mkdir(parents=True, exist_ok=True)
    partial = path().with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(found, indent=1), encoding="utf-8")
    partial.replace(path())


def _all() -> dict[str, dict[str, Any]]:
    """The content of the file; empty if it is missing or damaged."""
    try:
        found = json.loads(path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
