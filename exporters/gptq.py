"""GPTQ-packed Hugging Face folder: the codes of the solver in the layout that transformers, GPTQModel and vLLM load.

Symmetric grids are written in the format's first version, which every loader reads. Asymmetric ones need the second: in
the first, a zero point of 0 wraps around and loaders misread the whole word silently. Groups are those of the column
order (static), so `desc_act` is false and `g_idx` is always the plain one.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporters.folder import read_config, write_shards
from exporters.packed import (
    block_prefix,
    check_names,
    check_packed,
    commonest,
    grids_of,
    model_names,
    outer_notes,
    packed_tensors,
)
from mspc.errors import InputError
from mspc.formats.gptq import V1, V2, pack_gptq
from mspc.progress import Step
from mspc.storage.artifact import ArtifactSource
from mspc.storage.carrying import carry
from mspc.storage.config_json import with_dtype
from mspc.storage.files import write_json
from mspc.storage.manifest import MatrixEntry
from mspc.types import Codes, Grid, PlannedMatrix
from mspc.version import __version__


@dataclass(frozen=True)
class Options:
    """No options: the artifact decides everything."""


def check(matrices: Sequence[PlannedMatrix], config: dict[str, Any], options: Options, folder: Path) -> None:
    check_packed(matrices, "gptq", 32)
    check_names(matrices, "gptq", folder)
    if len({matrix.target.grid.symmetric for matrix in matrices if matrix.target.grid and not matrix.role}) > 1:
        raise InputError("gptq cannot mix symmetric and asymmetric matrices; use one kind in the plan.")


def notes(entries: Sequence[MatrixEntry], options: Options) -> list[str]:
    dense = outer_notes(entries, "gptq")
    if version_of(entries) == V1:
        return dense
    return [
        *dense,
        "Written as gptq_v2, since its grids are asymmetric. GPTQModel and transformers read it; ONNX Runtime "
        "GenAI, auto-gptq and vLLM are known not to. Symmetric grids avoid this.",
    ]


def export(artifact: ArtifactSource, out: Path, options: Options, step: Step) -> None:
    version = version_of(artifact.entries)
    dense: list[str] = []
    prefix, name_of = block_prefix(artifact.entries), model_names(artifact)

    def pack(codes: Codes, grid: Grid) -> dict[str, Tensor]:
        return pack_gptq(codes, grid.bits, version)

    def tensors_of(key: str) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in packed_tensors(artifact, key, pack, torch.float16):
            if name == name_of(key) and name.startswith(prefix) and name.endswith(".weight") and tensor.ndim == 2:
                dense.append(name.removesuffix(".weight"))
            yield name, tensor

    carry(artifact.folder, out)
    write_shards(artifact, out, tensors_of, step)
    quantization = quantization_config(artifact.entries, dense)
    config = with_dtype(read_config(artifact), "float16")
    write_json(out / "config.json", config | {"quantization_config": quantization})
    write_json(out / "quantize_config.json", quantization)


def quantization_config(entries: Sequence[MatrixEntry], dense: Sequence[str]) -> dict[str, Any]:
    """Matrices that differ from the commonest grid, or are dense, are named in both of the keys that loaders know."""
    settings = {name: _settings(grid) for name, grid in grids_of(entries).items()}
    bits, group_size = commonest([(own["bits"], own["group_size"]) for own in settings.values()])
    dynamic: dict[str, dict[str, int]] = {f"-:^{re.escape(name)}$": {} for name in dense}
    for name, own in settings.items():
        if own != {"bits": bits, "group_size": group_size}:
            dynamic[f"+:^{re.escape(name)}$"] = own
    version = version_of(entries)
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": version == V1,
        "desc_act": False,
        "checkpoint_format": version,
        "lm_head": False,
        # Loaders ask who wrote an asymmetric folder, and trust only packers that get its zero points right.
        "meta": {"quantizer": [f"mspc:{__version__}", "gptqmodel:7.6.0"]},
    }
    if dynamic:
        config["dynamic"] = dynamic
    if dense:
        prefix = re.escape(block_prefix(entries)) + r"\d+\."
        config["modules_in_block_to_quantize"] = [sorted({re.sub(prefix, "", name) for name in settings})]
    return config


def version_of(entries: Sequence[MatrixEntry]) -> str:
    """The first version of the format for symmetric grids, the second for asymmetric ones."""
    return V1 if all(grid.symmetric for grid in grids_of(entries).values()) else V2


def _settings(grid: Grid) -> dict[str, int]:
    return {"bits": grid.bits, "group_size": grid.group_size or -1}
