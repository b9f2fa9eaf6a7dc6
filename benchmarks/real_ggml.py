"""llama.cpp's quantizers on a dense checkpoint, matrix by matrix, dequantized again.

    python benchmarks/real_ggml.py importance MODEL TOKENS.safetensors OUT.safetensors
    python benchmarks/real_ggml.py quantize MODEL IMPORTANCE.safetensors LIBRARY TYPE OUT

The first one measures the importance matrix: for each matrix the mean squared input over the calibration tokens, as
llama.cpp's `llama-imatrix` does. The second one calls `ggml_quantize_chunk` of LIBRARY, the xllamacpp wheel's library.

Every matrix of the blocks gets TYPE, as with `llama-quantize --pure`; rows that do not divide into the blocks of a type
get the type that llama.cpp falls back to. The embeddings get Q6_K, or Q8_0 then, as llama.cpp does for embeddings that
are tied to the head. Norms stay in float32. OUT gets `dense`, in float32, and `bytes.json`.
"""

import ctypes
import sys
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mspc.storage.files import write_json, write_tensors

EMBEDDINGS = "Q6_K"
FALLBACK = {
    "IQ2_XXS": "IQ4_NL", "IQ2_XS": "IQ4_NL", "IQ2_S": "IQ4_NL", "IQ3_XXS": "IQ4_NL", "IQ3_S": "IQ4_NL",
    "IQ4_XS": "IQ4_NL", "Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
"""The types that llama.cpp takes for rows that are no multiple of 256 (`llama-quant.cpp`)."""
FIRST_BATCH = 4
"""Sequences of a forward pass."""


def importance(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The mean square of every input of every matrix in the blocks, over all tokens, float32."""
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str):  # type: ignore[no-untyped-def]
        def add(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            squares = inputs[0].double().pow(2).flatten(0, -2).sum(0)
            sums[name] = sums.get(name, torch.zeros(())) + squares

        return add

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for batch in ids.split(FIRST_BATCH):
            model.get_decoder()(input_ids=batch, use_cache=False)
    return {name: (total / ids.numel()).float() for name, total in sums.items()}


def type_for(wanted: str, columns: int) -> str:
    """The type in which llama.cpp stores rows of this length. Raises SystemExit for a length that no type takes."""
    kind = wanted
    while columns % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]:
        if kind not in FALLBACK:
            raise SystemExit(f"{kind} does not store rows of {columns}.")
        kind = FALLBACK[kind]
    return kind


class Quantizer:
    """`ggml_quantize_chunk` of a library."""

    def __init__(self, library: Path) -> None:
        self._call = ctypes.CDLL(str(library)).ggml_quantize_chunk
        self._call.restype = ctypes.c_size_t
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._call.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]

    def __call__(
        self, weight: NDArray[np.float32], kind: str, squares: NDArray[np.float32] | None
    ) -> tuple[NDArray[np.float32], int]:
        """A weight (O, I) quantized and dequantized, and the bytes in between. `squares` (I,) are the importances."""
        weight = np.ascontiguousarray(weight, np.float32)
        (rows, columns), number = weight.shape, GGMLQuantizationType[kind]
        block, size = GGML_QUANT_SIZES[number]
        stored = np.zeros(rows * columns // block * size, np.uint8)
        given = None if squares is None else np.ascontiguousarray(squares, np.float32)
        pointer = None if given is None else given.ctypes.data
        written = self._call(int(number), weight.ctypes.data, stored.ctypes.data, 0, rows, columns, pointer)
        if written != stored.size:
            raise SystemExit(f"ggml wrote {written} bytes of {kind}, not {stored.size}.")
        return dequantize(stored.reshape(rows, -1), number).reshape(rows, columns), stored.size


def quantize(folder: Path, squares: dict[str, torch.Tensor], quantizer: Quantizer, kind: str, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    inside = rest = 0
    for name, parameter in model.named_parameters():  # tied weights come once
        weight = parameter.data.numpy()
        in_block = ".layers." in name
        if parameter.ndim != 2:
            rest += 4 * parameter.numel()
            continue
        own = type_for(kind if in_block else EMBEDDINGS, weight.shape[1])
        scale = squares[name.removesuffix(".weight")].numpy() if in_block else None
        found, size = quantizer(weight, own, scale)
        parameter.data = torch.from_numpy(found)
        inside, rest = (inside + size, rest) if in_block else (inside, rest + size)
    model.save_pretrained(out / "dense")
    AutoTokenizer.from_pretrained(folder, trust_remote_code=False).save_pretrained(out / "dense")
    write_json(out / "bytes.json", {"matrix_bytes": inside, "weight_bytes": inside + rest})


def main() -> None:
    verb, folder, *arguments = sys.argv[1:]
    if verb == "importance":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
        write_tensors(Path(arguments[1]), importance(model, load_file(arguments[0])["ids"]))
    else:
        squares, library, kind, out = arguments
        quantize(Path(folder), load_file(squares), Quantizer(Path(library)), kind, Path(out))


if __name__ == "__main__":
    main()
