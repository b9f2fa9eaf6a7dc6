"""The quantized head and embeddings of a run: their grids, their codes, their file, and a model that has them.

8 bits are rounded to nearest. A head of 4 bits gets a sweep by the Gram of what it multiplies.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mspc.errors import InputError
from mspc.formats import layout
from mspc.formats.decoding import strips
from mspc.formats.layout import num_bytes
from mspc.model.outer import OuterMatrix, outer_matrices
from mspc.model.streamed import StreamedModel
from mspc.numerics.linalg import output_error
from mspc.numerics.quant import round_to_nearest
from mspc.passes.blocks import Batch, advance, batches_of
from mspc.passes.head import gram_of_head
from mspc.passes.walk import install, matrix_of
from mspc.planning.solver_options import solver_options
from mspc.progress import Progress
from mspc.settings import AUTO_GROUP_SIZES, Settings
from mspc.solvers import SOLVERS, SolverOptions
from mspc.storage.artifact import MATRICES, read_matrix
from mspc.storage.checkpoint import STORABLE, Over, TensorSource
from mspc.storage.files import sha256_of, write_tensors
from mspc.storage.journal import NAME as JOURNAL
from mspc.storage.journal import Journal
from mspc.storage.manifest import MatrixEntry
from mspc.types import (
    EMBEDDINGS,
    HEAD,
    UNQUANTIZED_BITS,
    Codes,
    CompressedLinear,
    GramStats,
    Grid,
    MatricesByBlock,
    PlannedMatrix,
    Target,
    Unstructured,
)

FILE = f"{MATRICES}/outer.safetensors"
FITTED, SWEPT = 2**22, 2**24
"""Weights whose scales are fitted at a time, and weights of a sweep."""
TIED_DAMP = 1.0
"""Least damping of the sweep where the head is the embeddings as well, whose rows count as they are."""
NEAREST = 8
"""Bits that are rounded to nearest."""
HEADER_BYTES = 250
"""Upper estimate for what the tensors of a matrix add to the header of a safetensors file."""
TOKENS = 2**15
"""Tokens of calibration text for the sweep of a head."""


@dataclass(frozen=True, slots=True)
class PlannedOuter:
    """A matrix outside of the blocks with its grid."""

    outer: OuterMatrix
    grid: Grid
    dtype: torch.dtype
    """Type of the weight in the checkpoint."""

    @property
    def planned(self) -> PlannedMatrix:
        matrix = self.outer.matrix
        return PlannedMatrix(matrix.name, matrix.shape, Target(Unstructured(0.0), self.grid), role=self.outer.role)

    @property
    def is_swept(self) -> bool:
        """True for a head of few bits: to nearest, 4 bits cost a real model a quarter of its perplexity and more."""
        return self.grid.bits < NEAREST and (self.outer.role == HEAD or self.outer.tied is not None)

    @property
    def saved_bytes(self) -> int:
        """Bytes that the grid saves in the sparse export, at least."""
        planned = self.planned
        stored = num_bytes(planned.shape, planned.target, self.dtype, exported=True)
        return planned.numel * self.dtype.itemsize - stored - HEADER_BYTES


def planned_outer(model: StreamedModel, settings: Settings, asked: Iterable[str]) -> list[PlannedOuter]:
    """The matrices to quantize, the embeddings first; `asked` are the options that were given.

    Raises InputError for a model that has no such matrix, and for two numbers of bits for one matrix. If neither option
    was given, such a model keeps them as they are.
    """
    if not settings.quantizes_outer:
        return []
    given = {"head_bits", "embedding_bits"} & set(asked)
    try:
        return _planned_outer(model, settings, both_given=len(given) == 2)
    except InputError:
        if given:
            raise
        return []


def _planned_outer(model: StreamedModel, settings: Settings, both_given: bool) -> list[PlannedOuter]:
    found = outer_matrices(model)
    bits = {EMBEDDINGS: settings.embedding_bits, HEAD: settings.head_bits}
    if found[HEAD] is found[EMBEDDINGS]:
        if both_given and bits[HEAD] != bits[EMBEDDINGS]:
            raise InputError(
                f"head_bits {bits[HEAD]} and embedding_bits {bits[EMBEDDINGS]} contradict each other: head and "
                f"embeddings are one matrix, {found[HEAD].matrix.name}. Give one of the two options."
            )
        bits = {EMBEDDINGS: min(bits.values())}
    return [
        PlannedOuter(found[role], grid_for(settings, found[role], number), dtype_of(model, found[role]))
        for role, number in bits.items()
        if number != UNQUANTIZED_BITS
    ]


def outer_notes(settings: Settings, planned: Sequence[PlannedOuter]) -> list[str]:
    """A note about head and embeddings that nobody asked to quantize, and that mspc cannot."""
    left = settings.quantizes_outer and not planned
    return ["Head and embeddings stay as they are: mspc does not quantize those of this model."] if left else []


def grid_for(settings: Settings, outer: OuterMatrix, bits: int) -> Grid:
    """The grid of a matrix: groups of the size that was asked for, or else the largest of those that divide it."""
    num_inputs, most = outer.matrix.shape[1], settings.group_size
    sizes = [size for size in AUTO_GROUP_SIZES if size <= (most or 0)] if settings.rows_if_needed else [most]
    size = next((size for size in sizes if size is None or num_inputs % size == 0), None)
    if size is None and not settings.rows_if_needed and most is not None:
        raise InputError(
            f"{outer.matrix.name}: group size {most} does not divide its {num_inputs} in features. Choose another "
            "group_size, 'row' or auto, or leave head_bits and embedding_bits out."
        )
    return Grid(bits, size, not settings.asymmetric)


def dtype_of(model: StreamedModel, outer: OuterMatrix) -> torch.dtype:
    """The dtype of a matrix in the checkpoint. Raises InputError for one that artifacts do not hold."""
    name = model.source.types()[model.tensor_key(outer.matrix)][0]
    if name not in STORABLE:
        raise InputError(f"{outer.matrix.name} is stored as {name}; leave head_bits and embedding_bits out.")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def quantize_outer(
    model: StreamedModel, planned: Sequence[PlannedOuter], settings: Settings, folder: Path, journal: Journal,
    progress: Progress, inputs: Callable[[], list[Batch]],
) -> None:  # fmt: skip
    """Quantize every planned matrix of the checkpoint, write them to one file and commit it, unless that was done.

    `model` has the norms of the result. `inputs` makes batches that have passed the compressed blocks.
    """
    if journal.outer is not None or not planned:
        return
    tensors: dict[str, Tensor] = {}
    rows = []
    with progress.stage("Quantizing head and embeddings", len(planned)) as step:
        for one in planned:
            weight = model.read_parameter(one.outer.matrix.parameter).to(model.device)
            stats = gram_of_head(model, inputs()) if one.is_swept else None
            found = rounded(weight, one) if stats is None else swept(weight, one, stats, solver_options(settings))
            stored = layout.as_stored(found, one.dtype)
            packed = layout.pack(stored, one.dtype)
            entry = entry_of(model, one, stored, packed)
            if stats is not None:
                error = output_error(weight.float(), stored.weight.float(), stats.gram)
                precision = str(stored.precision).removeprefix("torch.")
                entry = replace(
                    entry, output_error=error, damp=stored.damp, precision=precision, num_tokens=stats.num_tokens
                )
            rows.append(entry.to_row())
            tensors |= {f"{one.outer.matrix.name}.{part}": tensor for part, tensor in packed.items()}
            step(one.outer.matrix.name)
    write_tensors(folder / FILE, tensors)
    journal.commit({"file": FILE, "sha256": sha256_of(folder / FILE), "matrices": [], "outer": rows})


def rounded(weight: Tensor, one: PlannedOuter) -> CompressedLinear:
    """The matrix (O, I) on its grid, every weight rounded to nearest, with scales of the least squared error."""
    num_rows, num_columns = weight.shape
    parts = []
    for first, last in strips((num_rows, num_columns), FITTED):
        rows = weight[first:last].float()
        mask, importance = torch.ones_like(rows, dtype=torch.bool), torch.ones(num_columns, device=rows.device)
        parts.append(round_to_nearest(rows, mask, importance, one.grid, one.outer.matrix.name))
    codes = Codes(*(torch.cat([getattr(part, name) for part in parts]) for name in ("values", "scales", "zeros")))
    mask = torch.ones((num_rows, num_columns), dtype=torch.bool, device=weight.device)
    return CompressedLinear(weight, mask, one.planned.target, codes)


def swept(weight: Tensor, one: PlannedOuter, stats: GramStats, options: SolverOptions) -> CompressedLinear:
    """The matrix (O, I) by one OBS sweep for the least error of its products, some rows at a time."""
    if one.outer.tied is not None:
        options = replace(options, damp=max(options.damp, TIED_DAMP))
    parts = []
    for first, last in strips((weight.shape[0], weight.shape[1]), SWEPT):
        rows = weight[first:last].float()
        parts.append(SOLVERS["obs"](rows, stats, one.planned.target, options, one.outer.matrix.name))
    codes = [part.codes for part in parts if part.codes is not None]
    whole = Codes(*(torch.cat([getattr(part, name) for part in codes]) for name in ("values", "scales", "zeros")))
    weight, mask = (torch.cat([getattr(part, name) for part in parts]) for name in ("weight", "mask"))
    return CompressedLinear(weight, mask, one.planned.target, whole, parts[0].damp, parts[0].precision)


def inputs_of_head(
    model: StreamedModel, ids: Tensor, matrices: MatricesByBlock, solved: Callable[[int], dict[str, Tensor] | None]
) -> list[Batch]:
    """At most `TOKENS` tokens of sequences (N, T), passed through the solved blocks."""
    batches = batches_of(model, ids[: max(1, TOKENS // ids.shape[1])])
    for index, of_block in enumerate(matrices):
        with model.loaded(index) as block:
            weights = solved(index) or {}
            for matrix in of_block:
                install(matrix_of(model, block, index, matrix), weights[matrix.name])
            advance(model, index, block, batches)
    return batches


def entry_of(
    model: StreamedModel, one: PlannedOuter, stored: CompressedLinear, packed: Mapping[str, Tensor]
) -> MatrixEntry:
    """The entry of a matrix in the manifest."""
    return MatrixEntry(
        address=one.outer.matrix,
        source_key=model.tensor_key(one.outer.matrix),
        target=one.planned.target,
        dtype=one.dtype,
        parts=tuple(packed),
        num_bytes=sum(tensor.nbytes for tensor in packed.values()),
        digest=layout.digest(stored),
        pruned=0,
        zeros=int(torch.count_nonzero(stored.weight == 0)),
        sensitivity=None,
        output_error=None,
        damp=0.0,
        propagation_damp=0.0,
        precision="float32",
        num_tokens=0,
        file=FILE,
        role=one.outer.role,
        tied=one.outer.tied,
    )


class WithOuter(Over):
    """A source with the quantized matrices of an artifact under way in place of its own."""

    def __init__(self, source: TensorSource, folder: Path, entries: Iterable[MatrixEntry]) -> None:
        super().__init__(source)
        self.folder = folder
        self.entries = {entry.source_key: entry for entry in entries}

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for key in keys:
            if key in self.entries:
                yield key, read_matrix(self.folder, self.entries[key]).weight
            else:
                yield from self.source.read([key])


def with_outer(model: StreamedModel, folder: Path, journal: Journal) -> tuple[StreamedModel, list[MatrixEntry]]:
    """The same model with the quantized matrices, and their entries."""
    assert journal.outer is not None
    entries = [MatrixEntry.from_row(row, folder / JOURNAL) for row in journal.outer["outer"]]
    source = WithOuter(model.source, folder, entries)
    eager = model.model.config._attn_implementation == "eager"
    return StreamedModel(source, model.config, model.device, model.dtype, eager), entries
