"""Settings that some models of transformers need to be tiny, and models that cannot be measured, with the reason."""

from typing import Any

_PATCHES = {"num_hidden_layers": 2, "hidden_size_global": 64, "head_dim": 16, "vocab_size": 260}


_WINDOWED = {
    "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "head_dim": 24,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "qk_rope_head_dim": 8,
}  # fmt: skip
"""The last of three blocks of Dots 3, whose heads have other sizes."""
_INDEXED = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
    "indexer_compress_ratio": 2, "ngram_vocab_size_base": 100, "hc_lowrank": 16,
}  # fmt: skip
NEEDED: dict[str, dict[str, Any]] = {
    "blt": {"patch_in_forward": False, "encoder_hash_byte_group_vocab": 50, "vocab_size": 260}
    | {f"{part}_config": _PATCHES for part in ("encoder", "decoder", "patcher", "global")},
    "chameleon": {
        "vocabulary_map": {"<image>": 257}, "vq_config": {"channel_multiplier": [1, 1], "num_res_blocks": 1},
    },
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "apertus1p5": {
        "audio_config": {"codebook_dim": 32}, "image_token_offset": 196, "audio_token_offset": 228,
        "text_config": {"vocab_size": 260},
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "dots3_note": {
        "vision_config": {
            "mlp_layer_types": ["dense"], "per_layer_config": {}, "adapter_in_dim": 32, "adapter_out_dim": 64,
        },
        "audio_config": {"downsample_hidden_size": 32, "adapter_input_size": 32, "adapter_out_dim": 64},
    },
    "dots3_note_text": {"per_layer_config": {2: _WINDOWED}},
    "dory": {
        "num_hidden_layers": 4, "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "deepseek_ocr2_text": {
        "mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2, "num_key_value_heads": 4,
    },
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}},
    "emu3": {"vocabulary_map": {"<image>": 257, "<|extra_200|>": 256}},
    "fun_asr_nano": {"adaptor_config": {"hidden_size": 64, "intermediate_size": 16}},
    "fast_vlm": {"vision_config": {"architecture": "fastvit_mci0"}},
    "gemma3n": {"vision_config": {"architecture": "mobilenetv3_small_050"}},
    "gemma3n_text": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [128] * 4, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
    },
    "granite4_vision": {
        "text_config": {"num_layers_here": 6}, "vision_config": {"hidden_size": 64}, "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [1], "downsample_rate": "1/2",
    },
    "hunyuan_vl": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2, 2]}},
    },
    "inkling_text": {"n_routed_experts": 8, "rel_extent": 32, "n_shared_experts": 1},
    "inkling2_loop_text": {"unpadded_vocab_size": 258},
    "inkling2_text": {
        "unpadded_vocab_size": 258, "n_layers_per_attn_res_block": 1, "num_hidden_layers": 3,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
    },
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mllama": {
        "text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
        "vision_config": {"max_num_tiles": 4, "num_global_layers": 1, "intermediate_layers_indices": [0]},
    },
    "mistral3": {"vision_config": {"image_size": 56}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [0, 0]}},
    "nemo_speechlm": {"word_timestamp_config": {"blank_token_id": 0}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "perception_lm": {
        "vision_config": {
            "architecture": "vit_pe_core_tiny_patch16_384", "model_args": {"embed_dim": 192, "depth": 1},
        },
    },
    "qwen2_5_omni": {"enable_audio_output": False},
    "qwen2_vl": {"vision_config": {"mlp_ratio": 2}},
    "qwen3_omni_moe": {"enable_audio_output": False},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 258},
    "qwen4_exp_text": _INDEXED,
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 16]},
    "roc_bert": {"pronunciation_vocab_size": 50, "shape_vocab_size": 50},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "t5gemma2": {"encoder": {"text_config": {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 260}}},
    "unlimited_ocr": {"text_config": {"num_key_value_heads": 4}},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1, "attention_hidden_size": 128,
        "layers_block_type": ["mamba", "hybrid"] * 3, "attention_head_dim": 32, "num_key_value_heads": 4,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "n_mamba_heads": 4,
        "mamba_headdim": 32, "attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": 4,
        "hybrid_layer_ids": [1, 3], "use_mamba_kernels": False,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip
UNMEASURED: dict[str, str] = {
    "gemma4_assistant": "a drafter: it takes hidden states of another model in place of tokens",
    "gemma4_unified_assistant": "a drafter: it takes hidden states of another model in place of tokens",
    "musicgen": "it writes codes of sound, four at a time",
    "musicgen_melody": "it writes codes of sound, four at a time",
}
PACKAGES: dict[str, str] = {"fast_vlm": "timm", "gemma3n": "timm", "inkling_mm_model": "scipy", "perception_lm": "timm"}
"""Packages, not among those for tests, without which a type is not tried again."""
ACCEPTED: dict[str, str] = {
    "evolla": "AutoModelForMultimodalLM does not know its config",
}
"""Types whose verdict is `not built` or `error`, and why that is not a fault of mspc. Any other such verdict fails."""
