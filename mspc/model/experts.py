"""Experts that a model keeps in 3-D parameters, one matrix per expert and projection.

transformers lets a function stand in for the forward of such a module (`ALL_EXPERTS_FUNCTIONS`). Ours knows a module by
the attributes that transformers gives it, and runs products in one order, whichever experts the tokens choose: first
all experts' first products, then all second ones. It tells `before_product` of the module, if it is set, about all
products of a projection before it makes the first of them, and `after_product` afterwards. A projection may be a layer
of its own, as it is where experts stay compressed.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mspc.model.config_checks import largest_setting
from mspc.types import Matrix

IMPLEMENTATION = "mspc"
"""The name of `experts_forward` among the implementations of transformers."""
SETTINGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
"""The attributes by which transformers describes a module of experts."""
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj", "weight")
WHOLE_TRIAL = 2**22
"""Weights of a parameter that is random everywhere in a trial. In larger ones all experts are the same."""


CHOSEN = ("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")
"""Names in configs of the number of experts that a token is routed to."""


class Product(NamedTuple):
    """The product of one expert's matrix with the tokens that are routed to it, `inputs` (t, I)."""

    parameter: str
    """The name of the parameter in its module."""
    expert: int
    inputs: Tensor
    tokens: Tensor
    """Numbers (t) of the tokens among all that the module is given, ascending."""
    everyone: Callable[[], Tensor]
    """The inputs (n, I) of all experts, one below the other."""


def projections(experts: nn.Module) -> tuple[str, ...]:
    """The names of the parameters of the first and the second product, or of the only one."""
    only: str | None = getattr(experts, "only_projection", None)
    return (only,) if only else ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")


def experts_per_token(config: PreTrainedConfig) -> int:
    """The most experts that a token is routed to, 1 for a model without experts."""
    return max(1, *(largest_setting(config, name) for name in CHOSEN))


def layer_name(parameter: str, expert: int) -> str:
    """The name of the layer that stands for one expert's matrix of a parameter."""
    return f"{parameter}[{expert}]"


def num_experts(experts: nn.Module) -> int:
    held = experts._parameters.get(projections(experts)[-1])
    count: int = experts.num_layers if held is None else len(held)  # type: ignore[assignment]
    return count


def experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """(T, H), (T, k), (T, k) -> (T, H): the sum of each token's experts, by their weights.

    Experts without tokens are left out, unless someone looks on. Indices of no expert are ignored.
    """
    count, size = num_experts(experts), top_k_index.shape[1]
    chosen = top_k_index.flatten()
    order = chosen.argsort(stable=True)
    counts = torch.bincount(chosen, minlength=count)[:count].tolist()
    places = dict(enumerate(order[: sum(counts)].split(counts)))
    if not is_watched(experts):
        places = {expert: found for expert, found in places.items() if len(found)}
    tokens = {expert: found // size for expert, found in places.items()}
    outer = []
    for expert, down in multiplied(experts, {e: hidden_states[found] for e, found in tokens.items()}, tokens).items():
        # transformers 5.19 has no such norm.
        normed = experts.post_expert_norm(down) if getattr(experts, "has_post_expert_norm", False) else down
        weights = top_k_weights.flatten()[places[expert], None]
        outer.append((normed * weights).to(hidden_states.dtype))
    if not outer:
        return torch.zeros_like(hidden_states)
    return torch.zeros_like(hidden_states).index_add(0, torch.cat(list(tokens.values())), torch.cat(outer))


def is_watched(experts: nn.Module) -> bool:
    """Tell if someone looks on at the products of a module."""
    return any(getattr(experts, name, None) is not None for name in ("before_product", "after_product"))


def multiplied(experts: Any, inputs: Mapping[int, Tensor], tokens: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Both products of experts, on the inputs (t, H) of each, whose numbers are `tokens` (t).

    Slices of the first parameter that no expert has come with no inputs.
    """
    unused = getattr(experts, "unused_slices", ()) if is_watched(experts) else ()
    first, second = projections(experts)
    if unused and inputs:
        none, of_none = next(iter(inputs.values()))[:0], next(iter(tokens.values()))[:0]
        tokens = {**tokens, **dict.fromkeys(unused, of_none)}
        up = products(experts, first, {**inputs, **dict.fromkeys(unused, none)}, tokens)
    else:
        up = products(experts, first, inputs, tokens)
    gate = experts._apply_gate if experts.has_gate else experts.act_fn
    return products(experts, second, {expert: gate(up[expert]) for expert in inputs}, tokens)


def products(
    experts: Any, parameter: str, inputs: Mapping[int, Tensor], tokens: Mapping[int, Tensor]
) -> dict[int, Tensor]:
    """The products of one parameter with the inputs (t, I) of experts, whose numbers are `tokens` (t), ascending."""
    before, after = getattr(experts, "before_product", None), getattr(experts, "after_product", None)
    told = [
        Product(parameter, expert, x, tokens[expert], lambda: torch.cat(list(inputs.values())))
        for expert, x in inputs.items()
    ]
    for one in told:
        if before is not None:
            before(one)
    outputs = {one.expert: _times(experts, parameter, one.expert, one.inputs) for one in told}
    for one in told:
        if after is not None:
            after(one, outputs[one.expert])
    return outputs


ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] = experts_forward


def _times(experts: Any, parameter: str, expert: int, inputs: Tensor) -> Tensor:
    """Inputs (t, I) -> (t, O), by the matrix and the bias of one expert."""
    layer = experts._modules.get(layer_name(parameter, expert))
    bias = getattr(experts, f"{parameter}_bias")[expert] if experts.has_bias else None
    if layer is not None:
        outputs: Tensor = layer(inputs)
        return outputs if bias is None else outputs + bias
    weight = getattr(experts, parameter)[expert]
    return nn.functional.linear(inputs, weight.T if experts.is_transposed else weight, bias)


def expert_matrices(full: str, leaf: str, experts: nn.Module) -> list[Matrix]:
    """The matrices of a parameter with the name `full`, `leaf` in its module; none if it is not one of experts."""
    if not all(hasattr(experts, name) for name in SETTINGS) or leaf not in projections(experts):
        return []
    parameter = experts._parameters.get(leaf)
    understood = getattr(experts, "is_adopted", False) or (parameter is not None and is_understood(experts))
    if parameter is None or parameter.ndim != 3 or not understood:
        return []
    transposed = bool(experts.is_transposed)
    num_out, num_in = parameter.shape[:0:-1] if transposed else parameter.shape[1:]
    return [Matrix(full, (num_out, num_in), index, transposed) for index in range(len(parameter))]


def is_understood(experts: nn.Module) -> bool:
    """Tell if `experts_forward` computes what the own code of a module does, by trying both on random numbers.

    Of modules of one class, with the same shapes and settings, one is tried.
    """
    settings = {name: value for name, value in vars(experts).items() if isinstance(value, int | float | str | None)}
    shapes = [(name, parameter.shape) for name, parameter in experts.named_parameters()]
    kind = (type(experts), repr((settings, shapes)))
    if kind not in _tried:
        _tried[kind] = _computes_the_same(experts)
    return _tried[kind]


_tried: dict[tuple[type, str], bool] = {}


def _computes_the_same(experts: Any) -> bool:
    """The trial of a module, which may be on meta, in float32 on the CPU."""
    own = getattr(type(experts).forward, "__wrapped__", None)
    names = set(projections(experts))
    if own is None or {name for name, p in experts.named_parameters() if p.ndim > 2} != names:
        return False
    count, up = num_experts(experts), experts._parameters[projections(experts)[0]]
    width = up.shape[1 if experts.is_transposed else 2]
    return same_on_random(experts, own, experts_forward, lambda generator: routed(generator, width, count))


def routed(generator: torch.Generator, width: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden states (8, H), and indices and weights of up to two experts for each token."""
    hidden = torch.randn(8, width, generator=generator)
    index = torch.stack([torch.randperm(count, generator=generator)[: min(2, count)] for _ in hidden])
    return hidden, index, torch.rand(index.shape, generator=generator)


def same_on_random(
    experts: Any, own: Callable[..., Any], ours: Callable[..., Tensor], arguments: Callable[..., tuple[Tensor, ...]]
) -> bool:
    """Tell if two forwards of a module compute the same, with random parameters and on random arguments."""
    with torch.device("cpu"), torch.no_grad():
        generator = torch.Generator().manual_seed(0)

        def random(like: Tensor) -> nn.Parameter:
            shape = (1, *like.shape[1:]) if like.numel() > WHOLE_TRIAL else like.shape
            drawn = torch.randn(shape, generator=generator) / max(like.shape[-1], 1) ** 0.5
            return nn.Parameter(drawn.expand(like.shape), requires_grad=False)

        tensors: dict[int, Any] = {id(parameter): random(parameter) for parameter in experts.parameters()}
        config = getattr(experts, "config", None)
        tried = copy.deepcopy(experts, tensors | {id(config): config})
        given = arguments(generator)
        try:
            expected, found = own(tried, *given), ours(tried, *given)
        except Exception:  # it takes other arguments, or has other parts
            return False
        return (
            isinstance(expected, Tensor)
            and found.shape == expected.shape
            and torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        )
