"""Open a checkpoint folder, an artifact or a sparse export as a model, or as a source of tensors."""

from pathlib import Path

import torch

from mspc.model.config_checks import FLOATS
from mspc.model.hub import load_config
from mspc.model.streamed import StreamedModel
from mspc.storage.artifact import ArtifactSource
from mspc.storage.checkpoint import Replaced, TensorSource
from mspc.storage.dequantized import open_checkpoint
from mspc.storage.manifest import is_artifact
from mspc.storage.sparse_export import SparseSource, is_sparse_export


def open_model(
    folder: Path, *, device: torch.device, dtype: str = "auto", eager: bool = False, replaced: Path | None = None
) -> StreamedModel:
    """A checkpoint folder, an artifact or a sparse export as a streamed model.

    With `eager`, attention and experts are plain operations, which have second derivatives, and not fused kernels.
    `replaced` is a folder of files whose tensors are in place of those in `folder`.
    """
    source = open_source(folder)
    if replaced is not None:
        source = Replaced(source, replaced)
    config = load_config(folder)
    return StreamedModel(source, config, device, choose_dtype(dtype, source, device), eager)


def check_folder(folder: Path) -> None:
    """Raises InputError, naming the file or tensor, for a folder whose config and weights make no model.

    Only headers are read.
    """
    open_model(folder, device=torch.device("meta"))


def open_source(folder: Path) -> TensorSource:
    if is_artifact(folder):
        return ArtifactSource(folder)
    return SparseSource(folder) if is_sparse_export(folder) else open_checkpoint(folder)


def choose_dtype(name: str, source: TensorSource, device: torch.device) -> torch.dtype:
    """A dtype by name. `auto` is float32 on a CPU, where half precision is slow, else the checkpoint's own."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    types = source.types()
    found = next((types[key][0] for key in source.keys() if types[key][0] in FLOATS), "float32")  # noqa: SIM118
    return getattr(torch, found)
