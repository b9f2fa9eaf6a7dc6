"""pack-quantized Hugging Face folder in the layout of compressed-tensors >= 0.18, with mixed bits as they come.

`sparsity_config` stays empty: zeros lie inside the codes, and vLLM refuses a model whose sparsity names targets.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from exporters.folder import read_config, write_shards
from exporters.packed import (
    BLOCKS,
    GROUP_SIZES,
    check_names,
    check_packed,
    grids_of,
    model_names,
    outer_notes,
    packed_tensors,
)
from mspc.errors import InputError
from mspc.formats.gptq import pack_quantized
from mspc.progress import Step
from mspc.storage.artifact import ArtifactSource
from mspc.storage.carrying import carry
from mspc.storage.files import write_json
from mspc.storage.manifest import MatrixEntry
from mspc.types import HEAD, Codes, Grid, PlannedMatrix

LAYOUT = "0.20.0"
"""The release of compressed-tensors whose layout this is."""

MULTIPLE = 32
"""Features of a packed matrix are a multiple of it."""


def packed_roles(matrices: Sequence[PlannedMatrix]) -> tuple[str, ...]:
    """Roles of the matrices that are packed: blocks, and a head whose sizes allow it. Loaders know no embeddings."""
    heads = [matrix for matrix in matrices if matrix.role == HEAD and matrix.target.grid]
    fits = all(size % MULTIPLE == 0 for matrix in heads for size in matrix.shape) and all(
        matrix.target.grid and matrix.target.grid.group_size in GROUP_SIZES for matrix in heads
    )
    return (*BLOCKS, HEAD) if heads and fits else BLOCKS


@dataclass(frozen=True)
class Options:
    """No options: the artifact decides everything."""


def check(matrices: Sequence[PlannedMatrix], config: dict[str, Any], options: Options, folder: Path) -> None:
    check_packed(matrices, "compressed-tensors", MULTIPLE)
    check_names(matrices, "compressed-tensors", folder)
    if config.get("model_type") == "gpt2":
        raise InputError("compressed-tensors packs nn.Linear, and GPT-2's matrices are Conv1D; export gptq or sparse.")


def notes(entries: Sequence[MatrixEntry], options: Options) -> list[str]:
    roles = packed_roles([entry.planned for entry in entries])
    dense = outer_notes(entries, "compressed-tensors", roles)
    if all(grid.symmetric for grid in grids_of(entries, roles).values()):
        return dense
    return [*dense, "transformers 5.23 loads asymmetric grids only with CompressedTensorsConfig(dequantize=True)."]


def export(artifact: ArtifactSource, out: Path, options: Options, step: Step) -> None:
    dense: list[str] = []
    roles = packed_roles([entry.planned for entry in artifact.entries])
    name_of = model_names(artifact)

    def pack(codes: Codes, grid: Grid) -> dict[str, Tensor]:
        return pack_quantized(codes, grid.bits, symmetric=grid.symmetric)

    def tensors_of(key: str) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in packed_tensors(artifact, key, pack, None, roles):
            if name == name_of(key) and name.endswith(".weight") and tensor.ndim == 2:  # some may be nn.Linear
                dense.append(name.removesuffix(".weight"))
            yield name, tensor

    carry(artifact.folder, out)
    write_shards(artifact, out, tensors_of, step)
    if HEAD not in roles:
        dense.append("lm_head")
    grids = grids_of(artifact.entries, roles)
    quantization = quantization_config(grids, dense)
    write_json(out / "config.json", read_config(artifact) | {"quantization_config": quantization})


def quantization_config(grids: Mapping[str, Grid], dense: Sequence[str]) -> dict[str, Any]:
    """One config group for every grid: `Linear` when there is one, else the names of its matrices."""
    names_of: dict[Grid, list[str]] = defaultdict(list)
    for name, grid in grids.items():
        names_of[grid].append(name)
    groups = {}
    for number, (grid, names) in enumerate(names_of.items()):
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(names_of) == 1 else names,
            "format": "pack-quantized",
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": grid.bits,
                "type": "int",
                "symmetric": grid.symmetric,
                "strategy": "group" if grid.group_size else "channel",
                "group_size": grid.group_size,
                "dynamic": False,
            },
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "version": LAYOUT,
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "ignore": sorted(set(dense)),
        "config_groups": groups,
    }
