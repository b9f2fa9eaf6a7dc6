"""Experts that transformers does not describe: they get a description, and a forward of ours.

A form knows the parameters of such a module and what it is given. A module whose class is not that of the form, but
which computes the same on random numbers, is adopted. Its class becomes one that has the forward of the form.
"""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from mspc.model.experts import (
    SETTINGS,
    experts_forward,
    is_watched,
    multiplied,
    num_experts,
    products,
    routed,
    same_on_random,
)


class _Form(nn.Module):
    """The description that transformers gives other experts: two products with a gate in between, without biases."""

    has_gate, has_bias, is_transposed, has_post_expert_norm, is_concatenated = True, False, False, False, True
    is_adopted = True
    routed_only: str | None = None
    """Why experts cannot be shown all tokens, in the words of an error; None if they can."""


class _Gate:
    """The gate of a module that has none of its own."""

    act_fn: Any

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        inner: Tensor = self.act_fn(gate) * up
        return inner


class AllTokens(_Form):
    """Experts that are given all tokens (E T, H) one below the other, zeros where a token is not routed (Llama 4)."""

    is_transposed = True
    routed_only = "is an expert whose inputs have the weights of the router, which are 0 for other tokens"

    def forward(self, hidden_states: Tensor) -> Tensor:
        inputs = hidden_states.view(num_experts(self), -1, hidden_states.shape[-1])
        tokens = {expert: x.any(-1).nonzero().flatten() for expert, x in enumerate(inputs)}
        if not is_watched(self):
            tokens = {expert: found for expert, found in tokens.items() if len(found)}
        down = multiplied(self, {expert: inputs[expert][found] for expert, found in tokens.items()}, tokens)
        if not down:
            return torch.zeros_like(hidden_states)
        rows = torch.cat([expert * inputs.shape[1] + found for expert, found in tokens.items()])
        return torch.zeros_like(hidden_states).index_add(0, rows, torch.cat(list(down.values())))

    @staticmethod
    def arguments(experts: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Arguments for the trial of a module."""
        count, width, _ = experts.gate_up_proj.shape
        hidden, index, weights = routed(generator, width, count)
        scores = torch.zeros(len(hidden), count).scatter(1, index, weights)
        return ((hidden[None] * scores.T[..., None]).flatten(0, 1),)


class Routed(_Form):
    """Experts that only lack the description (Step 3.7)."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)

    @staticmethod
    def arguments(experts: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Arguments for the trial of a module."""
        return routed(generator, experts.down_proj.shape[1], len(experts.down_proj))


class WithIdentities(_Form):
    """Experts whose last ones hand tokens through, and have slices only in the first parameter (LongCat)."""

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        count = num_experts(self)
        handed_through = (top_k_weights * (top_k_index >= count)).sum(-1, keepdim=True)
        return experts_forward(self, hidden_states, top_k_index, top_k_weights) + hidden_states * handed_through

    @property
    def unused_slices(self: Any) -> range:
        return range(num_experts(self), self.total_experts)

    @staticmethod
    def arguments(experts: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Arguments for the trial of a module."""
        return routed(generator, experts.down_proj.shape[1], experts.total_experts)


class Groups(list[int]):
    """The numbers of inputs of each expert, with the tokens (T k) that these are, one expert after the other."""

    tokens: Tensor


class GroupingRouter(nn.Module):
    """A router that returns places, tokens, weights and the number of inputs of each expert (JetMoE)."""

    def forward(self, hidden_states: Tensor) -> tuple[Any, ...]:
        own: Any = super()
        places, tokens, weights, sizes, *more = own.forward(hidden_states)
        groups = Groups(sizes)
        groups.tokens = tokens
        return places, tokens, weights, groups, *more


class Grouped(_Form):
    """The matrices of one projection, given the inputs (T k, I) of all experts, one below the other (JetMoE)."""

    has_gate = False
    own_projections = ("weight",)
    routed_only = "is an expert that is given only the inputs of its own tokens"

    def forward(self, inputs: Tensor, sizes: Groups) -> Tensor:
        ends = torch.tensor(sizes).cumsum(0).tolist()
        tokens, orders = dict[int, Tensor](), dict[int, Tensor]()
        for expert, (end, size) in enumerate(zip(ends, sizes, strict=True)):
            if size or is_watched(self):
                tokens[expert], order = sizes.tokens[end - size : end].sort()
                orders[expert] = end - size + order
        outputs = products(self, *self.own_projections, {expert: inputs[at] for expert, at in orders.items()}, tokens)
        return torch.cat(list(outputs.values()))[torch.cat(list(orders.values())).argsort()]

    @staticmethod
    def arguments(experts: Any, generator: torch.Generator) -> tuple[Any, ...]:
        """Arguments for the trial of a module."""
        count, _, width = experts.weight.shape
        hidden, index, _ = routed(generator, width, count)
        chosen, size = index.flatten(), index.shape[1]
        order = chosen.argsort(stable=True)
        groups = Groups(torch.bincount(chosen, minlength=count).tolist())
        groups.tokens = order // size
        return hidden[groups.tokens], groups


class StackedMatrices(_Form):
    """The parameters (E I, H) of `Stacked`, in a module of their own."""

    own_projections = ("w1", "v1", "w2")
    transposed_projections = ("w2",)

    def _apply_gate(self: Any, gate: Tensor, up: Tensor) -> Tensor:
        inner: Tensor = self.activation_fn(gate) * up
        return inner


class Stacked(nn.Module):
    """Experts whose matrices are the rows of three 2-D parameters, one expert after the other (DBRX).

    The first two are multiplied by the same input, and the third is transposed.
    """

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        rows = hidden_states.flatten(0, -2)
        return experts_forward(self.mlp, rows, top_k_index, top_k_weights).view_as(hidden_states)

    @staticmethod
    def arguments(experts: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Arguments for the trial of a module."""
        hidden, index, weights = routed(generator, experts.mlp.w1.shape[1], experts.num_experts)
        return hidden[None], index, weights


def _adopt_routers(model: nn.Module) -> bool:
    """Adopt the routers of `GroupingRouter`, and tell if there are any."""
    found = [module for module in model.modules() if _groups_tokens(module)]
    for module in found:
        own = type(module)
        if not issubclass(own, GroupingRouter):
            described = type(own.__name__, (GroupingRouter, own), {})
            module.__class__ = _classes.setdefault((GroupingRouter, own), described)
    return bool(found)


def _groups_tokens(module: nn.Module) -> bool:
    """Tell if a module returns, for random tokens, what `GroupingRouter` says."""
    layer, count, size = (getattr(module, name, None) for name in ("layer", "num_experts", "top_k"))
    if not isinstance(layer, nn.Linear) or not isinstance(count, int) or not isinstance(size, int):
        return False
    tried: Any = copy.copy(module)
    with torch.device("cpu"), torch.no_grad():
        tried._modules = {"layer": nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)}
        hidden = torch.randn(8, layer.in_features, generator=torch.Generator().manual_seed(0))
        try:
            places, tokens, _, sizes, *_ = tried(hidden)
            chosen = tried.layer(hidden).topk(size, dim=1).indices.flatten()
        except Exception:  # it takes something else
            return False
        return (
            isinstance(sizes, list)
            and sizes == torch.bincount(chosen, minlength=count).tolist()
            and torch.equal(tokens, places // size)
            and bool((chosen[places].diff() >= 0).all())
        )


def adopt_experts(model: nn.Module) -> None:
    """Adopt the modules of a model that compute what a form does."""
    groups_tokens = _adopt_routers(model)
    for module in model.modules():
        form = _form_of(module)
        if form is Grouped and not groups_tokens:
            continue
        if form is not None and _is(form, module):
            _adopt(form, module)


_classes: dict[tuple[type, type], type] = {}
_tried: dict[tuple[type, str], bool] = {}


def _form_of(module: nn.Module) -> Any:
    """The form that a module may have, by its parameters; None for those that transformers describes."""
    parameters = dict(module.named_parameters(recurse=False))
    if any(hasattr(module, name) for name in SETTINGS) or isinstance(module, Stacked):
        return None
    if _has_stacked_matrices(module):
        return Stacked
    if set(parameters) == {"weight"} and parameters["weight"].ndim == 3:
        return Grouped if len(inspect.signature(module.forward).parameters) == 2 else None
    if set(parameters) != {"gate_up_proj", "down_proj"}:
        return None
    if not hasattr(module, "act_fn") or any(parameter.ndim != 3 for parameter in parameters.values()):
        return None
    if hasattr(module, "total_experts"):
        return WithIdentities
    return AllTokens if len(inspect.signature(module.forward).parameters) == 1 else Routed


def _has_stacked_matrices(module: Any) -> bool:
    """Tell if the parts of a module are those of `Stacked`."""
    parameters = dict(module.named_parameters())
    if set(parameters) != {f"mlp.{leaf}" for leaf in StackedMatrices.own_projections}:
        return False
    count, shapes = getattr(module, "num_experts", None), {parameter.shape for parameter in parameters.values()}
    if not isinstance(count, int) or count < 1 or len(shapes) != 1 or not hasattr(module.mlp, "activation_fn"):
        return False
    (shape,) = shapes
    return len(shape) == 2 and shape[0] % count == 0


def _adopt(form: Any, module: Any) -> None:
    """Make a module one of a form."""
    if form is Stacked:
        module.mlp.num_layers = module.num_experts
        _adopt(StackedMatrices, module.mlp)
    own = type(module)
    module.__class__ = _classes.setdefault((form, own), _described(form, own))


def _described(form: Any, own: type) -> type:
    return type(own.__name__, (form, own, _Gate), {})


def _is(form: Any, module: nn.Module) -> bool:
    """Tell if a module computes what a form does. Of modules of one class with the same shapes, one is tried."""
    shapes = [(name, parameter.shape) for name, parameter in module.named_parameters()]
    settings = {name: value for name, value in vars(module).items() if isinstance(value, int | float | str | None)}
    kind = (type(module), repr((settings, shapes)))
    if kind not in _tried:
        own = type(module).forward

        def ours(tried: Any, *given: Tensor) -> Tensor:
            _adopt(form, tried)
            outputs: Tensor = tried(*given)
            return outputs

        _tried[kind] = same_on_random(module, own, ours, lambda generator: form.arguments(module, generator))
    return _tried[kind]
