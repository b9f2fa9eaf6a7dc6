"""`load`: the model of any folder that mspc reads, in transformers, with its compressed matrices still compressed."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

import mspc.runtime.hf_quantizer  # noqa: F401  registers the sparse export with transformers
from mspc.errors import InputError, MspcError, in_brief, is_out_of_memory, unknown
from mspc.formats.layout import with_offsets
from mspc.kernels import cusparselt
from mspc.kernels.cpu.library import library
from mspc.model.auto_class import auto_class, model_class
from mspc.model.hub import choose_device, load_config, resolve, without_progress
from mspc.model.open import check_folder, choose_dtype, open_source
from mspc.runtime.linear import SparseLinear, prepare
from mspc.settings import DTYPES
from mspc.storage.artifact import ArtifactSource
from mspc.storage.dequantized import Dequantized
from mspc.storage.manifest import is_artifact
from mspc.storage.sparse_export import (
    descriptions,
    is_sparse_export,
    quantization_config,
    read_quantization_config,
    stored_name,
)

PREFILLS = ("auto", "cusparselt")
INPUTS = ("int16", "int8")


def load(
    path: str | Path,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    prefill: str = "auto",
    *,
    device_map: str | dict[str, Any] | None = None,
    attn_implementation: str | None = None,
    check: bool = True,
    inputs: str = "int16",
) -> PreTrainedModel:
    """The model of an artifact, a sparse or dense export, or a checkpoint, in eval mode and without gradients.

    `path` is a folder or a hub id. Compressed matrices are `SparseLinear` layers, which hold the tensors of the files
    byte for byte; all else is as transformers has it. Slices of fused experts in an artifact become dense.

    `dtype` is the dtype of all that is not compressed, and of the computation. auto means float32 on a CPU, and the
    checkpoint's own dtype elsewhere. `device_map`, which needs accelerate, and `attn_implementation` are those of
    `from_pretrained` in transformers; give `device` or `device_map`, not both.

    `prefill="cusparselt"` multiplies many tokens by 16-bit matrices of 2:4 on the sparse tensor cores of a CUDA device,
    from a copy of 9 bits a weight. auto makes no copy, and expands the weight.

    On a CPU, inputs of codes are rounded to 16 bits, and with `inputs="int8"` to 8, for any number of tokens.

    An artifact's files are compared with the digests in its manifest, at the speed of sha256. `check=False` omits that.

    Raises InputError, naming the matrix, for files that are damaged or do not belong together. Raises it too for a
    device or a model that `prefill` or `inputs` does not fit.
    """
    if device != "auto" and device_map is not None:
        raise InputError(f"load: device={device!r} and device_map={device_map!r} both place the model. Give only one.")
    path = getattr(path, "path", path)  # of an Artifact
    folder, main_device = resolve(str(path)), choose_device(_device_of(device_map) or device)
    _check_prefill(prefill, main_device)
    check_inputs(inputs, main_device)
    chosen_class, source = _artifact(folder, check) if is_artifact(folder) else _checkpoint(folder)
    chosen = _choose_dtype(dtype, main_device, folder)
    try:
        with without_progress():
            model, info = chosen_class.from_pretrained(
                **source, dtype=chosen, device_map=device_map, attn_implementation=attn_implementation,
                output_loading_info=True, trust_remote_code=False,
            )  # fmt: skip
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # shapes that do not fit, unknown options, no accelerate, damaged JSON
        if isinstance(error, MspcError) or is_out_of_memory(error):
            raise
        raise InputError(f"{folder}: transformers cannot load it ({in_brief(error)}).") from error
    model.config.name_or_path = str(folder)
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{folder} holds no {missing[0]}, which the model needs. Export or download it again.")
    model.requires_grad_(False)
    if device_map is None:
        model = model.to(main_device)
    prepare(model, model.dtype, on_cpu=True)
    _use(prefill, inputs, model, folder)
    return model


def _use(prefill: str, inputs: str, model: PreTrainedModel, folder: Path) -> None:
    """Raises InputError if one of both fits no matrix of the model."""
    if prefill == "cusparselt":
        _use_cusparselt(model, folder)
    if inputs == "int8":
        _use_int8_inputs(model, folder)


def _check_prefill(prefill: str, device: torch.device) -> None:
    if prefill not in PREFILLS:
        raise unknown("prefill", prefill, PREFILLS)
    if prefill == "cusparselt" and (reason := cusparselt.missing(device)):
        raise InputError(
            f"prefill='cusparselt' needs a CUDA device with sparse tensor cores and a torch with cuSPARSELt, but "
            f"{reason}. Leave prefill out, or choose another device."
        )


def check_inputs(inputs: str, device: torch.device) -> None:
    """Raises InputError for an unknown value, and for int8 where nothing rounds inputs."""
    if inputs not in INPUTS:
        raise unknown("inputs", inputs, INPUTS)
    if inputs == "int8" and (device.type != "cpu" or library() is None):
        reason = f"the device is {device}" if device.type != "cpu" else "it is not there"
        raise InputError(
            f"inputs='int8' is for products in C++ on a CPU, but {reason}. Leave inputs out: nothing is rounded then."
        )


def _device_of(device_map: str | dict[str, Any] | None) -> str | None:
    """cpu if a map puts everything there, else None, for which a device is chosen as if there were no map."""
    if isinstance(device_map, dict):
        devices = {str(device) for device in device_map.values()}
        return devices.pop() if devices == {"cpu"} else None
    return "cpu" if device_map == "cpu" else None


def _use_cusparselt(model: PreTrainedModel, folder: Path) -> None:
    """Raises InputError if no matrix of the model takes it."""
    sparse = [layer for layer in model.modules() if isinstance(layer, SparseLinear)]
    for layer in sparse:
        layer.use_cusparselt()
    if not any(layer.copied_bytes() for layer in sparse):
        raise InputError(
            f"prefill='cusparselt' is for {cusparselt.TAKES}, but {folder} in "
            f"{str(model.dtype).removeprefix('torch.')} has none. Leave prefill out."
        )


def _use_int8_inputs(model: PreTrainedModel, folder: Path) -> None:
    """Raises InputError if no matrix of the model has codes that are multiplied in C++."""
    sparse = [layer for layer in model.modules() if isinstance(layer, SparseLinear)]
    for layer in sparse:
        layer.use_int8_inputs()
    if not any(layer.has_int8_inputs for layer in sparse):
        raise InputError(
            f"inputs='int8' is for matrices with codes, but {folder} in {str(model.dtype).removeprefix('torch.')} has "
            "none. Leave inputs out."
        )


def _checkpoint(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The class of the model of a sparse export or a checkpoint, and the arguments that say where its weights are."""
    if is_sparse_export(folder):
        descriptions(read_quantization_config(folder), folder / "config.json")
    check_folder(folder)  # before transformers raises its own errors
    source = open_source(folder)
    if isinstance(source, Dequantized):
        found, config = _class_and_config(folder)
        tensors = dict(source.read(source.keys()))
        return found, {"pretrained_model_name_or_path": None, "config": config, "state_dict": tensors}
    return auto_class(load_config(folder)), {"pretrained_model_name_or_path": folder, "use_safetensors": True}


def _artifact(folder: Path, check: bool) -> tuple[Any, dict[str, Any]]:
    """The class of the model of an artifact, its config and its tensors, named as those of a sparse export."""
    check_folder(folder)
    source = ArtifactSource(folder)
    if check:
        source.check_files()
    stay_compressed = [entry for entry in source.entries if entry.address.index is None or entry.num_slices]
    quantization = quantization_config(stay_compressed)
    tensors: dict[str, Tensor] = dict(source.read(key for key in source.keys() if not source.is_compressed(key)))  # noqa: SIM118
    for entry in stay_compressed:
        name = stored_name(entry)
        stored = with_offsets(source.stored(entry), entry.stored, name)
        tensors |= {f"{name}.{part}": tensor for part, tensor in stored.items()}
    found, config = _class_and_config(folder)
    config.quantization_config = quantization
    return found, {"pretrained_model_name_or_path": None, "config": config, "state_dict": tensors}


def _class_and_config(folder: Path) -> tuple[Any, PreTrainedConfig]:
    """The class of the language model of a folder, and its config without a quantization."""
    config = load_config(folder)
    found, text = model_class(config), config.get_text_config()
    # Some classes take configs of other types than their own: the language model is wanted only where it is that type.
    return found, text if found.config_class is type(text) else config


def _choose_dtype(asked: str | torch.dtype, device: torch.device, folder: Path) -> torch.dtype:
    if isinstance(asked, torch.dtype):
        return asked
    if asked not in DTYPES:
        raise unknown("dtype", asked, DTYPES)
    return choose_dtype(asked, open_source(folder), device)
