"""The description of one stored matrix: a row of `matrices` in docs/sparse-format.md."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mspc.errors import InputError
from mspc.numerics.masking import num_pruned
from mspc.numerics.quant import groups_of
from mspc.types import NM, Grid, Pattern, Target

TensorType = tuple[torch.dtype, tuple[int, ...]]
"""dtype and shape."""


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """Shape, pattern and grid of a stored matrix, which decide its tensors."""

    shape: tuple[int, int]
    """(O, I), also where the parameter is (I, O)."""
    pattern: Pattern
    grid: Grid | None
    dtype: torch.dtype
    """Type of the weight."""
    transposed: bool = False
    """True if the model's parameter is (I, O), as in GPT-2's Conv1D."""

    @property
    def target(self) -> Target:
        return Target(self.pattern, self.grid)

    @property
    def num_kept(self) -> int:
        numel = self.shape[0] * self.shape[1]
        return numel - num_pruned(numel, self.pattern.sparsity)

    @property
    def kept_per_row(self) -> int:
        """Kept weights of each row. Without a mask, all rows keep the same number."""
        if isinstance(self.pattern, NM):
            return self.shape[1] // self.pattern.of * self.pattern.keep
        return self.shape[1]

    @property
    def has_mask(self) -> bool:
        return not isinstance(self.pattern, NM) and self.num_kept < self.shape[0] * self.shape[1]

    @property
    def has_indices(self) -> bool:
        return isinstance(self.pattern, NM) and self.pattern.keep < self.pattern.of

    @property
    def num_groups(self) -> int:
        """Groups of a row that share a scale."""
        return 0 if self.grid is None else self.shape[1] // groups_of(self.shape[1], self.grid)

    def tensors(self) -> dict[str, TensorType]:
        """dtype and shape of each of its tensors, by the last part of its name."""
        num_rows, num_columns = self.shape
        found: dict[str, TensorType] = {}
        if self.has_mask:
            found["mask"] = torch.uint8, (num_rows, num_bytes(num_columns, 1))
        elif isinstance(self.pattern, NM) and self.has_indices:
            found["indices"] = torch.uint8, (num_rows, num_bytes(self.kept_per_row, index_bits(self.pattern)))
        if self.grid is None:
            found["values"] = self.dtype, (self.num_kept,) if self.has_mask else (num_rows, self.kept_per_row)
        else:
            bits = self.grid.bits
            in_rows = num_rows, num_bytes(self.kept_per_row, bits)
            found["codes"] = torch.uint8, (num_bytes(self.num_kept, bits),) if self.has_mask else in_rows
            found["scales"] = torch.float16, (num_rows, self.num_groups)
            if not self.grid.symmetric:
                found["zeros"] = torch.uint8, (num_rows, num_bytes(self.num_groups, bits))
        if self.has_mask:
            found["row_offsets"] = torch.int64, (num_rows + 1,)
        return found


def index_bits(pattern: NM) -> int:
    """Bits of an index in a group of M."""
    return (pattern.of - 1).bit_length()


def num_bytes(count: int, bits: int) -> int:
    """Bytes of a stream of `count` integers of `bits` bits."""
    return -(-count * bits // 8)


def types_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorType]:
    return {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in tensors.items()}


def check_types(found: Mapping[str, TensorType], matrix: StoredMatrix, name: str = "the matrix") -> None:
    """Raises InputError, naming the matrix, when a tensor is missing or has another dtype or shape.

    Other tensors are ignored.
    """
    if matrix.grid is not None:
        groups_of(matrix.shape[1], matrix.grid, name)
    if isinstance(matrix.pattern, NM) and matrix.shape[1] % matrix.pattern.of:
        raise InputError(f"{name}: its {matrix.shape[1]} in features are not whole groups of {matrix.pattern}.")
    for part, expected in matrix.tensors().items():
        if part not in found:
            raise InputError(f"{name}: its {part} are missing.")
        if found[part] != expected:
            (dtype, shape), (needed_dtype, needed_shape) = found[part], expected
            raise InputError(
                f"{name}: its {part} are {dtype} {shape}, and its shape and target need {needed_dtype} {needed_shape}."
            )
