"""The families of models that a GGUF file can describe: names of tensors, metadata, and what readers cannot compute.

Names and keys are those of llama.cpp's own converter. What a file could say, but readers would
compute in another way, is refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, RopeScalingType

from exporters.gguf_rope import full_rope, head_size, rope_dims, rope_requirements
from mspc.errors import InputError
from mspc.model.gguf_config import LARGEST_GEMMAS
from mspc.model.hub import with_defaults

Requirements = Mapping[str, tuple[Any, str, bool]]
"""By the key of a config: its value, what is accepted, and whether it is."""
SEPARATE = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FUSED = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
FOUR_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}


@dataclass(frozen=True)
class Family:
    architecture: str
    names: Mapping[str, str]
    """Names in the file of the modules of a block."""
    requirements: Callable[[Any], Requirements]
    activation: str = "silu"
    ropes: tuple[str, ...] = ("default", "linear")
    paired: bool = False
    """Rows of query and key heads are in pairs, not in halves."""
    biased: tuple[str, ...] = ()
    norm_offset: int = 0
    """Number that the model adds to the weights of norms; the file holds the sums."""


def _llama(config: Any) -> Requirements:
    return _windowless(config) if config.model_type == "mistral" else {}


def _windowless(config: Any) -> Requirements:
    """No layer attends to less than the whole context."""
    kinds, window = getattr(config, "layer_types", None), config.sliding_window
    whole = window is None or window >= config.max_position_embeddings or set(kinds or ()) == {"full_attention"}
    return {"sliding_window": (window, "null", whole)}


def _gemma(config: Any, every: int) -> Requirements:
    """Every n-th layer is a full one; the scale of queries is that which llama.cpp derives from the sizes."""
    kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(config.num_hidden_layers)]
    largest = config.num_hidden_layers == LARGEST_GEMMAS[config.model_type]
    scale = config.hidden_size / config.num_attention_heads if largest else config.head_dim
    return {
        "layer_types": (config.layer_types, f"full_attention in every layer of {every}", config.layer_types == kinds),
        "query_pre_attn_scalar": (config.query_pre_attn_scalar, f"{scale:g}", config.query_pre_attn_scalar == scale),
        "sliding_window": (config.sliding_window, "a number", isinstance(config.sliding_window, int)),
    }


def _gemma2(config: Any) -> Requirements:
    caps = {name: getattr(config, name) for name in ("attn_logit_softcapping", "final_logit_softcapping")}
    return {
        **_gemma(config, 2),
        **{name: (cap, "a number", bool(cap)) for name, cap in caps.items()},
        "tie_word_embeddings": (config.tie_word_embeddings, "true", bool(config.tie_word_embeddings)),
    }


def _gemma3(config: Any) -> Requirements:
    caps = {name: getattr(config, name) for name in ("attn_logit_softcapping", "final_logit_softcapping")}
    local = config.rope_parameters["sliding_attention"]
    both = bool(config.use_bidirectional_attention)
    return {
        **_gemma(config, 6),
        **{name: (cap, "null", cap is None) for name, cap in caps.items()},
        "rope_type of sliding layers": (local["rope_type"], "default", local["rope_type"] == "default"),
        "rope_theta of sliding layers": (local["rope_theta"], "10000", local["rope_theta"] == 10000),
        "use_bidirectional_attention": (both, "false", not both),
    }


_LLAMA = Family("llama", SEPARATE | NORMS, _llama, ropes=("default", "linear", "yarn", "llama3"), paired=True)
_TANH = "gelu_pytorch_tanh"
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Family(
        "qwen2", SEPARATE | NORMS, _windowless, ropes=("default", "linear", "yarn"),
        biased=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ),
    "qwen3": Family("qwen3", SEPARATE | NORMS | HEAD_NORMS, _windowless, ropes=("default", "linear", "yarn")),
    "gemma2": Family("gemma2", SEPARATE | FOUR_NORMS, _gemma2, _TANH, norm_offset=1),
    "gemma3_text": Family("gemma3", SEPARATE | FOUR_NORMS | HEAD_NORMS, _gemma3, _TANH, norm_offset=1),
    "phi3": Family("phi3", FUSED | NORMS, lambda config: {}),
}  # fmt: skip
PACKED, WHOLE = "Export dense, gptq or compressed-tensors.", "Export dense or sparse."
"""Remedies; the second is for a model whose language model is a part of it."""


def family_of(config: dict[str, Any]) -> tuple[Family, Any]:
    """The family of a config.json, and the config with its defaults.

    Raises InputError for a model that readers of the file would silently compute in another way.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        accepted = ", ".join([*FAMILIES][:-1]) + f" or {[*FAMILIES][-1]}"
        raise _refused("model_type", kind, accepted, remedy=WHOLE if "text_config" in config else PACKED)
    found = with_defaults(config)
    family = FAMILIES[kind]
    activation = getattr(found, "hidden_activation", None) or getattr(found, "hidden_act", None)
    biases = {name: getattr(found, name, False) for name in ("attention_bias", "mlp_bias")}
    checked: dict[str, tuple[Any, str, bool]] = {
        "hidden_act": (activation, family.activation, activation == family.activation),
        **{name: (value, "false", not value) for name, value in biases.items()},
        **rope_requirements(found, family.ropes, partial=kind == "phi3"),
        **family.requirements(found),
    }
    for key, (value, accepted, holds) in checked.items():
        if not holds:
            raise _refused(f"{key}", value, accepted, kind)
    return family, found


def _refused(key: str, value: object, accepted: str, kind: object = None, remedy: str = PACKED) -> InputError:
    of = f"{kind} models" if kind else "models"
    return InputError(
        f"gguf takes {of} whose {key} is {accepted}, not {value!r}; readers of the file would not compute this model. "
        f"{remedy}"
    )


def family_notes(config: Any) -> list[str]:
    """Sentences on what readers of the file are known to compute otherwise."""
    window = getattr(config, "sliding_window", None)
    if config.model_type != "phi3" or not window or window >= config.max_position_embeddings:
        return []
    return [
        f"llama.cpp ignores the sliding window of phi3 models: beyond {window} tokens it attends to the whole text, "
        "where the model attends to the last of them."
    ]


def add_model(writer: GGUFWriter, config: Any) -> None:
    """The metadata of a model that `family_of` accepts."""
    size, rope = head_size(config), full_rope(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(rope_dims(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if config.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_sliding_window(config.sliding_window or 0)
    if config.model_type in ("gemma2", "gemma3_text"):
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
