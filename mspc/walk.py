"""The walk: every matrix of a model in execution order, with the statistics of its input. The only loop over blocks
that compresses.

A caller that installs a new weight before it resumes makes every later matrix see compressed activations; one that
does not, measures the dense model. Which matrices read the same input (q, k and v; gate and up) is found by running
the block, not from a table of architectures; they share one Gram.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mspc.blocks import Batch, advance, run_block
from mspc.errors import InputError
from mspc.linalg import check_finite, precise_matmul
from mspc.models import StreamedModel
from mspc.types import GramStats, Matrix


@dataclass(frozen=True)
class Visit:
    """One matrix of a loaded block. `weight` (O, I) is a view of the parameter in the model's precision."""

    matrix: Matrix
    weight: Tensor
    stats: GramStats
    block: int
    is_last_of_block: bool


def walk(
    model: StreamedModel,
    batches: Sequence[Batch],
    matrices: Sequence[Sequence[Matrix]],
    known: Callable[[int], dict[str, Tensor] | None] = lambda block: None,
) -> Iterator[Visit]:
    """Visit the matrices of every block; `batches` end as the outputs of the last block.

    `known(i)` may give the weights of block i by matrix name, if they were solved before: they are installed and the
    block is passed without a visit.
    """
    for index, of_block in enumerate(matrices):
        with model.loaded(index) as block:
            solved = known(index)
            if solved is None:
                yield from _visits(model, index, block, batches, of_block)
            else:
                for matrix in of_block:
                    install(matrix_of(model, block, index, matrix), solved[matrix.name])
            advance(model, index, block, batches)


def install(weight: Tensor, compressed: Tensor) -> None:
    """Write a matrix (O, I) into the model; the only function that does."""
    with torch.no_grad():
        weight.copy_(compressed)


def matrix_of(model: StreamedModel, block: nn.Module, index: int, matrix: Matrix) -> Tensor:
    return matrix.read(block.get_parameter(model.name_in_block(index, matrix)).data)


def _visits(
    model: StreamedModel, index: int, block: nn.Module, batches: Sequence[Batch], matrices: Sequence[Matrix]
) -> Iterator[Visit]:
    groups = read_groups(model, index, block, batches[0], matrices)
    left = len(matrices)
    for group in groups:
        stats = collect(model, index, block, batches, group[0])
        for matrix in group:
            left -= 1
            yield Visit(matrix, matrix_of(model, block, index, matrix), stats, index, left == 0)


class _Seen(Exception):
    """Raised to leave a block once its later part cannot matter."""


def read_groups(
    model: StreamedModel, index: int, block: nn.Module, batch: Batch, matrices: Sequence[Matrix]
) -> list[list[Matrix]]:
    """Matrices that read the same input, in execution order, found by running the block on one batch."""
    inputs: list[Tensor] = []  # kept alive, so that no address is used twice
    groups: dict[tuple[Any, ...], list[Matrix]] = {}

    def note(matrix: Matrix) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if any(matrix in seen for seen in groups.values()):
                raise InputError(
                    f"{matrix.name}: used more than once in its block, so it has no one input; leave it dense with "
                    "--skip REGEX."
                )
            x = args[0]
            inputs.append(x)
            groups.setdefault((x.data_ptr(), x.shape, x.stride(), x._version), []).append(matrix)

        return hook

    with torch.no_grad(), hooks(model, index, block, {matrix: note(matrix) for matrix in matrices}):
        run_block(model, block, batch.hidden.to(model.device), batch.calls[index])
    reached = {matrix for group in groups.values() for matrix in group}
    missed = [matrix.name for matrix in matrices if matrix not in reached]
    if missed:
        raise InputError(
            f"{', '.join(missed)}: never called in a forward pass, so nothing is known of the input; leave such "
            "matrices dense with --skip REGEX."
        )
    return list(groups.values())


def collect(model: StreamedModel, index: int, block: nn.Module, batches: Sequence[Batch], matrix: Matrix) -> GramStats:
    """The Gram of the input of one matrix over all batches, in float32 with full-precision products."""
    size = matrix.shape[1]
    gram = torch.zeros(size, size, device=model.device)
    tokens = 0

    def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal tokens
        x = args[0].detach().reshape(-1, size).float()
        gram.addmm_(x.T, x)
        tokens += len(x)
        raise _Seen

    with torch.no_grad(), precise_matmul(), hooks(model, index, block, {matrix: add}):
        for batch in batches:
            try:
                run_block(model, block, batch.hidden.to(model.device), batch.calls[index])
            except _Seen:
                continue
    stats = GramStats(gram, tokens)
    check_finite(stats, matrix.name)
    return stats


@contextmanager
def hooks(
    model: StreamedModel,
    index: int,
    block: nn.Module,
    of_matrix: dict[Matrix, Callable[[nn.Module, tuple[Tensor, ...]], None]],
) -> Iterator[None]:
    """Forward pre-hooks on the modules of matrices; they are gone afterwards, whatever happens."""
    handles = []
    try:
        for matrix, hook in of_matrix.items():
            module = block.get_submodule(model.name_in_block(index, matrix).rpartition(".")[0])
            handles.append(module.register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
