"""The time of a token without its products: that of a stand-in with products, minus theirs.

The stand-in has the sizes of the model and does all that `mspc bench` does, with the products of one format. Its
weights pass through the caches, and its code and theirs drive each other out of them, as in a model.
"""

from collections.abc import Callable, Sequence
from statistics import median, quantiles

import torch
from torch import Tensor

from mspc.formats import layout
from mspc.formats.description import StoredMatrix
from mspc.kernels.cpu.step import Constants, Layer, Step
from mspc.planning.timings import BATCH, CONTEXT
from mspc.planning.token_work import Sizes
from mspc.runtime.embedding import SparseEmbedding
from mspc.runtime.linear import SparseLinear
from mspc.runtime.stepping import layer_of
from mspc.types import Codes, CompressedLinear, Grid, Target, Unstructured

REPEATS, LOOKUPS = 15, 50
ROWS = 1024
"""Rows of the embeddings that are looked up."""
EPS = 1e-5
Clock = Callable[[], float]


class StandIn:
    """A token in float32 through blocks with random norms and caches, and without a head."""

    def __init__(self, sizes: Sizes, blocks: Sequence[Sequence[SparseLinear]]) -> None:
        """`blocks` have their layers in the order of `Sizes.linears`, ready to run in C++."""
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        hidden, dim = sizes.hidden, sizes.head_dim
        qk_norms = (drawn(dim), drawn(dim)) if sizes.qk_norms else None
        layers: list[Layer] = []
        for q, k, v, out, gate, up, down in blocks:
            layer = layer_of([q, k, v], out, [gate, up], down, (drawn(hidden), drawn(hidden)), qk_norms)
            assert layer is not None
            layers.append(layer)
        caches = [drawn(2, BATCH, sizes.kv_heads, CONTEXT + 1, dim) for _ in blocks]
        rotations = [(drawn(CONTEXT + 1, dim), drawn(CONTEXT + 1, dim))] * len(layers)
        self.step = Step(layers, caches, rotations, drawn(hidden), Constants(EPS, dim**-0.5))
        self.embedding, self.ids = drawn(ROWS, hidden), torch.zeros(BATCH, dtype=torch.int64)
        self.logits = drawn(BATCH, sizes.vocabulary)

    def seconds(self, clock: Clock) -> tuple[float, float]:
        """Seconds of the blocks of one token, and of what is outside of them."""
        begin = clock()
        x = self.embedding[self.ids]
        entered = clock()
        self.step(x, CONTEXT)
        left = clock()
        self.ids.copy_(self.logits.argmax(-1) % ROWS)
        return left - entered, clock() - left + entered - begin


def rest_seconds(sizes: Sizes, blocks: Sequence[Sequence[SparseLinear]], of_products: float, clock: Clock) -> float:
    """Seconds of a token without products, by blocks with these layers, which take `of_products` a block.

    The lower quartile counts.
    """
    stand_in = StandIn(sizes, blocks)
    found = [stand_in.seconds(clock) for _ in range(REPEATS + 1)][1:]  # the first warms up
    of_blocks, outside = (quantiles(part, n=4, method="inclusive")[0] for part in zip(*found, strict=True))
    return sizes.blocks * max(of_blocks / len(blocks) - of_products, 0.0) + outside


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
