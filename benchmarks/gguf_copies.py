"""Copies of a GGUF file: with every weight in float32, and with a fault made on purpose."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize
from numpy.typing import NDArray

ARCHITECTURE = "general.architecture"
Weight = NDArray[np.float32]


def kinds_in(file: Path) -> list[str]:
    """The types of the matrices."""
    return sorted({tensor.tensor_type.name for tensor in GGUFReader(file).tensors if len(tensor.shape) > 1})


def copy_as_float32(
    file: Path,
    out: Path,
    fields: dict[str, Any] | None = None,
    change: Callable[[str, Weight], Weight] = lambda name, weight: weight,
) -> Path:
    """A copy in float32. `fields` replace, add or (None) remove metadata; `change` may replace a tensor."""
    reader, fields = GGUFReader(file), fields or {}
    missing = {name: value for name, value in fields.items() if value is not None}
    writer = GGUFWriter(out, str(reader.fields[ARCHITECTURE].contents()))
    for name, found in reader.fields.items():
        value = fields.get(name, found.contents())
        if name.startswith("GGUF.") or name == ARCHITECTURE or value is None:
            continue
        missing.pop(name, None)
        is_array = found.types[0] == GGUFValueType.ARRAY
        writer.add_key_value(name, value, found.types[0], sub_type=found.types[-1] if is_array else None)
    for name, value in missing.items():
        writer.add_key_value(name, value, GGUFValueType.UINT32 if type(value) is int else GGUFValueType.get_type(value))
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1].tolist())
        writer.add_tensor(tensor.name, np.ascontiguousarray(change(tensor.name, weight), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@dataclass(frozen=True)
class Fault:
    """A way to be wrong, and the check of verify_llamacpp.py that must notice it."""

    noticed_by: str
    fields: dict[str, Any] = field(default_factory=dict)
    change: Callable[[str, Weight], Weight] = lambda name, weight: weight


def _halves(name: str, weight: Weight) -> Weight:
    """Query and key matrices with the halves of every head as the model has them. Heads have 16 rows."""
    if not name.endswith(("attn_q.weight", "attn_k.weight")):
        return weight
    return weight.reshape(-1, 8, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _swapped(name: str, weight: Weight) -> Weight:
    """The two rows of a pair swapped in one key matrix, which turns the rotation around."""
    if name != "blk.0.attn_k.weight":
        return weight
    return weight.reshape(-1, 2, weight.shape[1])[:, ::-1].reshape(weight.shape)


FAULTS = {
    "queries and keys not in pairs": Fault("logits", change=_halves),
    "keys of one block swapped": Fault("logits", change=_swapped),
    "another rotary base": Fault("logits", {"llama.rope.freq_base": 100.0}),
    "another epsilon of norms": Fault("logits", {"llama.attention.layer_norm_rms_epsilon": 1e-2}),
    "no end of text": Fault("end of text", {"tokenizer.ggml.eos_token_id": None}),
    "another end of text": Fault("end of text", {"tokenizer.ggml.eos_token_id": 70}),
    "a BOS token added": Fault("tokens", {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 70}),
    "another pre-tokenizer": Fault("tokens", {"tokenizer.ggml.pre": "llama-bpe"}),
    "another template": Fault("template", {"tokenizer.chat_template": "{{ messages[0]['content'] }}"}),
    "no template": Fault("template", {"tokenizer.chat_template": None}),
}
"""For a Llama with a tokenizer like that of SmolLM."""
