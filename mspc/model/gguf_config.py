"""The config of a model in a GGUF file, from its metadata, for the families whose metadata say all of it.

transformers reads these keys only in part: head sizes, windows, caps and scaled rotary embeddings are left at the
defaults of the family. Names of keys are those of llama.cpp.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from mspc.errors import InputError

TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
}
"""Model types of transformers by the architecture of a file."""
FACTORS = "rope_freqs.weight"
LARGEST_GEMMAS = {"gemma2": 46, "gemma3_text": 62}
"""Layers by which llama.cpp knows the 27B models, whose queries it scales otherwise."""
LOCAL_THETA = 10000.0
SCALING = {f"rope.scaling.{name}" for name in ("type", "factor", "original_context_length", "finetuned")}
USUAL = {"rope.scaling.attn_factor": 1.0, "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0}
"""Values of further keys that change nothing."""
LOW, HIGH, DEFAULT_CONTEXT = 1.0, 4.0, 8192
"""Constants of all models of the kind of Llama 3.1."""


def read_config(fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], factors: Tensor | None) -> Any:
    """The config, or None for other architectures.

    Args:
        fields: Metadata by key.
        shapes: Shapes of the tensors, rows first.
        factors: The tensor of that name, divisors (head_dim / 2) of the frequencies of rotary embedding.

    Raises InputError for a rotary embedding that no config describes.
    """
    architecture = fields.get("general.architecture")
    of = {key.removeprefix(f"{architecture}."): value for key, value in fields.items()}
    if architecture not in TYPES or of.get("expert_count") or isinstance(of.get("feed_forward_length"), list):
        return None
    if "rope_factors_long.weight" in shapes:
        raise InputError("its rotary embedding is longrope, whose config is not in the file")
    heads = of["attention.head_count"]
    head_dim = of.get("attention.key_length", of["embedding_length"] // heads)
    values = {
        "vocab_size": shapes["token_embd.weight"][0],
        "max_position_embeddings": of["context_length"],
        "hidden_size": of["embedding_length"],
        "intermediate_size": of["feed_forward_length"],
        "num_hidden_layers": of["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": of.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": of["attention.layer_norm_rms_epsilon"],
        "tie_word_embeddings": "output.weight" not in shapes,
        "rope_parameters": _rope(of, head_dim, factors),
        **_of_family(architecture, of, heads, head_dim),
    }
    if architecture == "llama":
        values["attention_bias"] = "blk.0.attn_q.bias" in shapes
    # Later they are those of the file; here the padding id must be a row of the embeddings.
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config: PreTrainedConfig = AutoConfig.for_model(TYPES[architecture], **values, **ids)
    return config


def _of_family(architecture: str, of: Mapping[str, Any], heads: int, head_dim: int) -> dict[str, Any]:
    window = of.get("attention.sliding_window") or None
    if architecture == "phi3":
        context = of.get("rope.scaling.original_context_length", of["context_length"])
        return {"sliding_window": window, "original_max_position_embeddings": context}
    if architecture not in ("gemma2", "gemma3"):
        return {}
    largest = of["block_count"] == LARGEST_GEMMAS[TYPES[architecture]]
    values: dict[str, Any] = {"query_pre_attn_scalar": of["embedding_length"] // heads if largest else head_dim}
    if window is not None:
        values["sliding_window"] = window
    for cap in ("attn", "final") if architecture == "gemma2" else ():
        if f"{cap}_logit_softcapping" in of:
            values[f"{cap}_logit_softcapping"] = of[f"{cap}_logit_softcapping"]
    if architecture == "gemma3":
        local = of.get("rope.freq_base_swa", LOCAL_THETA)
        of_sliding = {"rope_type": "default", "rope_theta": local}
        values["rope_parameters"] = {"full_attention": _rope(of, head_dim, None), "sliding_attention": of_sliding}
    return values


def _rope(of: Mapping[str, Any], head_dim: int, factors: Tensor | None) -> dict[str, Any]:
    """The `rope_parameters` of layers with full attention."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": of.get("rope.freq_base", 10000.0)}
    dims = of.get("rope.dimension_count", head_dim)
    if dims != head_dim:
        rope["partial_rotary_factor"] = dims / head_dim
    factor = of.get("rope.scaling.factor", 1.0)
    kind = of.get("rope.scaling.type", "none" if factor == 1 else "linear")  # without a type llama.cpp does so
    for key, value in of.items():
        if key.startswith("rope.scaling.") and key not in SCALING and value != USUAL.get(key):
            raise InputError(f"no config says what its {key} of {value} does")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": factor}
    elif kind != "none":
        raise InputError(f"its rotary embedding is scaled by {kind}")
    if kind == "yarn":
        rope["original_max_position_embeddings"] = of["rope.scaling.original_context_length"]
    if factors is not None:
        rope |= llama3_rope(factors, rope["rope_theta"], dims)
    return rope


def llama3_factors(theta: float, dims: int, factor: float, context: int, low: float, high: float) -> Tensor:
    """Divisors (dims / 2) float64 of the frequencies of a Llama 3.1.

    Long waves are slowed down by the whole factor, short ones not at all, and between the two it is interpolated in
    the frequency.
    """
    shares = ((context / _waves(theta, dims) - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - shares) / factor + shares)


def _waves(theta: float, dims: int) -> Tensor:
    """Wave lengths in tokens, (dims / 2) float64."""
    return 2 * math.pi * theta ** (torch.arange(0, dims, 2, dtype=torch.float64) / dims)


def llama3_rope(factors: Tensor, theta: float, dims: int) -> dict[str, Any]:
    """The parameters of a scaling as of Llama 3.1 that gives certain divisors (dims / 2) of the frequencies.

    Each divisor that is interpolated gives the original context. Raises InputError if
    the divisors are no such scaling.
    """
    found, factor = factors.double(), float(f"{float(factors.max()):.6g}")  # float32 has no more
    waves = _waves(theta, dims)
    if found.shape != waves.shape or factor <= 1:
        raise InputError(f"the factors of its rotary embedding, {FACTORS}, are those of no Llama 3.1")
    shares = (1 / found - 1 / factor) / (1 - 1 / factor)
    between = (shares > 1e-3) & (shares < 1 - 1e-3)
    contexts = waves * (shares * (HIGH - LOW) + LOW)
    context = round(float(contexts[between].median())) if between.any() else DEFAULT_CONTEXT
    if not torch.allclose(llama3_factors(theta, dims, factor, context, LOW, HIGH), found, rtol=1e-3):
        raise InputError(f"the factors of its rotary embedding, {FACTORS}, are those of no Llama 3.1")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LOW,
        "high_freq_factor": HIGH,
        "original_max_position_embeddings": context,
    }
