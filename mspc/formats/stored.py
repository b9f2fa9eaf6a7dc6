"""What the sparse export says of one matrix beside its tensors (docs/sparse-format.md)."""

from dataclasses import dataclass

import torch

from mspc.types import Target


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """Shape (O, I), target and dtype of a matrix that is stored by its kept weights."""

    shape: tuple[int, int]
    target: Target
    dtype: torch.dtype
