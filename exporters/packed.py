"""What the formats of packed integers share: which matrices they hold, and names and dtype of everything else."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mspc.errors import InputError
from mspc.settings import ROW
from mspc.storage.artifact import ArtifactSource

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128, ROW)


def check_packed(rows: Sequence[dict[str, Any]], format_name: str, multiple_of: int) -> None:
    """Raises InputError, naming the matrix, for a grid or shape that the loaders of packed integers do not take."""
    packed = [row for row in rows if row["bits"] != 16]
    if not packed:
        raise InputError(
            f"{format_name} holds rounded weights, and no matrix has a grid: compress with --bits 4 (or 2, 3, 8), or "
            "export dense or sparse."
        )
    for row in packed:
        if row["bits"] not in BITS or row["group_size"] not in GROUP_SIZES:
            raise InputError(
                f"{row['name']}: {format_name} takes 2, 3, 4 or 8 bits in groups of 32, 64, 128 or {ROW}, not "
                f"{row['bits']} bits in groups of {row['group_size']}; compress with such a --group-size."
            )
        if any(size % multiple_of for size in row["shape"]):
            raise InputError(
                f"{row['name']}: the kernels that read {format_name} need in and out features divisible by "
                f"{multiple_of}, not {row['shape'][1]} and {row['shape'][0]}; leave it out with --skip."
            )


def commonest(values: Sequence[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def model_names(artifact: ArtifactSource) -> Callable[[str], str]:
    """Source key -> the model's own name: some checkpoints leave out the prefix of the base model."""
    row = artifact.manifest["matrices"][0]
    prefix = row["parameter"].removesuffix(row["tensor"]) if row["parameter"].endswith(row["tensor"]) else ""
    return lambda key: prefix + key


def packed_tensors(
    artifact: ArtifactSource,
    key: str,
    rows: dict[str, dict[str, Any]],
    pack: Callable[[dict[str, Any]], dict[str, Tensor]],
    dtype: torch.dtype | None,
) -> Iterator[tuple[str, Tensor]]:
    """What one tensor of the source becomes: the packed parts of a matrix with a grid, else itself in `dtype`."""
    name = model_names(artifact)(key)
    if key in rows and rows[key]["bits"] != 16:
        for part, tensor in pack(rows[key]).items():
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


def block_prefix(rows: Sequence[dict[str, Any]]) -> str:
    """`model.layers.` of `model.layers.0.self_attn.q_proj.weight`."""
    name: str = rows[0]["parameter"]
    return name[: next(i for i, part in enumerate(name) if part.isdecimal())]
