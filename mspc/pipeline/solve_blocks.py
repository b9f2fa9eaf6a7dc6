"""Walk through a model, solve every matrix by the plan, and commit each block while the next one is solved."""

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mspc import ranks
from mspc.errors import ActivationError
from mspc.formats import layout
from mspc.formats.decoding import check_indices
from mspc.formats.targets import target_to_dict
from mspc.memory import free_memory
from mspc.model.streamed import StreamedModel
from mspc.numerics.linalg import output_error
from mspc.numerics.zeros import mask_of
from mspc.passes.blocks import Batch
from mspc.passes.together import FEW, Visit, independent
from mspc.passes.walk import install, matrix_of, walk
from mspc.pipeline.few_tokens import few_tokens_notes
from mspc.pipeline.reconstruct import reconstruct
from mspc.pipeline.sharing import check_equal
from mspc.planning.solver_options import solver_options
from mspc.progress import log
from mspc.settings import ALL, Settings
from mspc.solvers import SOLVERS, STEPS, SolverOptions
from mspc.solvers.error_compensation import compensated
from mspc.solvers.quadratic import solver_bytes
from mspc.solvers.rounding import Rounds, largest_batch, together
from mspc.storage.artifact import MATRICES, read_matrix
from mspc.storage.files import sha256_of, write_tensors
from mspc.storage.journal import NAME as JOURNAL
from mspc.storage.journal import Journal
from mspc.storage.manifest import MatrixEntry
from mspc.threads import fitting, run
from mspc.types import Codes, CompressedLinear, GramStats, MatricesByBlock, Matrix, PlannedMatrix

TOLD = ("output_error", "propagation_damp", "num_tokens", "borrowed_tokens", "routed_tokens")
CODES = ("values", "scales", "zeros")
"""Fields of `SolvedMatrix` and of `Codes` that ranks tell each other."""


@dataclass(frozen=True)
class SolvedMatrix:
    """A matrix that is solved and installed, but not committed yet."""

    matrix: Matrix
    planned: PlannedMatrix
    stored: CompressedLinear
    """The matrix as it is stored, on the solver's device."""
    output_error: float
    propagation_damp: float
    num_tokens: int
    borrowed_tokens: int = 0
    routed_tokens: int | None = None

    def row(self) -> dict[str, Any]:
        """The values that are known before the matrix is packed, under their names in the manifest."""
        return {
            "name": self.matrix.name,
            "shape": list(self.matrix.shape),
            **target_to_dict(self.planned.target),
            "sensitivity": self.planned.sensitivity,
            "output_error": self.output_error,
            "damp": self.stored.damp,
            "propagation_damp": self.propagation_damp,
            "num_tokens": self.num_tokens,
        }

    def with_weight(self, weight: Tensor, dense: Tensor, gram: Tensor) -> "SolvedMatrix":
        """Replace the weight (O, I) and keep the mask; `dense` is the original weight in float32."""
        stored = layout.as_stored(replace(self.stored, weight=weight), self.stored.weight.dtype)
        return replace(self, stored=stored, output_error=output_error(dense, stored.weight.float(), gram))


def solve_blocks(
    model: StreamedModel,
    batches: Sequence[Batch],
    matrices: MatricesByBlock,
    plan: Sequence[PlannedMatrix],
    settings: Settings,
    folder: Path,
    journal: Journal,
    *,
    dense: Sequence[Batch] = (),
    fisher: dict[str, Tensor] | None = None,
    spill: Path | None = None,
) -> Generator[SolvedMatrix]:
    """Yield each matrix when it is solved. Blocks that the journal holds are installed, not solved again.

    `dense` are the batches once more, for propagation and reconstruction, which keeps activations in `spill`. `fisher`
    holds the Fisher factors by matrix name. A thread packs, writes and commits each block while the next is solved; its
    errors are raised here at the next commit. It ends with this generator, so close one that is not used up.
    """
    planned, options = {matrix.name: matrix for matrix in plan}, solver_options(settings)
    solved, grams = dict[Matrix, SolvedMatrix](), dict[Matrix, Tensor]()

    def commit(block: int, **more: Any) -> None:
        writer.submit(commit_block, model, block, list(solved.values()), folder, journal, more)
        solved.clear()
        grams.clear()

    def on_block_end(index: int, block: nn.Module, dense_block: nn.Module) -> None:
        begin, parts = time.monotonic(), []
        masks = {matrix: found.stored.mask for matrix, found in solved.items()}
        for part in reconstruct(
            model, index, (block, dense_block), (batches, dense), masks, settings.reconstruct, settings.seed, spill
        ):
            for matrix, weight in part.weights.items():
                dense_weight = matrix_of(model, dense_block, index, matrix).float()
                solved[matrix] = solved[matrix].with_weight(weight, dense_weight, grams[matrix])
                install(matrix_of(model, block, index, matrix), solved[matrix].stored.weight)
            parts.append(part.to_dict())
        commit(index, reconstruction=parts, seconds=time.monotonic() - begin)

    def solve(visits: Sequence[Visit]) -> list[SolvedMatrix]:
        return solve_together(model, visits, planned, settings, options, fisher)

    at_end = on_block_end if settings.reconstruct else None
    with Writer() as writer:
        known, all_tokens = solved_weights(folder, journal), settings.route == ALL
        visits = walk(model, batches, matrices, known, dense=dense, all_tokens=all_tokens, finish=at_end)
        for few in independent(visits, matrices):
            solutions = solve_few(few, solve, planned, num_together(few[0].matrix, settings, model.device))
            for visit, found in zip(few, solutions, strict=True):
                solved[visit.matrix] = found
                if settings.reconstruct:
                    grams[visit.matrix] = visit.stats.gram
                elif visit.is_last_of_block:
                    commit(visit.block)
                yield found
        writer.wait()
        for note in few_tokens_notes(row for entry in journal.blocks for row in entry["matrices"]):
            log.warning(note)


def num_together(matrix: Matrix, settings: Settings, device: torch.device) -> int:
    """The number of matrices like this one that are solved as one batch, at most. No byte depends on it."""
    if matrix.index is None or settings.solver not in STEPS:
        return 1
    return min(FEW, largest_batch(matrix.shape, device))


def solve_few(
    few: Sequence[Visit],
    solve: Callable[[Sequence[Visit]], list[SolvedMatrix]],
    planned: dict[str, PlannedMatrix],
    most: int,
) -> Iterable[SolvedMatrix]:
    """Solve matrices that do not read each other, up to `most` as one batch.

    Threads share the batches; ranks share the matrices, or else the rows of a single one.
    """
    bytes_each = max(solver_bytes(visit.matrix.shape) for visit in few)

    def solved(visits: Sequence[Visit]) -> Iterable[SolvedMatrix]:
        memory = free_memory(few[0].weight.device) // 4
        size = max(1, min(most, -(-len(visits) // fitting(bytes_each)), memory // bytes_each))
        batches = [visits[start : start + size] for start in range(0, len(visits), size)]
        return chain.from_iterable(run(solve, batches, size * bytes_each))

    if ranks.size() == 1:
        return solved(few)
    if len(few) == 1:
        with ranks.together():
            (found,) = solve(few)
        check_equal(few[0].matrix.name, layout.digest(found.stored))
        return [found]
    owners = ranks.owners([visit.matrix.numel for visit in few])
    own = [visit for visit, owner in zip(few, owners, strict=True) if owner == ranks.rank()]
    by_matrix = dict(zip((visit.matrix for visit in own), solved(own), strict=True))
    return [_from(owner, visit, by_matrix.get(visit.matrix), planned) for visit, owner in zip(few, owners, strict=True)]


def _from(owner: int, visit: Visit, solved: SolvedMatrix | None, planned: dict[str, PlannedMatrix]) -> SolvedMatrix:
    """The matrix as its owner solved it, installed."""
    told: Any = None
    tensors: dict[str, Tensor] = {}
    if solved is not None:
        stored = solved.stored
        told = {name: getattr(solved, name) for name in TOLD} | {
            "damp": stored.damp,
            "precision": str(stored.precision),
        }
        tensors = {"weight": stored.weight, "mask": stored.mask}
        tensors |= {name: getattr(stored.codes, name) for name in CODES if stored.codes is not None}
    told, tensors = ranks.from_rank(owner, told, tensors)
    if solved is not None:
        return solved
    target = planned[visit.matrix.name].target
    codes = Codes(*(tensors[name] for name in CODES)) if target.grid is not None else None
    precision = getattr(torch, told.pop("precision").removeprefix("torch."))
    stored = CompressedLinear(tensors["weight"], tensors["mask"], target, codes, told.pop("damp"), precision)
    install(visit.weight, stored.weight)
    return SolvedMatrix(visit.matrix, planned[visit.matrix.name], stored, **told)


class Writer:
    """A thread that commits blocks, one after the other. At most one waits, which bounds the memory."""

    def __init__(self) -> None:
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit")
        self.pending: Future[None] | None = None

    def submit(self, work: Callable[..., None], *arguments: Any) -> None:
        """Hand over a block. Raises the error of the block before."""
        self.wait()
        self.pending = self.executor.submit(work, *arguments)

    def wait(self) -> None:
        if self.pending is not None:
            self.pending.result()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.executor.shutdown()  # waits
        if kind in (None, GeneratorExit):  # other errors go first
            self.wait()


def solved_weights(folder: Path, journal: Journal) -> Callable[[int], dict[str, Tensor] | None]:
    """Make a function that reads the weights of a block by matrix name, or returns None for one not yet committed."""
    rows_of = {entry["block"]: entry["matrices"] for entry in journal.results}

    def weights(block: int) -> dict[str, Tensor] | None:
        if block not in rows_of:
            return None
        entries = [MatrixEntry.from_row(row, folder / JOURNAL) for row in rows_of[block]]
        return {entry.name: read_matrix(folder, entry).weight for entry in entries}

    return weights


def solve_together(
    model: StreamedModel,
    visits: Sequence[Visit],
    planned: dict[str, PlannedMatrix],
    settings: Settings,
    options: SolverOptions,
    fisher: dict[str, Tensor] | None,
) -> list[SolvedMatrix]:
    """Solve and install matrices that do not read each other.

    What is installed, judged and later exported is what will be stored, not what the solver held.
    """
    under_way = []
    for visit in visits:
        name, weight = visit.matrix.name, visit.weight.float().clone()
        factor = fisher[name].to(weight.device) if fisher else None
        stats = replace(visit.stats, output_fisher=factor)
        wanted, propagation_damp = compensated(weight, stats, settings.propagation, options.damp, name)
        steps = solver_steps(model, visit, planned[name], wanted, stats, settings, options)
        under_way.append((visit, weight, propagation_damp, steps))
    solutions = together([steps for *_, steps in under_way])
    return [
        stored_and_installed(model, visit, planned[visit.matrix.name], weight, solution, propagation_damp)
        for (visit, weight, propagation_damp, _), solution in zip(under_way, solutions, strict=True)
    ]


def stored_and_installed(
    model: StreamedModel, visit: Visit, planned: PlannedMatrix, weight: Tensor, solution: CompressedLinear,
    propagation_damp: float,
) -> SolvedMatrix:  # fmt: skip
    """Install a solution as it is stored. `weight` is the original one in float32."""
    name, dtype, stats = visit.matrix.name, model.source_dtypes[visit.matrix.parameter], visit.stats
    stored = layout.as_stored(solution, dtype)
    if not bool(torch.stack(stored.weight.aminmax()).isfinite().all()):  # NaN is passed on; faster than isfinite
        raise ActivationError(f"{name}: its weights overflow {dtype} after the update. Raise --damp, or use --skip.")
    install(visit.weight, stored.weight)
    error = output_error(weight, stored.weight.float(), stats.gram)
    counts = stats.num_tokens, stats.borrowed_tokens, stats.routed_tokens
    return SolvedMatrix(visit.matrix, planned, stored, error, propagation_damp, *counts)


def solver_steps(
    model: StreamedModel, visit: Visit, planned: PlannedMatrix, wanted: Tensor, stats: GramStats,
    settings: Settings, options: SolverOptions,
) -> Rounds:  # fmt: skip
    """The steps of the solver of a matrix."""
    arguments: list[Any] = [wanted, stats, planned.target, options, visit.matrix.name]
    if settings.keep_zeros:
        source, mask = zeros_of(model, visit, planned)
        if planned.target.grid is None:
            return CompressedLinear(source, mask, planned.target)
        arguments.append(mask)
    if settings.solver in STEPS:
        return (yield from STEPS[settings.solver](*arguments))
    return SOLVERS[settings.solver](*arguments)


def zeros_of(model: StreamedModel, visit: Visit, planned: PlannedMatrix) -> tuple[Tensor, Tensor]:
    """A matrix as it is in the checkpoint, in float32, and the mask of its zeros.

    The checkpoint is read again: the dtype of the passes may make small weights zero.
    """
    source = visit.matrix.read(model.read_parameter(visit.matrix.parameter)).to(visit.weight.device)
    return source.float(), mask_of(source, planned.target.pattern)


def commit_block(
    model: StreamedModel,
    block: int,
    solved: Sequence[SolvedMatrix],
    folder: Path,
    journal: Journal,
    more: dict[str, Any],
) -> None:
    """Pack the matrices of a block, write them to its file and commit it to the journal, with `more` in its entry.

    Only the first rank does. Raises StorageError when the disk is full, and InputError for a matrix whose mask does not
    fit its target.
    """
    if not ranks.is_first():
        return
    file = f"{MATRICES}/{block:05d}.safetensors"
    tensors: dict[str, Tensor] = {}
    rows = []
    for found in solved:
        packed = layout.pack(found.stored, found.stored.weight.dtype)
        entry = entry_of(model, found, packed, file)
        check_packed(packed, entry)
        rows.append(entry.to_row())
        tensors |= {f"{found.matrix.name}.{part}": tensor for part, tensor in packed.items()}
    write_tensors(folder / file, tensors)
    journal.commit({"block": block, "file": file, "sha256": sha256_of(folder / file), "matrices": rows} | more)


def check_packed(packed: dict[str, Tensor], entry: MatrixEntry) -> None:
    """Raise InputError for a matrix whose tensors are not those that its target needs."""
    check_indices(layout.with_offsets(packed, entry.stored, entry.name), entry.stored, entry.name)


def entry_of(model: StreamedModel, solved: SolvedMatrix, packed: dict[str, Tensor], file: str) -> MatrixEntry:
    """The entry of a matrix in the manifest: its address, its tensors, its target, and how well it was solved."""
    stored, planned = solved.stored, solved.planned
    return MatrixEntry(
        address=model.in_source(solved.matrix),
        source_key=model.tensor_key(solved.matrix),
        target=planned.target,
        dtype=stored.weight.dtype,
        parts=tuple(packed),
        num_bytes=sum(tensor.nbytes for tensor in packed.values()),
        digest=layout.digest(stored),
        pruned=solved.matrix.numel - int(torch.count_nonzero(stored.mask)),
        zeros=int(torch.count_nonzero(stored.weight == 0)),  # bools count faster than bfloat16
        sensitivity=planned.sensitivity,
        output_error=solved.output_error,
        damp=stored.damp,
        propagation_damp=solved.propagation_damp,
        precision=str(stored.precision).removeprefix("torch."),
        num_tokens=solved.num_tokens,
        file=file,
        borrowed_tokens=solved.borrowed_tokens,
        routed_tokens=solved.routed_tokens,
        rows=model.rows_of(solved.matrix),
        num_slices=model.num_slices(solved.matrix),
        stacked=model.is_stacked(solved.matrix),
    )
