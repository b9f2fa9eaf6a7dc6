"""The work of one token of a model: the products with its matrices, its head, and the sizes of all between them."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from mspc.errors import InputError
from mspc.model.streamed import StreamedModel
from mspc.types import Grid, MatricesByBlock, Matrix, flatten

LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3")
"""Types of models whose blocks `mspc bench` runs."""
Size = tuple[int, int]
"""(O, I) of a matrix."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a model on which attention, norms, rotations and embeddings depend."""

    hidden: int
    intermediate: int
    blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    qk_norms: bool
    """Queries and keys have norms."""

    @property
    def linears(self) -> tuple[Size, ...]:
        """(O, I) of q, k, v, out, gate, up and down."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        up = self.intermediate, self.hidden
        return (
            (queries, self.hidden), (keys, self.hidden), (keys, self.hidden), (self.hidden, queries), up, up,
            (self.hidden, self.intermediate),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class TokenWork:
    """The matrices that one token is multiplied by."""

    sizes: Sizes
    matrices: tuple[Matrix, ...]
    """Those that are compressed, in order."""
    others: tuple[Size, ...]
    """Linear layers of the blocks that stay dense."""
    head: Grid | None
    """The grid of the head; None if it stays dense."""
    quantized_lookup: bool
    """The embeddings have codes."""
    dtype: torch.dtype
    """Type of the weights in the checkpoint."""

    @property
    def head_size(self) -> Size:
        return self.sizes.vocabulary, self.sizes.hidden

    @property
    def linears(self) -> list[Size]:
        """All linear layers of the blocks."""
        return [*(matrix.shape for matrix in self.matrices), *self.others]

    @property
    def by_size(self) -> Counter[Size]:
        """The linear layers of the blocks, counted."""
        return Counter(self.linears)


def work_of(
    model: StreamedModel,
    matrices: MatricesByBlock,
    everything: MatricesByBlock,
    head: Grid | None,
    quantized_lookup: bool,
    dtype: torch.dtype,
) -> TokenWork:
    """The work of a token of a model on any device, meta included. `everything` has the matrices that could be chosen.

    Raises InputError for a model that the bench does not run, as nothing could confirm its times.
    """
    config: Any = model.config
    if config.model_type not in LIKE_LLAMA:
        raise InputError(
            f"A budget in time knows {', '.join(LIKE_LLAMA)}, and this is a {config.model_type} model. Give a size, "
            "such as bits_per_weight 3.25."
        )
    chosen = {matrix.name for matrix in flatten(matrices)}
    others = [matrix.shape for matrix in flatten(everything) if matrix.name not in chosen]
    return TokenWork(sizes_of(config), tuple(flatten(matrices)), tuple(others), head, quantized_lookup, dtype)


def sizes_of(config: Any) -> Sizes:
    heads = config.num_attention_heads
    return Sizes(
        config.hidden_size, config.intermediate_size, config.num_hidden_layers, heads,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
        config.vocab_size, config.model_type == "qwen3",
    )  # fmt: skip
