"""Experts that a model keeps in one parameter per projection, one matrix per expert: 3-D, or stacked in two dimensions.

transformers lets a function stand in for the forward of such a module (`ALL_EXPERTS_FUNCTIONS`). Ours knows a module by
the attributes that transformers gives it, and runs products in one order, whichever experts the tokens choose: first
all experts' first products (of each first projection, as DBRX has two), then all second ones. It tells `before_product`
of the module, if it is set, about all products of a projection before it makes the first of them, and `after_product`
afterwards. A projection may be a layer of its own, as it is where experts stay compressed.

With `sees_all` set, `before_product` gets the inputs of all tokens for every expert, those of its second product as the
expert would have them for each token. The outputs of the module stay the same to the bit.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
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
WHOLE_TRIAL = 2**22
"""Weights of a parameter that is random everywhere in a trial. Larger ones repeat fewer numbers."""


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
    routed: Mapping[int, int]
    """The number of tokens that are routed to each expert of the module; fewer than `tokens` where it sees all."""


def projections(experts: nn.Module) -> tuple[str, ...]:
    """The names of the parameters of the first products and of the second one, or of the only one."""
    own: tuple[str, ...] | None = getattr(experts, "own_projections", None)
    return own or ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")


def holds_experts(module: nn.Module) -> bool:
    """Tell if a module has the attributes by which transformers describes experts."""
    return all(hasattr(module, name) for name in SETTINGS)


def slices(experts: nn.Module, parameter: Tensor) -> Tensor:
    """A parameter as one matrix for each expert, (E, ...): of a 2-D one, which has them one below the other, a view."""
    return parameter if parameter.ndim > 2 else parameter.unflatten(0, (num_experts(experts), -1))


def matrix_shapes(block: nn.Module) -> Iterator[tuple[int, ...]]:
    """The shapes of the parameters of a block, those of experts (E, ...)."""
    for module in block.modules():
        of_experts = projections(module) if getattr(module, "is_adopted", False) else ()
        for leaf, parameter in module.named_parameters(recurse=False):
            yield tuple(slices(module, parameter).shape if leaf in of_experts else parameter.shape)


def is_transposed(experts: nn.Module, parameter: str) -> bool:
    """Tell if the matrices of a parameter are (I, O)."""
    return bool(experts.is_transposed) or parameter in getattr(experts, "transposed_projections", ())


def experts_per_token(config: PreTrainedConfig) -> int:
    """The most experts that a token is routed to, 1 for a model without experts. DBRX has it in a config of its own."""
    parts = [part for part in vars(config.get_text_config()).values() if isinstance(part, PreTrainedConfig)]
    return max(1, *(largest_setting(part, name) for part in (config, *parts) for name in CHOSEN))


def layer_name(parameter: str, expert: int) -> str:
    """The name of the layer that stands for one expert's matrix of a parameter."""
    return f"{parameter}[{expert}]"


def num_experts(experts: nn.Module) -> int:
    held = experts._parameters.get(projections(experts)[-1])
    count: int = len(held) if held is not None and held.ndim > 2 else experts.num_layers  # type: ignore[assignment]
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
    inputs = {expert: hidden_states[found] for expert, found in tokens.items()}
    everything = hidden_states if sees_all(experts) else None
    for expert, down in multiplied(experts, inputs, tokens, everything).items():
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


def sees_all(experts: nn.Module) -> bool:
    """Tell if every expert of a module is to be shown all tokens."""
    return bool(getattr(experts, "sees_all", False))


def multiplied(
    experts: Any, inputs: Mapping[int, Tensor], tokens: Mapping[int, Tensor], everything: Tensor | None = None
) -> dict[int, Tensor]:
    """All products of experts, on the inputs (t, H) of each, whose numbers are `tokens` (t).

    Slices of the first parameter that no expert has come with no inputs. With `everything` (T, H), the inputs of all
    tokens, `before_product` gets those for each expert and slice.
    """
    unused = getattr(experts, "unused_slices", ()) if is_watched(experts) else ()
    *first, second = projections(experts)
    given = dict(inputs)
    if unused and inputs:
        none, of_none = next(iter(inputs.values()))[:0], next(iter(tokens.values()))[:0]
        tokens = {**tokens, **dict.fromkeys(unused, of_none)}
        given |= dict.fromkeys(unused, none)
    shown = None if everything is None else dict.fromkeys(given, everything)
    ups = [products(experts, parameter, given, tokens, shown) for parameter in first]
    gate = experts._apply_gate if experts.has_gate else experts.act_fn
    if everything is not None:  # apart from the products whose results are passed on
        shown = {e: gate(*(_times(experts, parameter, e, everything) for parameter in first)) for e in inputs}
    return products(experts, second, {expert: gate(*(up[expert] for up in ups)) for expert in inputs}, tokens, shown)


def products(
    experts: Any,
    parameter: str,
    inputs: Mapping[int, Tensor],
    tokens: Mapping[int, Tensor],
    shown: Mapping[int, Tensor] | None = None,
) -> dict[int, Tensor]:
    """The products of one parameter with the inputs (t, I) of experts, whose numbers are `tokens` (t), ascending.

    `shown` are the inputs (T, I) of all tokens for each expert, which `before_product` gets in their place.
    """
    before, after = getattr(experts, "before_product", None), getattr(experts, "after_product", None)
    routed = {expert: len(found) for expert, found in tokens.items()}
    told = [
        Product(parameter, expert, x, tokens[expert], lambda: torch.cat(list(inputs.values())), routed)
        for expert, x in inputs.items()
    ]
    for one in told:
        if before is not None and shown is not None:
            x = shown[one.expert]
            before(one._replace(inputs=x, tokens=torch.arange(len(x), device=x.device)))
        elif before is not None:
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
    weight = slices(experts, getattr(experts, parameter))[expert]
    return nn.functional.linear(inputs, weight.T if is_transposed(experts, parameter) else weight, bias)


def expert_matrices(full: str, leaf: str, experts: nn.Module) -> list[Matrix]:
    """The matrices of a parameter with the name `full`, `leaf` in its module; none if it is not one of experts."""
    if not holds_experts(experts) or leaf not in projections(experts):
        return []
    parameter = experts._parameters.get(leaf)
    if parameter is None:
        return []
    is_adopted = getattr(experts, "is_adopted", False)
    if not is_adopted and (parameter.ndim != 3 or not is_understood(experts)):
        return []
    transposed, of_each = is_transposed(experts, leaf), slices(experts, parameter)
    num_out, num_in = of_each.shape[:0:-1] if transposed else of_each.shape[1:]
    return [Matrix(full, (num_out, num_in), index, transposed) for index in range(len(of_each))]


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
            is_large = like.numel() > WHOLE_TRIAL
            shape = (1, *like.shape[1:]) if is_large else like.shape  # all experts are the same
            if is_large and like.ndim == 2:
                shape = (sum(like.shape),)  # each row is the one above it, moved by one place
            drawn = torch.randn(shape, generator=generator) / max(like.shape[-1], 1) ** 0.5
            drawn = drawn.as_strided(like.shape, (1, 1)) if drawn.ndim < like.ndim else drawn.expand(like.shape)
            return nn.Parameter(drawn, requires_grad=False)

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
