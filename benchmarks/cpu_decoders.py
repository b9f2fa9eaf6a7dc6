"""Steps of decoding for cpu_peers.py: mspc's decoder with random weights, or with those of an artifact."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mspc.bench.decoder import Block, Cache, Decoder, Operations, OuterLayers, Shape
from mspc.bench.formats import Source, describe, parse_format, random_stored
from mspc.bench.models import EPS, SEED, THETA, model_decoder, shape_of, tune
from mspc.kernels.cpu import memory
from mspc.runtime.joined import ConcatenatedLinear, DenseLinear
from mspc.runtime.linear import SparseLinear
from mspc.storage.manifest import read_manifest
from mspc.types import Grid, Target, Unstructured

PARTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
GROUP_SIZE = 128
Formats = str | list[dict[str, Target]]
"""One format for all matrices, or the target of every matrix of every block, by its name in the block."""


def random_step(shape: Shape, formats: Formats, head_bits: int, context: int) -> tuple[Callable[[], Tensor], int]:
    """A step with random weights after `context` tokens, and the bytes of weights that it reads.

    `torch` and `dense` have weights of 16 bits, head included: torch multiplies by the first in bfloat16, mspc by the
    second. All others have a head of `head_bits`, or of 16 bits.
    """
    dtype = torch.bfloat16 if formats == "torch" else torch.float32
    source = Source.seeded(SEED, torch.device("cpu"))
    outer = _outer(
        shape, source, dtype, 16 if formats in ("torch", "dense") else head_bits, context, formats == "torch"
    )
    blocks: list[Block] = []
    for number in range(shape.blocks):
        if isinstance(formats, str) and blocks:
            blocks.append(copy.deepcopy(blocks[0], {id(b): memory.copied(b) for b in blocks[0].buffers()}))
            continue
        targets = _targets(formats if isinstance(formats, str) else formats[number])
        linears = {
            layer: _linear(size, layer, targets, shape, source, dtype) for layer, size in shape.linears().items()
        }
        ones = torch.ones(shape.hidden, dtype=dtype)
        blocks.append(Block(linears, (ones, ones.clone()), None))
    decoder = Decoder(shape, outer, blocks, Operations())
    return _step(decoder, context), sum(decoder.weight_bytes().values())


def model_step(folder: Path, context: int) -> tuple[Callable[[], Tensor], int]:
    """The same for an artifact or sparse export."""
    shape_of(folder)
    decoder = model_decoder(folder, context + 1, torch.device("cpu"), Operations())
    return _step(decoder, context), sum(decoder.weight_bytes().values())


def mixture_of(artifact: Path, num_blocks: int) -> list[dict[str, Target]]:
    """The patterns and bits of an artifact for a model of `num_blocks`, each like the block at the same relative depth.

    Groups become those of the benchmark.
    """
    rows = {row["name"]: row for row in read_manifest(artifact)["matrices"]}
    prefix = next(iter(rows)).split(".0.")[0]
    depth = 1 + max(int(name[len(prefix) + 1 :].split(".")[0]) for name in rows)
    found = []
    for number in range(num_blocks):
        like = round(number * (depth - 1) / max(num_blocks - 1, 1))
        found.append({
            part: _target_of(rows[f"{prefix}.{like}.{part}"]) for parts in PARTS.values() for part in parts
        })  # fmt: skip
    return found


def _target_of(row: dict[str, Any]) -> Target:
    if row["pattern"] != "unstructured":
        raise SystemExit(f"{row['name']} has the pattern {row['pattern']}, but a mixture has bitmaps only.")
    return Target(Unstructured(row["sparsity"]), Grid(row["bits"], GROUP_SIZE))


def _targets(formats: str | dict[str, Target]) -> Callable[[str], Target | None]:
    if isinstance(formats, dict):
        return formats.__getitem__
    return lambda part: None if formats == "torch" else parse_format(formats)


def _linear(
    size: tuple[int, int], layer: str, targets: Callable[[str], Target | None], shape: Shape, source: Source,
    dtype: torch.dtype,
) -> nn.Module:  # fmt: skip
    """The matrices of one input. Those of the same target without a mask are one product, as in a loaded model."""
    parts = PARTS[layer]
    wanted = [targets(part) for part in parts]
    if wanted[0] is None:
        return DenseLinear(memory.copied(source.normal(size, size[1] ** -0.5, dtype)))
    if len(set(map(str, wanted))) == 1 and not describe(size, wanted[0], layer).has_mask:
        return _sparse(size, wanted[0], layer, source, dtype)
    rows = _rows(layer, shape)
    made = [_sparse((count, size[1]), target, part, source, dtype)
            for count, target, part in zip(rows, wanted, parts, strict=True)]  # fmt: skip
    return made[0] if len(made) == 1 else ConcatenatedLinear(made)


def _rows(layer: str, shape: Shape) -> Sequence[int]:
    keys = shape.kv_heads * shape.head_dim
    return {
        "qkv": (shape.heads * shape.head_dim, keys, keys),
        "out": (shape.hidden,),
        "gate_up": (shape.intermediate, shape.intermediate),
        "down": (shape.hidden,),
    }[layer]


def _sparse(size: tuple[int, int], target: Target, what: str, source: Source, dtype: torch.dtype) -> SparseLinear:
    matrix = describe(size, target, what)
    layer = SparseLinear.of(random_stored(matrix, source), matrix)
    tune(layer, dtype)
    return layer


def _outer(
    shape: Shape, source: Source, dtype: torch.dtype, head_bits: int, context: int, by_torch: bool
) -> OuterLayers:
    # One row stands for all, because a step reads one.
    embedding = source.normal((1, shape.hidden), 1.0, dtype).expand(shape.vocabulary, -1)
    if by_torch:
        head: Tensor | SparseLinear = memory.copied(source.normal(tuple(embedding.shape), 1.0, dtype))
    else:
        grid = None if head_bits == 16 else Grid(head_bits, GROUP_SIZE)
        target = Target(Unstructured(0.0), grid)
        head = _sparse((shape.vocabulary, shape.hidden), target, "head", source, dtype)
    frequencies = THETA ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
    angles = (torch.arange(context + 1)[:, None] * frequencies).repeat(1, 2)
    ones = torch.ones(shape.hidden, dtype=dtype)
    return OuterLayers(embedding, ones, head, angles.cos().to(dtype), angles.sin().to(dtype), EPS)


def _step(decoder: Decoder, context: int) -> Callable[[], Tensor]:
    cache = Cache(decoder.shape, 1, context + 1, decoder.outer.norm)
    ids = torch.zeros(1, 1, dtype=torch.long)
    return lambda: ids.copy_(decoder(ids, cache, context).argmax(-1, keepdim=True))
