"""Rotary embedding in a GGUF file: what metadata can say, and the factors of Llama 3.1 as a tensor."""

import math
from typing import Any

from torch import Tensor

from mspc.model.gguf_config import llama3_factors

YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "mscale": None, "mscale_all_dim": None, "truncate": True}
"""Constants of llama.cpp; others would need keys that older versions do not read."""


def head_size(config: Any) -> int:
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def full_rope(config: Any) -> dict[str, Any]:
    """The parameters of rotary embedding, of the full layers where sliding ones have their own."""
    found: dict[str, Any] = config.rope_parameters
    return found.get("full_attention", found)


def rope_dims(config: Any) -> int:
    """Dimensions of a head that turn."""
    return int(head_size(config) * (full_rope(config).get("partial_rotary_factor") or 1))


def rope_requirements(config: Any, types: tuple[str, ...], *, partial: bool) -> dict[str, tuple[Any, str, bool]]:
    """The requirements (see `gguf_families`) of a family that takes some types of rotary embedding."""
    rope, dims = full_rope(config), rope_dims(config)
    kind, share = rope["rope_type"], rope.get("partial_rotary_factor") or 1
    found: dict[str, tuple[Any, str, bool]] = {
        "rope_type": (kind, " or ".join((", ".join(types[:-1]), types[-1])), kind in types),
        "partial_rotary_factor": (share, "1", partial or share == 1),
        "rotary size of a head": (dims, "even", dims % 2 == 0),
    }
    if kind == "yarn":
        usual = yarn_attention_factor(rope["factor"])
        factor = rope.get("attention_factor")
        same = factor is None or math.isclose(factor, usual, rel_tol=1e-6)
        found["attention_factor of yarn"] = (factor, f"null or {usual:g}", same)
        for name, value in YARN_DEFAULTS.items():
            given = rope.get(name, value)
            found[f"{name} of yarn"] = (given, str(value), given in (None, value))
    return found


def yarn_attention_factor(factor: float) -> float:
    """Scale of cosines and sines, where a config names no other (Peng et al. 2023)."""
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def rope_factors(config: Any) -> Tensor | None:
    """Divisors of the frequencies of a Llama 3.1, (rope_dims / 2) float32; None for other types."""
    rope = full_rope(config)
    if rope["rope_type"] != "llama3":
        return None
    names = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    return llama3_factors(rope["rope_theta"], rope_dims(config), *(rope[name] for name in names)).float()
