"""A model whose blocks are like Llama's, one token at a time in C++ (`mspc/kernels/cpu/step.py`).

Dense layers between compressed ones are repacked for it, too, and then lie in memory twice.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from mspc.formats.description import StoredMatrix
from mspc.kernels import ON_CPU
from mspc.kernels.cpu import kernel
from mspc.kernels.cpu.library import library
from mspc.kernels.cpu.step import Constants, Layer, Part, Step
from mspc.passes.sampling import cache_keyword
from mspc.planning.token_work import LIKE_LLAMA
from mspc.runtime.joined import ConcatenatedLinear, DenseLinear
from mspc.runtime.linear import SparseLinear
from mspc.types import Unstructured

ALSO_LIKE_LLAMA = ("granite", "smollm3", "gemma3_text")
"""Types of models that have steps, and that `mspc bench` does not run."""
WITH_WINDOWS = ("gemma3_text",)
"""Types whose blocks have windows and rotations of their own."""
GELU = ("gelu_pytorch_tanh",)
MOST_DIFFERENCE = 1e-2
"""A share of the largest logit. Rounding of inputs to 16 bits makes some 1e-4."""
_dense: WeakKeyDictionary[nn.Module, tuple[object, Part]] = WeakKeyDictionary()
"""Dense layers as they were repacked, with the place and version of their weights."""
FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Types of rotary embedding that do not depend on the length of the text."""


def _matrices(modules: Iterable[nn.Module]) -> Iterator[Any]:
    """The layers of modules, one for each matrix."""
    for module in modules:
        yield from module.layers if isinstance(module, ConcatenatedLinear) else [module]


def _runs(layer: nn.Module) -> bool:
    """Tell if a layer runs in C++ with float32, or can be repacked for that."""
    if isinstance(layer, SparseLinear):
        return layer.kernel_name in ON_CPU and layer.prepared_for == torch.float32
    if type(layer) not in (nn.Linear, DenseLinear) or library() is None:
        return False
    weight: Any = layer.weight
    return weight.dtype == torch.float32 and weight.device.type == "cpu"


def _part(layer: Any) -> Part:
    if isinstance(layer, SparseLinear):
        return Part(layer.repacked(), layer.matrix, _float32(layer.bias))
    weight = layer.weight.detach()
    state = weight.data_ptr(), 0 if weight.is_inference() else weight._version
    if layer not in _dense or _dense[layer][0] != state:
        short = weight.to(torch.bfloat16)
        values = short if torch.equal(short.float(), weight) else weight  # the same numbers in half the bytes
        matrix = StoredMatrix((len(weight), weight.shape[1]), Unstructured(0.0), None, values.dtype)
        repacked = kernel.repack({"values": values.contiguous()}, matrix)
        _dense[layer] = state, Part(repacked, matrix)
    return _dense[layer][1]._replace(bias=_float32(layer.bias))


def _float32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().float().contiguous()


def layer_of(
    qkv: Sequence[nn.Module], out: nn.Module, gate_up: Sequence[nn.Module], down: nn.Module,
    norms: tuple[Tensor, Tensor], qk_norms: tuple[Tensor, Tensor] | None,
) -> Layer | None:  # fmt: skip
    """A block, or None if one of its matrices does not run in C++. `norms` come before attention and before the MLP."""
    if not all(map(_runs, _matrices([*qkv, out, *gate_up, down]))):
        return None
    of_qkv, of_gate_up = (list(map(_part, _matrices(modules))) for modules in (qkv, gate_up))
    return Layer(of_qkv, _part(out), of_gate_up, _part(down), norms, qk_norms)


def planes_of(modules: Iterable[nn.Module]) -> int | None:
    """The planes of inputs of codes: 1 if they are rounded to 8 bits, else 2; None if layers differ."""
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, SparseLinear)]
    found = {1 if layer.has_int8_inputs else 2 for layer in layers if layer.matrix.grid is not None}
    return None if len(found) > 1 else min(found, default=2)


class Stepper:
    """Texts of one model of transformers, a token at a time. It holds the keys and values of one text."""

    def __init__(self, model: Any, step: Step, caches: Sequence[Tensor]) -> None:
        self.model, self.step, self.caches = model, step, caches
        self.position = 0

    def read(self, ids: Tensor) -> Tensor | None:
        """Logits (1, V) after a prompt (1, T), by the model's own forward; None if the step computes something else.

        The last token of the prompt shows that.
        """
        keyword = cache_keyword(self.model)
        # Without a config the cache keeps all tokens, also those that have left a window.
        output = self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **{keyword: DynamicCache()})
        logits: Tensor = output.logits[:, -1]
        last = self.position = ids.shape[1] - 1
        layers = getattr(output, keyword).layers
        for layer, held in zip(layers, self.caches, strict=True):
            held[0, :, :, : last + 1], held[1, :, :, : last + 1] = layer.keys, layer.values
        difference = (self.next(int(ids[0, -1])) - logits).abs().max()
        for layer, held in zip(layers, self.caches, strict=True):
            held[0, :, :, last], held[1, :, :, last] = layer.keys[:, :, last], layer.values[:, :, last]
        is_same = bool(difference <= MOST_DIFFERENCE * logits.abs().max())
        return logits if is_same or not bool(logits.isfinite().all()) else None  # NaN is the model's own fault

    def next(self, token: int) -> Tensor:
        """Logits (1, V) after one more token."""
        x = self.model.model.embed_tokens(torch.tensor([token], device="cpu")) * self._number("embedding_multiplier")
        normed = self.step(x, self.position)
        self.position += 1
        logits: Tensor = self.model.lm_head(normed) / self._number("logits_scaling")
        return logits

    def _number(self, name: str) -> float:
        return float(getattr(self.model.config, name, None) or 1.0)


def stepper_of(model: Any, length: int) -> Stepper | None:
    """For texts of up to `length` tokens with their prompt, or None for a model that has no such steps."""
    config, decoder = model.config, model.model if hasattr(model, "model") else None
    if not _is_known(config, length) or decoder is None or not _is_plain(model):
        return None
    planes, layers = planes_of(decoder.layers), list(_layers(model))
    if None in layers or planes is None or model.dtype != torch.float32 or model.device.type != "cpu":
        return None
    whole, first = [layer for layer in layers if layer is not None], decoder.layers[0].self_attn
    size = (2, 1, config.num_key_value_heads, length, first.head_dim)
    caches = [torch.empty(size, dtype=torch.float32, device="cpu") for _ in whole]
    constants = Constants(
        config.rms_norm_eps, float(first.scaling), float(getattr(config, "residual_multiplier", 1.0)),
        _activation(config) in GELU, planes,
    )  # fmt: skip
    step = Step(whole, caches, _rotations(model, length), _norm(decoder.norm), constants)
    return Stepper(model, step, caches)


def _is_plain(model: Any) -> bool:
    """Tell if compressed layers run in C++, and nobody waits for a call of a module or has replaced one."""
    compressed = [layer for layer in model.model.layers.modules() if isinstance(layer, SparseLinear)]
    return any(map(_runs, compressed)) and not any(
        part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__ or hasattr(part, "_hf_hook")
        for part in model.modules()
    )


def _activation(config: Any) -> str:
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def _is_known(config: Any, length: int) -> bool:
    """Tell if nothing in a text of this length depends on more than a step knows."""
    rotations = getattr(config, "rope_parameters", None) or {}
    of_types = rotations.values() if "rope_type" not in rotations else [rotations]
    window = getattr(config, "sliding_window", None)
    return (
        config.model_type in LIKE_LLAMA + ALSO_LIKE_LLAMA
        and _activation(config) in ("silu", *GELU)
        and all((one or {}).get("rope_type", "default") in FIXED_ROTATIONS for one in of_types)
        and (config.model_type in WITH_WINDOWS or window is None or length <= window)
        and not any(getattr(config, f"{kind}_logit_softcapping", None) for kind in ("attn", "final"))
    )


def _layers(model: Any) -> Iterator[Layer | None]:
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        has_qk_norms, has_four = hasattr(attention, "q_norm"), hasattr(block, "pre_feedforward_layernorm")
        qk_norms = (_norm(attention.q_norm), _norm(attention.k_norm)) if has_qk_norms else None
        second = block.pre_feedforward_layernorm if has_four else block.post_attention_layernorm
        layer = layer_of(
            [attention.q_proj, attention.k_proj, attention.v_proj], attention.o_proj, [mlp.gate_proj, mlp.up_proj],
            mlp.down_proj, (_norm(block.input_layernorm), _norm(second)), qk_norms,
        )  # fmt: skip
        after = None
        if has_four:
            after = _norm(block.post_attention_layernorm), _norm(block.post_feedforward_layernorm)
        window = getattr(attention, "sliding_window", None) if model.config.model_type in WITH_WINDOWS else None
        yield layer and replace(layer, after_norms=after, window=int(window or 0))


def _norm(norm: Any) -> Tensor:
    """The vector (n,) that normed vectors are multiplied by: Gemma holds it less 1."""
    weight = norm.weight.detach().float()
    return (weight + 1.0 if type(norm).__name__.startswith("Gemma") else weight).contiguous()


def _rotations(model: Any, length: int) -> list[tuple[Tensor, Tensor]]:
    """Cosines and sines (L, D) of each block. Blocks without rotations have 1 and 0."""
    x, positions = torch.empty(1, 1, dtype=torch.float32, device="cpu"), torch.arange(length, device="cpu")[None]
    config = model.config
    kinds = getattr(config, "layer_types", None) if config.model_type in WITH_WINDOWS else None
    found: dict[str | None, tuple[Tensor, Tensor]] = {}
    for kind in set(kinds or (None,)):
        cos, sin = model.model.rotary_emb(x, positions, *(() if kind is None else (kind,)))
        found[kind] = cos[0].contiguous(), sin[0].contiguous()
    number = len(model.model.layers)
    rotations = [found[kind] for kind in kinds or [None] * number]
    for index, is_rotated in enumerate(getattr(config, "no_rope_layers", None) or [True] * number):
        if not is_rotated:
            cos, sin = rotations[index]
            rotations[index] = torch.ones_like(cos), torch.zeros_like(sin)
    return rotations
