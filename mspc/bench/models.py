"""Decoders to measure: of random weights in a format, or of the weights of a checkpoint, artifact or sparse export."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mspc.bench.decoder import Block, Decoder, Outer, Pieces, Shape
from mspc.bench.formats import DENSE, FP8_PREFILL, Source, describe, parse_format, random_stored
from mspc.bench.tinygemm import TinygemmLinear, check_fits, num_bytes
from mspc.errors import InputError
from mspc.formats.description import StoredMatrix
from mspc.kernels import fp8
from mspc.model.hub import load_config, longest_sequence
from mspc.model.open import choose_dtype, open_model, open_source
from mspc.runtime.hf_quantizer import check_files
from mspc.runtime.joined import DenseLinear, joined
from mspc.runtime.linear import SparseLinear, prepare
from mspc.runtime.loading import load
from mspc.storage.artifact import ArtifactSource
from mspc.storage.checkpoint import Checkpoint
from mspc.storage.manifest import is_artifact
from mspc.storage.sparse_export import descriptions, is_sparse_export, read_quantization_config
from mspc.types import NM

SHAPES = {
    "1b": Shape("1b", 2048, 8192, 16, 32, 8, 64, 128256, tied=True),
    "8b": Shape("8b", 4096, 14336, 32, 32, 8, 128, 128256, tied=False),
}
"""Llama-3.2-1B and Llama-3.1-8B."""
TINYGEMM = "tinygemm"
"""The format of torch's own int4 product."""
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding that do not depend on the length of the text."""
EPS, THETA = 1e-5, 500_000.0
SEED = 0


def engine_of(decoder: Decoder) -> str:
    """What multiplies by the linear layers, in words."""
    modules = [layer for block in decoder.blocks for layer in block.modules()]
    layers, on_gpu = {type(layer) for layer in modules}, decoder.outer.head.is_cuda
    if SparseLinear in layers:
        prepared = {layer.prepared_for is not None for layer in modules if isinstance(layer, SparseLinear)}
        words = " and ".join({True: "mspc kernels", False: "plain torch"}[is_one] for is_one in sorted(prepared))
        sparse = [layer for layer in modules if isinstance(layer, SparseLinear)]
        prefill = sorted({str(layer.prefill) for layer in sparse if layer.copied_bytes() or layer.rounds})
        return f"{words}, prefill {' and '.join(prefill)}" if prefill else words
    if TinygemmLinear in layers:
        return "tinygemm" if on_gpu else "torch int4"
    return "cuBLAS" if on_gpu else "torch"


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, which is slow on a CPU: there float32."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


# Random weights


def check_format(shape: Shape, name: str) -> None:
    """Raises InputError when a format is unknown or does not fit the matrices of this shape."""
    target = None if name == TINYGEMM else parse_format(name)
    for layer, size in shape.linears().items():
        what = f"{name}: {layer} of {shape.name}"
        if target is None:
            check_fits(size, what)
        elif not fp8.fits(describe(size, target, what)) and name.endswith(FP8_PREFILL):
            raise InputError(
                f"{what} is {size[0]} x {size[1]}, and prefill in fp8 needs multiples of {fp8.SIZES}; leave this "
                "format out."
            )


def random_bytes(shape: Shape, name: str, dtype: torch.dtype) -> int:
    """What the linear layers of a model in this format take."""
    if name == DENSE:
        return shape.block_weights * shape.blocks * dtype.itemsize
    if name == TINYGEMM:
        return shape.blocks * sum(num_bytes(size, dtype) for size in shape.linears().values())
    target = parse_format(name)
    described = [describe(size, target, layer) for layer, size in shape.linears().items()]
    return shape.blocks * sum(
        torch.Size(size).numel() * of.itemsize for matrix in described for of, size in matrix.tensors().values()
    )


def copied_bytes(shape: Shape, name: str) -> int:
    """What a copy for prefill takes beside them on a GPU."""
    bits = 5 if name.endswith(FP8_PREFILL) else 9 if name == "2:4" else 0
    return shape.block_weights * shape.blocks * bits // 8


def outer_bytes(shape: Shape, dtype: torch.dtype) -> int:
    return shape.hidden * shape.vocabulary * dtype.itemsize * (1 if shape.tied else 2)


def random_outer(shape: Shape, length: int, device: torch.device) -> Outer:
    """Embeddings, norm and head, which all formats share, and rotations for `length` tokens."""
    source, dtype = Source.seeded(SEED, device), compute_dtype(device)
    size = (shape.vocabulary, shape.hidden)
    embedding = source.normal(size, 1.0, dtype)
    head = embedding if shape.tied else source.normal(size, 1.0, dtype)
    frequencies = THETA ** (-torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim)
    angles = (torch.arange(length, device=device)[:, None] * frequencies).repeat(1, 2)
    ones = torch.ones(shape.hidden, dtype=dtype, device=device)
    return Outer(embedding, ones, head, angles.cos().to(dtype), angles.sin().to(dtype), EPS)


def random_decoder(shape: Shape, name: str, outer: Outer, pieces: Pieces) -> Decoder:
    """Random weights in a format. All blocks hold the same values, each at its own addresses: as much to read as of a
    real model, and drawn once."""
    device, dtype = outer.head.device, outer.head.dtype
    source = Source.seeded(SEED, device)
    layers = {
        layer: random_linear(size, name, source, dtype, f"{name}: {layer}") for layer, size in shape.linears().items()
    }
    ones = torch.ones(shape.hidden, dtype=dtype, device=device)
    first = Block(layers, (ones, ones.clone()), None)
    return Decoder(shape, outer, [first, *(copy.deepcopy(first) for _ in range(shape.blocks - 1))], pieces)


def random_linear(size: tuple[int, int], name: str, source: Source, dtype: torch.dtype, what: str) -> nn.Module:
    """A layer as it runs: arranged for its kernel, on a GPU."""
    if name == DENSE:
        return DenseLinear(source.normal(size, size[1] ** -0.5, dtype))
    if name == TINYGEMM:
        return TinygemmLinear(size, source, dtype)
    matrix = describe(size, parse_format(name), what)
    layer = SparseLinear.of(random_stored(matrix, source), matrix)
    arrange(layer, dtype, "fp8" if name.endswith(FP8_PREFILL) else "cusparselt")
    return layer


def arrange(module: nn.Module, dtype: torch.dtype, prefill: str = "cusparselt") -> None:
    """Its sparse layers as they run fastest on their device, whatever memory that takes."""
    prepare(module, dtype)
    for layer in module.modules():
        if isinstance(layer, SparseLinear):
            layer.prefill_by(prefill)
            layer.tune()


# Weights of a model


def shape_of(folder: Path) -> tuple[Shape, int | None]:
    """The sizes of a model, and how many tokens it was made for. Raises InputError for one that is not Llama-like."""
    config = load_config(folder)
    if config.model_type not in LLAMA_LIKE:
        raise InputError(
            f"{folder} is a {config.model_type} model, and the bench runs {', '.join(LLAMA_LIKE)}; measure its shapes "
            "with --shapes, or run it with mspc.load and time that."
        )
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotation not in FIXED_ROTATIONS:
        raise InputError(
            f"{folder}: its rotary embedding {rotation!r} changes with the length of the text, and the bench runs "
            f"{', '.join(FIXED_ROTATIONS)}; measure its shapes with --shapes from-model."
        )
    heads = config.num_attention_heads
    shape = Shape(
        folder.resolve().name, config.hidden_size, config.intermediate_size, config.num_hidden_layers, heads,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
        config.vocab_size, bool(config.tie_word_embeddings),
    )  # fmt: skip
    limits = [n for n in (longest_sequence(config), getattr(config, "sliding_window", None)) if n is not None]
    return shape, min(limits, default=None)


def check_model(folder: Path) -> None:
    """Raises InputError, naming the file or tensor, for a model that could not be loaded."""
    if is_artifact(folder):
        ArtifactSource(folder).check_files()
    elif is_sparse_export(folder):
        described = descriptions(read_quantization_config(folder), folder / "config.json")
        check_files(described, [folder / shard for shard in Checkpoint(folder).shards()])
    open_model(folder, device=torch.device("cpu"))  # no weights are read


def stored_dtype(folder: Path) -> torch.dtype:
    """That of the weights in the files of a model, which the bench may not compute in."""
    return choose_dtype("auto", open_source(folder), torch.device("meta"))  # on no device that would have another


def model_decoder(folder: Path, length: int, device: torch.device, pieces: Pieces) -> Decoder:
    """The model of a checkpoint, artifact or sparse export, its compressed matrices as they are stored, for texts of
    `length` tokens."""
    shape, _ = shape_of(folder)
    dtype = compute_dtype(device)
    blocks: list[Block] = []
    if is_artifact(folder) or is_sparse_export(folder):
        # From the CPU, because matrices are joined before they are arranged; they are there twice in one block only.
        model = load(folder, "cpu", dtype)
        layers = model.model.layers
        for index, layer in enumerate(layers):
            blocks.append(_block_of(layer).to(device))
            arrange(blocks[-1], dtype)
            layers[index] = nn.Identity()
        return Decoder(shape, _outer_of(model.to(device), length), blocks, pieces)
    streamed = open_model(folder, device=device, dtype=str(dtype).removeprefix("torch."))
    for index in range(len(streamed.blocks)):
        with streamed.loaded(index) as layer:
            blocks.append(_block_of(layer))
    with streamed.loaded_outer() as model:
        return Decoder(shape, _outer_of(model, length), blocks, pieces)


def _outer_of(model: Any, length: int) -> Outer:
    embedding, head = model.model.embed_tokens.weight.detach(), model.lm_head.weight.detach()
    positions = torch.arange(length, device=embedding.device)[None]
    cos, sin = model.model.rotary_emb(embedding[:1], positions)
    norm = model.model.norm.weight.detach()
    return Outer(embedding, norm, head, cos[0], sin[0], model.config.rms_norm_eps)


def _block_of(layer: Any) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    linears = {
        "qkv": joined([attention.q_proj, attention.k_proj, attention.v_proj]),
        "out": joined([attention.o_proj]),
        "gate_up": joined([mlp.gate_proj, mlp.up_proj]),
        "down": joined([mlp.down_proj]),
    }
    norms = layer.input_layernorm.weight.detach(), layer.post_attention_layernorm.weight.detach()
    has_qk_norms = hasattr(attention, "q_norm")
    qk_norms = (attention.q_norm.weight.detach(), attention.k_norm.weight.detach()) if has_qk_norms else None
    return Block(linears, norms, qk_norms)


def format_of(decoder: Decoder) -> str:
    """What a decoder holds, in the words of `parse_format` where all matrices are the same."""
    kinds = set()
    for block in decoder.blocks:
        for layer in block.modules():
            if isinstance(layer, SparseLinear):
                kinds.add(_name_of(layer.matrix))
            elif isinstance(layer, DenseLinear):
                kinds.add(DENSE)
    return kinds.pop() if len(kinds) == 1 else "mixed"


def _name_of(matrix: StoredMatrix) -> str:
    is_nm, bits = isinstance(matrix.pattern, NM), matrix.grid and f"int{matrix.grid.bits}"
    pattern = str(matrix.pattern) if is_nm else f"{matrix.pattern.sparsity:.0%}"
    parts = [pattern] if matrix.pattern.sparsity else []
    return "+".join([*parts, *([bits] if bits else [])]) or DENSE
