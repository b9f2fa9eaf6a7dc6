"""Decoders to measure, with random weights in a format, or the weights of a checkpoint, artifact or sparse export."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mspc.bench.decoder import Block, Decoder, Operations, OuterLayers, Shape
from mspc.bench.formats import DENSE, Source, describe, parse_format, random_stored
from mspc.bench.tinygemm import TinygemmLinear, check_fits, num_bytes
from mspc.errors import InputError
from mspc.formats.description import StoredMatrix
from mspc.kernels import ON_CPU
from mspc.kernels.cpu import library, memory
from mspc.model.hub import load_config, longest_sequence
from mspc.model.open import check_folder, choose_dtype, open_model, open_source
from mspc.model.vocabulary import check_tokenizer_of
from mspc.planning.token_work import LIKE_LLAMA, Sizes, sizes_of
from mspc.progress import log
from mspc.runtime.embedding import SparseEmbedding
from mspc.runtime.hf_quantizer import check_files
from mspc.runtime.joined import DenseLinear, joined
from mspc.runtime.linear import SparseLinear, prepare
from mspc.runtime.loading import INPUTS, load
from mspc.runtime.stepping import FIXED_ROTATIONS
from mspc.storage.artifact import ArtifactSource
from mspc.storage.checkpoint import Checkpoint
from mspc.storage.dequantized import origin_note
from mspc.storage.manifest import is_artifact
from mspc.storage.sparse_export import descriptions, is_sparse_export, read_quantization_config
from mspc.types import NM

SHAPES = {
    "1b": Shape("1b", 2048, 8192, 16, 32, 8, 64, 128256, tied=True),
    "8b": Shape("8b", 4096, 14336, 32, 32, 8, 128, 128256, tied=False),
}
"""Llama-3.2-1B and Llama-3.1-8B."""
TINYGEMM = "tinygemm"
"""Name of the format of torch's own int4 product."""
TORCH16 = "torch bf16"
"""Name of the format of dense weights in bfloat16 where others compute in float32, multiplied by torch."""
EPS, THETA = 1e-5, 500_000.0
SEED = 0
Layers = TypeVar("Layers", bound=nn.Module)


def engine_of(decoder: Decoder) -> str:
    """The code that multiplies by the linear layers, in words."""
    layers = {type(layer) for block in decoder.blocks for layer in block.modules()}
    on_gpu, sparse = decoder.outer.norm.is_cuda, decoder.sparse_layers()
    if sparse:
        words = " and ".join(sorted({_engine_of_layer(layer) for layer in sparse}))
        return f"{words}, prefill cusparselt" if any(layer.copied_bytes() for layer in sparse) else words
    if TinygemmLinear in layers:
        return "tinygemm" if on_gpu else "torch int4"
    return "cuBLAS" if on_gpu else "torch"


def _engine_of_layer(layer: SparseLinear) -> str:
    if layer.kernel_name is None:
        return "plain torch"
    if layer.kernel_name not in ON_CPU:
        return "mspc kernels"
    return f"C++, {library.ISAS[library.isa()]}{', int8 inputs' * layer.has_int8_inputs}"


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16; on a CPU, where that is slow, float32."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


# Random weights


def check_format(shape: Shape, name: str) -> None:
    """Raises InputError if a format is unknown or does not fit the matrices of this shape."""
    target = None if name == TINYGEMM else parse_format(name)
    for layer, size in shape.linears().items():
        what = f"{name}: {layer} of {shape.name}"
        if target is None:
            check_fits(size, what)
        else:
            describe(size, target, what)


def random_bytes(shape: Shape, name: str, dtype: torch.dtype) -> int:
    """Bytes of the linear layers of a model in this format."""
    if name in (DENSE, TORCH16):
        return shape.block_weights * shape.blocks * (2 if name == TORCH16 else dtype.itemsize)
    if name == TINYGEMM:
        return shape.blocks * sum(num_bytes(size, dtype) for size in shape.linears().values())
    target = parse_format(name)
    return shape.blocks * sum(bytes_of_matrix(describe(size, target, layer)) for layer, size in shape.linears().items())


def bytes_of_matrix(matrix: StoredMatrix) -> int:
    """Bytes of a matrix as it is stored."""
    return sum(torch.Size(size).numel() * stored.itemsize for stored, size in matrix.tensors().values())


def copied_bytes(shape: Shape, name: str) -> int:
    """Bytes of the copies for cuSPARSELt on a GPU, 9 bits a weight."""
    is_copied = name == str(NM(2, 4))
    return shape.block_weights * shape.blocks * 9 // 8 if is_copied else 0


def outer_bytes(shape: Shape, dtype: torch.dtype) -> int:
    return shape.hidden * shape.vocabulary * dtype.itemsize * (1 if shape.tied else 2)


def random_outer(shape: Shape, length: int, device: torch.device, dtype: torch.dtype | None = None) -> OuterLayers:
    """Embeddings, norm and head, which all formats share, and rotations for `length` tokens."""
    source, dtype = Source.seeded(SEED, device), dtype or compute_dtype(device)
    size = (shape.vocabulary, shape.hidden)
    embedding = _in_huge_pages(source.normal(size, 1.0, dtype))
    head = embedding if shape.tied else _in_huge_pages(source.normal(size, 1.0, dtype))
    ones = torch.ones(shape.hidden, dtype=dtype, device=device)
    return OuterLayers(embedding, ones, head, *rotations(shape, length, dtype, device), EPS)


def with_head(outer: OuterLayers, bits: int, inputs: str = INPUTS[0]) -> OuterLayers:
    """The same with a random head in codes."""
    assert isinstance(outer.embedding, Tensor)
    rows, columns = outer.embedding.shape
    source = Source.seeded(SEED, outer.norm.device)
    head = random_linear((rows, columns), f"int{bits}", source, outer.norm.dtype, f"int{bits}: head", inputs)
    assert isinstance(head, SparseLinear)
    return replace(outer, head=head)


def rotations(shape: Shape, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (length, D) of the positions of a model with random weights."""
    frequencies = THETA ** (-torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim)
    angles = (torch.arange(length, device=device)[:, None] * frequencies).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def random_decoder(
    shape: Shape, name: str, outer: OuterLayers, operations: Operations, inputs: str = INPUTS[0]
) -> Decoder:
    """A decoder with random weights in a format.

    They are drawn once. All blocks hold the same values, each at its own addresses, so that as much is read as from a
    real model.
    """
    device, dtype = outer.norm.device, outer.norm.dtype
    source = Source.seeded(SEED, device)
    layers = {
        layer: random_linear(size, name, source, dtype, f"{name}: {layer}", inputs)
        for layer, size in shape.linears().items()
    }
    ones = torch.ones(shape.hidden, dtype=dtype, device=device)
    first = Block(layers, (ones, ones.clone()), None)
    return Decoder(shape, outer, [first, *(copy_of(first) for _ in range(shape.blocks - 1))], operations)


def copy_of(layers: Layers) -> Layers:
    """A copy at other addresses."""
    return copy.deepcopy(layers, {id(buffer): _in_huge_pages(buffer.clone()) for buffer in layers.buffers()})


def _in_huge_pages(tensor: Tensor) -> Tensor:
    """On a CPU a copy in huge pages, as repacked weights are, so that the weights of all formats are in the same."""
    return memory.copied(tensor) if tensor.device.type == "cpu" else tensor


def random_linear(
    size: tuple[int, int], name: str, source: Source, dtype: torch.dtype, what: str, inputs: str = INPUTS[0]
) -> nn.Module:
    """A layer ready to run: prepared for a kernel of its device and tuned."""
    if name == DENSE:
        return DenseLinear(_in_huge_pages(source.normal(size, size[1] ** -0.5, dtype)))
    if name == TINYGEMM:
        return TinygemmLinear(size, source, dtype)
    matrix = describe(size, parse_format(name), what)
    layer = SparseLinear.of(random_stored(matrix, source), matrix)
    tune(layer, dtype, inputs)
    return layer


def tune(module: nn.Module, dtype: torch.dtype, inputs: str = INPUTS[0]) -> None:
    """Make its sparse layers run as fast as their device can, whatever memory that takes. `inputs` as in `load`."""
    prepare(module, dtype, on_cpu=True)
    for layer in module.modules():
        if isinstance(layer, SparseLinear):
            layer.use_cusparselt(measured=True)
            if inputs == "int8":
                layer.use_int8_inputs()


# Weights of a model


def shape_of(folder: Path) -> tuple[Shape, int | None]:
    """The sizes of a model, and the most tokens that it was made for. Raises InputError if it is not Llama-like."""
    config = load_config(folder)
    if note := origin_note(config):
        log.info(note)
    if config.model_type not in LIKE_LLAMA:
        raise InputError(
            f"{folder} is a {config.model_type} model, but the bench runs {', '.join(LIKE_LLAMA)}. Choose another, or "
            "load it with mspc.load and time that."
        )
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotation not in FIXED_ROTATIONS:
        raise InputError(
            f"{folder}: its rotary embedding {rotation!r} changes with the length of the text, but the bench runs "
            f"{', '.join(FIXED_ROTATIONS)}. Load the model with mspc.load and time that, or choose another one."
        )
    shape = shape_with(folder.resolve().name, sizes_of(config), bool(config.tie_word_embeddings))
    limits = [n for n in (longest_sequence(config), getattr(config, "sliding_window", None)) if n is not None]
    return shape, min(limits, default=None)


def shape_with(name: str, sizes: Sizes, tied: bool) -> Shape:
    """The sizes of a model as the decoder takes them."""
    return Shape(
        name, sizes.hidden, sizes.intermediate, sizes.blocks, sizes.heads, sizes.kv_heads, sizes.head_dim,
        sizes.vocabulary, tied,
    )  # fmt: skip


def check_model(folder: Path) -> None:
    """Raises InputError, naming the file or tensor, if a model cannot be loaded."""
    if is_artifact(folder):
        ArtifactSource(folder).check_files()
    elif is_sparse_export(folder):
        described = descriptions(read_quantization_config(folder), folder / "config.json")
        check_files(described, [folder / shard for shard in Checkpoint(folder).shards()])
    check_folder(folder)
    check_tokenizer_of(folder)


def matrices_of(folder: Path) -> list[StoredMatrix]:
    """The compressed matrices of a model: none of a checkpoint."""
    if is_artifact(folder):
        return [entry.stored for entry in ArtifactSource(folder).whole.values()]
    if is_sparse_export(folder):
        return list(descriptions(read_quantization_config(folder), folder / "config.json").values())
    return []


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of the weights in the files of a model. The bench may compute in another."""
    return choose_dtype("auto", open_source(folder), torch.device("meta"))  # a device that keeps it


def model_decoder(
    folder: Path, length: int, device: torch.device, operations: Operations, inputs: str = INPUTS[0]
) -> Decoder:
    """The model of a checkpoint, artifact or sparse export for texts of `length` tokens.

    Its matrices stay compressed. `inputs` as in `load`.
    """
    shape, _ = shape_of(folder)
    dtype = compute_dtype(device)
    blocks: list[Block] = []
    if is_artifact(folder) or is_sparse_export(folder):
        # Loaded to the CPU, because matrices are joined before they are repacked. Only one block is held twice.
        model = load(folder, "cpu", dtype)
        layers = model.model.layers
        for index, layer in enumerate(layers):
            for module in layer.modules():
                if isinstance(module, SparseLinear):
                    module.unprepare()
            blocks.append(_block_of(layer).to(device))
            layers[index] = nn.Identity()
            tune(blocks[-1], dtype, inputs)
        return Decoder(shape, _outer_of(model.to(device), length), blocks, operations)
    streamed = open_model(folder, device=device, dtype=str(dtype).removeprefix("torch."))
    for index in range(len(streamed.blocks)):
        with streamed.loaded(index) as layer:
            blocks.append(_block_of(layer))
    with streamed.loaded_outer() as model:
        return Decoder(shape, _outer_of(model, length), blocks, operations)


def _outer_of(model: Any, length: int) -> OuterLayers:
    embedding, head, norm = model.model.embed_tokens, model.lm_head, model.model.norm.weight.detach()
    positions = torch.arange(length, device=norm.device)[None]
    cos, sin = model.model.rotary_emb(norm[None], positions)
    is_tied = head.weight is embedding.weight if isinstance(embedding, nn.Embedding) else False
    rows = embedding if isinstance(embedding, SparseEmbedding) else _in_huge_pages(embedding.weight.detach())
    if not isinstance(head, SparseLinear):
        head = rows if is_tied else _in_huge_pages(head.weight.detach())
    return OuterLayers(rows, norm, head, cos[0], sin[0], model.config.rms_norm_eps)


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
    for module in linears.values():
        for part in module.modules():
            if isinstance(part, DenseLinear):
                part.weight = _in_huge_pages(part.weight)
    return Block(linears, norms, qk_norms)


def format_of(decoder: Decoder) -> str:
    """The format of a decoder, as `parse_format` reads it, or "mixed" if its matrices differ."""
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
