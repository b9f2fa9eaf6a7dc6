"""mspc's own sparse checkpoint, which is really smaller: kept weights or codes, and where they are.

docs/sparse-format.md specifies it. One folder may mix patterns and grids; `quantization_config` in config.json says
what every matrix is, so that a reader needs nothing else.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporters.folder import copy_configs, read_config, write_shards
from mspc.artifact import ArtifactSource
from mspc.checkpoint import write_json
from mspc.formats.bits import unpack_rows
from mspc.report import Step

FORMAT_VERSION = 1
KEYS = ("parameter", "shape", "transposed", "dtype", "pattern", "sparsity", "bits", "group_size", "symmetric")


@dataclass(frozen=True)
class Options:
    """None: the artifact decides everything."""


def check(rows: Sequence[dict[str, Any]], config: dict[str, Any], options: Options) -> None:
    """Every artifact can be sparse."""


def notes(rows: Sequence[dict[str, Any]], options: Options) -> list[str]:
    return []


def export(artifact: ArtifactSource, out: Path, options: Options, step: Step) -> None:
    rows = {row["tensor"]: row for row in artifact.manifest["matrices"]}
    matrices = {base_of(key): {name: row[name] for name in KEYS if name in row} for key, row in rows.items()}
    copy_configs(artifact, out)
    quantization = {"quant_method": "mspc", "format_version": FORMAT_VERSION, "matrices": matrices}
    write_json(out / "config.json", read_config(artifact) | {"quantization_config": quantization})

    def tensors_of(key: str) -> Iterator[tuple[str, Tensor]]:
        if key not in rows:
            yield from artifact.read([key])
            return
        row = rows[key]
        for part, tensor in artifact.stored(row).items():  # they are those of the artifact: no packing is due
            yield f"{base_of(key)}.{part}", tensor
            if part == "mask":
                yield f"{base_of(key)}.row_offsets", row_offsets(tensor, row["shape"][1])

    write_shards(artifact, out, tensors_of, step)


def base_of(key: str) -> str:
    return key.removesuffix(".weight")


def row_offsets(mask: Tensor, num_columns: int) -> Tensor:
    """Mask bits uint8 (O, ceil(I / 8)) -> int64 (O + 1): where the kept weights of each row begin, and the end, so that
    rows can be read on their own."""
    counts = unpack_rows(mask, 1, num_columns).sum(1)
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
