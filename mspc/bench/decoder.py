"""A Llama-like decoder with a static key-value cache, which takes linear layers of any format.

All else is the same for every format: attention, norms, rotations, head. On a CPU, steps of decoders with compressed
matrices run in C++ as a whole, and all others in operations of torch. q, k and v are one product, gate and up
another, as in engines that serve such models. It is made for timing: the position of a step is fixed when the step is
built. Nothing is therefore read on the host, and a CUDA graph can hold the step.

B sequences, T tokens of a step, L of the cache, H heads of queries, K of keys and values, D dimensions of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from mspc.kernels import ON_CPU
from mspc.kernels.cpu.kernel import fused_up_to
from mspc.kernels.cpu.step import Constants, Layer, Step
from mspc.runtime.embedding import SparseEmbedding
from mspc.runtime.linear import SparseLinear
from mspc.runtime.stepping import layer_of, planes_of


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a model, from which the work of a step follows."""

    name: str
    hidden: int
    intermediate: int
    blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    """Head and embeddings are one matrix."""

    def linears(self) -> dict[str, tuple[int, int]]:
        """(O, I) of the linear layers of a block."""
        return {
            "qkv": ((self.heads + 2 * self.kv_heads) * self.head_dim, self.hidden),
            "out": (self.hidden, self.heads * self.head_dim),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }

    @property
    def block_weights(self) -> int:
        return sum(rows * columns for rows, columns in self.linears().values())

    def cache_bytes(self, tokens: int, itemsize: int) -> int:
        """Bytes of the keys and values of `tokens` tokens, in all blocks."""
        return 2 * self.blocks * self.kv_heads * self.head_dim * itemsize * tokens

    def flops(self, batch: int, tokens: int, context: int) -> int:
        """Operations of a step with `tokens` new tokens a sequence after `context` others; logits of the last only."""
        of_linears = 2 * self.block_weights * self.blocks * batch * tokens
        pairs = tokens * context + tokens * (tokens + 1) // 2
        of_attention = 4 * self.heads * self.head_dim * pairs * batch * self.blocks
        return of_linears + of_attention + 2 * self.hidden * self.vocabulary * batch


def add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y, and its norm."""
    total = x + y
    return total, rms_norm(total, weight.shape, weight, eps)


def rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, norms: tuple[Tensor, Tensor] | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(B, T, (H + 2K) D) -> queries (B, H, T, D), keys and values (2, B, K, T, D); cos and sin (T, D)."""
    batch, tokens, head_dim = qkv.shape[0], qkv.shape[1], cos.shape[1]
    q, k, v = qkv.view(batch, tokens, heads + 2 * kv_heads, head_dim).split([heads, kv_heads, kv_heads], 2)
    if norms is not None:
        q, k = (rms_norm(part, norm.shape, norm, eps) for part, norm in zip((q, k), norms, strict=True))
    q, k = (part * cos[:, None] + _half_turned(part) * sin[:, None] for part in (q, k))
    return q.transpose(1, 2), torch.stack([k, v]).transpose(2, 3)


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return silu(gate) * up


@dataclass(frozen=True, slots=True)
class Operations:
    """The arithmetic between products, which is the same for all formats. `compiled` makes each one kernel."""

    add_norm: Callable[..., tuple[Tensor, Tensor]] = add_norm
    rotate: Callable[..., tuple[Tensor, Tensor]] = rotate
    gated: Callable[[Tensor], Tensor] = gated

    def compiled(self) -> "Operations":
        # Every batch size is compiled twice, for one token and for many. Above the limit torch would run them eagerly.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        return Operations(*(torch.compile(getattr(self, field.name)) for field in fields(self)))


@dataclass(frozen=True, slots=True)
class OuterLayers:
    """Embeddings, last norm and head, and the rotations of all positions."""

    embedding: Tensor | SparseEmbedding
    """(V, hidden)."""
    norm: Tensor
    head: Tensor | SparseLinear
    """(V, hidden): the embeddings themselves where they are tied, unless they are quantized."""
    cos: Tensor
    """(L, D), as `sin`."""
    sin: Tensor
    eps: float


class Block(nn.Module):
    """The four linear layers of a block, its norms, and those of queries and keys where a model has them."""

    attention_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor
    k_norm: Tensor

    def __init__(
        self, linears: dict[str, nn.Module], norms: tuple[Tensor, Tensor], qk_norms: tuple[Tensor, Tensor] | None
    ) -> None:
        super().__init__()
        self.qkv, self.out = linears["qkv"], linears["out"]
        self.gate_up, self.down = linears["gate_up"], linears["down"]
        self.register_buffer("attention_norm", norms[0])
        self.register_buffer("mlp_norm", norms[1])
        self.has_qk_norms = qk_norms is not None
        if qk_norms is not None:
            self.register_buffer("q_norm", qk_norms[0])
            self.register_buffer("k_norm", qk_norms[1])

    def layer(self) -> Layer | None:
        """As a part of a step in C++, or None if a matrix does not run there."""
        norms = self.attention_norm, self.mlp_norm
        return layer_of([self.qkv], self.out, [self.gate_up], self.down, norms, self.qk_norms)

    @property
    def qk_norms(self) -> tuple[Tensor, Tensor] | None:
        return (self.q_norm, self.k_norm) if self.has_qk_norms else None


@dataclass(frozen=True, slots=True)
class Cache:
    """Keys and values (2, B, K, L, D) of every block, at the same addresses for all steps; random at first."""

    blocks: list[Tensor]
    step: Step | None
    """One token through all blocks in C++."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """Tokens to logits."""

    shape: Shape
    outer: OuterLayers
    blocks: list[Block]
    operations: Operations

    def __call__(self, ids: Tensor, cache: Cache, first: int) -> Tensor:
        """Logits (B, V) after the last of ids (B, T), which stand at `first` and after; T is 1 unless `first` is 0.

        Writes their keys and values to the cache, and attends to all that it holds up to them.
        """
        assert first == 0 or ids.shape[1] == 1
        outer, operations, shape = self.outer, self.operations, self.shape
        last = first + ids.shape[1]
        cos, sin = outer.cos[first:last], outer.sin[first:last]
        x = outer.embedding[ids] if isinstance(outer.embedding, Tensor) else outer.embedding(ids)
        if ids.shape[1] == 1 and cache.step is not None:
            return self._logits(cache.step(x[:, 0], first))
        y = torch.zeros_like(x)
        for block, cached in zip(self.blocks, cache.blocks, strict=True):
            x, normed = operations.add_norm(x, y, block.attention_norm, outer.eps)
            q, kv = operations.rotate(
                block.qkv(normed), cos, sin, shape.heads, shape.kv_heads, block.qk_norms, outer.eps
            )  # fmt: skip
            cached[:, :, :, first:last] = kv
            keys, values = cached[:, :, :, :last]
            mixed = scaled_dot_product_attention(
                q, keys, values, is_causal=ids.shape[1] > 1, enable_gqa=shape.heads != shape.kv_heads
            )
            y = block.out(mixed.transpose(1, 2).flatten(2))
            x, normed = operations.add_norm(x, y, block.mlp_norm, outer.eps)
            y = block.down(operations.gated(block.gate_up(normed)))
        _, normed = operations.add_norm(x[:, -1], y[:, -1], outer.norm, outer.eps)
        return self._logits(normed)

    def _logits(self, normed: Tensor) -> Tensor:
        head = self.outer.head
        return linear(normed, head) if isinstance(head, Tensor) else head(normed)

    def cache(self, batch: int, length: int) -> Cache:
        """A cache for texts of `length` tokens, whose steps run in C++ where all matrices of the blocks do."""
        shape, outer = self.shape, self.outer
        size = (2, batch, shape.kv_heads, length, shape.head_dim)
        blocks = [outer.norm.new_empty(size).normal_() for _ in self.blocks]
        planes, compressed = planes_of(self.blocks), any(one.kernel_name in ON_CPU for one in self.sparse_layers())
        layers = [block.layer() for block in self.blocks] if compressed else [None]
        if None in layers or planes is None or batch > fused_up_to():
            return Cache(blocks, None)
        rotations = [(outer.cos[:length], outer.sin[:length])] * shape.blocks
        constants = Constants(outer.eps, shape.head_dim**-0.5, planes=planes)
        return Cache(blocks, Step([one for one in layers if one], blocks, rotations, outer.norm, constants))

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of the weights that a decoding step reads. The rows of the embeddings that it reads are not counted.

        Compressed matrices count as they are stored, whatever a device repacks them to.
        """
        norms = sum(norm.nbytes for block in self.blocks for norm in block.buffers(recurse=False))
        linears = self.repacked_bytes() + sum(
            layer.stored_bytes() - layer.held_bytes() + layer.copied_bytes() for layer in self.sparse_layers()
        )
        return {"linears": linears, "norms": norms + self.outer.norm.nbytes, "head": bytes_of(self.outer.head)}

    def repacked_bytes(self) -> int:
        """Bytes of the linear layers as they are held, without copies: with padding, and without unused offsets."""
        held = sum(tensor.nbytes for block in self.blocks for tensor in (*block.buffers(), *block.parameters()))
        norms = sum(norm.nbytes for block in self.blocks for norm in block.buffers(recurse=False))
        return held - norms - self.copied_bytes()

    def sparse_layers(self) -> list[SparseLinear]:
        return [layer for block in self.blocks for layer in block.modules() if isinstance(layer, SparseLinear)]

    def copied_bytes(self) -> int:
        """Bytes of the copies of weights that only prefill reads."""
        return sum(layer.copied_bytes() for layer in self.sparse_layers())

    def stored_bytes(self) -> int:
        """Bytes of all weights: those that a step reads, copies, and embeddings that are not the head."""
        tied = self.outer.head is self.outer.embedding
        read = sum(self.weight_bytes().values()) + self.copied_bytes()
        return read + (0 if tied else bytes_of(self.outer.embedding))


def bytes_of(part: Tensor | nn.Module) -> int:
    """Bytes of a tensor, or of a compressed layer as it is stored."""
    if isinstance(part, SparseLinear):
        return part.stored_bytes()
    tensors = [part] if isinstance(part, Tensor) else [*part.buffers(), *part.parameters()]
    return sum(tensor.nbytes for tensor in tensors)
