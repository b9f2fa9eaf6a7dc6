"""One GGUF file of a Llama, with all else that belongs to the model, for llama.cpp and transformers.

Codes become Q4_0 or Q8_0 blocks bit for bit. Everything else keeps its dtype; only vectors become float32, as
readers want, which holds every value of the smaller dtypes exactly. Rows of query and key matrices are in the order of
the format, which pairs neighbours for rotary embedding where the model pairs the two halves of a head.

The layout is that of the GGUF specification, the names of tensors and keys are those of llama.cpp's own converter.
"""

import json
import math
import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, TokenType
from torch import Tensor

from exporters.folder import read_config
from exporters.packed import grids_of, model_names
from mspc.errors import InputError
from mspc.formats.gguf import BLOCK, pack_blocks
from mspc.progress import Step
from mspc.settings import ROW
from mspc.storage.artifact import ArtifactSource
from mspc.storage.carrying import carry
from mspc.storage.files import write_json
from mspc.storage.manifest import MatrixEntry
from mspc.types import PlannedMatrix

FILE = "model.gguf"
ARCHITECTURE = "llama"
QUANTIZATION_VERSION = 2
BLOCK_KINDS = {4: GGMLQuantizationType.Q4_0, 8: GGMLQuantizationType.Q8_0}
FLOAT_KINDS = {
    "float32": GGMLQuantizationType.F32,
    "float16": GGMLQuantizationType.F16,
    "bfloat16": GGMLQuantizationType.BF16,
}
OUTER = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
HEAD = "lm_head.weight"
INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
DERIVED = ".rotary_emb.inv_freq"
"""Ending of a tensor in some old checkpoints, which every reader computes."""
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Options:
    """No options: every tensor has one type that holds it exactly."""


def notes(entries: Sequence[MatrixEntry], options: Options) -> list[str]:
    return []


def check(matrices: Sequence[PlannedMatrix], config: dict[str, Any], options: Options) -> None:
    _check_model(config)
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


def _check_model(config: dict[str, Any]) -> None:
    """Raises InputError for a model that readers of the file would silently compute in another way."""
    window = config.get("sliding_window") if config.get("model_type") == "mistral" else None
    rope = rope_parameters(config)
    refused = {
        "model_type": (config.get("model_type"), "llama or mistral", config.get("model_type") in ("llama", "mistral")),
        "hidden_act": (config.get("hidden_act"), "silu", config.get("hidden_act", "silu") == "silu"),
        "attention_bias": (config.get("attention_bias"), "false", not config.get("attention_bias")),
        "mlp_bias": (config.get("mlp_bias"), "false", not config.get("mlp_bias")),
        "sliding_window": (window, "null", window is None or window >= config["max_position_embeddings"]),
        "rope_type": (rope["rope_type"], "default", rope["rope_type"] == "default"),
        "partial_rotary_factor": (rope["partial_rotary_factor"], "1", rope["partial_rotary_factor"] == 1),
    }
    for key, (found, accepted, holds) in refused.items():
        if not holds:
            raise InputError(
                f"gguf takes Llama models whose {key} is {accepted}, not {found!r}; readers of the file would not "
                "compute this model. Export dense, gptq or compressed-tensors."
            )


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """rope_type, rope_theta and partial_rotary_factor; versions of config.json differ in where they keep them."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {
        "rope_type": found.get("rope_type", found.get("type", "default")),
        "rope_theta": found.get("rope_theta", config.get("rope_theta", 10000.0)),
        "partial_rotary_factor": found.get("partial_rotary_factor", config.get("partial_rotary_factor", 1)),
    }


def export(artifact: ArtifactSource, out: Path, options: Options, step: Step) -> None:
    config = read_config(artifact)
    names = tensor_names(artifact, config)
    writer = GGUFWriter(out / FILE, ARCHITECTURE)
    _add_model(writer, config)
    _add_tokenizer(writer, artifact.folder, config["vocab_size"])
    if grids_of(artifact.entries):
        writer.add_quantization_version(QUANTIZATION_VERSION)
    for key, name in names.items():
        kind, shape = _kind_and_shape(artifact, key)
        block, size = GGML_QUANT_SIZES[kind]
        # The shape is that of the weights: the writer would take uint8 for a shape in bytes.
        writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) // block * size, kind)
    writer.write_header_to_file()
    with closing(writer):
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for key in artifact.keys():  # noqa: SIM118  not a dict
            if key in names:
                writer.write_tensor_data(_bytes_of(artifact, key, names[key], config).numpy())
            step(key)
    carry(artifact.folder, out)
    write_json(out / "config.json", config)


def tensor_names(artifact: ArtifactSource, config: dict[str, Any]) -> dict[str, str]:
    """Names in the file by source key. Raises InputError for a tensor without a name there."""
    name_of, names = model_names(artifact), {}
    for key in artifact.keys():  # noqa: SIM118  not a dict
        name = name_of(key)
        layer = re.fullmatch(r"model\.layers\.(\d+)\.([\w.]+)\.weight", name)
        if name in OUTER:
            names[key] = OUTER[name]
        elif name == HEAD:
            if not config.get("tie_word_embeddings"):  # a head of its own is how readers tell
                names[key] = "output.weight"
        elif layer and layer[2] in INNER:
            names[key] = f"blk.{layer[1]}.{INNER[layer[2]]}.weight"
        elif not key.endswith(DERIVED):
            raise InputError(f"{key} has no place in a GGUF file of a Llama; export dense, gptq or compressed-tensors.")
    return names


def _kind_and_shape(artifact: ArtifactSource, key: str) -> tuple[GGMLQuantizationType, Sequence[int]]:
    if entry := artifact.whole.get(key):
        grid = entry.target.grid
        return BLOCK_KINDS[grid.bits] if grid else FLOAT_KINDS[str(entry.dtype).removeprefix("torch.")], entry.shape
    tensor = _floats(artifact, key)
    return FLOAT_KINDS[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape)


def _bytes_of(artifact: ArtifactSource, key: str, name: str, config: dict[str, Any]) -> Tensor:
    """The tensor as it lies in the file, uint8."""
    entry = artifact.whole.get(key)
    if entry and entry.target.grid:
        codes = artifact.matrix(entry).codes
        assert codes is not None
        tensor = pack_blocks(codes, entry.target.grid.bits)
    else:
        tensor = _floats(artifact, key)
    if name.endswith((".attn_q.weight", ".attn_k.weight")):
        tensor = pairs_from_halves(tensor, num_heads(config, keys=name.endswith(".attn_k.weight")))
    return tensor.contiguous().view(torch.uint8)


def _floats(artifact: ArtifactSource, key: str) -> Tensor:
    ((_, tensor),) = artifact.read([key])
    if str(tensor.dtype).removeprefix("torch.") not in FLOAT_KINDS:
        raise InputError(f"{key}: gguf takes float32, float16 and bfloat16, not {tensor.dtype}.")
    return tensor.float() if tensor.ndim == 1 else tensor


def pairs_from_halves(matrix: Tensor, heads: int) -> Tensor:
    """Rows (O, ...) of every head reordered 0, h, 1, h + 1, ... with h half of its size."""
    return matrix.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def num_heads(config: dict[str, Any], *, keys: bool = False) -> int:
    heads: int = config["num_attention_heads"]
    return (config.get("num_key_value_heads") or heads) if keys else heads


def _add_model(writer: GGUFWriter, config: dict[str, Any]) -> None:
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(num_heads(config))
    writer.add_head_count_kv(num_heads(config, keys=True))
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(rope_parameters(config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _add_tokenizer(writer: GGUFWriter, folder: Path, vocab_size: int) -> None:
    described = _read_json(folder / "tokenizer.json")
    settings = _read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    tokens, kinds = vocabulary(described, vocab_size)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in described["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_name(described))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    add_id = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "pad": writer.add_pad_token_id}
    special: dict[str, Any] = {}
    for role in add_id:
        token = settings.get(f"{role}_token")
        special[role] = token["content"] if isinstance(token, dict) else token
        if special[role] in tokens:
            add_id[role](tokens.index(special[role]))
    before, after = added_tokens(described)
    for text, role in ((before, "bos"), (after, "eos")):
        if text not in (None, special[role]):
            raise _refused(f"it adds {text!r}, which is not its {role} token")
    writer.add_add_bos_token(before is not None)
    writer.add_add_eos_token(after is not None)


def vocabulary(described: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """The text and the type of every id below `size`; ids that no token has are named as unused."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [int(TokenType.UNUSED)] * size
    added = {token["content"]: token for token in described["added_tokens"]}
    ids = described["model"]["vocab"] | {text: token["id"] for text, token in added.items()}
    for text, i in ids.items():
        if i >= size:
            raise _refused(f"its token {text!r} has the id {i}, and the model has {size} of them")
        tokens[i], kinds[i] = text, int(TokenType.NORMAL)
        if text in added:
            kinds[i] = int(TokenType.CONTROL if added[text]["special"] else TokenType.USER_DEFINED)
    return tokens, kinds


def split_name(described: dict[str, Any]) -> str:
    """The name by which readers know how it cuts text before merging. Raises InputError if they have none."""
    model = described["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise _refused(f"it is {'SentencePiece' if model.get('byte_fallback') else model['type']}")
    if not model["merges"]:
        raise _refused("it has no merges, which readers need")
    for what, value in (
        ("normalizer", described.get("normalizer")),
        ("prefix of inner pieces", model.get("continuing_subword_prefix")),
        ("suffix of words", model.get("end_of_word_suffix")),
    ):
        if value:
            raise _refused(f"it has a {what}")
    *cuts, last = _steps(described.get("pre_tokenizer"), "pretokenizers") or [{"type": None}]
    if last["type"] == "ByteLevel" and not last.get("add_prefix_space"):
        whole, own_cut = bool(model.get("ignore_merges")), last.get("use_regex", True)
        if not cuts and own_cut and not whole:
            return "gpt-2"
        patterns = [cut.get("pattern") for cut in cuts]
        if patterns == [{"Regex": LLAMA3_SPLIT}] and cuts[0]["behavior"] == "Isolated" and not own_cut and whole:
            return "llama-bpe"
    raise _refused("it cuts text in a way that readers have no name for")


def added_tokens(described: dict[str, Any]) -> tuple[str | None, str | None]:
    """The tokens that it puts before and after a text. Raises InputError when that is more than one token at a side."""
    before: list[str] = []
    after: list[str] = []
    for step in _steps(described.get("post_processor"), "processors"):
        if step["type"] == "TemplateProcessing":
            side = before
            for piece in step["single"]:
                if "Sequence" in piece:
                    side = after
                else:
                    side.append(piece["SpecialToken"]["id"])
        elif step["type"] != "ByteLevel":
            raise _refused(f"it has a post-processor {step['type']}")
    if len(before) > 1 or len(after) > 1:
        raise _refused(f"it adds {len(before)} tokens before and {len(after)} after a text, and one is accepted")
    return before[0] if before else None, after[0] if after else None


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """One step, or those of a sequence."""
    if part is None:
        return []
    steps: list[dict[str, Any]] = part[key] if part["type"] == "Sequence" else [part]
    return steps


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}), and gguf holds the tokenizer too.") from error
    return found


def _refused(reason: str) -> InputError:
    return InputError(
        f"gguf takes byte-level BPE tokenizers that cut text as GPT-2's or Llama 3's does, and not this one: {reason}. "
        "Export dense, gptq or compressed-tensors."
    )
