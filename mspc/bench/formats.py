"""Formats by name, and random matrices in them, made on the device in the layout of an export.

No pruner is needed to measure speed. It is enough that every group of N:M is filled, that values are not zero, and that
masks and values lie as in an export.
"""

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mspc.errors import InputError
from mspc.formats.bits import pack_rows
from mspc.formats.decoding import row_offsets
from mspc.formats.description import StoredMatrix, index_bits, num_bytes
from mspc.numerics.masking import num_pruned
from mspc.types import NM, Grid, Target, Unstructured, parse_nm

GROUP_SIZES = (128, 64, 32)
"""Weights that share a scale: the most that divide a row."""
GROUP_SIZE = GROUP_SIZES[0]
DENSE, BF16 = "dense", "bf16"
"""Weights of the dtype of the computation, multiplied by torch; weights of 16 bits, multiplied by mspc."""
ROW_SPREAD = 0.1
"""Standard deviation of the kept weights of a row, divided by their mean. Pruners that compare weights over the whole
matrix leave some rows fuller than others; in the bundled model at 50% this is 0.09 (median of its matrices)."""
STRIP = 2**24
"""Weights whose mask is drawn at a time."""


def parse_format(name: str) -> Target:
    """`dense`, `bf16`, `int4`, `2:4`, `50%` or pattern and bits, such as `2:4+int4`. Raises InputError for others."""
    patterns = [] if name in (DENSE, BF16) else name.split("+")
    grid = None
    if patterns and (bits := re.fullmatch(r"int([8432])", patterns[-1])):
        grid = Grid(int(bits[1]), GROUP_SIZE)
        patterns.pop()
    if not patterns:
        return Target(Unstructured(0.0), grid)
    if len(patterns) == 1 and re.fullmatch(r"\d+:\d+", patterns[0]):
        return Target(parse_nm(patterns[0]), grid)
    if len(patterns) == 1 and re.fullmatch(r"[1-9]\d?%", patterns[0]):
        return Target(Unstructured(int(patterns[0][:-1]) / 100), grid)
    raise InputError(
        f"Unknown format {name!r}. Choose dense, bf16, int8, int4, int3, int2, N:M such as 8:16, a share of zeros "
        "such as 50%, one of the last two with bits, such as 2:4+int4, or an artifact."
    )


def describe(shape: tuple[int, int], target: Target, what: str) -> StoredMatrix:
    """A bfloat16 matrix of a target, in groups that fit its rows.

    Raises InputError, naming `what`, if the target does not fit the shape.
    """
    num_columns = shape[1]
    if target.grid is not None and target.grid.group_size == GROUP_SIZE:
        size = next((size for size in GROUP_SIZES if num_columns % size == 0), GROUP_SIZES[-1])
        target = replace(target, grid=replace(target.grid, group_size=size))
    needed = {}
    if isinstance(target.pattern, NM):
        needed[f"groups of {target.pattern}"] = target.pattern.of
    if target.grid is not None:
        needed[f"groups of {target.grid.group_size} that share a scale"] = target.grid.group_size or num_columns
    for groups, size in needed.items():
        if num_columns % size:
            raise InputError(
                f"{what} has {num_columns} inputs, but needs a multiple of {size} for {groups}. Leave this format out."
            )
    return StoredMatrix(shape, target.pattern, target.grid, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Source:
    """A source of random tensors: a seed on a device."""

    generator: torch.Generator

    @classmethod
    def seeded(cls, seed: int, device: torch.device) -> "Source":
        return cls(torch.Generator(device).manual_seed(seed))

    @property
    def device(self) -> torch.device:
        return self.generator.device

    def normal(self, shape: tuple[int, ...], std: float, dtype: torch.dtype) -> Tensor:
        drawn = torch.empty(shape, dtype=dtype, device=self.device)
        return drawn.normal_(0, std, generator=self.generator)

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, device=self.device, generator=self.generator)

    def stream(self, num_rows: int, count: int, bits: int) -> Tensor:
        """`count` random integers a row, as a stream of bits: uint8 (rows, bytes), unused bits zero."""
        width = num_bytes(count, bits)
        drawn = torch.randint(
            256, (num_rows, width), dtype=torch.uint8, device=self.device, generator=self.generator
        )  # fmt: skip
        if count:
            drawn[:, -1] &= 2 ** (count * bits - 8 * (width - 1)) - 1
        return drawn


def random_stored(matrix: StoredMatrix, source: Source) -> dict[str, Tensor]:
    """The tensors of docs/sparse-format.md for a random matrix, whose grid is symmetric.

    Inputs of variance 1 give outputs of variance 1.
    """
    num_rows, num_columns = matrix.shape
    std = (num_columns * max(matrix.num_kept, 1) / (num_rows * num_columns)) ** -0.5
    stored: dict[str, Tensor] = {}
    if matrix.has_mask:
        stored["mask"] = _random_mask(matrix, source)
        stored["row_offsets"] = row_offsets(stored["mask"])
    elif matrix.has_indices:
        stored["indices"] = _random_indices(matrix, source)
    if matrix.grid is None:
        stored["values"] = source.normal(matrix.tensors()["values"][1], std, matrix.dtype)
        return stored
    bits = matrix.grid.bits
    if matrix.has_mask:
        stored["codes"] = source.stream(1, matrix.num_kept, bits)[0]
    else:
        stored["codes"] = source.stream(num_rows, matrix.kept_per_row, bits)
    size_of_codes = ((4**bits - 1) / 12 + 0.25) ** 0.5  # uniform, and their zero is half a step off the middle
    stored["scales"] = ((0.5 + source.uniform((num_rows, matrix.num_groups))) * std / size_of_codes).half()
    return stored


def _random_indices(matrix: StoredMatrix, source: Source) -> Tensor:
    """N indices for every group, each set of N equally likely."""
    assert isinstance(matrix.pattern, NM)
    num_rows, num_columns = matrix.shape
    keep, of = matrix.pattern.keep, matrix.pattern.of
    packed = []
    for first in range(0, num_rows, max(1, STRIP // num_columns)):
        rows = min(max(1, STRIP // num_columns), num_rows - first)
        order = source.uniform((rows * num_columns // of, of)).argsort(1)
        indices = order[:, :keep].sort(1).values.to(torch.uint8)
        packed.append(pack_rows(indices.view(rows, -1), index_bits(matrix.pattern)))
    return torch.cat(packed)


def _random_mask(matrix: StoredMatrix, source: Source) -> Tensor:
    """Bits of a mask that keeps exactly the weights that the sparsity says, in rows of different fullness."""
    num_rows, num_columns = matrix.shape
    numel = num_rows * num_columns
    share = matrix.num_kept / numel
    fullness = share * (1 + ROW_SPREAD * source.normal((num_rows, 1), 1.0, torch.float32))
    mask = torch.cat([
        source.uniform((len(rows), num_columns)) < rows
        for rows in fullness.clamp(0, 1).split(max(1, STRIP // num_columns))
    ]).flatten()  # fmt: skip
    surplus = int(mask.sum()) - matrix.num_kept
    # The surplus is a small share, so indices are drawn until enough of them can be flipped.
    while surplus:
        indices = torch.randint(numel, (4 * abs(surplus),), device=source.device, generator=source.generator).unique()
        indices = indices[mask[indices] == (surplus > 0)]
        indices = indices[
            torch.randperm(len(indices), device=source.device, generator=source.generator)[: abs(surplus)]
        ]
        mask[indices] = surplus < 0
        surplus = int(mask.sum()) - matrix.num_kept
    assert num_pruned(numel, matrix.pattern.sparsity) == numel - int(mask.sum())
    return pack_rows(mask.view(num_rows, num_columns).to(torch.uint8), 1)
