"""The reverse walk: gradients of the loss, with the weights of one block in memory at a time.

Forward, the input of every block is kept in host memory. Backward, each block is loaded again, run again, and passes
the gradient of its input to the block before. A `Measure` says what is kept of the gradients of each matrix. It may
carry more than the hidden states and their gradients through the blocks, as `mspc.published.hutchinson` does.
"""

import copy
import hashlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import starmap
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp

from mspc.errors import ActivationError, InputError
from mspc.model.experts import Product, holds_experts
from mspc.model.matrices import skip_option
from mspc.model.streamed import StreamedModel
from mspc.numerics.linalg import precise_matmul
from mspc.passes.blocks import (
    Batch,
    Logits,
    batches_of,
    batches_of_parts,
    handed_over,
    hidden_of,
    logits_bytes,
    pass_bytes,
    route_of,
    token_losses,
    without_blocks,
)
from mspc.passes.shared import Layout, Piece, with_entries, written
from mspc.threads import run
from mspc.types import Matrix

T = TypeVar("T")
R = TypeVar("R")
Weights = dict[str, Tensor]  # by name within the block

TYPICAL = 0.8
"""Share of the tokens whose gradients keep their length in an output Fisher factor."""
LARGEST_FISHER_BLOCK = 256
"""Largest B of an output Fisher factor. Blocks of this size fit in memory, and larger ones gained nothing."""


@dataclass(frozen=True)
class Sample:
    """The value of one matrix for one sequence, or its output Fisher factor (K, B, B) for one batch.

    The result for a text is the mean over its samples.
    """

    matrix: Matrix
    value: Tensor
    sequences: int = 1
    batch: int = 0
    """Number of the batch."""


@dataclass(frozen=True)
class BlockRun:
    """A loaded block on one batch, as a function of its input and of the `weights` of its matrices.

    An input is the hidden states and what blocks share (`mspc.passes.shared`).
    """

    block: nn.Module
    batch: Batch
    index: int
    number: int
    """Number of the batch in the whole text: that of its sequence, where a batch has one sequence."""
    weights: Weights
    model: StreamedModel
    layouts: list[Layout]
    """Those of the states before this block and the blocks before it, and after a run of that after it, too."""

    def __call__(self, state: Tensor, weights: Weights) -> Tensor:
        after = before = self.layouts[self.index]
        hidden, values = before.unpack(state)
        if self.index not in route_of(self.model).skipped:
            call = with_entries(given := self.batch.calls[self.index], before, values)
            output = functional_call(self.block, weights, (hidden, *call.args), call.kwargs)
            after, values = written(call, before, given, handed_over(route_of(self.model), output))
            hidden = hidden_of(self.model, self.batch, output)
        if self.index == len(self.batch.calls) - 1:  # the head reads hidden states alone
            after, values = Layout(before.hidden), []
        self.layouts[self.index + 1 :] = [after]
        return after.pack(hidden, values)

    def gradients(self, state: Tensor, weights: Weights, cotangent: Tensor) -> tuple[Tensor, Weights]:
        """Gradients of the block's input and of its weights."""
        return vjp(self, state, weights)[1](cotangent)


class Measure(ABC):
    """A quantity of each matrix that the reverse walk averages over samples.

    The state of a batch is its hidden states, and the cotangent their gradient; a subclass may carry other tensors.
    """

    batch_size: int | None = 1
    """Sequences of a batch (None: as many as make about 4096 tokens)."""
    at_once = False
    """True if several batches may be in a block at once; derivatives in forward mode may not."""

    def start(self, hidden: Tensor) -> Tensor:
        """The state of a batch before the first block."""
        return hidden

    def forward(self, run: BlockRun, state: Tensor) -> Tensor:
        """The state after a block."""
        return run(state, run.weights)

    def head(self, loss: Callable[[Tensor], Tensor], state: Tensor, predicted: int) -> Tensor:
        """The cotangent of the state after the last block; `loss` is the mean over the `predicted` tokens."""
        return _gradient(loss, state)

    @abstractmethod
    def backward(self, run: BlockRun, state: Tensor, cotangent: Tensor) -> tuple[Tensor, Weights]:
        """The cotangent before a block, and what is kept of each weight, by parameter name."""

    def value(self, matrix: Matrix, kept: Tensor) -> Tensor:
        """The value of a sample: here the mean over the weights of the matrix."""
        return matrix.read(kept).double().mean()


class SquaredGradient(Measure):
    """The mean squared gradient of each matrix: the diagonal of the empirical Fisher information, averaged."""

    def backward(self, run: BlockRun, state: Tensor, cotangent: Tensor) -> tuple[Tensor, Weights]:
        # Not run.gradients: torch.func does not take functions of autograd of the older kind (RecurrentGemma).
        with torch.enable_grad():
            hidden = state.detach().requires_grad_()
            leaves = {name: weight.detach().requires_grad_() for name, weight in run.weights.items()}
            gradient, *of_weights = torch.autograd.grad(
                run(hidden, leaves), [hidden, *leaves.values()], cotangent, allow_unused=True, materialize_grads=True
            )
        return gradient, {name: g.float().square() for name, g in zip(leaves, of_weights, strict=True)}


class OutputFisher(Measure):
    """The mean over tokens of g g^T, with g the gradient of a sequence's summed loss at the outputs of a matrix.

    Few tokens have most of the gradient, so that a plain mean is that of a few. `_typical` makes it one of many.
    With the Gram of the inputs it is the Kronecker-factored Fisher information of the matrix (Martens and Grosse,
    arXiv:1503.05671). Only blocks of B outputs on its diagonal are kept, (K, B, B). No weight's gradient is computed.
    All batches must have the same size.
    """

    batch_size = None  # the gradients of tokens do not mix
    at_once = True

    def head(self, loss: Callable[[Tensor], Tensor], state: Tensor, predicted: int) -> Tensor:
        def summed(hidden: Tensor) -> Tensor:
            return predicted * loss(hidden)  # small gradients would vanish in float16

        return _gradient(summed, state)

    def backward(self, run: BlockRun, state: Tensor, cotangent: Tensor) -> tuple[Tensor, Weights]:
        modules = {name: run.block.get_submodule(name.rpartition(".")[0]) for name in run.weights}
        with _outputs_of(modules, run.weights) as outputs, torch.enable_grad():
            hidden = state.detach().requires_grad_()
            result = run(hidden, run.weights)
            called = {output.name for output in outputs}
            if missed := [f"{run.model.block_name(run.index)}.{name}" for name in modules if name not in called]:
                raise InputError(
                    f"{', '.join(missed)}: never called in a forward pass, so there is no gradient. Leave such "
                    f"matrices dense with {skip_option(name for name in modules if name not in called)}."
                )
            # Some outputs have no gradient: those of an indexer only select.
            wanted = [output for output in outputs if output.value.requires_grad]
            gradient, *found = torch.autograd.grad(
                result, [hidden, *(output.value for output in wanted)], cotangent, allow_unused=True,
                materialize_grads=True,
            )  # fmt: skip
        of_outputs = {id(output): g for output, g in zip(wanted, found, strict=True)}
        factors = defaultdict[str, list[Tensor]](list)
        for output in outputs:
            g = of_outputs.get(id(output), torch.zeros_like(output.value)).flatten(0, -2)
            factors[output.name].append(_fisher_factor(g, output.tokens, *run.batch.ids.shape))
        return gradient, {
            name: torch.stack(factors[name]) if holds_experts(module) else factors[name][-1]
            for name, module in modules.items()
        }

    def value(self, matrix: Matrix, kept: Tensor) -> Tensor:
        return kept if matrix.index is None else kept[matrix.index]


@dataclass(frozen=True)
class Output:
    """An output (..., O) of the matrix of a parameter; of an expert, with the numbers of its tokens."""

    name: str
    value: Tensor
    tokens: Tensor | None = None


@contextmanager
def _outputs_of(modules: dict[str, nn.Module], weights: Weights) -> Iterator[list[Output]]:
    """The outputs of matrices while their block runs. `modules` are the owners of parameters, by name.

    Those of experts come in the order of the experts.
    """
    found: list[Output] = []

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            found.append(Output(name, output))

        return hook

    def keep_product(names: dict[str, str]) -> Callable[[Product, Tensor], None]:
        def after(product: Product, output: Tensor) -> None:
            if name := names.get(product.parameter):
                found.append(Output(name, output, product.tokens))

        return after

    experts = {name: module for name, module in modules.items() if holds_experts(module)}
    handles = [m.register_forward_hook(keep(name)) for name, m in modules.items() if name not in experts]
    for module in experts.values():
        names = {name.rpartition(".")[2]: name for name, owner in experts.items() if owner is module}
        module.after_product = keep_product(names)  # type: ignore[assignment]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        for module in experts.values():
            module.after_product = None  # type: ignore[assignment]


def reverse_walk(
    model: StreamedModel,
    ids: Tensor,
    matrices: Sequence[Sequence[Matrix]],
    measure: Measure,
    first_sequence: int = 0,
    parts: Sequence[Tensor] | None = None,
    keep: Callable[[Tensor], Tensor] = Tensor.cpu,
) -> Iterator[Sample]:
    """Samples of every matrix from `ids` (N, T), last block first.

    `parts` are the ids of each batch (None: as the measure says), `first_sequence` the number of the first sequence
    in the whole text, and `keep` holds the states before a block until gradients pass it. Raises ActivationError when
    a gradient is not finite, and InputError for a block without derivatives.
    """
    batches = batches_of(model, ids, batch_size=measure.batch_size) if parts is None else batches_of_parts(model, parts)
    kept = [[measure.start(batch.hidden)] for batch in batches]  # the states before the blocks, then before the head
    layouts = [[Layout(Piece.of(batch.hidden))] for batch in batches]

    def each(function: Callable[[int, T], R], given: Sequence[T], bytes_each: int) -> Iterator[R]:
        pairs = list(enumerate(given))
        return run(lambda pair: function(*pair), pairs, bytes_each) if measure.at_once else starmap(function, pairs)

    def runs(index: int, block: nn.Module) -> list[BlockRun]:
        names = sorted({model.name_in_block(index, matrix) for matrix in matrices[index]})
        weights = {name: block.get_parameter(name).data for name in names}
        blocks = [_twin(block) if len(batches) > 1 and measure.at_once else block for _ in batches]
        pairs = enumerate(zip(blocks, batches, strict=True))
        return [BlockRun(*pair, index, first_sequence + i, weights, model, layouts[i]) for i, pair in pairs]

    def forward(number: int, one: BlockRun) -> Tensor:
        with _differentiating(model.block_name(one.index)):
            return keep(measure.forward(one, kept[number][-1].to(model.device)))

    def backward(number: int, one: BlockRun) -> tuple[Tensor, list[Sample]]:
        state = kept[number].pop().to(model.device)
        with _differentiating(model.block_name(one.index)):
            cotangent, values = measure.backward(one, state, cotangents[number])
        of_block = [(matrix, values[model.name_in_block(one.index, matrix)]) for matrix in matrices[one.index]]
        size = len(one.batch.ids)
        return cotangent, [Sample(m, _checked(m, measure.value(m, value)), size, number) for m, value in of_block]

    for index in range(len(model.blocks)):
        with model.loaded(index) as block, torch.no_grad():
            for i, state in enumerate(each(forward, runs(index, block), pass_bytes(model, block, batches))):
                kept[i].append(state)
    with without_blocks(model) as logits_of:

        def head(number: int, state: Tensor) -> Tensor:
            sequences, length = batches[number].ids.shape
            return measure.head(partial(_mean_loss, logits_of, batches[number]), state, sequences * (length - 1))

        states = [of_batch.pop().to(model.device) for of_batch in kept]
        cotangents = list(each(head, states, logits_bytes(model, batches[0].ids)))
    for index in reversed(range(len(model.blocks))):
        with model.loaded(index) as block:
            for i, found in enumerate(each(backward, runs(index, block), 2 * pass_bytes(model, block, batches))):
                cotangents[i] = found[0]
                yield from found[1]


def _twin(block: nn.Module) -> nn.Module:
    """A block with the same tensors and modules of its own, as hooks and replaced weights are those of a module."""
    return copy.deepcopy(block, {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())})


def _gradient(loss: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
    """The gradient of a function of hidden states that may write to buffers, such as those of longrope."""
    with torch.enable_grad():
        hidden = state.detach().requires_grad_()
        return torch.autograd.grad(loss(hidden), hidden)[0]


WITHOUT_GRADIENTS = (
    "Runs without gradients: --solver admm with --allocator uniform, or with --allocator trace-rank --sensitivity gram."
)


@contextmanager
def _differentiating(name: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # an operation without a derivative, or with one that torch.func cannot use
        raise InputError(f"{name}: its derivatives cannot be computed ({error}). {WITHOUT_GRADIENTS}") from error


def _mean_loss(logits_of: Logits, batch: Batch, hidden: Tensor) -> Tensor:
    return token_losses(logits_of, replace(batch, hidden=hidden)).mean()


def fisher_block_size(num_outputs: int) -> int:
    """B of an output Fisher factor: the largest number up to 256 that divides the outputs."""
    return next(size for size in range(min(num_outputs, LARGEST_FISHER_BLOCK), 0, -1) if num_outputs % size == 0)


def _fisher_factor(gradients: Tensor, tokens: Tensor | None, num_sequences: int, length: int) -> Tensor:
    """The factor (K, B, B) of a matrix from its gradients (T, O).

    That of an expert is a sum over its tokens, divided by the number of all tokens. An expert that is used half as
    often matters half as much.
    """
    if tokens is None:
        return _second_moment(_typical(gradients, num_sequences, length))
    counted = num_sequences * length
    if length > 2:
        gradients, counted = gradients[tokens % length > 0], num_sequences * (length - 1)
    return _second_moment(_shortened(gradients.float()), counted)


def _second_moment(gradients: Tensor, count: int | None = None) -> Tensor:
    """(T, O) -> the blocks (K, B, B) of the sum of g g^T, divided by a count (None: T)."""
    num_tokens, num_outputs = gradients.shape
    count = num_tokens if count is None else count
    size = fisher_block_size(num_outputs)
    blocks = gradients.view(num_tokens, num_outputs // size, size).transpose(0, 1)
    with precise_matmul():
        return blocks.mT @ blocks / max(count, 1)


def _typical(gradients: Tensor, num_sequences: int, length: int) -> Tensor:
    """Gradients of tokens (T, O) float32 without the first of each sequence, and with long ones shortened.

    Many models attend to the first token where they have nothing to attend to, so its values and keys had most of the
    whole gradient. Their mean square stays the same, as plans compare matrices by it.
    """
    gradients = gradients.float()
    # Experts see tokens in an order of their own. The last token has no gradient, so the first may be the only one.
    if len(gradients) == num_sequences * length and length > 2:
        gradients = gradients.view(num_sequences, length, -1)[:, 1:].flatten(0, 1)
    return _shortened(gradients)


def _shortened(gradients: Tensor) -> Tensor:
    """Gradients of tokens (T, O) float32 with long ones shortened, and all of them scaled to the old mean square."""
    norms = torch.linalg.vector_norm(gradients, dim=1)
    some = norms[norms > 0]
    if not len(some):
        return gradients
    longest = some.kthvalue(max(round(TYPICAL * len(some)), 1)).values
    shortened = gradients * (longest / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1.0)[:, None]
    energy = shortened.square().sum()
    return shortened * (norms.square().sum() / energy).sqrt()


def _checked(matrix: Matrix, value: Tensor) -> Tensor:
    if not bool(value.isfinite().all()):
        raise ActivationError(
            f"{matrix.name}: its gradient contains NaN or infinity. Try --dtype float32. {WITHOUT_GRADIENTS}"
        )
    return value


def seed_of(*parts: object) -> int:
    """A seed that depends on all parts and on nothing else (Python's own hash differs between runs)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1
