"""The reverse walk: gradients and Hessian products of the loss, with the weights of one block in memory at a time.

Forward, the input of every block is kept in host memory, one sequence at a time; backward, each block is loaded again,
run again, and passes the gradient of its input to the block before. Hessian products are the same pass on dual
numbers: every value travels with its derivative along a direction z of the weights, so the backward pass carries H z
beside the gradient, and no second-order graph of the whole model is ever built.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp

from mspc.errors import ActivationError, InputError
from mspc.model.streamed import StreamedModel
from mspc.numerics.linalg import precise_matmul
from mspc.passes.blocks import Batch, batches_of, token_losses
from mspc.types import Matrix

Weights = dict[str, Tensor]  # by name within the block
Run = Callable[[Tensor, Weights], Tensor]
State = tuple[Tensor, ...]  # a value, and in the dual pass its derivative along z
Place = tuple[int, int]  # a sequence and a block

LARGEST_BLOCK = 256
"""Of a Fisher factor: the whole of it gained nothing over blocks of this size, which always fit in memory."""


@dataclass(frozen=True)
class Sample:
    """What one sequence says about one matrix, or a batch its Fisher factor (K, B, B). The mean over samples counts."""

    matrix: Matrix
    value: Tensor


class SquaredGradient:
    """The mean squared gradient of each matrix: the diagonal of the empirical Fisher information, averaged."""

    batch_size = 1

    def start(self, hidden: Tensor) -> State:
        return (hidden,)

    def forward(self, run: Run, weights: Weights, state: State, place: Place) -> State:
        return (run(state[0], weights),)

    def head(self, loss: Callable[[Tensor], Tensor], state: State) -> State:
        return (grad(loss)(state[0]),)

    def backward(
        self, run: Run, weights: Weights, state: State, cotangent: State, place: Place
    ) -> tuple[State, Weights]:
        gradient, of_weights = _backward(run, state[0], weights, cotangent[0])
        return (gradient,), {name: g.float().square() for name, g in of_weights.items()}


class FisherFactor:
    """The mean over tokens of g g^T, with g the gradient of a sequence's summed loss at the outputs of a matrix.

    With the Gram of the inputs it is the Kronecker-factored Fisher information of the matrix (Martens and Grosse,
    arXiv:1503.05671). Only blocks of B outputs on its diagonal are kept, (K, B, B). No weight's gradient is computed.
    """

    batch_size = None  # as many sequences as go through a block at once: the gradients of tokens do not mix

    def __init__(self, model: StreamedModel, matrices: Sequence[Sequence[Matrix]]) -> None:
        self.model, self.matrices = model, matrices

    def start(self, hidden: Tensor) -> State:
        return (hidden,)

    def forward(self, run: Run, weights: Weights, state: State, place: Place) -> State:
        return (run(state[0], weights),)

    def head(self, loss: Callable[[Tensor], Tensor], state: State) -> State:
        predicted = state[0].shape[0] * (state[0].shape[1] - 1)  # the loss is a mean over them

        def summed(hidden: Tensor) -> Tensor:
            return predicted * loss(hidden)  # so that nothing vanishes in float16

        return (grad(summed)(state[0]),)

    def backward(
        self, run: Run, weights: Weights, state: State, cotangent: State, place: Place
    ) -> tuple[State, Weights]:
        block, outputs = self.model.blocks[place[1]], dict[str, Tensor]()
        names = [self.model.name_in_block(place[1], matrix) for matrix in self.matrices[place[1]]]

        def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                outputs[name] = output

            return hook

        handles = [block.get_submodule(n.rpartition(".")[0]).register_forward_hook(keep(n)) for n in names]
        try:
            with torch.enable_grad():
                hidden = state[0].detach().requires_grad_()
                result = run(hidden, weights)
                wanted = [outputs[name] for name in names]
                gradient, *of_outputs = torch.autograd.grad(result, [hidden, *wanted], cotangent[0])
        finally:
            for handle in handles:
                handle.remove()
        return (gradient,), {name: _moment(g.flatten(0, -2)) for name, g in zip(names, of_outputs, strict=True)}


class HessianTrace:
    """One Hutchinson sample z * (H z) of each matrix, averaged over its weights, with signs z drawn per sequence.

    z covers all matrices at once; the terms between different matrices have mean zero. The model must have second
    derivatives (`open_model(..., eager=True)`).
    """

    batch_size = 1

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def start(self, hidden: Tensor) -> State:
        return hidden, torch.zeros_like(hidden)

    def forward(self, run: Run, weights: Weights, state: State, place: Place) -> State:
        hidden, along = state
        return jvp(run, (hidden, weights), (along, self._signs(weights, place)))

    def head(self, loss: Callable[[Tensor], Tensor], state: State) -> State:
        return jvp(grad(loss), (state[0],), (state[1],))

    def backward(
        self, run: Run, weights: Weights, state: State, cotangent: State, place: Place
    ) -> tuple[State, Weights]:
        signs = self._signs(weights, place)
        primals, tangents = (state[0], weights, cotangent[0]), (state[1], signs, cotangent[1])
        result = jvp(partial(_backward, run), primals, tangents)
        (gradient, _), (gradient_along, products) = result[0], result[1]
        return (gradient, gradient_along), {name: product * signs[name] for name, product in products.items()}

    def _signs(self, weights: Weights, place: Place) -> Weights:
        """Random signs of every weight of a block; the same when the backward pass asks again."""
        signs = {}
        for name, weight in weights.items():
            generator = torch.Generator().manual_seed(seed_of(self.seed, place, name))
            bits = torch.randint(0, 2, weight.shape, generator=generator, dtype=torch.int8)
            signs[name] = (2 * bits - 1).to(weight)
        return signs


Measure = SquaredGradient | FisherFactor | HessianTrace


def reverse_walk(
    model: StreamedModel,
    ids: Tensor,
    matrices: Sequence[Sequence[Matrix]],
    measure: Measure,
    first_sequence: int = 0,
) -> Iterator[Sample]:
    """Samples of every matrix from `ids` (N, T), last block first: of every sequence, or of batches of equal size.

    Raises ActivationError when a gradient is not finite.
    """
    batches = batches_of(model, ids, batch_size=measure.batch_size)
    kept = [[measure.start(batch.hidden)] for batch in batches]  # the inputs of the blocks, then of the head
    for index in range(len(model.blocks)):
        with model.loaded(index) as block, torch.no_grad():
            weights = _weights(model, index, block, matrices[index])
            for i, (batch, states) in enumerate(zip(batches, kept, strict=True)):
                run = partial(_run, model, block, batch, index)
                place = (first_sequence + i, index)
                with _differentiating(model.block_name(index)):
                    state = measure.forward(run, weights, _on(model.device, states[-1]), place)
                states.append(_on("cpu", state))
    cotangents = []
    with model.loaded_outer():
        for batch, states in zip(batches, kept, strict=True):
            loss = partial(_mean_loss, model, batch)
            cotangents.append(measure.head(loss, _on(model.device, states.pop())))
    for index in reversed(range(len(model.blocks))):
        with model.loaded(index) as block:
            weights = _weights(model, index, block, matrices[index])
            for i, (batch, states) in enumerate(zip(batches, kept, strict=True)):
                run = partial(_run, model, block, batch, index)
                place = (first_sequence + i, index)
                state = _on(model.device, states.pop())
                with _differentiating(model.block_name(index)):
                    cotangents[i], values = measure.backward(run, weights, state, cotangents[i], place)
                for matrix in matrices[index]:
                    yield Sample(matrix, _value(matrix, values[model.name_in_block(index, matrix)], measure))


@contextmanager
def _differentiating(name: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # an operation without a derivative, or with one that torch.func cannot use
        raise InputError(f"{name}: its derivatives cannot be computed ({error}); use --sensitivity gram.") from error


def _run(model: StreamedModel, block: nn.Module, batch: Batch, index: int, hidden: Tensor, weights: Weights) -> Tensor:
    call = batch.calls[index]
    output = functional_call(block, weights, (hidden, *call.args), call.kwargs)
    model.blocks_return_tuples = isinstance(output, tuple)
    return output[0] if isinstance(output, tuple) else output


def _backward(run: Run, hidden: Tensor, weights: Weights, cotangent: Tensor) -> tuple[Tensor, Weights]:
    """Gradients of the block's input and of its weights."""
    pull_back = vjp(run, hidden, weights)[1]
    return pull_back(cotangent)


def _mean_loss(model: StreamedModel, batch: Batch, hidden: Tensor) -> Tensor:
    return token_losses(model, batch.ids, hidden).mean()


def fisher_block(num_outputs: int) -> int:
    """B of a Fisher factor: the largest number up to 256 that divides the outputs."""
    return next(size for size in range(min(num_outputs, LARGEST_BLOCK), 0, -1) if num_outputs % size == 0)


def _moment(gradients: Tensor) -> Tensor:
    """(T, O) -> the blocks (K, B, B) of the mean of g g^T."""
    num_tokens, num_outputs = gradients.shape
    blocks = gradients.float().view(num_tokens, -1, fisher_block(num_outputs)).transpose(0, 1)
    with precise_matmul():
        return blocks.mT @ blocks / num_tokens


def _value(matrix: Matrix, values: Tensor, measure: Measure) -> Tensor:
    """A Fisher factor as it is; what is given for each weight is averaged over the weights."""
    value = values if isinstance(measure, FisherFactor) else matrix.read(values).double().mean()
    if not bool(value.isfinite().all()):
        raise ActivationError(
            f"{matrix.name}: its gradient contains NaN or infinity; try --dtype float32, or --sensitivity gram."
        )
    return value


def _weights(model: StreamedModel, index: int, block: nn.Module, matrices: Sequence[Matrix]) -> Weights:
    names = {model.name_in_block(index, matrix) for matrix in matrices}
    return {name: block.get_parameter(name).data for name in sorted(names)}


def _on(device: torch.device | str, state: State) -> State:
    return tuple(part.to(device) for part in state)


def seed_of(*parts: object) -> int:
    """A seed that depends on all parts and on nothing else (Python's own hash differs between runs)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1
