"""Steps of decoding for cpu_peers.py: mspc's decoder with random weights, or with those of an artifact."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mspc.bench.decoder import Block, Decoder, Operations, OuterLayers, Shape
from mspc.bench.formats import Source, describe, parse_format, random_stored
from mspc.bench.models import EPS, SEED, copy_of, model_decoder, rotations, shape_of, tune
from mspc.formats.description import StoredMatrix
from mspc.kernels.cpu import memory
from mspc.runtime.joined import DenseLinear, joined
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
            blocks.append(copy_of(blocks[0]))
            continue
        targets = _targets(formats if isinstance(formats, str) else formats[number])
        linears = {layer: _linear(layer, targets, shape, source, dtype) for layer in PARTS}
        ones = torch.ones(shape.hidden, dtype=dtype)
        blocks.append(Block(linears, (ones, ones.clone()), None))
    decoder = Decoder(shape, outer, blocks, Operations())
    return step_of(decoder, context), sum(decoder.weight_bytes().values())


def model_step(folder: Path, context: int) -> tuple[Callable[[], Tensor], int]:
    """The same for an artifact or sparse export."""
    shape_of(folder)
    decoder = model_decoder(folder, context + 1, torch.device("cpu"), Operations())
    return step_of(decoder, context), sum(decoder.weight_bytes().values())


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
    layer: str, targets: Callable[[str], Target | None], shape: Shape, source: Source, dtype: torch.dtype
) -> nn.Module:
    """The matrices of one input."""
    size = shape.linears()[layer]
    wanted = {part: targets(part) for part in PARTS[layer]}
    if None in wanted.values():
        return DenseLinear(memory.copied(source.normal(size, size[1] ** -0.5, dtype)))
    keys = shape.kv_heads * shape.head_dim
    rows = {"qkv": (size[0] - 2 * keys, keys, keys), "gate_up": (size[0] // 2, size[0] // 2)}.get(layer, size[:1])
    matrices = [
        describe((count, size[1]), target, part)
        for count, (part, target) in zip(rows, wanted.items(), strict=True)
        if target is not None
    ]
    return random_layer(matrices, source, dtype)


def random_layer(matrices: Sequence[StoredMatrix], source: Source, dtype: torch.dtype) -> nn.Module:
    """A layer with random matrices that read one input, joined as those of a loaded model."""
    made = joined([SparseLinear.of(random_stored(matrix, source), matrix) for matrix in matrices])
    tune(made, dtype)
    return made


def _outer(
    shape: Shape, source: Source, dtype: torch.dtype, head_bits: int, context: int, by_torch: bool
) -> OuterLayers:
    # One row stands for all, because a step reads one.
    embedding = source.normal((1, shape.hidden), 1.0, dtype).expand(shape.vocabulary, -1)
    if by_torch:
        head: Any = memory.copied(source.normal(tuple(embedding.shape), 1.0, dtype))
    else:
        grid = None if head_bits == 16 else Grid(head_bits, GROUP_SIZE)
        target = Target(Unstructured(0.0), grid)
        head = random_layer([describe((shape.vocabulary, shape.hidden), target, "head")], source, dtype)
    ones = torch.ones(shape.hidden, dtype=dtype)
    return OuterLayers(embedding, ones, head, *rotations(shape, context + 1, dtype, source.device), EPS)


def step_of(decoder: Decoder, context: int) -> Callable[[], Tensor]:
    """One more token after `context` others, each the input of the next."""
    cache = decoder.cache(1, context + 1)
    ids = torch.zeros(1, 1, dtype=torch.long)
    return lambda: ids.copy_(decoder(ids, cache, context).argmax(-1, keepdim=True))
