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

from exporters.folder import copy_configs, read_config, write_shards
from exporters.packed import block_prefix, check_packed, commonest, model_names, packed_tensors
from mspc.errors import InputError
from mspc.formats.gptq import V1, V2, pack_gptq
from mspc.progress import Step
from mspc.settings import ROW
from mspc.storage.artifact import ArtifactSource
from mspc.storage.files import write_json
from mspc.version import __version__


@dataclass(frozen=True)
class Options:
    checkpoint_format: str | None = None
    """gptq or gptq_v2; None: gptq for symmetric grids, gptq_v2 for asymmetric ones."""


def check(rows: Sequence[dict[str, Any]], config: dict[str, Any], options: Options) -> None:
    check_packed(rows, "gptq", 32)
    if options.checkpoint_format not in (None, V1, V2):
        raise InputError(f"checkpoint_format must be {V1} or {V2}, not {options.checkpoint_format!r}.")
    if len({row["symmetric"] for row in rows if row["bits"] != 16}) > 1:
        raise InputError("gptq cannot mix symmetric and asymmetric matrices; use one kind in the plan.")


def notes(rows: Sequence[dict[str, Any]], options: Options) -> list[str]:
    if _version(rows, options) == V1:
        return []
    return [
        "Note: written as gptq_v2, since its grids are asymmetric or it was asked for. GPTQModel and transformers read "
        "it; ONNX Runtime GenAI, auto-gptq and vLLM are known not to. Symmetric grids avoid this."
    ]


def export(artifact: ArtifactSource, out: Path, options: Options, step: Step) -> None:
    matrices = artifact.manifest["matrices"]
    version = _version(matrices, options)
    rows = {row["tensor"]: row for row in matrices}
    dense: list[str] = []
    prefix, name_of = block_prefix(matrices), model_names(artifact)

    def pack(row: dict[str, Any]) -> dict[str, Tensor]:
        codes = artifact.matrix(row).codes
        assert codes is not None
        if version == V1 and int(codes.zeros.min()) == 0:
            raise InputError(
                f"{row['name']}: it has a zero point of 0, which loaders misread in {V1}; use {V2}, or symmetric grids."
            )
        return pack_gptq(codes, row["bits"], version)

    def tensors_of(key: str) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in packed_tensors(artifact, key, rows, pack, torch.float16):
            if name == name_of(key) and name.startswith(prefix) and name.endswith(".weight") and tensor.ndim == 2:
                dense.append(name.removesuffix(".weight"))
            yield name, tensor

    copy_configs(artifact, out)
    write_shards(artifact, out, tensors_of, step)
    quantization = quantization_config(matrices, dense, version)
    write_json(out / "config.json", read_config(artifact) | {"dtype": "float16", "quantization_config": quantization})
    write_json(out / "quantize_config.json", quantization)


def quantization_config(matrices: Sequence[dict[str, Any]], dense: Sequence[str], version: str) -> dict[str, Any]:
    """Matrices that differ from the commonest grid, or are dense, are named in both of the keys that loaders know."""
    packed = [row for row in matrices if row["bits"] != 16]
    bits, group_size = commonest([(row["bits"], row["group_size"]) for row in packed])
    dynamic: dict[str, dict[str, int]] = {f"-:^{re.escape(name)}$": {} for name in dense}
    for row in packed:
        if (row["bits"], row["group_size"]) != (bits, group_size):
            settings = {"bits": row["bits"], "group_size": _group_size(row["group_size"])}
            dynamic[f"+:^{re.escape(row['name'])}$"] = settings
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": _group_size(group_size),
        "sym": packed[0]["symmetric"],
        "desc_act": False,
        "checkpoint_format": version,
        "lm_head": False,
        # Loaders ask who wrote an asymmetric folder, and trust only packers that get its zero points right.
        "meta": {"quantizer": [f"mspc:{__version__}", "gptqmodel:7.6.0"]},
    }
    if dynamic:
        config["dynamic"] = dynamic
    if dense:
        prefix = re.escape(block_prefix(matrices)) + r"\d+\."
        config["modules_in_block_to_quantize"] = [sorted({re.sub(prefix, "", row["name"]) for row in packed})]
    return config


def _version(rows: Sequence[dict[str, Any]], options: Options) -> str:
    symmetric = all(row["symmetric"] for row in rows if row["bits"] != 16)
    return options.checkpoint_format or (V1 if symmetric else V2)


def _group_size(size: int | str) -> int:
    return -1 if size == ROW else int(size)
