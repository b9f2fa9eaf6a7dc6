"""Exports that are Hugging Face folders: what belongs to the model is copied, weights are written in shards."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mspc.progress import Step
from mspc.storage.artifact import ArtifactSource
from mspc.storage.carrying import is_carried
from mspc.storage.checkpoint import INDEX
from mspc.storage.config_json import corrected
from mspc.storage.files import write_json, write_tensors


def read_config(artifact: ArtifactSource) -> dict[str, Any]:
    """config.json of the source, with the sparsity under a key of our own.

    Readers of `quantization_config` and `sparsity_config` would expect packed tensors, and vLLM refuses a model whose
    `sparsity_config` names targets.
    """
    found: dict[str, Any] = json.loads((artifact.folder / "config.json").read_text(encoding="utf-8"))
    config, manifest = corrected(found, partial(is_carried, artifact.folder)), artifact.manifest
    if any(entry.role and entry.tied is None for entry in artifact.entries):  # the source has both, now different
        config = _untied(config)
    return config | {"mspc": {key: manifest[key] for key in ("format_version", "mspc_version", "sparsity")}}


def _untied(config: dict[str, Any]) -> dict[str, Any]:
    inner = {key: _untied(value) for key, value in config.items() if key == "text_config" and isinstance(value, dict)}
    return config | inner | {"tie_word_embeddings": False}


def write_shards(
    artifact: ArtifactSource, out: Path, tensors_of: Callable[[str], Iterator[tuple[str, Tensor]]], step: Step
) -> None:
    """Weights sharded like the source; `tensors_of` gives what one tensor of the source becomes, by key."""
    weight_map: dict[str, str] = {}
    total_size = 0
    for shard, keys in artifact.shards().items():
        tensors: dict[str, Tensor] = {}
        for key in keys:
            tensors |= tensors_of(key)
            step(key)
        weight_map |= dict.fromkeys(tensors, shard)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
        write_tensors(out / shard, tensors)
    if len(artifact.shards()) > 1:
        write_json(out / INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})
