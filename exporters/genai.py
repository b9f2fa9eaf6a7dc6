"""`genai_config.json`, by which ONNX Runtime GenAI generates from a folder that holds `model.onnx`."""

from typing import Any

from mspc.model.special_ids import NO_END, SpecialIds
from mspc.progress import log


def genai_config(
    config: dict[str, Any], ids: SpecialIds, cache: tuple[int, int, int], session: dict[str, str]
) -> dict[str, Any]:
    """`config` is config.json; `cache` gives layers, key-value heads and their size as the graph has them; `session`
    has further entries of the session's configuration.
    """
    layers, kv_heads, head_size = cache
    heads = config.get("num_attention_heads", config.get("n_head", kv_heads))
    context = config.get("max_position_embeddings", config.get("n_positions", 2048))
    return {
        "model": {
            **_special(ids),
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


def _special(ids: SpecialIds) -> dict[str, Any]:
    """The ids that are named: what is left out is absent for GenAI. Padding is the end of text, as in transformers."""
    if not ids.eos:
        log.warning(NO_END.format("genai_config.json"))
    pad = ids.pad if ids.pad is not None or not ids.eos else ids.eos[0]
    found = {
        "bos_token_id": ids.bos,
        "pad_token_id": pad,
        "eos_token_id": ids.eos[0] if len(ids.eos) == 1 else list(ids.eos),
    }
    return {key: value for key, value in found.items() if value not in (None, [])}
