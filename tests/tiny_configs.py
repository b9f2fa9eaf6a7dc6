"""A tiny configuration of any model of transformers: small numbers by the names of settings, and what a family needs.

Lists with one entry per layer are cut so that each kind of layer is left.
"""

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

from families import NEEDED
from transformers import CONFIG_MAPPING, PreTrainedConfig

VOCABULARY, HIDDEN, HEADS, HEAD_SIZE = 260, 64, 4, 16
MOST_LAYERS = 6
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers", "layers")
PERIODIC = (
    "full_attention_interval", "global_attn_every_n_layers", "attn_layer_period", "expert_layer_period",
    "no_rope_layer_interval", "layer_group_size", "attention_types",
)  # fmt: skip
"""Settings by which a model has more than one kind of layer."""
SIZES: dict[int, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input decoder_vocab_size output_vocab_size",
    HIDDEN: "hidden_size embed_dim n_embd d_model word_embed_proj_dim emb_dim embedding_size input_embedding_size "
    "output_embedding_size lru_width embedding_dim backbone_hidden_size moe_intermediate_size expert_ffn_hidden_size",
    2 * HIDDEN: "intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim d_inner dim_ff dff d_ff "
    "feed_forward_size ffn_hidden_size intermediate_size_mlp dense_intermediate_size prefix_dense_intermediate_size "
    "shared_intermediate_size shared_experts_intermediate_size mamba_d_ssm shared_expert_intermediate_size "
    "moe_shared_expert_intermediate_size dim_feedforward alignment_intermediate_size attention_hidden_size "
    "max_position_embeddings n_positions max_seq_len max_sequence_length n_ctx context_length model_max_length "
    "max_target_positions original_max_position_embeddings",
    HEADS: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads linear_num_heads attention_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads "
    "linear_num_value_heads",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups num_global_key_value_heads "
    "num_experts_per_tok moe_k moe_topk num_experts_per_token top_k_experts moe_top_k linear_num_key_heads "
    "index_n_heads indexer_n_heads",
    HEAD_SIZE: "head_dim swa_head_dim attention_head_dim d_head d_kv dim_head kv_channels attention_head_size "
    "global_head_dim linear_head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim swa_v_head_dim mamba_d_state "
    "state_size ssm_state_size chunk_size mamba_chunk_size index_topk linear_key_head_dim linear_value_head_dim "
    "query_pre_attn_scalar rotary_dim",
    1: "n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts num_expert_group "
    "num_mtp_layers num_nextn_predict_layers mamba_n_groups n_groups mamba_ngroups",
    32: "qk_head_dim q_lora_rank kv_lora_rank o_lora_rank laurel_rank hidden_size_per_layer_input moe_latent_size "
    "adapter_rank gated_norm_rank mamba_dt_rank time_step_rank mamba_d_head mamba_head_dim mamba_headdim "
    "index_head_dim indexer_head_dim moe_hidden_size",
    8: "sliding_window attention_window_size sliding_window_size attention_chunk_size local_attention window_size",
}
SIZE_OF = {name: size for size, names in SIZES.items() for name in names.split()}
EVEN_WITHOUT = {"head_dim", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok", "n_shared_experts"}
"""Set where the default is None."""
VISION: dict[str, Any] = {
    "hidden_size": 32, "embed_dim": 32, "intermediate_size": 64, "num_hidden_layers": 1, "depth": 1, "num_layers": 1,
    "num_attention_heads": 2, "num_heads": 2, "image_size": 28, "patch_size": 14, "out_hidden_size": HIDDEN,
    "mlp_ratio": 2.0, "num_channels": 3, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0], "vision_output_dim": HIDDEN, "head_dim": 16, "projector_input_dim": HIDDEN,
    "projector_output_dim": HIDDEN, "num_key_value_heads": 2, "hidden_dim": 32, "encoder_layers": 1,
    "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "d_model": 32, "num_global_layers": 1,
    "intermediate_layers_indices": [0], "max_num_tiles": 1, "output_dim": HIDDEN, "vocab_size": VOCABULARY,
    "num_blocks": 1, "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32,
    "base_channels": 32, "codebook_size": 32, "output_channels": 32, "mlp_dim": 64, "downsample_channels": [32, 32],
    "text_hidden_size": HIDDEN, "image_token_embed_dim": HIDDEN, "depths": 1, "num_filters": 4, "n_layers": 1,
    "upsample_groups": 32, "num_embeddings": 32, "encoder_hidden_size": 32, "audio_hidden_size": 32,
}  # fmt: skip
"""Sizes of towers, which are smaller than the decoder."""
DECODERS = (
    "text_config", "language_config", "decoder", "llm_config", "thinker_config", "decoder_config", "vlm_config",
    "dit_config",
)  # fmt: skip
IMAGE_ID = 257
"""The id of images and other things that no text holds."""


def tiny_config(model_type: str, needed: dict[str, Any]) -> PreTrainedConfig:
    """The config of a model with hidden states of 64; `needed` are settings that win over the rules."""
    cls = CONFIG_MAPPING[model_type]
    needed = copy.deepcopy(needed)
    dropped = needed.pop("without", ())
    values = _nested(cls().to_dict(), needed) | needed
    gone = {"model_type", "transformers_version", "architectures", *dropped}
    return cls(**{name: value for name, value in values.items() if name not in gone})


def _nested(default: dict[str, Any], needed: dict[str, Any]) -> dict[str, Any]:
    values = _of_text(default, needed.pop("num_layers_here", None))
    for name, inner in default.items():
        if not (isinstance(inner, dict) and "model_type" in inner and name.endswith(("config", "coder"))):
            continue
        given = needed.pop(name, copy.deepcopy(NEEDED.get(inner.get("model_type") or "", {})))
        of_inner = _nested(inner, given) if name in DECODERS else _tower(inner)
        values[name] = of_inner | given | {"model_type": inner.get("model_type")}
    return values


def _tower(default: dict[str, Any]) -> dict[str, Any]:
    """Settings of a tower for images or sound, and of towers within it."""
    values = {key: VISION[key] for key in default if key in VISION and default[key] is not None}
    count = next((default[name] for name in LAYERS if isinstance(default.get(name), int)), None)
    for name, inner in default.items():
        if isinstance(inner, dict) and "model_type" in inner:
            values[name] = _tower(inner) | {"model_type": inner["model_type"]}
        elif isinstance(inner, list | tuple) and (name == "layer_types" or len(inner) == count):
            values[name] = inner[:1]
        elif isinstance(inner, list | tuple) and isinstance(values.get(name), int):
            values[name] = [values[name]] * len(inner)
    return values


def _of_text(default: dict[str, Any], wanted: int | None) -> dict[str, Any]:
    values = _layers(default, wanted)
    for name, value in default.items():
        if name in values:
            continue
        if name == "is_decoder":
            values[name] = True
        elif name == "num_key_value_heads" and default.get("kv_lora_rank"):
            values[name] = HEADS
        elif name in ("first_k_dense_replace", "num_dense_layers"):
            values[name] = 1
        elif value == 0 and SIZE_OF.get(name) == HEAD_SIZE:
            values[name] = 0
        elif name in SIZE_OF and (value is not None or name in EVEN_WITHOUT) and not isinstance(value, dict | list):
            if SIZE_OF[name] != 8 or value is not None:
                values[name] = SIZE_OF[name]
        elif name.endswith(("_token_id", "_token_index", "token_id")) and isinstance(value, int | list):
            special = name.removeprefix("forced_").split("_")[0] in ("bos", "eos", "pad", "sep", "cls", "decoder")
            found = 0 if special else 1 if name == "mask_token_id" else IMAGE_ID
            values[name] = [found] if isinstance(value, list) else found
        elif name.endswith(("bos_token_id", "eos_token_id", "pad_token_id")):
            values[name] = 0
    halves = [default.get(name) for name in ("head_dim", "qk_nope_head_dim", "qk_rope_head_dim")]
    if None not in halves and halves[0] == halves[1] + halves[2]:
        values["head_dim"] = values["qk_nope_head_dim"] + values["qk_rope_head_dim"]
    if isinstance(default.get("rope_parameters"), dict) and default["rope_parameters"]:
        sections = 3 * _reads_sections(default.get("model_type", ""))
        values["rope_parameters"] = _rope(default["rope_parameters"], values.get("head_dim", HEAD_SIZE), sections)
    return values


def _reads_sections(model_type: str) -> bool:
    """Tell if the code of a type has sections of its rotary embeddings, for time, height and width."""
    module = CONFIG_MAPPING[model_type].__module__ if model_type in CONFIG_MAPPING else ""
    found = importlib.util.find_spec(module.replace(".configuration_", ".modeling_")) if module else None
    return found is not None and '"mrope_section"' in Path(str(found.origin)).read_text(encoding="utf-8")


def _layers(default: dict[str, Any], wanted: int | None) -> dict[str, Any]:
    """The number of layers, and lists with one entry per layer."""
    name = next((n for n in LAYERS if isinstance(default.get(n), int) and default[n] > 0), None)
    if name is None:
        return {}
    count, values = default[name], dict[str, Any]()
    lists = {key: value for key, value in default.items() if isinstance(value, list | tuple) and len(value) == count}
    if lists:
        kinds = [json.dumps(kind, default=str) for kind in zip(*lists.values(), strict=True)]
        chosen = sorted({kinds.index(kind) for kind in kinds})[:MOST_LAYERS]
        others = (i for i in range(count) if i not in chosen)
        chosen = sorted([*chosen, *(i for i, _ in zip(others, range((wanted or 2) - len(chosen)), strict=False))])
        values |= {key: [value[i] for i in chosen] for key, value in lists.items()}
        values[name] = len(chosen)
    else:
        values[name] = wanted or min(count, 4 if any(key in default for key in PERIODIC) else 2)
    return values | {key: 2 for key in ("encoder_layers", "num_encoder_layers") if key in default}


def _rope(given: dict[str, Any], head_size: int, default_sections: int) -> dict[str, Any]:
    """Rotary embeddings with sections that fit the head size: as many as are given, or that the code reads."""
    rope = copy.deepcopy(given)
    inner = [value for value in rope.values() if isinstance(value, dict)]
    for part in inner or [rope]:
        if count := len(part.get("mrope_section", ())) or default_sections:
            half = int(head_size * part.get("partial_rotary_factor", 1.0)) // 2
            part["mrope_section"] = [(half + count - 1 - place) // count for place in range(count)]
    return rope
