"""Tensors that blocks write to a mapping which they are all given, such as keys and values that later blocks read.

Gradients reach such tensors through the mapping only, and those that a block returns for the next one, such as router
states, through its arguments. In the reverse walk they travel with the hidden states: a state is one flat tensor, the
hidden states and then all that blocks before have written or handed on. Where there is nothing else, it is the hidden
states themselves.
"""

import copy
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from mspc.errors import InputError
from mspc.passes.blocks import Call

Place = tuple[int | str, Any]
"""The position or name of an argument, and the key in it; None for an argument that is no mapping, or handed on."""


@dataclass(frozen=True)
class Piece:
    """A tensor that is part of a state."""

    shape: torch.Size
    dtype: torch.dtype

    @staticmethod
    def of(tensor: Tensor) -> "Piece":
        return Piece(tensor.shape, tensor.dtype)


@dataclass(frozen=True)
class Entry:
    """A value of a mapping, or one that is handed on.

    `leaves` are those of a structure, with a `Piece` for each tensor that may have a gradient.
    """

    place: Place
    leaves: tuple[Any, ...]
    spec: TreeSpec


@dataclass(frozen=True)
class Layout:
    """The parts of a state."""

    hidden: Piece
    entries: tuple[Entry, ...] = ()

    def pack(self, hidden: Tensor, values: Sequence[Tensor]) -> Tensor:
        return torch.cat([hidden.flatten(), *(value.flatten() for value in values)]) if values else hidden

    def unpack(self, state: Tensor) -> tuple[Tensor, list[Tensor]]:
        leaves = (leaf for entry in self.entries for leaf in entry.leaves)
        pieces = [self.hidden, *(leaf for leaf in leaves if isinstance(leaf, Piece))]
        if len(pieces) == 1:
            return state, []
        parts = state.split([piece.shape.numel() for piece in pieces])
        hidden, *values = (
            part.view(piece.shape).to(piece.dtype) for part, piece in zip(parts, pieces, strict=True)
        )  # fmt: skip
        return hidden, values


def with_entries(call: Call, layout: Layout, values: Sequence[Tensor]) -> Call:
    """The call with these values of a layout: mappings of its own hold them, or they are arguments themselves."""
    args = [_own(value) for value in call.args]
    kwargs = {name: _own(value) for name, value in call.kwargs.items()}
    left = iter(values)
    for entry in layout.entries:
        argument, key = entry.place
        arguments: Any = args if isinstance(argument, int) else kwargs
        leaves = [next(left) if isinstance(leaf, Piece) else leaf for leaf in entry.leaves]
        holder, key = (arguments, argument) if key is None else (arguments[argument], key)
        holder[key] = tree_unflatten(leaves, entry.spec)
    return Call(tuple(args), kwargs)


def written(
    call: Call, layout: Layout, before: Call, handed: Mapping[int | str, Any] | None = None
) -> tuple[Layout, list[Tensor]]:
    """The layout and the values of what the mappings of a call hold now and those of `before` do not.

    `call` is that of `with_entries` after its block has run, and `before` the one that it was made of. `handed` are
    arguments of the next block alone; what this block got in their place goes no further.
    """
    entries, values, old, handed = [], [], dict(places(before)), handed or {}
    changed = [(p, v) for p, v in places(call) if p[0] not in handed and not (p in old and old[p] is v)]
    for place, value in (*changed, *(((argument, None), value) for argument, value in handed.items())):
        leaves, spec = tree_flatten(value)
        moving = [isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves]
        values += [leaf for leaf, moves in zip(leaves, moving, strict=True) if moves]
        kept = (Piece.of(leaf) if moves else leaf for leaf, moves in zip(leaves, moving, strict=True))
        entries.append(Entry(place, tuple(kept), spec))
    return Layout(layout.hidden, tuple(entries)), values


class Sharing:
    """A look at the arguments of blocks, for changes that blocks make between its creation and `found`."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls
        self.before = [{place: (value, tree_leaves(value)) for place, value in places(call)} for call in calls]

    def found(self, where: str) -> bool:
        """Tell if they wrote to a mapping. Raises InputError if they wrote to another container, such as a list."""
        found = False
        for call, before in zip(self.calls, self.before, strict=True):
            for place, value in places(call):
                old, leaves = before.get(place, (None, []))
                if old is not value:
                    found = True
                elif list(map(id, leaves)) != list(map(id, tree_leaves(value))):
                    raise InputError(
                        f"{where}: blocks write to a {type(value).__name__} that they share, {place[0]}, where mspc "
                        "knows only new values in a dict. Give another model: this one is not supported."
                    )
        return found


def places(call: Call) -> Iterator[tuple[Place, Any]]:
    """The values of the mappings among the arguments of a call, and the other arguments, with their places."""
    arguments: list[tuple[int | str, Any]] = [*enumerate(call.args), *call.kwargs.items()]
    for argument, value in arguments:
        if isinstance(value, MutableMapping):
            yield from (((argument, key), of_key) for key, of_key in value.items())
        else:
            yield (argument, None), value


def _own(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, MutableMapping) else value
