"""Packed integers: the matrices that such a format holds, and names and dtype of all other tensors."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mspc.errors import InputError
from mspc.settings import ROW
from mspc.storage.artifact import ArtifactSource
from mspc.storage.dequantized import open_checkpoint
from mspc.storage.manifest import MatrixEntry, is_artifact
from mspc.types import Codes, Grid, PlannedMatrix

GROUP_SIZES = (32, 64, 128, None)
BLOCKS = ("",)
"""Roles of the matrices of blocks, which have none."""


def check_packed(
    matrices: Sequence[PlannedMatrix], format_name: str, multiple_of: int, roles: Collection[str] = BLOCKS
) -> None:
    """Raises InputError, naming the matrix, for a grid or shape that the loaders of packed integers do not take.

    `roles` are those of the matrices that are packed. Others are dense, whatever their grid.
    """
    matrices = [matrix for matrix in matrices if matrix.role in roles]
    if not any(matrix.target.grid for matrix in matrices):
        raise InputError(
            f"{format_name} holds quantized weights, and no matrix has a grid: compress with --bits 4 (or 2, 3, 8), or "
            "export dense or sparse."
        )
    for matrix in matrices:
        grid, (num_out, num_in) = matrix.target.grid, matrix.shape
        if grid is None:
            continue
        if grid.group_size not in GROUP_SIZES:
            raise InputError(
                f"{matrix.name}: {format_name} takes groups of 32, 64, 128 or {ROW}, not of {grid.group_size}; "
                "compress with such a --group-size."
            )
        if num_out % multiple_of or num_in % multiple_of:
            raise InputError(
                f"{matrix.name}: the kernels that read {format_name} need in and out features divisible by "
                f"{multiple_of}, not {num_in} and {num_out}; leave it out with --skip."
            )


def check_names(matrices: Sequence[PlannedMatrix], format_name: str, folder: Path) -> None:
    """Raises InputError, naming the matrix, for one whose tensor in the source has another name than in the model.

    Loaders look for packed parts under the names of the model's layers, and transformers renames no packed tensor.
    """
    source = ArtifactSource(folder) if is_artifact(folder) else open_checkpoint(folder)
    keys = set(source.keys())
    for matrix in matrices:
        parts = matrix.name.split(".")
        known = {f"{'.'.join(parts[first:])}{end}" for first in range(len(parts)) for end in (".weight", "")}
        if matrix.role in BLOCKS and not known & keys:
            raise InputError(
                f"{matrix.name}: the checkpoint has another name for this matrix than the model, so that no loader of "
                f"{format_name} would find its codes; export dense or sparse."
            )


def grids_of(entries: Sequence[MatrixEntry], roles: Collection[str] = BLOCKS) -> dict[str, Grid]:
    """The grid of every quantized matrix with one of such roles, by its name."""
    return {entry.name: entry.target.grid for entry in entries if entry.target.grid and entry.role in roles}


def outer_notes(entries: Sequence[MatrixEntry], format_name: str, roles: Collection[str] = BLOCKS) -> list[str]:
    """A note about quantized matrices outside of the blocks that such a format holds dense."""
    names = [entry.name for entry in entries if entry.role not in roles]
    if not names:
        return []
    return [
        f"{' and '.join(names)}: {format_name} holds no such codes that its loaders read. Written as the weights that "
        "the codes stand for, with the bytes of a matrix that is not quantized."
    ]


def commonest(values: Sequence[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def model_names(artifact: ArtifactSource) -> Callable[[str], str]:
    """Source key -> the model's own name: some checkpoints leave out the prefix of the base model."""
    first = artifact.entries[0]
    parameter, key = first.address.parameter, first.source_key
    prefix = parameter.removesuffix(key) if parameter.endswith(key) else ""
    return lambda key: prefix + key


def packed_tensors(
    artifact: ArtifactSource,
    key: str,
    pack: Callable[[Codes, Grid], dict[str, Tensor]],
    dtype: torch.dtype | None,
    roles: Collection[str] = BLOCKS,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that one of the source becomes: the packed parts of a quantized matrix, else itself in `dtype`."""
    name, entry = model_names(artifact)(key), artifact.whole.get(key)
    if entry and entry.target.grid and entry.role in roles:
        codes = artifact.matrix(entry).codes
        assert codes is not None
        for part, tensor in pack(codes, entry.target.grid).items():
            yield f"{name.removesuffix('.weight')}.{part}", tensor
        return
    ((_, tensor),) = artifact.read([key])
    if dtype is None or not tensor.is_floating_point():
        yield name, tensor
        return
    cast = tensor.to(dtype)
    if not bool(cast.isfinite().all()):
        raise InputError(f"{name}: its largest weight, {float(tensor.abs().max()):g}, does not fit into {dtype}.")
    yield name, cast


def block_prefix(entries: Sequence[MatrixEntry]) -> str:
    """`model.layers.` of `model.layers.0.self_attn.q_proj`."""
    name = entries[0].name
    return name[: next(i for i, part in enumerate(name) if part.isdecimal())]
