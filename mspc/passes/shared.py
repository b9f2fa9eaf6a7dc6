"""Tensors that blocks write to a mapping which they are all given, such as keys and values that later blocks read.

Gradients reach such tensors through the mapping only. In the reverse walk they travel with the hidden states: a state
is one flat tensor, the hidden states and then all that blocks before have written. Where nothing is written, it is the
hidden states themselves.
"""

import copy
import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from mspc.passes.blocks import Call


@dataclass(frozen=True)
class Entry:
    """The value of a key of a mapping: tensors in a structure. `argument` is the position or name of the mapping."""

    argument: int | str
    key: Any
    shapes: tuple[torch.Size, ...]
    spec: TreeSpec


@dataclass(frozen=True)
class Layout:
    """The parts of a state: hidden states of a shape, and entries."""

    shape: torch.Size
    entries: tuple[Entry, ...] = ()

    def pack(self, hidden: Tensor, values: Sequence[Tensor]) -> Tensor:
        return torch.cat([hidden.flatten(), *(value.flatten() for value in values)]) if values else hidden

    def unpack(self, state: Tensor) -> tuple[Tensor, list[Tensor]]:
        if not self.entries:
            return state, []
        shapes = [self.shape, *(shape for entry in self.entries for shape in entry.shapes)]
        parts = state.split([math.prod(shape) for shape in shapes])
        hidden, *values = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
        return hidden, values


def with_entries(call: Call, layout: Layout, values: Sequence[Tensor]) -> Call:
    """The call with mappings of its own, which hold these values of a layout."""
    args = [_own(value) for value in call.args]
    kwargs = {name: _own(value) for name, value in call.kwargs.items()}
    left = list(values)
    for entry in layout.entries:
        mapping = args[entry.argument] if isinstance(entry.argument, int) else kwargs[entry.argument]
        mapping[entry.key] = tree_unflatten([left.pop(0) for _ in entry.shapes], entry.spec)
    return Call(tuple(args), kwargs)


def written(call: Call, layout: Layout, before: Call) -> tuple[Layout, list[Tensor]]:
    """The layout and the values of what the mappings of a call hold now and those of `before` do not.

    `call` is that of `with_entries` after its block has run, and `before` the one that it was made of.
    """
    entries, values = [], []
    for argument, mapping in mappings(call):
        old = before.args[argument] if isinstance(argument, int) else before.kwargs[argument]
        for key, value in mapping.items():
            if key in old and old[key] is value:
                continue
            leaves, spec = tree_flatten(value)
            if all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves):
                entries.append(Entry(argument, key, tuple(leaf.shape for leaf in leaves), spec))
                values += leaves
    return Layout(layout.shape, tuple(entries)), values


def mappings(call: Call) -> list[tuple[int | str, Mapping[Any, Any]]]:
    """The mappings among the arguments of a call, by position or name."""
    named: list[tuple[int | str, Any]] = [*enumerate(call.args), *call.kwargs.items()]
    return [(argument, value) for argument, value in named if isinstance(value, MutableMapping)]


def _own(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, MutableMapping) else value
