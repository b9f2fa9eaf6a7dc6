"""A trial of a model on a few tokens, before any long work: it runs block by block, and calls its linear layers."""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mspc.errors import InputError
from mspc.model.experts import Product, expert_matrices, holds_experts, projections
from mspc.model.matrices import LINEAR, outside_note
from mspc.model.streamed import StreamedModel
from mspc.passes.blocks import batches_of, route_of, run_block, without_blocks
from mspc.passes.shared import Sharing

TOKENS = 8


def irregular_layers(model: StreamedModel) -> set[str]:
    """Weights of linear layers that their block does not call exactly once, so that they have no one input.

    Some blocks read the weight without calling the layer. One block of each kind is run, or all of them where one needs
    another. Layers in a list, such as experts, do not count: they may be called for other text. Raises InputError for a
    model that cannot be run block by block.
    """
    try:
        return _tried(model, all_blocks=False)
    except InputError:
        return _tried(model, all_blocks=True)


def outside_notes(model: StreamedModel) -> Iterator[str]:
    """A note about the linear layers outside of the blocks that a model runs, without its head."""
    if model.route is not None and model.route.outside:
        numel = sum(model.model.get_submodule(name).weight.numel() for name in model.route.outside)
        yield outside_note(model.route.outside, numel, sum(p.numel() for p in model.model.parameters()))


def _tried(model: StreamedModel, *, all_blocks: bool) -> set[str]:
    (batch,) = batches_of(model, torch.zeros(1, TOKENS, dtype=torch.int64))
    known: dict[object, tuple[set[str], set[str]]] = {}
    found, unread = set[str](), set[str]()
    sharing = Sharing(list(batch.calls))
    for index, block in enumerate(model.blocks):
        shapes = tuple((name, parameter.shape) for name, parameter in block.named_parameters())
        kind = (type(block), shapes, index in route_of(model).skipped)
        if all_blocks or kind not in known:
            with model.loaded(index) as loaded, torch.no_grad():
                known[kind] = _irregular(loaded, partial(run_block, model, loaded, batch, index))
        for names, of_block in zip((found, unread), known[kind], strict=True):
            names |= {f"{model.block_name(index)}.{name}" for name in of_block}
    model.unread = unread
    model.shares = sharing.found(type(model.model).__name__) or bool(model.route and model.route.to_next)
    with without_blocks(model) as logits_of, torch.no_grad():
        logits_of(batch)
    return found


class _Reads(TorchDispatchMode):
    """The storages of the tensors that operations read."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_leaves((args, kwargs))
        self.storages |= {leaf.untyped_storage().data_ptr() for leaf in given if isinstance(leaf, Tensor)}
        return func(*args, **(kwargs or {}))


def _irregular(block: nn.Module, run: partial[torch.Tensor]) -> tuple[set[str], set[str]]:
    """Weights of the layers and experts that a run of their block does not multiply with exactly once.

    Then those of layers among them that no operation of the run reads.
    """
    layers = {
        name: layer
        for name, layer in block.named_modules()
        if isinstance(layer, LINEAR) and not any(part.isdigit() for part in name.split("."))
    }
    experts = {
        name: module
        for name, module in block.named_modules()
        if holds_experts(module) and any(expert_matrices(leaf, leaf, module) for leaf in projections(module))
    }
    weights = {f"{name}.weight" for name in layers}
    weights |= {f"{name}.{leaf}" for name, module in experts.items() for leaf in projections(module)}
    calls = Counter[str]()
    handles = [
        layer.register_forward_pre_hook(lambda *_, name=f"{name}.weight": calls.update([name]))
        for name, layer in layers.items()
    ]
    for name, module in experts.items():
        module.before_product = partial(_count, calls, name)
    try:
        with _Reads() as reads:
            run()
    finally:
        for handle in handles:
            handle.remove()
        for module in experts.values():
            module.before_product = None
    unread = {
        f"{name}.weight"
        for name, layer in layers.items()
        if layer.weight.untyped_storage().data_ptr() not in reads.storages
    }
    return {name for name in weights if calls[name] != 1}, unread


def _count(calls: Counter[str], name: str, product: Product) -> None:
    """Count a product for its parameter, once for all experts."""
    if product.expert == 0:
        calls[f"{name}.{product.parameter}"] += 1
