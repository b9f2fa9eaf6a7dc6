"""`load`: a sparse export or an artifact as a model of transformers whose compressed matrices stay compressed."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

import mspc.runtime.hf_quantizer  # noqa: F401  makes transformers know the format
from mspc.errors import InputError, unknown
from mspc.formats.description import StoredMatrix
from mspc.formats.layout import with_offsets
from mspc.kernels import cusparselt, fp8
from mspc.model.hub import choose_device, load_config, resolve, without_progress
from mspc.recipe import DTYPES
from mspc.runtime.linear import SparseLinear, prepare
from mspc.storage.artifact import ArtifactSource
from mspc.storage.checkpoint import Checkpoint
from mspc.storage.manifest import is_artifact
from mspc.storage.sparse_export import base_of, descriptions, quantization_config, read_quantization_config

PREFILLS = {"cusparselt": cusparselt, "fp8": fp8}
"""What can be asked for."""


def load(
    path: str | Path, device: str = "auto", dtype: str | torch.dtype = "auto", prefill: str = "auto"
) -> PreTrainedModel:
    """The model of a sparse export (a folder or hub id) or of an artifact, in eval mode and without gradients.

    Compressed matrices are `SparseLinear` layers, which hold their tensors as they are in the files, byte for byte; all
    else is as transformers has it. `dtype` is what that is in and what is computed in; auto means float32 on a CPU, and
    the checkpoint's own elsewhere. Slices of fused experts, which an artifact may have, become dense.

    `prefill` is for many tokens and 2:4 matrices, on a CUDA device with cuSPARSELt. `cusparselt` multiplies values of
    16 bits on sparse tensor cores, from a copy of 9 bits a weight; auto, with no copy, expands the weight. `fp8` rounds
    inputs and weights to 8-bit floats for more than 32 tokens (`mspc.kernels.fp8`), which changes the logits, and needs
    a copy of 5 bits.

    Raises InputError, naming the matrix, for files that are damaged or do not belong together, and for a device or a
    model without what `prefill` needs.
    """
    if prefill not in ("auto", *PREFILLS):
        raise unknown("prefill", prefill, ("auto", *PREFILLS))
    folder, place = resolve(str(path)), choose_device(device)
    if prefill != "auto" and (reason := PREFILLS[prefill].missing(place)):
        raise InputError(
            f"prefill={prefill!r} needs a CUDA device with sparse tensor cores and a torch with cuSPARSELt, and "
            f"{reason}; leave it out, or choose another device."
        )
    open_folder = _open_artifact if is_artifact(folder) else _open_export
    model_class, described, settings = open_folder(folder)
    with without_progress():
        model, info = model_class.from_pretrained(
            **settings, dtype=_choose_dtype(dtype, place, described), output_loading_info=True
        )
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{folder} holds no {missing[0]}, which the model needs; it is incomplete.")
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model = model.to(place)
    prepare(model, model.dtype)
    if prefill != "auto":
        _prefill_by(prefill, model, folder)
    return model


def _prefill_by(method: str, model: PreTrainedModel, folder: Path) -> None:
    """Raises InputError where it would change nothing."""
    sparse = [layer for layer in model.modules() if isinstance(layer, SparseLinear)]
    for layer in sparse:
        layer.prefill_by(method)
    if not any(layer.copied_bytes() for layer in sparse):
        raise InputError(
            f"prefill={method!r} is for {PREFILLS[method].TAKES}, and {folder} in "
            f"{str(model.dtype).removeprefix('torch.')} has none; leave it out."
        )


Opened = tuple[Any, dict[str, StoredMatrix], dict[str, Any]]
"""The class of a model, its compressed matrices, and from what it is loaded."""


def _open_export(folder: Path) -> Opened:
    described = descriptions(read_quantization_config(folder), folder / "config.json")
    Checkpoint(folder)  # raises what is wrong with its files in our words
    return AutoModelForCausalLM, described, {"pretrained_model_name_or_path": folder}


def _open_artifact(folder: Path) -> Opened:
    source = ArtifactSource(folder)
    quantization = quantization_config(source.whole.values())
    described = {base_of(key): entry.stored for key, entry in source.whole.items()}
    tensors: dict[str, Tensor] = dict(source.read(sorted(set(source.keys()) - source.whole.keys())))
    for (name, matrix), entry in zip(described.items(), source.whole.values(), strict=True):
        stored = with_offsets(source.stored(entry), matrix, name)
        tensors |= {f"{name}.{part}": tensor for part, tensor in stored.items()}
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(load_config(folder))
    skeleton.config.quantization_config = quantization
    settings = {"pretrained_model_name_or_path": None, "config": skeleton.config, "state_dict": tensors}
    return type(skeleton), described, settings


def _choose_dtype(asked: str | torch.dtype, device: torch.device, described: dict[str, StoredMatrix]) -> torch.dtype:
    if isinstance(asked, torch.dtype):
        return asked
    if asked not in DTYPES:
        raise unknown("dtype", asked, DTYPES)
    if asked != "auto":
        return getattr(torch, asked)
    if device.type == "cpu":
        return torch.float32
    return next((matrix.dtype for matrix in described.values()), torch.float32)
