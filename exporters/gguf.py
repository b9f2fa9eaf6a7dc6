"""One GGUF file of a model, with all else that belongs to it, for llama.cpp and transformers.

Codes become Q4_0 or Q8_0 blocks bit for bit. Everything else keeps its dtype; only vectors become float32, as
readers want, which holds every value of the smaller dtypes exactly. Rows of query and key matrices of a Llama are in
the order of the format, which pairs neighbours for rotary embedding where the model pairs the two halves of a head.

The layout is that of the GGUF specification, the names of tensors and keys are those of llama.cpp's own converter.
"""

import math
import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from torch import Tensor

from exporters.folder import read_config
from exporters.gguf_families import Family, add_model, family_notes, family_of
from exporters.gguf_rope import rope_factors
from exporters.gguf_tokenizer import add_tokenizer, read_vocabulary
from exporters.packed import model_names
from mspc.errors import InputError
from mspc.formats.gguf import BLOCK, pack_blocks
from mspc.model.gguf_config import FACTORS
from mspc.progress import Step, log
from mspc.settings import ROW
from mspc.storage.artifact import ArtifactSource
from mspc.storage.carrying import carry
from mspc.storage.files import write_json
from mspc.storage.manifest import MatrixEntry
from mspc.types import PlannedMatrix

FILE = "model.gguf"
QUANTIZATION_VERSION = 2
BLOCK_KINDS = {4: GGMLQuantizationType.Q4_0, 8: GGMLQuantizationType.Q8_0}
FLOAT_KINDS = {
    "float32": GGMLQuantizationType.F32,
    "float16": GGMLQuantizationType.F16,
    "bfloat16": GGMLQuantizationType.BF16,
}
EMBEDDINGS, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
OUTER = {EMBEDDINGS: "token_embd.weight", NORM: "output_norm.weight", HEAD: "output.weight"}
DERIVED = ".rotary_emb.inv_freq"
"""Ending of a tensor in some old checkpoints, which every reader computes."""


@dataclass(frozen=True)
class Options:
    """No options: every tensor has one type that holds it exactly."""


def notes(entries: Sequence[MatrixEntry], options: Options) -> list[str]:
    return []


def check(matrices: Sequence[PlannedMatrix], config: dict[str, Any], options: Options, folder: Path) -> None:
    check_blocks(matrices)
    _, settings = family_of(config)
    read_vocabulary(folder, settings.vocab_size)


def check_blocks(matrices: Sequence[PlannedMatrix]) -> None:
    """Raises InputError, naming the matrix, for a grid that no block of the format is."""
    for matrix in matrices:
        grid = matrix.target.grid
        if grid is None:
            continue
        if grid.bits not in BLOCK_KINDS or grid.group_size != BLOCK:
            raise InputError(
                f"{matrix.name}: gguf takes 4 or 8 bits in groups of {BLOCK}, or weights that are not quantized, not "
                f"{grid.bits} bits in groups of {grid.group_size or ROW}; compress with --bits 4 --group-size {BLOCK}."
            )
        if not grid.symmetric:
            raise InputError(
                f"{matrix.name}: gguf takes symmetric grids, since its blocks with a minimum would quantize it again; "
                "compress without --asymmetric."
            )


def export(artifact: ArtifactSource, out: Path, options: Options, step: Step) -> None:
    config = read_config(artifact)
    family, settings = family_of(config)
    if settings.tie_word_embeddings and has_own_head(artifact):
        config["tie_word_embeddings"] = False
        family, settings = family_of(config)
    names = tensor_names(artifact, family, settings)
    found = read_vocabulary(artifact.folder, settings.vocab_size)
    factors = rope_factors(settings)
    writer = GGUFWriter(out / FILE, family.architecture)
    add_model(writer, settings)
    add_tokenizer(writer, found)
    if any(entry.target.grid for entry in artifact.entries):
        writer.add_quantization_version(QUANTIZATION_VERSION)
    if factors is not None:
        _add_info(writer, FACTORS, GGMLQuantizationType.F32, factors.shape)
    for key, name in names.items():
        _add_info(writer, name, *_kind_and_shape(artifact, key))
    writer.write_header_to_file()
    with closing(writer):
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors.view(torch.uint8).numpy())
        for key in artifact.keys():  # noqa: SIM118  not a dict
            if key in names:
                writer.write_tensor_data(_bytes_of(artifact, key, names[key], family, settings).numpy())
            step(key)
    carry(artifact.folder, out)
    write_json(out / "config.json", config)
    for note in (*found.notes, *family_notes(settings)):
        log.warning(note)


def has_own_head(artifact: ArtifactSource) -> bool:
    """True if the head differs from the embeddings. The config may call them tied; transformers unties them too."""
    name_of = model_names(artifact)
    keys = [key for key in artifact.keys() if name_of(key) in (EMBEDDINGS, HEAD)]  # noqa: SIM118  not a dict
    if len(keys) < 2:
        return False
    (_, first), (_, second) = artifact.read(keys)
    return not torch.equal(first, second)


def _add_info(writer: GGUFWriter, name: str, kind: GGMLQuantizationType, shape: Sequence[int]) -> None:
    block, size = GGML_QUANT_SIZES[kind]
    # The shape is that of the weights: the writer would take uint8 for a shape in bytes.
    writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) // block * size, kind)


def tensor_names(artifact: ArtifactSource, family: Family, settings: Any) -> dict[str, str]:
    """Names in the file by source key. Raises InputError for a tensor without a name there."""
    name_of, names = model_names(artifact), {}
    for key in artifact.keys():  # noqa: SIM118  not a dict
        name = name_of(key)
        part = re.fullmatch(r"model\.layers\.(\d+)\.([\w.]+)\.(weight|bias)", name)
        if name in OUTER:
            if name != HEAD or not settings.tie_word_embeddings:  # a head of its own is how readers tell
                names[key] = OUTER[name]
        elif part and part[2] in family.names and (part[3] == "weight" or part[2] in family.biased):
            names[key] = f"blk.{part[1]}.{family.names[part[2]]}.{part[3]}"
        elif not key.endswith(DERIVED):
            raise InputError(
                f"{key} has no place in a GGUF file of a {settings.model_type} model; export dense, gptq or "
                "compressed-tensors."
            )
    return names


def _kind_and_shape(artifact: ArtifactSource, key: str) -> tuple[GGMLQuantizationType, Sequence[int]]:
    if entry := artifact.whole.get(key):
        grid = entry.target.grid
        return BLOCK_KINDS[grid.bits] if grid else FLOAT_KINDS[str(entry.dtype).removeprefix("torch.")], entry.shape
    tensor = _floats(artifact, key)
    return FLOAT_KINDS[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape)


def _bytes_of(artifact: ArtifactSource, key: str, name: str, family: Family, settings: Any) -> Tensor:
    """The tensor as it lies in the file, uint8."""
    entry = artifact.whole.get(key)
    if entry and entry.target.grid:
        codes = artifact.matrix(entry).codes
        assert codes is not None
        tensor = pack_blocks(codes, entry.target.grid.bits)
    else:
        tensor = _floats(artifact, key)
    if name.endswith("norm.weight") and family.norm_offset:
        tensor = tensor + family.norm_offset
    if family.paired and name.endswith((".attn_q.weight", ".attn_k.weight")):
        is_query = name.endswith(".attn_q.weight")
        tensor = pairs_from_halves(tensor, settings.num_attention_heads if is_query else settings.num_key_value_heads)
    return tensor.contiguous().view(torch.uint8)


def _floats(artifact: ArtifactSource, key: str) -> Tensor:
    ((_, tensor),) = artifact.read([key])
    if str(tensor.dtype).removeprefix("torch.") not in FLOAT_KINDS:
        raise InputError(f"{key}: gguf takes float32, float16 and bfloat16, not {tensor.dtype}.")
    return tensor.float() if tensor.ndim == 1 else tensor


def pairs_from_halves(matrix: Tensor, heads: int) -> Tensor:
    """Rows (O, ...) of every head reordered 0, h, 1, h + 1, ... with h half of its size."""
    return matrix.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
