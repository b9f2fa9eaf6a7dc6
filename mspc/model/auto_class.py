"""The class of transformers that makes a model of a config: a language model, or one that sees or hears as well."""

from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
)


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Tell if `AutoModelForMultimodalLM` makes the model of a config. Those that both make are language models.

    The language models of some (Emu3, Llama 3.2 with images) have a config that no auto class would load again.
    """
    kind = type(config)
    if kind not in MODEL_FOR_MULTIMODAL_LM_MAPPING or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return kind in MODEL_FOR_MULTIMODAL_LM_MAPPING
    return MODEL_FOR_CAUSAL_LM_MAPPING[kind].config_class not in MODEL_FOR_CAUSAL_LM_MAPPING


def auto_class(config: PreTrainedConfig) -> Any:
    """The auto class of a config that `check_task` takes."""
    return AutoModelForMultimodalLM if is_multimodal(config) else AutoModelForCausalLM


def model_class(config: PreTrainedConfig) -> Any:
    """The class of the model that the auto class makes."""
    found = MODEL_FOR_MULTIMODAL_LM_MAPPING if is_multimodal(config) else MODEL_FOR_CAUSAL_LM_MAPPING
    return found[type(config)]
