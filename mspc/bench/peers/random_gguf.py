"""A GGUF file with random weights in the shapes of a Llama, for llama.cpp to be timed on. Needs the package gguf."""

from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from mspc.bench.decoder import Shape

LAYERS = {
    "attn_q": "q",
    "attn_k": "kv",
    "attn_v": "kv",
    "attn_output": "o",
    "ffn_gate": "up",
    "ffn_up": "up",
    "ffn_down": "down",
}
SCALES = {"Q4_0": [0], "Q8_0": [0], "Q4_K": [0, 2], "Q3_K": [108]}
"""Offsets of the float16 scales in a block of each type; all else are codes, for which any byte is one."""
SEED = 0


def write(file: Path, shape: Shape, kind: str, head_kind: str | None = None) -> dict[str, int]:
    """Write the file: all matrices of this type, and embeddings that are the head, of the same or of another type.

    Returns the bytes of weights that a step reads. All blocks hold the same values.
    """
    sizes = {
        "q": (shape.heads * shape.head_dim, shape.hidden), "kv": (shape.kv_heads * shape.head_dim, shape.hidden),
        "o": (shape.hidden, shape.heads * shape.head_dim), "up": (shape.intermediate, shape.hidden),
        "down": (shape.hidden, shape.intermediate),
    }  # fmt: skip
    quantized = gguf.GGMLQuantizationType[kind]
    of_head = gguf.GGMLQuantizationType[head_kind or kind]
    random = np.random.default_rng(SEED)
    drawn = {name: random_blocks(size, kind, random) for name, size in sizes.items()}
    head = random_blocks((shape.vocabulary, shape.hidden), of_head.name, random)
    writer = gguf.GGUFWriter(file, "llama")
    _describe(writer, shape)
    ones = np.ones(shape.hidden, np.float32)
    writer.add_tensor("token_embd.weight", head, raw_dtype=of_head)
    writer.add_tensor("output_norm.weight", ones)
    for number in range(shape.blocks):
        for layer, of in LAYERS.items():
            writer.add_tensor(f"blk.{number}.{layer}.weight", drawn[of], raw_dtype=quantized)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{number}.{norm}.weight", ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    linears = shape.blocks * sum(drawn[of].nbytes for of in LAYERS.values())
    return {"linears": linears, "norms": (2 * shape.blocks + 1) * ones.nbytes, "head": head.nbytes}


def random_blocks(size: tuple[int, int], kind: str, random: np.random.Generator) -> NDArray[np.uint8]:
    """Random blocks of a type, uint8 (rows, bytes), whose scales are small numbers."""
    per_block, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = random.integers(0, 256, (size[0] * size[1] // per_block, num_bytes), np.uint8)
    for offset in SCALES[kind]:
        scales = (0.001 * (0.5 + random.random(len(blocks)))).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(size[0], -1)


def _describe(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_block_count(shape.blocks)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(500_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{number}" for number in range(shape.vocabulary)])
    writer.add_token_types([gguf.TokenType.NORMAL] * shape.vocabulary)
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
