"""`genai_config.json`, by which ONNX Runtime GenAI generates from a folder that holds `model.onnx`."""

from typing import Any


def genai_config(
    config: dict[str, Any], generation: dict[str, Any], cache: tuple[int, int, int], session: dict[str, str]
) -> dict[str, Any]:
    """`config` is config.json and `generation` generation_config.json; `cache` gives layers, key-value heads and their
    size as the graph has them; `session` has further entries of the session's configuration.
    """
    layers, kv_heads, head_size = cache
    heads = config.get("num_attention_heads", config.get("n_head", kv_heads))
    context = config.get("max_position_embeddings", config.get("n_positions", 2048))
    ends = _tokens("eos_token_id", config, generation) or [0]
    return {
        "model": {
            "bos_token_id": (_tokens("bos_token_id", config, generation) or ends)[0],
            "context_length": context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": [], **session},
                "filename": "model.onnx",
                "head_size": head_size,
                "hidden_size": config.get("hidden_size", config.get("n_embd", heads * head_size)),
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": heads,
                "num_hidden_layers": layers,
                "num_key_value_heads": kv_heads,
            },
            "eos_token_id": ends if len(ends) > 1 else ends[0],
            "pad_token_id": (_tokens("pad_token_id", config, generation) or ends)[0],
            # Its name for a decoder with a cache per layer; the graph, not the name, says how the model computes.
            "type": "llama",
            "vocab_size": config["vocab_size"],
        },
        "search": {
            "do_sample": False,
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "past_present_share_buffer": False,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
        },
    }


def _tokens(name: str, config: dict[str, Any], generation: dict[str, Any]) -> list[int]:
    """The ids of a config that exist. Defaults of a family may exceed a small vocabulary, which GenAI refuses."""
    found = generation.get(name, config.get(name))
    ids = found if isinstance(found, list) else [found]
    return [i for i in ids if i is not None and 0 <= i < config["vocab_size"]]
