"""Lengths beyond which a model computes in another way, by its config: windows, chunks and rope switches.

A config is one of transformers, whose own classes complete and unify what is in config.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mspc.model.config_checks import setting_of
from mspc.model.hub import longest_sequence

KEPT = "window of kept tokens"
"""The most important ones of the whole sequence, in Doge."""
WINDOWS = {
    "sliding_window": "sliding window",
    "sliding_window_size": "sliding window",
    "attention_window_size": "sliding window",
    "local_attention_window_len": "sliding window",
    "window_size": "window of local attention",
    "keep_window_size": KEPT,
    "attention_chunk_size": "attention chunk",
}
"""Settings in tokens, as the families of transformers name them."""
WITHOUT_WINDOW = {"full_attention", "linear_attention", "conv", "moe", "mlp"}
"""Entries of layer_types that no window concerns."""
LONGROPE, DYNAMIC = "longrope", "dynamic"
"""Values of rope_type whose frequencies change with the length of the sequence."""


@dataclass(frozen=True, order=True)
class Limit:
    """A sequence of more than `tokens` tokens is computed in another way than a shorter one."""

    tokens: int
    name: str

    def __str__(self) -> str:
        return f"the {self.name} of {self.tokens}"


def limits_of(config: Any) -> list[Limit]:
    """The limits that a sequence of a permitted length can exceed, smallest first."""
    longest = permitted(config)
    found = set(windows_of(config))
    for rope in ropes(config):
        original = _original_context(config, rope)
        if original is not None and rope["rope_type"] not in ("default", "linear"):
            found.add(Limit(original, "original context"))
    return sorted(limit for limit in found if longest is None or limit.tokens < longest)


def switches_of(config: Any) -> list[int]:
    """Lengths beyond which even the first positions are encoded in another way, so that a cache of keys grows wrong.

    transformers computes the keys of Phi-3 again there; no graph and no other runtime does.
    """
    found = [_original_context(config, rope) for rope in ropes(config) if rope["rope_type"] in (LONGROPE, DYNAMIC)]
    return [tokens for tokens in found if tokens is not None]


def is_dynamic(config: Any) -> bool:
    """True if the frequencies of rotary embedding depend on the length of the sequence that is run."""
    return any(rope["rope_type"] == DYNAMIC for rope in ropes(config))


def depends_on_later(config: Any) -> bool:
    """True if later tokens change what a layer makes of earlier ones, so that a cache differs from one pass."""
    return is_dynamic(config) or any(limit.name == KEPT for limit in windows_of(config))


def permitted(config: Any) -> int | None:
    """Maximum sequence length in tokens, or None; dynamic frequencies are made for what exceeds the config's."""
    return None if is_dynamic(config) else longest_sequence(config)


def _original_context(config: Any, rope: Mapping[str, Any]) -> int | None:
    names = ("original_max_position_embeddings", "max_position_embeddings")
    found = (rope.get(names[0]), *(setting_of(config, name) for name in names))
    return next((tokens for tokens in found if isinstance(tokens, int)), None)


def windows_of(config: Any) -> list[Limit]:
    """The windows and chunks of attention that some layer has."""
    layers = set(setting_of(config, "layer_types") or ())
    if (layers and layers <= WITHOUT_WINDOW) or setting_of(config, "use_sliding_window") is False:
        return []
    found = ((setting_of(config, setting), name) for setting, name in WINDOWS.items())
    return [Limit(tokens, name) for tokens, name in found if isinstance(tokens, int) and tokens > 0]


def ropes(config: Any) -> list[dict[str, Any]]:
    """The parameters of rotary embedding: one set, or one for each kind of layer."""
    parameters = setting_of(config, "rope_parameters")
    if not isinstance(parameters, Mapping):
        return []
    nested = [part for part in parameters.values() if isinstance(part, Mapping)]
    return [{"rope_type": "default", **part} for part in nested or [parameters]]
