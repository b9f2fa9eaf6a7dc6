"""Lengths beyond which a model computes in another way, by its config: windows, chunks and rope switches."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from mspc.model.config_checks import setting_of
from mspc.model.hub import longest_sequence

WINDOWS = {
    "sliding_window": "sliding window",
    "sliding_window_size": "sliding window",
    "attention_window_size": "sliding window",
    "local_attention_window_len": "sliding window",
    "window_size": "window of local attention",
    "keep_window_size": "window of kept tokens",
    "attention_chunk_size": "attention chunk",
}
"""Settings in tokens, as the families of transformers name them."""
WITHOUT_WINDOW = {"full_attention", "linear_attention", "conv", "moe", "mlp"}
"""Entries of layer_types that no window concerns."""


@dataclass(frozen=True, order=True)
class Limit:
    """A sequence of more than `tokens` tokens is computed in another way than a shorter one."""

    tokens: int
    name: str

    def __str__(self) -> str:
        return f"the {self.name} of {self.tokens}"


def limits_of(config: PreTrainedConfig) -> list[Limit]:
    """The limits that a sequence of a permitted length can exceed, smallest first."""
    longest = longest_sequence(config)
    found = {Limit(tokens, name) for name, tokens in _windows(config)}
    for rope in ropes(config):
        rope_type = str(rope.get("rope_type", "default"))
        original = rope.get("original_max_position_embeddings", setting_of(config, "original_max_position_embeddings"))
        if "dynamic" in rope_type:  # made for sequences beyond the maximum
            found.add(Limit(original or longest or 0, "original context"))
            longest = None
        elif rope_type not in ("default", "linear") and isinstance(original, int):
            found.add(Limit(original, "original context"))
    return sorted(limit for limit in found if limit.tokens > 0 and (longest is None or limit.tokens < longest))


def _windows(config: PreTrainedConfig) -> Iterator[tuple[str, int]]:
    layers = set(setting_of(config, "layer_types") or ())
    if (layers and layers <= WITHOUT_WINDOW) or setting_of(config, "use_sliding_window") is False:
        return
    for setting, name in WINDOWS.items():
        tokens = setting_of(config, setting)
        if isinstance(tokens, int):
            yield name, tokens


def ropes(config: PreTrainedConfig) -> list[Mapping[str, Any]]:
    """The parameters of rotary embedding: one set, or one for each kind of layer."""
    parameters = setting_of(config, "rope_parameters")
    if not isinstance(parameters, Mapping):
        return []
    nested = [part for part in parameters.values() if isinstance(part, Mapping)]
    return nested or [parameters]
