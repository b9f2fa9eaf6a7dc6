"""A model whose blocks are like Llama's, one token at a time in C++ (`mspc/kernels/cpu/step.py`).

Dense layers between compressed ones are repacked for it, too, and then lie in memory twice.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mspc.formats.description import StoredMatrix
from mspc.kernels import ON_CPU
from mspc.kernels.cpu import kernel
from mspc.kernels.cpu.step import Layer, Part, Step
from mspc.passes.sampling import cache_keyword
from mspc.planning.token_work import LIKE_LLAMA
from mspc.runtime.joined import ConcatenatedLinear, DenseLinear
from mspc.runtime.linear import SparseLinear
from mspc.types import Unstructured

FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Types of rotary embedding that do not depend on the length of the text."""


def parts_of(modules: Iterable[nn.Module]) -> list[Part] | None:
    """The matrices of modules that read the same input, or None if one does not run in C++ with float32."""
    parts = []
    for module in modules:
        for layer in module.layers if isinstance(module, ConcatenatedLinear) else [module]:
            part = _sparse(layer) if isinstance(layer, SparseLinear) else _dense(layer)
            if part is None:
                return None
            parts.append(part)
    return parts


def _sparse(layer: SparseLinear) -> Part | None:
    if layer.kernel_name not in ON_CPU or layer.prepared_for != torch.float32:
        return None
    return Part(layer.repacked(), layer.matrix, _float32(layer.bias))


def _dense(layer: Any) -> Part | None:
    if type(layer) not in (nn.Linear, DenseLinear) or layer.weight.dtype != torch.float32:
        return None
    weight = layer.weight.detach()
    short = weight.to(torch.bfloat16)
    values = short if torch.equal(short.float(), weight) else weight  # the same numbers in half the bytes
    matrix = StoredMatrix((len(weight), weight.shape[1]), Unstructured(0.0), None, values.dtype)
    return Part(kernel.repack({"values": values.contiguous()}, matrix), matrix, _float32(layer.bias))


def _float32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().float().contiguous()


def layer_of(
    qkv: Sequence[nn.Module], out: nn.Module, gate_up: Sequence[nn.Module], down: nn.Module,
    norms: tuple[Tensor, Tensor], qk_norms: tuple[Tensor, Tensor] | None,
) -> Layer | None:  # fmt: skip
    """A block, or None if one of its matrices does not run in C++. `norms` come before attention and before the MLP."""
    of_qkv, of_out, of_gate_up, of_down = map(parts_of, (qkv, [out], gate_up, [down]))
    if of_qkv is None or of_out is None or of_gate_up is None or of_down is None:
        return None
    return Layer(of_qkv, of_out[0], of_gate_up, of_down[0], *norms, qk_norms)


def planes_of(modules: Iterable[nn.Module]) -> int:
    """1 if inputs of codes are rounded to 8 bits, else 2."""
    layers = (layer for module in modules for layer in module.modules())
    return 1 if any(isinstance(layer, SparseLinear) and layer.has_int8_inputs for layer in layers) else 2


class Stepper:
    """Texts of one model of transformers, a token at a time. It holds the keys and values of one text."""

    def __init__(self, model: Any, step: Step, caches: Sequence[Tensor]) -> None:
        self.model, self.step, self.caches = model, step, caches
        self.position = 0

    def read(self, ids: Tensor) -> Tensor:
        """Logits (1, V) after a prompt (1, T), by the model's own forward."""
        output = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        self.position = ids.shape[1]
        for layer, held in zip(getattr(output, cache_keyword(self.model)).layers, self.caches, strict=True):
            held[0, :, :, : self.position], held[1, :, :, : self.position] = layer.keys, layer.values
        logits: Tensor = output.logits[:, -1]
        return logits

    def next(self, token: int) -> Tensor:
        """Logits (1, V) after one more token."""
        x = self.model.model.embed_tokens(torch.tensor([token]))
        normed = self.step(x, self.position)
        self.position += 1
        logits: Tensor = self.model.lm_head(normed)
        return logits


def stepper_of(model: Any, length: int) -> Stepper | None:
    """For texts of up to `length` tokens with their prompt, or None for a model that has no such steps."""
    config = model.config
    if not _is_like_llama(config, length) or not _has_compressed_layers(model):
        return None
    layers = list(_layers(model))
    norm, dim = model.model.norm.weight.detach(), model.model.layers[0].self_attn.head_dim
    if None in layers or norm.dtype != torch.float32:
        return None
    cos, sin = model.model.rotary_emb(norm[None], torch.arange(length)[None])
    caches = [torch.empty(2, 1, config.num_key_value_heads, length, dim) for _ in layers]
    whole, rotation = [layer for layer in layers if layer is not None], (cos[0].contiguous(), sin[0].contiguous())
    step = Step(whole, caches, rotation, norm, config.rms_norm_eps, planes_of([model]))
    return Stepper(model, step, caches)


def _is_like_llama(config: Any, length: int) -> bool:
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    window = getattr(config, "sliding_window", None)
    return (
        config.model_type in LIKE_LLAMA
        and config.hidden_act == "silu"
        and rotation in FIXED_ROTATIONS
        and (window is None or length <= window)
    )


def _has_compressed_layers(model: nn.Module) -> bool:
    return any(isinstance(layer, SparseLinear) and layer.kernel_name in ON_CPU for layer in model.modules())


def _layers(model: Any) -> Iterator[Layer | None]:
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        has_qk_norms = hasattr(attention, "q_norm")
        qk_norms = (attention.q_norm.weight.detach(), attention.k_norm.weight.detach()) if has_qk_norms else None
        norms = block.input_layernorm.weight.detach(), block.post_attention_layernorm.weight.detach()
        yield layer_of(
            [attention.q_proj, attention.k_proj, attention.v_proj], attention.o_proj, [mlp.gate_proj, mlp.up_proj],
            mlp.down_proj, norms, qk_norms,
        )  # fmt: skip
