"""The walk: every matrix of a model in execution order, with the statistics of its input.

It is the only loop over blocks that compresses. A caller that installs a new weight at a visit makes every later matrix
see compressed activations; a caller that installs nothing measures the dense model. With a second stream of batches,
the dense model walks along, and the statistics include the difference between dense and actual inputs.

Every batch passes a block once: it pauses before each matrix, and goes on when the caller asks for the next visit.
"""

import copy
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mspc import ranks
from mspc.errors import InputError
from mspc.memory import free_memory
from mspc.model.experts import experts_per_token
from mspc.model.matrices import skip_option
from mspc.model.streamed import StreamedModel
from mspc.numerics.linalg import add_gram, add_product, check_finite, precise_matmul, symmetrize
from mspc.passes.blocks import Batch, advance, arrive, own_batches, pass_bytes, run_block, scores_bytes
from mspc.passes.paused import Pause, PausedForward, pauses_before
from mspc.passes.together import Visit, is_same, same_inputs
from mspc.threads import fitting
from mspc.types import GramStats, Matrix

BUFFERS_HELD = 3
"""Activations, each as wide as the widest input, that a suspended pass holds at most, estimated."""


FEW_TOKENS = 2
"""Tokens per input of an expert below which its Gram has some of its layer's."""


def walk(
    model: StreamedModel,
    batches: Sequence[Batch],
    matrices: Sequence[Sequence[Matrix]],
    known: Callable[[int], dict[str, Tensor] | None] = lambda block: None,
    *,
    dense: Sequence[Batch] = (),
    all_tokens: bool = False,
    memory: int | None = None,
    finish: Callable[[int, nn.Module, nn.Module], None] | None = None,
) -> Iterator[Visit]:
    """Visit the matrices of every block. Afterwards `batches` hold the outputs of the last block.

    With several ranks they are those of this one (`own_batches`), and the statistics are of the whole text.

    `known(i)` returns the weights of block i by matrix name if they were solved before, else None. Known weights are
    installed, and their block is passed without a visit. `dense` are the same batches for the dense model. With
    `all_tokens`, the statistics of every expert are of all tokens; routed ones alone are passed on. Suspended passes
    take up to `memory` bytes (None: half of the free memory, or a quarter where several passes run at once).
    `finish(i, block, dense_block)` is called after the visits of block i, before any batch leaves it, and may change
    its weights.
    """
    alike: Alike = {}
    for index, of_block in enumerate(matrices):
        with model.loaded(index) as block:
            dense_block = copy.deepcopy(block) if dense else block
            solved = known(index)
            if solved is None:
                streams = 2 if dense else 1
                # Twice: running passes take a quarter of the free memory, and suspended ones the other quarter.
                at_once = fitting(2 * pass_bytes(model, block, batches, all_tokens) * streams)
                kept = _num_kept(model, batches, of_block, memory, 2 if at_once == 1 else 4, all_tokens) // streams
                visits = _Block(model, index, block, dense_block, of_block, finish, at_once, alike, all_tokens)
                yield from visits.visits(batches, dense, kept)
            else:
                for matrix in of_block:
                    install(matrix_of(model, block, index, matrix), solved[matrix.name])
                advance(model, index, block, batches)
                advance(model, index, dense_block, dense)


class DenseWalk:
    """The visits of a walk that changes nothing; it can be iterated several times.

    The statistics of the first full iteration are kept if they fit in `memory` bytes (None: a quarter of the free
    memory). Otherwise every iteration passes the model again. Solvers add a normalized Gram, a preconditioner and an
    inverse to each kept Gram, hence the factor 4.
    """

    def __init__(
        self,
        model: StreamedModel,
        ids: Tensor,
        matrices: Sequence[Sequence[Matrix]],
        memory: int | None = None,
        *,
        all_tokens: bool = False,
    ) -> None:
        self.model, self.ids, self.matrices, self.all_tokens = model, ids, matrices, all_tokens
        self.memory = free_memory(model.device) // 4 if memory is None else memory
        self.kept: list[list[tuple[Matrix, GramStats]]] = []

    def __iter__(self) -> Iterator[Visit]:
        return self._again() if self.kept else self._pass()

    def _pass(self) -> Iterator[Visit]:
        # An upper bound: some matrices share their Gram.
        grams = 4 * sum(matrix.shape[1] ** 2 for of_block in self.matrices for matrix in of_block)
        seen: list[list[tuple[Matrix, GramStats]]] = [[] for _ in self.matrices]
        keep = ranks.every(4 * grams <= self.memory)
        for visit in walk(self.model, own_batches(self.model, self.ids), self.matrices, all_tokens=self.all_tokens):
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


def _num_kept(
    model: StreamedModel,
    batches: Sequence[Batch],
    matrices: Sequence[Matrix],
    memory: int | None,
    share: int,
    all_tokens: bool,
) -> int:
    """Number of batches that can be suspended in a block at once, estimated from the widest input.

    They take `memory` bytes, or 1 / `share` of the free memory.
    """
    if memory is None:
        memory = free_memory(model.device) // share
    each = 1 + max((m.index or 0) for m in matrices) if all_tokens and matrices else experts_per_token(model.config)
    width = max((matrix.shape[1] * (1 if matrix.index is None else each) for matrix in matrices), default=0)
    ids = batches[0].ids
    bytes_each = BUFFERS_HELD * width * ids.numel() * model.dtype.itemsize + scores_bytes(model, ids)
    return memory // max(bytes_each, 1)


Alike = dict[Hashable, list[list[str]]]
"""Names in the block of matrices with the same input, by the class of the block and the names of all its matrices."""


class Inputs(NamedTuple):
    """The inputs (T, I) of a matrix in one pass; of an expert, with the ascending numbers (T) of its tokens."""

    inputs: Tensor
    tokens: Tensor | None
    routed: Mapping[int, int]
    """The number of tokens that are routed to each expert of its module."""


@dataclass(frozen=True)
class _Block:
    """A loaded block during its visits. `dense_block` is a copy with the original weights."""

    model: StreamedModel
    index: int
    block: nn.Module
    dense_block: nn.Module
    matrices: Sequence[Matrix]
    finish: Callable[[int, nn.Module, nn.Module], None] | None
    at_once: int
    """Passes that threads and memory allow at once."""
    alike: Alike
    """Found in earlier blocks."""
    all_tokens: bool = False
    layer_means: dict[str, Tensor] = field(default_factory=dict)
    """Results of `of_layer` by parameter."""
    routed: dict[str, list[int]] = field(default_factory=dict)
    """With `all_tokens`, the tokens that are routed to each expert, by the name of the module."""

    def visits(self, batches: Sequence[Batch], dense: Sequence[Batch], num_kept: int) -> Iterator[Visit]:
        seen: list[Matrix] = []
        finish = self.finish if self.matrices else None
        with (
            self.forwards(self.block, batches, num_kept) as forwards,
            self.forwards(self.dense_block, dense, num_kept) as dense_forwards,
        ):
            followers = self.followers(batches)
            previous, stats, ahead = torch.empty(0), GramStats(torch.empty(0), 0), list[Matrix]()
            while isinstance(pause := self.reached(forwards, len(seen), alone=bool(ahead)), tuple):
                matrix, inputs = pause.matrix, pause.inputs
                self.check_new(matrix, seen)
                seen.append(matrix)
                if ahead:
                    if matrix != ahead.pop(0) or not is_same(inputs, previous):
                        raise self.other_order(matrix)
                    continue  # it was visited with the one before
                if not is_same(inputs, previous):
                    stats = self.collect(matrix, len(seen) - 1, forwards, dense_forwards)
                previous = inputs  # kept alive, so that no address is used twice
                ahead = list(followers.get(matrix, ()))
                left = len(self.matrices) - len(seen)
                for i, one in enumerate((matrix, *ahead)):
                    weight = matrix_of(self.model, self.block, self.index, one)
                    yield Visit(one, weight, self.counted(one, stats), self.index, i == left, i < len(ahead))
            self.check_all(seen)
            if finish is None:
                self.complete(batches, forwards)
                self.complete(dense, dense_forwards)
        # The suspended passes are closed here: they were computed with weights that `finish` may change.
        if finish is not None:
            finish(self.index, self.block, self.dense_block)
            advance(self.model, self.index, self.block, batches)
            advance(self.model, self.index, self.dense_block, dense)

    def followers(self, batches: Sequence[Batch]) -> dict[Matrix, list[Matrix]]:
        """For each matrix, those after it that have the same input."""
        by_name = {self.model.name_in_block(self.index, matrix): matrix for matrix in self.matrices}
        kind = type(self.block), *by_name
        if kind not in self.alike:
            forward = partial(run_block, self.model, self.block, batches[0], self.index)
            found = same_inputs(lambda: PausedForward(forward, kept=True), len(self.matrices))
            names = {matrix: name for name, matrix in by_name.items()}
            self.alike[kind] = [[names[matrix] for matrix in group] for group in found]
        return {by_name[first]: [by_name[name] for name in others] for first, *others in self.alike[kind]}

    def reached(self, forwards: Sequence[PausedForward], number: int, *, alone: bool) -> Pause | Tensor:
        """The first pass at a pause, or its output. Unless it is to go `alone`, those collected with it go on, too."""
        started = [forward.start_to(number) for forward in forwards[: 1 if alone else self.at_once] if forward.kept]
        results = [one.result() for one in started]
        return results[0]

    def complete(self, batches: Sequence[Batch], forwards: Sequence[PausedForward]) -> None:
        """Run all suspended passes to the end of the block."""
        for batch, (forward, output) in zip(batches, self.results(forwards, len(self.matrices)), strict=True):
            if isinstance(output, tuple):
                raise self.other_order(output.matrix)
            arrive(self.model, self.index, batch, output)
            forward.close()

    @contextmanager
    def forwards(self, block: nn.Module, batches: Sequence[Batch], num_kept: int) -> Iterator[list[PausedForward]]:
        """One paused forward pass per batch. The first `num_kept` stay suspended at pauses."""
        names = {matrix: self.model.name_in_block(self.index, matrix).rpartition(".")[0] for matrix in self.matrices}
        forwards = [
            PausedForward(
                partial(run_block, self.model, block, batch, self.index), i < max(num_kept, 1), i, batch.chunk
            )
            for i, batch in enumerate(batches)
        ]
        # Without batches, `block` may be the one that other passes run through.
        modules = {matrix: block.get_submodule(name) for matrix, name in names.items()} if batches else {}
        with pauses_before(modules, self.all_tokens):
            try:
                yield forwards
            finally:
                for forward in forwards:
                    forward.close()

    def collect(
        self, matrix: Matrix, number: int, forwards: Sequence[PausedForward], dense_forwards: Sequence[PausedForward]
    ) -> GramStats:
        """The Gram of a matrix's input over all batches, in float32 with full-precision products, and its shift.

        The Gram of an expert that sees few tokens has some of its layer's, unless it is of all tokens.
        """
        size = matrix.shape[1]
        grams, shifts = self.text_sum(size), self.text_sum(size) if dense_forwards else None
        tokens, routed = 0, Counter[int]()
        with precise_matmul():
            passes = self.inputs_of(matrix, number, forwards)
            dense_passes = self.inputs_of(matrix, number, dense_forwards)
            for forward, found in zip(forwards, passes, strict=True):
                add_gram(grams.of(forward.chunk), found.inputs)
                tokens += len(found.inputs)
                routed.update(found.routed)
                if shifts is not None:
                    add_product(shifts.of(forward.chunk), *_difference(next(dense_passes), found))
        gram, shift, tokens = grams.total(), None if shifts is None else shifts.total(), ranks.count(tokens)
        borrows = matrix.index is not None and not self.all_tokens
        borrowed = max(FEW_TOKENS * size - tokens, 0) if borrows else 0
        if self.all_tokens and matrix.index is not None and _owner(matrix) not in self.routed:
            self.routed[_owner(matrix)] = [ranks.count(routed[i]) for i in range(self.model.num_slices(matrix))]
        if borrowed:
            gram.add_(self.of_layer(matrix, number, forwards), alpha=borrowed)
            # Sums over the own tokens, or over one token where an expert sees none. Borrowed tokens have no shift.
            for total in (gram,) if shift is None else (gram, shift):
                total.mul_(max(tokens, 1) / (tokens + borrowed))
        stats = GramStats(symmetrize(gram), tokens, shift, borrowed_tokens=borrowed)
        check_finite(stats, matrix.name)
        return stats

    def counted(self, matrix: Matrix, stats: GramStats) -> GramStats:
        """The statistics with the number of tokens that are routed to the expert, where its Gram is of all."""
        if not self.all_tokens or matrix.index is None:
            return stats
        return replace(stats, routed_tokens=self.routed[_owner(matrix)][matrix.index])

    def of_layer(self, matrix: Matrix, number: int, forwards: Sequence[PausedForward]) -> Tensor:
        """The mean of x x^T over the tokens of all experts of the layer of an expert's matrix."""
        if matrix.parameter in self.layer_means:
            return self.layer_means[matrix.parameter]
        grams, count = self.text_sum(matrix.shape[1]), 0
        with precise_matmul():
            found = self.inputs_of(matrix, number, forwards, of_layer=True)
            for forward, one in zip(forwards, found, strict=True):
                add_gram(grams.of(forward.chunk), one.inputs)
                count += len(one.inputs)
        gram, count = grams.total(), ranks.count(count)
        self.layer_means.clear()  # one is needed at a time
        self.layer_means[matrix.parameter] = gram / max(count, 1)
        return self.layer_means[matrix.parameter]

    def text_sum(self, size: int) -> ranks.TextSum:
        """A sum (I, I) over the text of all ranks."""
        return ranks.TextSum(partial(torch.zeros, size, size, device=self.model.device))

    def results(self, forwards: Sequence[PausedForward], number: int) -> Iterator[tuple[PausedForward, Pause | Tensor]]:
        """Each pass and its `run_to`. As many go on as can run at once, those that are not asked for yet included."""
        left = iter(forwards)
        started = deque((forward, forward.start_to(number)) for forward in islice(left, self.at_once))
        while started:
            forward, reached = started.popleft()
            yield forward, reached.result()
            started.extend((following, following.start_to(number)) for following in islice(left, 1))

    def inputs_of(
        self, matrix: Matrix, number: int, forwards: Sequence[PausedForward], *, of_layer: bool = False
    ) -> Iterator[Inputs]:
        """The inputs of a matrix, the `number`-th of its block, in each pass.

        `of_layer`: those of all experts of the layer of an expert's matrix.
        """
        for forward, pause in self.results(forwards, number):
            inputs = self.inputs(matrix, pause, of_layer)
            forward.discard()
            yield inputs

    def inputs(self, matrix: Matrix, pause: Pause | Tensor, of_layer: bool) -> Inputs:
        """The input of a matrix at a pause, as tokens (T, I)."""
        if isinstance(pause, Tensor) or pause.matrix != matrix:
            raise self.other_order(matrix)
        found = pause.product.everyone() if of_layer and pause.product else pause.inputs
        tokens, routed = (None, {}) if pause.product is None else (pause.product.tokens, pause.product.routed)
        return Inputs(found.detach().reshape(-1, matrix.shape[1]), tokens, routed)

    def other_order(self, matrix: Matrix) -> InputError:
        return InputError(
            f"{matrix.name}: the order in which its block runs its matrices depends on the text. Leave matrices that "
            f"are not always used dense, this one with {self.skip(matrix)}."
        )

    def check_new(self, matrix: Matrix, seen: Sequence[Matrix]) -> None:
        if matrix in seen:
            raise InputError(
                f"{matrix.name}: used more than once in its block, and mspc needs one input per matrix. Leave it dense "
                f"with {self.skip(matrix)}."
            )

    def check_all(self, seen: Sequence[Matrix]) -> None:
        missed = [matrix for matrix in self.matrices if matrix not in seen]
        if missed:
            names = ", ".join(matrix.name for matrix in missed)
            raise InputError(
                f"{names}: never called in a forward pass, so the input is unknown. Leave such matrices dense with "
                f"{self.skip(*missed)}."
            )

    def skip(self, *matrices: Matrix) -> str:
        """The option that leaves these matrices dense, in every block."""
        return skip_option(self.model.name_in_block(self.index, matrix) for matrix in matrices)


def _owner(matrix: Matrix) -> str:
    """The name of the module that has the parameter of a matrix."""
    return matrix.parameter.rpartition(".")[0]


def _difference(wanted: Inputs, actual: Inputs) -> tuple[Tensor, Tensor]:
    """The inputs in the dense model minus the actual ones, and the latter; of an expert, for tokens in both."""
    z, x = wanted.inputs, actual.inputs
    if wanted.tokens is not None and actual.tokens is not None:
        z = z[torch.isin(wanted.tokens, actual.tokens)]
        x = x[torch.isin(actual.tokens, wanted.tokens)]
    return z.float() - x.float(), x
