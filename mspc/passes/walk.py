"""The walk: every matrix of a model in execution order, with the statistics of its input. The only loop over blocks
that compresses.

A caller that installs a new weight before it resumes makes every later matrix see compressed activations; one that
does not, measures the dense model. With a second stream of batches, the dense model walks beside it, and the statistics
also say how far the inputs have drifted from the dense ones.

Every batch passes a block once: it stops where a matrix reads its input, and goes on when the caller does.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mspc.errors import InputError
from mspc.memory import free_memory
from mspc.model.streamed import StreamedModel
from mspc.numerics.linalg import add_gram, check_finite, precise_matmul, symmetrize
from mspc.passes.blocks import Batch, advance, arrive, batches_of, run_block
from mspc.passes.paused import Passage, Stop, stops
from mspc.types import GramStats, Matrix

BUFFERS_HELD = 3
"""A suspended pass holds at most about so many activations of the width of the widest input."""


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
    *,
    dense: Sequence[Batch] = (),
    memory: int | None = None,
    finish: Callable[[int, nn.Module, nn.Module], None] | None = None,
) -> Iterator[Visit]:
    """Visit the matrices of every block; `batches` end as the outputs of the last block.

    `known(i)` may give the weights of block i by matrix name, if they were solved before: they are installed and the
    block is passed without a visit. `dense` are the same batches on their way through the dense model. Passes are
    suspended in up to `memory` bytes (None: half of what is free). `finish(i, block, dense_block)` is called after the
    visits of block i, before any batch leaves it, and may change its weights.
    """
    for index, of_block in enumerate(matrices):
        with model.loaded(index) as block:
            dense_block = copy.deepcopy(block) if dense else block
            solved = known(index)
            if solved is None:
                kept = _num_kept(model, batches, of_block, memory) // (2 if dense else 1)
                yield from _Block(model, index, block, dense_block, of_block, finish).visits(batches, dense, kept)
            else:
                for matrix in of_block:
                    install(matrix_of(model, block, index, matrix), solved[matrix.name])
                advance(model, index, block, batches)
                advance(model, index, dense_block, dense)


class DenseWalk:
    """The visits of a walk on which nothing is changed, as often as they are wanted.

    The model is passed once if all statistics fit in a quarter of the free memory, where they are kept; else each time.
    A solver keeps a normalized Gram and its eigenvectors beside each.
    """

    def __init__(self, model: StreamedModel, ids: Tensor, matrices: Sequence[Sequence[Matrix]]) -> None:
        self.model, self.ids, self.matrices = model, ids, matrices
        self.kept: list[list[tuple[Matrix, GramStats]]] = []

    def __iter__(self) -> Iterator[Visit]:
        return self._again() if self.kept else self._pass()

    def _pass(self) -> Iterator[Visit]:
        grams = 4 * sum(
            matrix.shape[1] ** 2 for of_block in self.matrices for matrix in of_block
        )  # or less: some share
        seen: list[list[tuple[Matrix, GramStats]]] = [[] for _ in self.matrices]
        keep = 3 * grams <= free_memory(self.model.device) // 4
        for visit in walk(self.model, batches_of(self.model, self.ids), self.matrices):
            if keep:
                seen[visit.block].append((visit.matrix, visit.stats))
            yield visit
        self.kept = seen if keep else []

    def _again(self) -> Iterator[Visit]:
        for index, of_block in enumerate(self.kept):
            with self.model.loaded(index) as block:
                for number, (matrix, stats) in enumerate(of_block, 1):
                    yield Visit(
                        matrix, matrix_of(self.model, block, index, matrix), stats, index, number == len(of_block)
                    )


def install(weight: Tensor, compressed: Tensor) -> None:
    """Write a matrix (O, I) into the model; the only function that does."""
    with torch.no_grad():
        weight.copy_(compressed)


def matrix_of(model: StreamedModel, block: nn.Module, index: int, matrix: Matrix) -> Tensor:
    return matrix.read(block.get_parameter(model.name_in_block(index, matrix)).data)


def _num_kept(model: StreamedModel, batches: Sequence[Batch], matrices: Sequence[Matrix], memory: int | None) -> int:
    """How many batches can be suspended in a block at once, by the widest thing that a suspended pass holds."""
    if memory is None:
        memory = free_memory(model.device) // 2
    width = max((matrix.shape[1] for matrix in matrices), default=0)
    bytes_each = BUFFERS_HELD * width * batches[0].ids.numel() * model.dtype.itemsize
    return memory // max(bytes_each, 1)


@dataclass(frozen=True)
class _Block:
    """A loaded block on its way; `dense_block` is a copy that stays as it was."""

    model: StreamedModel
    index: int
    block: nn.Module
    dense_block: nn.Module
    matrices: Sequence[Matrix]
    finish: Callable[[int, nn.Module, nn.Module], None] | None

    def visits(self, batches: Sequence[Batch], dense: Sequence[Batch], num_kept: int) -> Iterator[Visit]:
        seen: list[Matrix] = []
        with ExitStack() as stack:
            passages = stack.enter_context(self.passages(self.block, batches, num_kept))
            beside = stack.enter_context(self.passages(self.dense_block, dense, num_kept)) if dense else []
            read, stats = torch.empty(0), GramStats(torch.empty(0), 0)
            while isinstance(stop := passages[0].stop(len(seen)), tuple):
                matrix, inputs = stop
                self.check_new(matrix, seen)
                if not _same(inputs, read):
                    stats = self.collect(matrix, len(seen), passages, beside)
                read = inputs  # kept alive, so that no address is used twice
                seen.append(matrix)
                weight = matrix_of(self.model, self.block, self.index, matrix)
                yield Visit(matrix, weight, stats, self.index, len(seen) == len(self.matrices))
            self.check_all(seen)
            if self.finish is None or not self.matrices:
                self.arrive(batches, passages, dense, beside)
                return
        # The suspended passes are gone: what they hold was computed with weights that may change now.
        self.finish(self.index, self.block, self.dense_block)
        advance(self.model, self.index, self.block, batches)
        advance(self.model, self.index, self.dense_block, dense)

    def arrive(
        self, batches: Sequence[Batch], passages: Sequence[Passage], dense: Sequence[Batch], beside: Sequence[Passage]
    ) -> None:
        """Let all suspended passes go on to the end of the block."""
        for batch, passage in (*zip(batches, passages, strict=True), *zip(dense, beside, strict=True)):
            output = passage.stop(len(self.matrices))
            if isinstance(output, tuple):
                raise self.other_order(output[0])
            arrive(self.model, self.index, batch, output)
            passage.close()

    @contextmanager
    def passages(self, block: nn.Module, batches: Sequence[Batch], num_kept: int) -> Iterator[list[Passage]]:
        modules = {
            matrix: block.get_submodule(self.model.name_in_block(self.index, matrix).rpartition(".")[0])
            for matrix in self.matrices
        }
        passages = [
            Passage(partial(run_block, self.model, block, batch, self.index), kept=i < max(num_kept, 1))
            for i, batch in enumerate(batches)
        ]
        with stops(modules):
            try:
                yield passages
            finally:
                for passage in passages:
                    passage.close()

    def collect(self, matrix: Matrix, number: int, passages: Sequence[Passage], beside: Sequence[Passage]) -> GramStats:
        """The Gram of what a matrix reads over all batches, in float32 with full-precision products, and its drift."""
        size = matrix.shape[1]
        gram = torch.zeros(size, size, device=self.model.device)
        drift = torch.zeros_like(gram) if beside else None
        tokens = 0
        with precise_matmul():
            for i, passage in enumerate(passages):
                inputs = self.inputs(matrix, passage.stop(number))
                passage.rest()
                add_gram(gram, inputs)
                tokens += len(inputs)
                if drift is not None:
                    drift.addmm_((self.inputs(matrix, beside[i].stop(number)) - inputs).T, inputs)
                    beside[i].rest()
        stats = GramStats(symmetrize(gram), tokens, drift)
        check_finite(stats, matrix.name)
        return stats

    def inputs(self, matrix: Matrix, stop: Stop | Tensor) -> Tensor:
        """What a matrix reads at a stop, as float32 tokens (T, I)."""
        if isinstance(stop, Tensor) or stop[0] != matrix:
            raise self.other_order(matrix)
        return stop[1].detach().reshape(-1, matrix.shape[1]).float()

    def other_order(self, matrix: Matrix) -> InputError:
        return InputError(
            f"{matrix.name}: its block runs its matrices in another order for other text; leave those that are not "
            "always used dense with --skip REGEX."
        )

    def check_new(self, matrix: Matrix, seen: Sequence[Matrix]) -> None:
        if matrix in seen:
            raise InputError(
                f"{matrix.name}: used more than once in its block, so it has no one input; leave it dense with --skip "
                "REGEX."
            )

    def check_all(self, seen: Sequence[Matrix]) -> None:
        missed = [matrix.name for matrix in self.matrices if matrix not in seen]
        if missed:
            raise InputError(
                f"{', '.join(missed)}: never called in a forward pass, so nothing is known of the input; leave such "
                "matrices dense with --skip REGEX."
            )


def _same(one: Tensor, other: Tensor) -> bool:
    return (one.data_ptr(), one.shape, one.stride(), one._version) == (
        other.data_ptr(), other.shape, other.stride(), other._version,
    )  # fmt: skip
