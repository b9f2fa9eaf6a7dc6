"""The reverse walk: gradients and Hessian products of the loss, with the weights of one block in memory at a time.

Forward, the input of every block is kept (one sequence at a time, in host memory); backward, each block is loaded
again, run again with gradients on, and passes the gradient of its input to the block before. Hessian products are the
same pass on dual numbers: every value travels with its derivative along a direction z of the weights, so the backward
pass carries H z beside the gradient, without a second-order graph of the whole model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

from mspc.blocks import Batch, batches_of, run_block, token_losses
from mspc.errors import ActivationError
from mspc.models import StreamedModel
from mspc.types import Matrix

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Sample:
    """One number of one sequence about one matrix, to be averaged."""

    matrix: Matrix
    value: float


def squared_gradients(model: StreamedModel, ids: Tensor, matrices: Sequence[Sequence[Matrix]]) -> Iterator[Sample]:
    """The mean squared gradient of every matrix for every sequence (N, T): the diagonal Fisher information."""
    batches = batches_of(model, ids, batch_size=1)
    inputs = [[batch.hidden] for batch in batches]  # of every block, then of the head
    for index in range(len(model.blocks)):
        with model.loaded(index) as block, torch.no_grad():
            for batch, states in zip(batches, inputs, strict=True):
                hidden = run_block(model, block, states[-1].to(model.device), batch.calls[index])
                states.append(hidden.cpu())
    cotangents = []
    with model.loaded_outer():
        for batch, states in zip(batches, inputs, strict=True):
            hidden = states.pop().to(model.device).requires_grad_()
            (cotangent,) = torch.autograd.grad(token_losses(model, batch.ids, hidden).mean(), hidden)
            cotangents.append(cotangent)
    for index in reversed(range(len(model.blocks))):
        with model.loaded(index) as block:
            weights = _weights(model, index, block, matrices[index])
            for i, (batch, states) in enumerate(zip(batches, inputs, strict=True)):
                function = partial(_run, model, block, batch, index)
                hidden = states.pop().to(model.device)
                _, backward = vjp(function, hidden, weights)
                cotangents[i], gradients = backward(cotangents[i])
                yield from _samples(matrices[index], model, index, {k: g.square() for k, g in gradients.items()})


def hessian_traces(
    model: StreamedModel, ids: Tensor, matrices: Sequence[Sequence[Matrix]], seed: int
) -> Iterator[Sample]:
    """One Hutchinson sample of the mean Hessian trace, mean of z * (H z), per matrix and sequence (N, T).

    The signs z are drawn anew for every sequence and all matrices at once; the cross terms between matrices have mean
    zero. The attention must be one with second derivatives (eager).
    """
    batches = batches_of(model, ids, batch_size=1)
    inputs = [[(batch.hidden, torch.zeros_like(batch.hidden))] for batch in batches]
    for index in range(len(model.blocks)):
        with model.loaded(index) as block, torch.no_grad():
            weights = _weights(model, index, block, matrices[index])
            for i, (batch, states) in enumerate(zip(batches, inputs, strict=True)):
                signs = _signs(weights, seed, i, index)
                primals = (states[-1][0].to(model.device), weights)
                tangents = (states[-1][1].to(model.device), signs)
                hidden, along = jvp(partial(_run, model, block, batch, index), primals, tangents)
                states.append((hidden.cpu(), along.cpu()))
    cotangents = []
    with model.loaded_outer():
        for batch, states in zip(batches, inputs, strict=True):
            hidden, along = (part.to(model.device) for part in states.pop())
            gradient = torch.func.grad(lambda h, batch=batch: token_losses(model, batch.ids, h).mean())
            cotangents.append(jvp(gradient, (hidden,), (along,)))
    for index in reversed(range(len(model.blocks))):
        with model.loaded(index) as block:
            weights = _weights(model, index, block, matrices[index])
            for i, (batch, states) in enumerate(zip(batches, inputs, strict=True)):
                signs = _signs(weights, seed, i, index)
                hidden, along = (part.to(model.device) for part in states.pop())
                backward = partial(_backward, partial(_run, model, block, batch, index))
                primals, tangents = (hidden, weights, cotangents[i][0]), (along, signs, cotangents[i][1])
                (cotangent, _), (cotangent_along, products) = jvp(backward, primals, tangents)
                cotangents[i] = (cotangent, cotangent_along)
                yield from _samples(matrices[index], model, index, {k: products[k] * signs[k] for k in products})


def _run(model: StreamedModel, block: nn.Module, batch: Batch, index: int, hidden: Tensor, weights: Weights) -> Tensor:
    call = batch.calls[index]
    output = functional_call(block, weights, (hidden, *call.args), call.kwargs)
    model.blocks_return_tuples = isinstance(output, tuple)
    return output[0] if isinstance(output, tuple) else output


def _backward(function, hidden: Tensor, weights: Weights, cotangent: Tensor) -> tuple[Tensor, Weights]:
    _, backward = vjp(function, hidden, weights)
    return backward(cotangent)


def _weights(model: StreamedModel, index: int, block: nn.Module, matrices: Sequence[Matrix]) -> Weights:
    return {m.parameter: block.get_parameter(_local(model, index, m)).data for m in matrices}
