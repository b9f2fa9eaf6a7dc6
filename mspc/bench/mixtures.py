"""Random weights in the formats of an artifact, whose model may have other shapes.

Pattern and bits of each matrix are those of the block at the same relative depth, in groups of the benchmark.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from mspc.bench.decoder import Block, Decoder, Operations, OuterLayers, Shape
from mspc.bench.formats import GROUP_SIZE, Source, describe, random_stored
from mspc.bench.models import SEED, bytes_of_matrix, tune
from mspc.errors import InputError
from mspc.formats.description import StoredMatrix
from mspc.runtime.joined import joined
from mspc.runtime.linear import SparseLinear
from mspc.runtime.loading import INPUTS
from mspc.storage.artifact import ArtifactSource
from mspc.storage.manifest import is_artifact
from mspc.types import Grid, Target

PARTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""The matrices that read one input, by the name of their product in the decoder."""
Described = dict[str, list[StoredMatrix]]
"""The matrices of each product of a block."""


def is_mixture(name: str) -> bool:
    """Tell if a format is named by an artifact."""
    return is_artifact(Path(name))


def mixture_of(artifact: Path, num_blocks: int) -> list[dict[str, Target]]:
    """The target of every matrix of every block, by its name in the block. Raises InputError for other families."""
    targets: dict[int, dict[str, Target]] = {}
    parts = {part for of_input in PARTS.values() for part in of_input}
    for name, entry in ((entry.name, entry) for entry in ArtifactSource(artifact).entries):
        if (found := re.fullmatch(r".*\.(\d+)\.(\w+\.\w+)", name)) and found[2] in parts:
            grid = entry.target.grid and Grid(entry.target.grid.bits, GROUP_SIZE)
            targets.setdefault(int(found[1]), {})[found[2]] = Target(entry.target.pattern, grid)
    for number in range(max(targets, default=-1) + 1):
        if absent := parts - set(targets.get(number, {})):
            raise InputError(
                f"{artifact} has no {min(absent)} in block {number}, so it cannot be a format. Name an artifact of a "
                "whole Llama-like model."
            )
    if not targets:
        raise InputError(f"{artifact} is not of a Llama-like model, so it cannot be a format.")
    depth = len(targets)
    return [targets[round(number * (depth - 1) / max(num_blocks - 1, 1))] for number in range(num_blocks)]


def described(shape: Shape, name: str) -> list[Described]:
    """The matrices of each block in the formats of an artifact. Raises InputError for those that do not fit."""
    keys = shape.kv_heads * shape.head_dim
    rows = {
        "qkv": (shape.heads * shape.head_dim, keys, keys), "out": (shape.hidden,),
        "gate_up": (shape.intermediate, shape.intermediate), "down": (shape.hidden,),
    }  # fmt: skip
    columns = {layer: size[1] for layer, size in shape.linears().items()}
    return [
        {
            layer: [
                describe((count, columns[layer]), targets[part], f"{name}: {part} of {shape.name}")
                for count, part in zip(rows[layer], PARTS[layer], strict=True)
            ]
            for layer in PARTS
        }
        for targets in mixture_of(Path(name), shape.blocks)
    ]


def mixture_bytes(shape: Shape, name: str) -> int:
    """Bytes of the linear layers as they are stored."""
    return sum(
        bytes_of_matrix(matrix)
        for of_block in described(shape, name)
        for of_layer in of_block.values()
        for matrix in of_layer
    )


def mixture_decoder(
    shape: Shape, name: str, outer: OuterLayers, operations: Operations, inputs: str = INPUTS[0]
) -> Decoder:
    """A decoder with random weights in the formats of an artifact."""
    source, dtype = Source.seeded(SEED, outer.norm.device), outer.norm.dtype
    blocks = []
    for of_block in described(shape, name):
        layers = {layer: random_layer(matrices, source, dtype, inputs) for layer, matrices in of_block.items()}
        ones = torch.ones(shape.hidden, dtype=dtype, device=outer.norm.device)
        blocks.append(Block(layers, (ones, ones.clone()), None))
    return Decoder(shape, outer, blocks, operations)


def random_layer(
    matrices: Sequence[StoredMatrix], source: Source, dtype: torch.dtype, inputs: str = INPUTS[0]
) -> nn.Module:
    """A layer with random matrices that read one input, joined as those of a loaded model."""
    made = joined([SparseLinear.of(random_stored(matrix, source), matrix) for matrix in matrices])
    tune(made, dtype, inputs)
    return made
