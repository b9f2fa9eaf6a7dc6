"""Tiny random causal LMs as checkpoint folders, made offline in a moment: one for each architecture under test.

Weights are random but not degenerate: activations keep their size from block to block, biases and norms are not
trivial, and the logits differ from token to token, so that a wrong mask, scale or bias shows in the perplexity.
"""

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from mspc.models import StreamedModel

VOCABULARY = 260  # the 256 bytes, and some ids that no text has
LENGTH = 32  # tokens of a sequence in most tests

_SMALL = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_SMALL |= {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 128}
_GATED = _SMALL | {"intermediate_size": 64, "num_key_value_heads": 2, "tie_word_embeddings": False}

CONFIGS = {
    "llama": _GATED,
    "mistral": _GATED | {"sliding_window": 8},
    "qwen2": _GATED,
    "qwen3": _GATED | {"head_dim": 16},
    "gemma2": _GATED | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "tie_word_embeddings": True},
    "phi3": _GATED,
    "opt": _SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": _SMALL | {"n_inner": 64},
    "gpt_neox": _SMALL | {"intermediate_size": 64, "rotary_pct": 0.5},
    "mixtral": _GATED | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}

# What each block multiplies by, in the order of execution; the matrices of one line read the same input.
_SEPARATE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED_GROUPS = (_SEPARATE, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
GROUPS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2"), _GATED_GROUPS),
    "phi3": (("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    "opt": (_SEPARATE, ("self_attn.out_proj",), ("fc1",), ("fc2",)),
    "gpt2": (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    "gpt_neox": (
        ("attention.query_key_value",), ("attention.dense",), ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",),
    ),
}  # fmt: skip
FAMILIES = tuple(GROUPS)
BLOCKS = {"opt": "model.decoder.layers", "gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}


def blocks_name(family: str) -> str:
    return BLOCKS.get(family, "model.layers")


def make(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """The model itself, in float32; `changes` are made to the config."""
    config = AutoConfig.for_model(family, **CONFIGS[family] | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:  # biases, and norms about their own middle
                parameter.add_(0.2 * noise)
            elif isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding):
                parameter.copy_(0.25 * noise)
            else:
                parameter.copy_(1.5 * noise / config.hidden_size**0.5)
    return model.eval()


def build(
    folder: Path, family: str, *, dtype: torch.dtype = torch.float32, sharded: bool = False, seed: int = 0,
    **changes: object,
) -> Path:  # fmt: skip
    """Write `make(...)` with a tokenizer of bytes to `folder`, in several files if `sharded`."""
    return save(make(family, seed, **changes).to(dtype), folder, sharded=sharded)


def save(model: PreTrainedModel, folder: Path, *, sharded: bool = False) -> Path:
    model.save_pretrained(folder, max_shard_size="32KB" if sharded else "1GB")
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for every byte of UTF-8, and nothing else."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def text(characters: int, seed: int) -> str:
    """Words that a seed draws."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 9))) for _ in range(characters)]
    return " ".join(words)[:characters]


def ids(sequences: int, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(256, (sequences, length), generator=torch.Generator().manual_seed(seed))


def reference(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """What transformers itself makes of a folder, computing in plain operations."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval().requires_grad_(False)


def losses(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Cross entropy of every predicted token, (N, T - 1), by a plain forward pass of the whole model."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


def inputs_of(model: PreTrainedModel, ids: Tensor, modules: Iterable[str]) -> dict[str, Tensor]:
    """What each module reads, (tokens, I), in one forward pass of the whole model; in the order of the calls."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, args: seen.update({name: args[0].detach().flatten(0, -2).clone()})

    handles = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in modules]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def tensors(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder under the names of its files."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return found


def keys_of(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return sorted(opened.keys())


def parts_in_memory(model: StreamedModel) -> list[str]:
    """Which blocks of a streamed model, by name, and whether its outer part ("") have weights that are not on meta."""
    blocks = [model.block_name(index) for index in range(len(model.blocks))]
    loaded = [name for name, parameter in model.model.named_parameters() if parameter.device.type != "meta"]
    return sorted({next((block for block in blocks if name.startswith(block + ".")), "") for name in loaded})
