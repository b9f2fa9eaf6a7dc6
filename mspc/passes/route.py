"""The route of hidden states through a model, found by a trial of the model's own forward on a few tokens.

Passes run one block at a time, in the order of the list. That is right only if the model does the same: it calls each
block once and in order, hands on what a block returns as it is and to the next block alone, and reads nothing but the
last output at the end. Blocks that it does not call at all are passed by. In the trial each block returns random
numbers, so that what arrives at blocks and at the logits shows all of this.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mspc.errors import InputError, in_brief, is_out_of_memory
from mspc.model.matrices import LINEAR
from mspc.model.streamed import Route, StreamedModel

SHAPE = (3, 7)
"""Sequences of the trial, and tokens of each: two numbers that name the axes of whatever has them."""
MOST_OUTPUTS = 4
"""Values that a block may return."""
TOLERANCE = 0.01
"""Largest difference of logits, as a share of the largest, that other sizes of products may make in bfloat16."""
SAME_SIZES = 1e-5
"""The same for products of the same numbers and sizes."""


class EarlyExit(Exception):
    """Raised to leave a forward pass as soon as the wanted values are known."""


@dataclass(frozen=True)
class _Extra:
    """Stands for a value that block `index` returns after the hidden states, by its place in the tuple."""

    index: int
    place: int


@dataclass
class _Trial:
    """One run of the model's own forward in which each block returns `num_outputs` values, random ones first."""

    model: StreamedModel
    num_outputs: int
    called: list[int] = field(default_factory=list)
    made: list[Tensor] = field(default_factory=list)
    """The outputs of the blocks."""
    given: list[list[Tensor]] = field(default_factory=list)
    """The tensors that each block is given after the hidden states."""
    faults: list[str] = field(default_factory=list)
    between: list[str] = field(default_factory=list)
    """Linear layers that ran after the first block and before the last."""
    outside: list[str] = field(default_factory=list)
    """Linear layers that ran outside of the blocks."""
    axis: int = 0

    def run(self) -> Tensor:
        """The logits. Anything that the model raises is passed on."""
        generator = torch.Generator().manual_seed(0)
        last: list[Tensor] = []
        names = self.model.block_name

        def block(index: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.called.append(index)
            if not last:
                self.axis = self.axis_of(hidden)
            elif hidden.shape != last[0].shape or not torch.equal(hidden, last[0]):
                self.faults.append(f"something comes between {names(self.called[-2])} and {names(index)}")
            self.given.append(_tensors(args, kwargs))
            output = torch.randn(hidden.shape, generator=generator).to(hidden)
            last[:] = [output.clone()]  # the model may write to what it is given
            self.made.append(last[0])
            return as_outputs(output, self.num_outputs)

        with replaced_forwards(self.model.blocks, block), self.noting():
            logits = _logits(self.model, torch.zeros(SHAPE, dtype=torch.int64))
        if logits.shape[:2] != SHAPE:
            self.faults.append(f"its logits are {tuple(logits.shape)} for tokens {SHAPE}")
        return logits

    def axis_of(self, hidden: Tensor) -> int:
        """The axis of the sequences, before that of the tokens; others may come first, as in (4, B, T, D)."""
        fitting = [axis for axis in range(hidden.ndim - 1) if hidden.shape[axis : axis + 2] == SHAPE]
        if len(fitting) != 1:
            before = f", after other layers such as {self.outside[0]}" if self.outside else ""
            raise ValueError(
                f"{self.model.blocks_name} take hidden states {tuple(hidden.shape)} for tokens {SHAPE}{before}"
            )
        return fitting[0]

    @contextmanager
    def noting(self) -> Iterator[None]:
        def note(name: str) -> Callable[..., None]:
            def hook(*_: object) -> None:
                self.outside.append(name)
                if 0 < len(self.called) < len(self.model.blocks):
                    self.between.append(name)

            return hook

        inside, head = self.model.blocks_name + ".", self.model.model.get_output_embeddings()
        handles = [
            module.register_forward_pre_hook(note(name))
            for name, module in self.model.model.named_modules()
            if isinstance(module, LINEAR) and module is not head and not name.startswith(inside)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def fault(self) -> str | None:
        """The reason why passes of one block at a time would be wrong; None if they are right."""
        calls, blocks = Counter(self.called), self.model.blocks
        found = []
        if not calls:
            found.append(f"it never runs {self.named(range(len(blocks)))}")
        if repeated := [index for index, count in calls.items() if count > 1]:
            most = max(calls.values())
            found.append(f"it runs {self.named(repeated)} more than once, up to {most} times")
        elif self.called != sorted(self.called):
            later, earlier = next(pair for pair in zip(self.called, self.called[1:], strict=False) if pair[0] > pair[1])
            found.append(f"it runs {self.model.block_name(later)} before {self.model.block_name(earlier)}")
        found += self.faults[:1]
        if self.faults and self.between:
            found.append(f"layers outside of {self.model.blocks_name} run there, such as {self.between[0]}")
        return "; ".join(found) or None

    def named(self, indices: Sequence[int]) -> str:
        names = [self.model.block_name(index) for index in sorted(indices)]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def find_route(model: StreamedModel) -> Route:
    """The route of a model whose outer part is loaded. Raises InputError, naming blocks, for one that has another."""
    reasons: list[str] = []
    with torch.no_grad():
        for num_outputs in range(MOST_OUTPUTS + 1):
            trial = _Trial(model, num_outputs)
            try:
                logits = trial.run()
                fault = trial.fault() or _fault_of_values(model, trial, logits)
            except Exception as error:  # whatever a model raises that unpacks other outputs
                if is_out_of_memory(error):
                    raise
                if not trial.called:
                    raise InputError(
                        f"{type(model.model).__name__} does not get from text alone to its first block "
                        f"({in_brief(error)}). Give a model that needs no images, sound or other input with a text."
                    ) from error
                reasons.append(in_brief(error))
                continue
            if fault is None:
                found = {n: _handed_on(model, n) for n in range(2, MOST_OUTPUTS + 1)}
                handed_on = frozenset(n for n, places in found.items() if places is None or places)
                to_next = tuple(found.get(num_outputs) or ())
                skipped = frozenset(range(len(model.blocks))).difference(trial.called)
                return Route(num_outputs, trial.axis, handed_on, tuple(dict.fromkeys(trial.outside)), to_next, skipped)
            reasons.insert(0, fault)
    raise InputError(
        f"{type(model.model).__name__} cannot be run one block at a time, as mspc does ({reasons[0]}). Give a model "
        "whose blocks pass hidden states on from one to the next."
    )


def _fault_of_values(model: StreamedModel, trial: _Trial, logits: Tensor) -> str | None:
    """A fault that shows in values where all blocks return what the last one returned in the trial; None without one.

    Other arguments of a block must not depend on the outputs of blocks, and logits on that of the last block alone, for
    the same token.
    """
    ids, output = torch.zeros(SHAPE, dtype=torch.int64), trial.made[-1]

    def head(ids: Tensor, hidden: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
        given = []

        def block(index: int, _: Any, *args: Any, **kwargs: Any) -> Any:
            given.append(_tensors(args, kwargs))
            return as_outputs(hidden.clone(), trial.num_outputs)

        with replaced_forwards(model.blocks, block):
            return _logits(model, ids), given

    found, given = head(ids, output)
    for index, one, other in zip(trial.called, given, trial.given, strict=True):
        if len(one) != len(other) or not all(map(torch.equal, one, other)):
            return f"{model.block_name(index)} is given more than the last output of the blocks before it"
    if not _is_close(found, logits, SAME_SIZES):
        return "its logits depend on more than the output of the last block"
    part = output.narrow(trial.axis, 1, 1).narrow(trial.axis + 1, 2, 3)
    if not _is_close(head(ids[1:2, 2:5], part)[0], logits[1:2, 2:5], TOLERANCE):
        return "the logits of a token depend on what the last block returns for others"
    return None


def _tensors(*values: Any) -> list[Tensor]:
    return [leaf.clone() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _is_close(one: Tensor, other: Tensor, share: float) -> bool:
    if one.shape != other.shape:
        return False
    one, other = one.float(), other.float()
    bound = share * float(other.nan_to_num(0.0, 0.0, 0.0).abs().max())
    return torch.allclose(one, other, rtol=0.0, atol=bound, equal_nan=True)


def _handed_on(model: StreamedModel, num_outputs: int) -> list[tuple[int, int | str]] | None:
    """The places of what a block returns after the hidden states, and the arguments in which the next block gets it.

    None where it gets elsewhere, or the model computes with it.
    """
    arrived: list[set[tuple[int, int | str]]] = []
    elsewhere = False

    def block(index: int, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal elsewhere
        arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        named = {(value.place, name): value for name, value in arguments if isinstance(value, _Extra)}
        extras = sum(isinstance(leaf, _Extra) for leaf in tree_leaves((hidden, args, kwargs)))
        elsewhere |= extras > len(named) or any(value.index != index - 1 for value in named.values())
        arrived.append(set(named))
        if len(arrived) == len(model.blocks):
            raise EarlyExit
        return (hidden, *[_Extra(index, place) for place in range(1, num_outputs)])

    try:
        with replaced_forwards(model.blocks, block), suppress(EarlyExit):
            _logits(model, torch.zeros(SHAPE, dtype=torch.int64))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None  # it computes with them, or unpacks another number of values
    places = arrived[1] if len(arrived) > 1 else set[tuple[int, int | str]]()
    return None if elsewhere or any(found != places for found in arrived[2:]) else sorted(places, key=str)


def _logits(model: StreamedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model.model(input_ids=ids.to(model.device), use_cache=False).logits
    return logits


def as_outputs(hidden: Tensor, num_outputs: int) -> Any:
    """The outputs of a block: hidden states alone, or a tuple that begins with them."""
    return (hidden, *[None] * (num_outputs - 1)) if num_outputs else hidden


@contextmanager
def replaced_forwards(blocks: nn.ModuleList, forward: Callable[..., Any]) -> Iterator[None]:
    """Call `forward(index, hidden, *args, **kwargs)` in place of every block, whose attributes stay."""

    def called(index: int, *args: Any, **kwargs: Any) -> Any:
        if not args:
            args = (kwargs.pop("hidden_states"),)
        return forward(index, *args, **kwargs)

    for index, block in enumerate(blocks):
        block.forward = partial(called, index)  # an instance attribute that hides the method of the class
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
