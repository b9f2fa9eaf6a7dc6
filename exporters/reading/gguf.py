"""Reader of GGUF files: header, metadata, table of tensors and blocks, by the layout of the format's third version.

Sizes in the metadata must be those of `config.json` in the same folder. It shares neither code nor tables with the
exporter, nor with the package that writes the file.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.reading import Decoded, Reader, from_grid
from mspc.errors import InputError
from mspc.storage.manifest import MatrixEntry

# Types of metadata by their number; 8 is a string and 9 an array.
SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
STRING, ARRAY = 8, 9
ALIGNMENT = 32
# Types of tensors by their number.
FLOATS = {0: ("<f4", "float32"), 1: ("<f2", "float16"), 30: ("<u2", "bfloat16")}
Q4_0 = np.dtype([("scale", "<f2"), ("halves", "u1", 16)])
Q8_0 = np.dtype([("scale", "<f2"), ("values", "i1", 32)])
BLOCKS = {2: Q4_0, 8: Q8_0}

PARTS = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "qkv_proj": "attn_qkv", "o_proj": "attn_output",
         "gate_proj": "ffn_gate", "up_proj": "ffn_up", "gate_up_proj": "ffn_up", "down_proj": "ffn_down"}  # fmt: skip
PAIRED = "llama"
"""The only architecture whose query and key rows are in pairs."""
SIZES = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""Keys of the metadata, after the name of the architecture, by those of config.json."""
OUTER = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight"}
MATRIX = re.compile(r"layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.weight$")


class Cursor:
    """A place in the file that moves on with every value read. Raises InputError beyond its end."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.data, self.place = data, 0

    def number(self, dtype: str) -> Any:
        value = values_at(self.data, self.place, np.dtype(dtype), 1)[0].item()
        self.place += np.dtype(dtype).itemsize
        return value

    def string(self) -> str:
        length = self.number("<u8")
        text = values_at(self.data, self.place, np.dtype(np.uint8), length).tobytes().decode("utf-8")
        self.place += length
        return text

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            inner, count = self.number("<u4"), self.number("<u8")
            if inner == ARRAY:
                raise InputError("an array of arrays, which no file of this format has")
            return [self.value(inner) for _ in range(count)]
        return self.number(SCALARS[kind])


def values_at(data: NDArray[np.uint8], start: int, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    """`count` values from byte `start` on. Raises InputError when the file ends before the last."""
    stop = start + count * dtype.itemsize
    if stop > len(data):
        raise InputError(f"the file ends after {len(data):,} bytes, before byte {stop:,} that it speaks of")
    return np.asarray(data[start:stop]).view(dtype)


@dataclass(frozen=True)
class Stored:
    """A tensor's shape, the number of its type, and its first byte in the file."""

    shape: tuple[int, ...]
    kind: int
    start: int


def reader(folder: Path) -> Reader:
    path = folder / "model.gguf"
    data: NDArray[np.uint8] = np.memmap(path, np.uint8, "r")
    metadata, tensors = parse(data, path)
    check_sizes(metadata, json.loads((folder / "config.json").read_text(encoding="utf-8")))
    paired = metadata["general.architecture"] == PAIRED

    def read(entry: MatrixEntry) -> Decoded:
        if entry.address.parameter in OUTER:
            return decode(data, tensors[OUTER[entry.address.parameter]], slice(None))
        found = MATRIX.search(entry.address.parameter)
        if found is None:
            raise InputError(f"{entry.name} has no place in a GGUF file")
        name = f"blk.{found[1]}.{PARTS[found[2]]}.weight"
        order: NDArray[np.int64] | slice = slice(None)
        if paired and found[2] in ("q_proj", "k_proj"):
            count = "head_count" if found[2] == "q_proj" else "head_count_kv"
            order = halves_from_pairs(tensors[name].shape[0], metadata[f"{PAIRED}.attention.{count}"])
        return decode(data, tensors[name], order)

    return read


def check_sizes(metadata: dict[str, Any], config: dict[str, Any]) -> None:
    """Raises InputError where the metadata differ from config.json, as far as it names the sizes."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    named = config | rope | rope.get("full_attention", {})
    for key, name in SIZES.items():
        found = metadata.get(f"{metadata['general.architecture']}.{name}")
        if found is None or named.get(key) is None:
            continue
        if not math.isclose(found, named[key], rel_tol=1e-6):
            raise InputError(f"{name} is {found} in the file, but {key} is {named[key]} in config.json")


def parse(data: NDArray[np.uint8], path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Metadata and tensors by name. Raises InputError for another kind of file and for one cut short."""
    if data[:4].tobytes() != b"GGUF":
        raise InputError(f"{path} is not a GGUF file.")
    cursor = Cursor(data)
    cursor.place = 4
    if (version := cursor.number("<u4")) != 3:
        raise InputError(f"{path} has version {version} of GGUF, not 3.")
    num_tensors, num_keys = cursor.number("<u8"), cursor.number("<u8")
    metadata = {}
    for _ in range(num_keys):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("<u4"))
    table = {}
    for _ in range(num_tensors):
        name = cursor.string()
        shape = tuple(cursor.number("<u8") for _ in range(cursor.number("<u4")))[::-1]
        table[name] = Stored(shape, cursor.number("<u4"), cursor.number("<u8"))
    first = -(-cursor.place // ALIGNMENT) * ALIGNMENT
    return metadata, {name: Stored(item.shape, item.kind, first + item.start) for name, item in table.items()}


def halves_from_pairs(num_rows: int, num_heads: int) -> NDArray[np.int64]:
    """Index in the file of each row of a query or key matrix, (num_rows,).

    Rotary embedding turns two rows of a head together: i and i + size / 2 in the model, 2 i and 2 i + 1 in the file.
    """
    if num_heads < 1 or num_rows % (2 * num_heads):
        raise InputError(f"{num_rows} rows are not {num_heads} heads of an even size")
    size = num_rows // num_heads
    place = np.arange(num_rows)
    head, within = place // size, place % size
    pair, second = within % (size // 2), within // (size // 2)
    return head * size + 2 * pair + second


def decode(data: NDArray[np.uint8], stored: Stored, order: NDArray[np.int64] | slice) -> Decoded:
    num_rows, num_columns = stored.shape
    if stored.kind in FLOATS:
        dtype, name = FLOATS[stored.kind]
        values = values_at(data, stored.start, np.dtype(dtype), num_rows * num_columns)
        values = values.reshape(num_rows, num_columns)[order]
        if name == "bfloat16":  # the upper half of a float32
            return Decoded((values.astype(np.uint32) << 16).view(np.float32), name)
        return Decoded(values.astype(np.float32), name)
    if stored.kind not in BLOCKS:
        raise InputError(f"a tensor of type {stored.kind}, which is not of this format")
    if not num_columns or num_columns % 32:
        raise InputError(f"{num_columns} columns, which are not whole blocks of 32")
    blocks = values_at(data, stored.start, BLOCKS[stored.kind], num_rows * (num_columns // 32))
    blocks = blocks.reshape(num_rows, num_columns // 32)[order]
    if stored.kind == 2:
        halves = blocks["halves"]
        codes, zero = np.concatenate([halves % 16, halves // 16], axis=2), 8
    else:
        codes, zero = (blocks["values"].astype(np.int16) + 128).astype(np.uint8), 128
    scales = np.ascontiguousarray(blocks["scale"])
    zeros = np.full(scales.shape, zero, np.uint8)
    return from_grid(codes.reshape(num_rows, num_columns), scales, zeros)
