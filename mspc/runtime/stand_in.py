"""The time of a token without its products: that of a stand-in with products, minus theirs.

The stand-in has the sizes of the model and does all that `mspc bench` does, with the products of one format. Its
weights pass through the caches, and its code and theirs drive each other out of them, as in a model.
"""

from collections.abc import Callable, Sequence
from statistics import median, quantiles

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from mspc.formats import layout
from mspc.formats.description import StoredMatrix
from mspc.planning.timings import BATCH, CONTEXT
from mspc.planning.token_work import Sizes
from mspc.runtime.embedding import SparseEmbedding
from mspc.types import Codes, CompressedLinear, Grid, Target, Unstructured

REPEATS, LOOKUPS = 15, 50
ROWS = 1024
"""Rows of the embeddings that are looked up."""
EPS = 1e-5
Clock = Callable[[], float]


class StandIn:
    """A token in float32, with the layers of each block in the order of `Sizes.linears`, and without a head.

    Without layers, vectors that were made before stand for what they would give.
    """

    def __init__(self, sizes: Sizes, layers: Sequence[Sequence[nn.Module]] = ()) -> None:
        self.sizes, self.layers = sizes, layers
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        hidden, heads, kv_heads, dim = sizes.hidden, sizes.heads, sizes.kv_heads, sizes.head_dim
        self.norms = [(drawn(hidden), drawn(hidden)) for _ in range(sizes.blocks)]
        self.qk_norms = (drawn(dim), drawn(dim)) if sizes.qk_norms else None
        self.caches = [drawn(2, BATCH, kv_heads, CONTEXT + 1, dim) for _ in range(sizes.blocks)]
        self.cos, self.sin = drawn(1, dim), drawn(1, dim)
        self.q, self.k, self.v = (drawn(BATCH, 1, count * dim) for count in (heads, kv_heads, kv_heads))
        self.out, self.down = drawn(BATCH, 1, hidden), drawn(BATCH, 1, hidden)
        self.gate, self.up = drawn(BATCH, 1, sizes.intermediate), drawn(BATCH, 1, sizes.intermediate)
        self.embedding, self.ids = drawn(ROWS, hidden), torch.zeros(BATCH, 1, dtype=torch.int64)
        self.logits = drawn(BATCH, sizes.vocabulary)

    def block(self, x: Tensor, y: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """The two residuals of the next block, by those of this one."""
        sizes, cached = self.sizes, self.caches[index]
        layers: Sequence[nn.Module | None] = self.layers[index] if self.layers else (None,) * len(sizes.linears)
        x, normed = _add_norm(x, y, self.norms[index][0])
        made = (self.q, self.k, self.v)
        parts = [_given(layer, normed, one) for layer, one in zip(layers[:3], made, strict=True)]
        q, k, v = torch.cat(parts, -1).view(
            BATCH, 1, sizes.heads + 2 * sizes.kv_heads, sizes.head_dim
        ).split([sizes.heads, sizes.kv_heads, sizes.kv_heads], 2)  # fmt: skip
        if self.qk_norms is not None:
            q, k = (rms_norm(part, norm.shape, norm, EPS) for part, norm in zip((q, k), self.qk_norms, strict=True))
        q, k = (part * self.cos[:, None] + _half_turned(part) * self.sin[:, None] for part in (q, k))
        cached[:, :, :, CONTEXT:] = torch.stack([k, v]).transpose(2, 3)
        keys, values = cached
        mixed = scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, is_causal=False, enable_gqa=sizes.heads != sizes.kv_heads
        )
        out = _given(layers[3], mixed.transpose(1, 2).flatten(2), self.out)
        x, normed = _add_norm(x, out, self.norms[index][1])
        parts = [_given(layer, normed, one) for layer, one in zip(layers[4:6], (self.gate, self.up), strict=True)]
        gate, up = torch.cat(parts, -1).chunk(2, -1)
        return x, _given(layers[6], silu(gate) * up, self.down)

    def seconds(self, clock: Clock) -> tuple[float, float]:
        """Seconds of the blocks of one token, and of what is outside of them."""
        begin = clock()
        x = self.embedding[self.ids]
        y = torch.zeros_like(x)
        entered = clock()
        for index in range(len(self.layers) or self.sizes.blocks):
            x, y = self.block(x, y, index)
        left = clock()
        _add_norm(x[:, -1], y[:, -1], self.norms[0][0])
        self.ids.copy_(self.logits.argmax(-1, keepdim=True) % ROWS)
        return left - entered, clock() - left + entered - begin


def _given(layer: nn.Module | None, x: Tensor, made: Tensor) -> Tensor:
    return made if layer is None else layer(x)


def _add_norm(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + y
    return total, rms_norm(total, weight.shape, weight, EPS)


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def rest_seconds(sizes: Sizes, layers: Sequence[Sequence[nn.Module]], of_products: float, clock: Clock) -> float:
    """Seconds of a token without products, by blocks with these layers, which take `of_products` a block.

    The lower quartile counts. It is at least that of a stand-in without layers, whose caches are warm.
    """
    blocks, outside = _quartiles(StandIn(sizes, layers), clock)
    alone, _ = _quartiles(StandIn(sizes), clock)
    return max(sizes.blocks * (blocks / len(layers) - of_products), alone) + outside


def _quartiles(stand_in: StandIn, clock: Clock) -> list[float]:
    """The lower quartiles of both parts, after a token that warms up."""
    found = [stand_in.seconds(clock) for _ in range(REPEATS + 1)][1:]
    return [quantiles(part, n=4, method="inclusive")[0] for part in zip(*found, strict=True)]


def lookup_seconds(hidden: int, clock: Clock) -> float:
    """Seconds by which a lookup in embeddings of 8 bits, one scale a row, takes longer than in dense ones."""
    grid, shape = Grid(8, None), (ROWS, hidden)
    values, mask = torch.randint(256, shape, dtype=torch.uint8), torch.ones(shape, dtype=torch.bool)
    codes = Codes(values, torch.rand(ROWS, 1).half(), torch.full((ROWS, 1), 128, dtype=torch.uint8))
    target = Target(Unstructured(0.0), grid)
    stored = layout.pack(CompressedLinear(values.float(), mask, target, codes), torch.float32)
    quantized = SparseEmbedding(StoredMatrix(shape, target.pattern, grid, torch.float32), torch.float32)
    for part, tensor in stored.items():
        setattr(quantized, part, tensor)
    dense, ids = torch.randn(shape), torch.zeros(1, 1, dtype=torch.int64)
    found = []
    for _ in range(LOOKUPS):
        begin = clock()
        quantized(ids)
        middle = clock()
        dense[ids]
        found.append(2 * middle - begin - clock())
    return max(median(found), 0.0)
