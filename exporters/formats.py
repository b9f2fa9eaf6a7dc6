"""The table of formats: the content of each, its readers, and the gain from zeros."""

import importlib.util
from dataclasses import dataclass
from types import ModuleType

from mspc.errors import InputError, unknown


@dataclass(frozen=True)
class Format:
    """One row of `mspc export --list`."""

    module: str
    extra: str | None
    """The extra of the package that writing needs, if any."""
    holds: str
    accepts: str
    runtimes: tuple[str, ...]
    """Names in `exporters.runtimes.RUNTIMES` that `verify` runs it in."""
    zeros: str
    """The gain from zeros, in words."""
    if_installed: tuple[str, ...] = ()
    """Runtimes that `verify` runs it in too where they are installed."""
    holds_slices: bool = False
    """True if it holds matrices that are slices of a parameter (experts)."""


FORMATS = {
    "dense": Format(
        "exporters.dense",
        None,
        "Hugging Face folder, weights in the model's dtype with exact zeros",
        "every pattern and grid",
        ("transformers",),
        "same size and speed as dense; TensorRT and 2:4 kernels can use the zeros",
        if_installed=("vllm",),
        holds_slices=True,
    ),
    "sparse": Format(
        "exporters.sparse",
        None,
        "Hugging Face folder of mspc's own format: values or codes of the kept weights, and where they are",
        "every pattern and grid",
        ("transformers",),
        "smaller: 2:4 and 50% take 9/16 of dense bf16, with int4 g128 3.125 bits per weight",
        if_installed=("vllm",),
        holds_slices=True,
    ),
    "gptq": Format(
        "exporters.gptq",
        None,
        "GPTQ-packed Hugging Face folder, float16 scales",
        "every pattern; 2, 3, 4 or 8 bits in groups of 32, 64, 128 or a row",
        ("transformers", "gptqmodel", "onnxruntime-genai"),
        "same size and speed as without zeros",
        if_installed=("vllm",),
    ),
    "compressed-tensors": Format(
        "exporters.compressed_tensors",
        None,
        "pack-quantized Hugging Face folder in the layout of compressed-tensors >= 0.18",
        "every pattern; 2, 3, 4 or 8 bits in groups of 32, 64, 128 or a row, mixed as they come",
        ("transformers",),
        "same size and speed as without zeros",
        if_installed=("vllm",),
    ),
    "onnx": Format(
        "exporters.onnx",
        "onnx",
        "decoder with key-value cache: float32 or float16 weights, MatMulNBits or QDQ codes; genai_config.json",
        "every pattern; as codes 2, 4 or 8 bits in groups of a multiple of 16",
        ("onnxruntime", "onnxruntime-genai", "openvino"),
        "same size and speed as dense; TensorRT can use 2:4 zeros",
    ),
    "gguf": Format(
        "exporters.gguf",
        "gguf",
        "one file for llama.cpp: codes as Q4_0 or Q8_0, everything else in the model's dtype",
        "Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3, Phi-3; every pattern; symmetric 4 or 8 bits in groups of 32",
        ("transformers",),
        "same size and speed as without zeros",
    ),
}


def runtimes_of(format_name: str) -> tuple[str, ...]:
    """The runtimes that `verify` runs a format in here."""
    row = FORMATS[format_name]
    return *row.runtimes, *(name for name in row.if_installed if importlib.util.find_spec(name))


def load(format_name: str) -> ModuleType:
    """The module of a format. Raises InputError when it is unknown, or needs a package that is not installed."""
    if format_name not in FORMATS:
        raise unknown("format", format_name, FORMATS)
    row = FORMATS[format_name]
    try:
        importlib.import_module(f"exporters.reading.{row.module.rpartition('.')[2]}")  # needed after the export
        return importlib.import_module(row.module)
    except ModuleNotFoundError as error:
        if row.extra is None or str(error.name).startswith(("mspc", "exporters")):
            raise
        raise InputError(
            f"Exporting {format_name} needs {error.name}, in mspc's extra {row.extra}: "
            f"pip install '.[{row.extra}]' in mspc's folder."
        ) from error
