"""Checks that a config.json and the tensors with it make a causal language model, before any weight is read."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from mspc.errors import InputError
from mspc.model.auto_class import is_multimodal, model_class
from mspc.storage.checkpoint import STORABLE, StoredType

FLOATS = ("float64", *STORABLE)
"""Types of weights that a model can be loaded from."""
SUPPORTED = (
    "mspc takes decoders that AutoModelForCausalLM or AutoModelForMultimodalLM knows: Llama, Qwen, Mistral, Gemma, "
    "Phi, GPT-2, Mamba, Qwen-VL and others"
)
GIVE = "Give a causal language model"
DECODERS_IN_ANY_CASE = "gpt_neox"
"""Causal models whose config says that they are no decoders."""
OTHER_TASKS = (
    "MaskedLM", "SequenceClassification", "TokenClassification", "ImageClassification", "QuestionAnswering",
    "MultipleChoice",
)  # fmt: skip
SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "n_positions",
)  # fmt: skip
"""Sizes that no model has without a tensor of about that many rows, columns or layers."""
MAY_BE_ZERO = ("intermediate_size", "head_dim")
"""0 where blocks have no such part: an MLP, or the part of heads that is rotated."""
TOLERANCE = 16
"""Larger sizes than the tensors show, by this factor, would take minutes to refuse otherwise."""


def setting_of(config: PreTrainedConfig, name: str) -> Any:
    """An entry of the config of the language model; None without it, and where it differs from layer to layer."""
    try:
        return getattr(config.get_text_config(), name, None)
    except Exception:  # transformers has a type of its own for entries that differ
        return None


def largest_setting(config: PreTrainedConfig, name: str) -> int:
    """An integer of the config of the language model, the largest where layers differ; 0 without it."""
    text: Any = config.get_text_config()
    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else []
    found = [setting_of(config, name), *(getattr(of_layer, name, None) for of_layer in layers)]
    return max((value for value in found if isinstance(value, int)), default=0)


def check_task(config: PreTrainedConfig, folder: Path) -> None:
    """Raises InputError for a model that is no decoder-only language model."""
    named = getattr(config, "architectures", None)
    architectures = [str(name) for name in named] if isinstance(named, list | tuple) else []
    what = f"{folder} is a {config.model_type} model{f' ({architectures[0]})' if architectures else ''}"
    try:
        inner = config.get_text_config()
    except ValueError as error:  # more than one part writes text
        raise InputError(f"{what}, and its config names no one language model ({error}). {GIVE}.") from error
    if not isinstance(inner, PreTrainedConfig):
        raise InputError(f"{what}, and its text_config is no config of transformers. Get config.json again.")
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{what}, an encoder with a decoder. Give a decoder alone: {SUPPORTED}.")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not is_multimodal(config):
        remedy = GIVE
        if inner is not config and type(inner) in MODEL_FOR_CAUSAL_LM_MAPPING:
            remedy = f"Save its language model, a {inner.model_type}, to a folder of its own and give that"
        raise InputError(f"{what}, which is no causal language model. {remedy}: {SUPPORTED}.")
    if model_class(config).forward is nn.Module.forward:  # a frame around models that do the work
        parts = [part for part in vars(config).values() if isinstance(part, PreTrainedConfig) and is_multimodal(part)]
        remedy = f"Save its {parts[0].model_type} to a folder of its own and give that" if parts else GIVE
        raise InputError(f"{what}, which has no forward pass of its own. {remedy}: {SUPPORTED}.")
    if (
        getattr(type(config), "is_decoder", None) is False
        and config.is_decoder is False
        and not config.model_type.startswith(DECODERS_IN_ANY_CASE)
    ):
        raise InputError(
            f"{what}, which sees the tokens that it should predict (is_decoder is false). {GIVE}: {SUPPORTED}."
        )
    if architectures and all(name.endswith(OTHER_TASKS) for name in architectures):
        raise InputError(f"{what}, which predicts no next token. {GIVE}: {SUPPORTED}.")


def check_sizes(config: PreTrainedConfig, types: Mapping[str, StoredType]) -> None:
    """Raises InputError for sizes far beyond those of the tensors, with which a model would not even be built."""
    largest = max([len(types), *(size for _, shape in types.values() for size in shape)], default=0)
    for name in SIZES:
        size = setting_of(config, name)
        if isinstance(size, int) and not (name not in MAY_BE_ZERO) <= size <= TOLERANCE * largest:
            raise InputError(
                f"{name} is {size} in config.json, but no tensor of the checkpoint has more than {largest} rows or "
                "columns. Give the config.json that belongs to the weights."
            )


def check_tensor(key: str, stored: StoredType, name: str, expected: Tensor, is_whole: bool) -> None:
    """Raises InputError, naming the tensor, for a shape that the config does not mean or a dtype of no weight."""
    dtype, shape = stored
    if is_whole and shape != tuple(expected.shape):
        raise InputError(
            f"{name} has shape {shape} in the checkpoint, but {tuple(expected.shape)} by the config. Give the "
            "config.json that belongs to the weights."
        )
    if expected.is_floating_point() and dtype not in FLOATS:
        raise InputError(
            f"{key} is stored as {dtype}, which is no weight without the scales of its quantization. Give the "
            f"checkpoint in {', '.join(STORABLE)}."
        )


def count_blocks(model: PreTrainedModel, blocks_name: str, num_blocks: int, keys: Iterable[str]) -> int:
    """The number of blocks in the checkpoint. Raises InputError for blocks that the config leaves out.

    Blocks that transformers ignores on purpose, such as those that predict several tokens, do not count.
    """
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    extra = setting_of(model.config, "num_nextn_predict_layers") or 0
    prefixes = {blocks_name, blocks_name.removeprefix(model.base_model_prefix + ".")}
    index_of = re.compile(rf"(?:{'|'.join(map(re.escape, sorted(prefixes)))})\.(\d+)\.")
    of_blocks = ((key, found) for key in keys if (found := index_of.match(key)))
    indices = {int(found[1]): key for key, found in of_blocks if not any(pattern.search(key) for pattern in ignored)}
    count = max(indices, default=-1) + 1
    if count > num_blocks + extra:
        raise InputError(
            f"The checkpoint has {count} blocks and holds {indices[count - 1]}, but by config.json the model has "
            f"{num_blocks} blocks. Give the config.json that belongs to the weights."
        )
    return count
