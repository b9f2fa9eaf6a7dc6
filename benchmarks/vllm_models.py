"""Folders of random weights in the shapes of Llama-3.2-1B, in the formats that vllm_cpu.py compares.

Values do not matter to the time, so nothing is compressed: the tensors of one block are drawn in the layout of each
export. Every block has the same, each at its own place in the file, and so at an address of its own in vLLM.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from memory import CONFIG, TOKENIZER
from safetensors.torch import save_file
from torch import Tensor

from mspc.bench.formats import Source, describe, parse_format, random_stored
from mspc.formats.gptq import V1, pack_gptq
from mspc.formats.targets import target_to_dict
from mspc.types import Codes

GROUP_SIZE = 128
GPTQ: dict[str, Any] = {
    "quant_method": "gptq", "bits": 4, "group_size": GROUP_SIZE, "sym": True, "desc_act": False,
    "checkpoint_format": V1, "lm_head": False,
}  # fmt: skip
SIZES, KEYS, INNER = CONFIG.hidden_size, CONFIG.num_key_value_heads * CONFIG.head_dim, CONFIG.intermediate_size
MATRICES = {
    "self_attn.q_proj": (SIZES, SIZES), "self_attn.k_proj": (KEYS, SIZES), "self_attn.v_proj": (KEYS, SIZES),
    "self_attn.o_proj": (SIZES, SIZES), "mlp.gate_proj": (INNER, SIZES), "mlp.up_proj": (INNER, SIZES),
    "mlp.down_proj": (SIZES, INNER),
}  # fmt: skip
"""(O, I) of the matrices of a block."""
NORMS = "input_layernorm", "post_attention_layernorm"
EMBEDDINGS, HEAD = "model.embed_tokens", "lm_head.weight"
Tensors = dict[str, Tensor]


def make(folder: Path, format_name: str, num_blocks: int, head_bits: int) -> Path:
    """A folder for vLLM, made unless it is there. `format_name` is bf16, gptq, or one of `parse_format`.

    A head of 8 or 4 bits is one matrix with the embeddings, as `--head-bits` makes it where the two are tied.
    """
    out = folder / f"{format_name.replace(':', '').replace('+', '-')}-head{head_bits}-{num_blocks}"
    if (out / "config.json").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    source = Source.seeded(0, torch.device("cpu"))
    draw = {"bf16": _dense, "gptq": _gptq}.get(format_name) or _sparse(format_name)
    block = {f"{name}.{part}": t for name, shape in MATRICES.items() for part, t in draw(shape, source).items()}
    block |= {f"{name}.weight": torch.ones(CONFIG.hidden_size, dtype=torch.bfloat16) for name in NORMS}
    vocabulary = CONFIG.vocab_size, CONFIG.hidden_size
    of_head = _dense(vocabulary, source) if head_bits == 16 else _sparse(f"int{head_bits}")(vocabulary, source)
    outer = {f"{EMBEDDINGS}.{part}": tensor for part, tensor in of_head.items()}
    outer["model.norm.weight"] = torch.ones(CONFIG.hidden_size, dtype=torch.bfloat16)
    weight_map: dict[str, str] = {}
    for file, tensors in _files(block, outer, num_blocks):
        save_file(tensors, out / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / file, out / file)
    config = CONFIG.to_diff_dict() | {"num_hidden_layers": num_blocks, "architectures": ["LlamaForCausalLM"]}
    if format_name != "bf16":
        config["quantization_config"] = (
            GPTQ if format_name == "gptq" else _described(format_name, num_blocks, head_bits)
        )
    (out / "config.json").write_text(json.dumps(config))  # last: it says that the folder is whole
    return out


def _files(block: Tensors, outer: Tensors, num_blocks: int) -> Iterator[tuple[str, Tensors]]:
    yield "outer.safetensors", outer
    for number in range(num_blocks):
        yield f"block-{number}.safetensors", {f"model.layers.{number}.{name}": t for name, t in block.items()}


def _dense(shape: tuple[int, int], source: Source) -> Tensors:
    return {"weight": source.normal(shape, shape[1] ** -0.5, torch.bfloat16)}


def _gptq(shape: tuple[int, int], source: Source) -> Tensors:
    num_groups = shape[1] // GROUP_SIZE
    values = torch.randint(16, shape, generator=source.generator, dtype=torch.uint8)
    scales = ((0.5 + source.uniform((shape[0], num_groups))) * shape[1] ** -0.5 / 4.6).half()
    return pack_gptq(Codes(values, scales, torch.full_like(scales, 8, dtype=torch.uint8)), 4, V1)


def _sparse(format_name: str) -> Callable[[tuple[int, int], Source], Tensors]:
    target = parse_format(format_name)
    return lambda shape, source: random_stored(describe(shape, target, format_name), source)


def _described(format_name: str, num_blocks: int, head_bits: int) -> dict[str, Any]:
    """The `quantization_config` of docs/sparse-format.md."""

    def row(name: str, shape: tuple[int, int], of: str) -> dict[str, Any]:
        described = {"parameter": f"{name}.weight", "shape": shape, "transposed": False, "dtype": "bfloat16"}
        return described | target_to_dict(parse_format(of))

    names = {f"model.layers.{number}.{part}": shape for number in range(num_blocks) for part, shape in MATRICES.items()}
    matrices = {name: row(name, shape, format_name) for name, shape in names.items()}
    if head_bits < 16:
        of_head = row(EMBEDDINGS, (CONFIG.vocab_size, CONFIG.hidden_size), f"int{head_bits}")
        matrices[EMBEDDINGS] = of_head | {"tied": HEAD}
    return {"quant_method": "mspc", "format_version": 1, "matrices": matrices}


def num_bytes(folder: Path) -> int:
    """Bytes of the weights in the files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
