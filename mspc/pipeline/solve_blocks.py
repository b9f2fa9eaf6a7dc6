"""Walk through a model, solve every matrix by the plan, and commit each block as soon as it is solved."""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mspc.errors import ActivationError
from mspc.formats import layout
from mspc.formats.targets import target_from_dict, target_to_dict
from mspc.model.streamed import StreamedModel
from mspc.numerics.linalg import output_error
from mspc.passes.blocks import Batch
from mspc.passes.walk import Visit, install, matrix_of, walk
from mspc.pipeline.reconstruct import reconstruct
from mspc.planning.solver_options import solver_options
from mspc.settings import Settings
from mspc.solvers import SOLVERS, SolverOptions
from mspc.solvers.error_compensation import compensated
from mspc.storage.artifact import MATRICES, read_matrix
from mspc.storage.files import sha256_of, write_tensors
from mspc.storage.journal import NAME as JOURNAL
from mspc.storage.journal import Journal
from mspc.storage.manifest import MatrixEntry
from mspc.types import CompressedLinear, MatricesByBlock, Matrix, PlannedMatrix


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
) -> Generator[dict[str, Any]]:
    """The row of each matrix in the manifest, when it is solved. Blocks in the journal are installed, not solved again.

    `dense` are the batches once more, for propagation and reconstruction, which keeps activations in `spill`; `fisher`
    the Fisher factors by matrix name.
    """
    planned = {matrix.name: matrix for matrix in plan}
    options = solver_options(settings)
    solved: dict[Matrix, Solved] = {}

    def commit(block: int, **more: Any) -> None:
        file = f"{MATRICES}/{block:05d}.safetensors"
        for of in solved.values():
            of.row["file"] = file
        write_tensors(
            folder / file, {f"{m.name}.{part}": t for m, of in solved.items() for part, t in of.tensors.items()}
        )
        rows, digest = [of.row for of in solved.values()], sha256_of(folder / file)
        journal.commit({"block": block, "file": file, "sha256": digest, "matrices": rows} | more)
        solved.clear()

    def finish(index: int, block: nn.Module, dense_block: nn.Module) -> None:
        begin, parts = time.monotonic(), []
        masks = {matrix: of.read().mask for matrix, of in solved.items()}
        for part in reconstruct(
            model, index, (block, dense_block), (batches, dense), masks, settings.reconstruct, settings.seed, spill
        ):
            for matrix, weight in part.weights.items():
                dense_weight = matrix_of(model, dense_block, index, matrix).float()
                install(matrix_of(model, block, index, matrix), solved[matrix].replace(weight, dense_weight))
            parts.append(part.to_dict())
        commit(index, reconstruction=parts, seconds=time.monotonic() - begin)

    known, at_end = _committed(folder, journal.blocks), finish if settings.reconstruct else None
    for visit in walk(model, batches, matrices, known, dense=dense, finish=at_end):
        matrix = visit.matrix
        factor = fisher[matrix.name].to(visit.weight.device) if fisher else None
        row, tensors = solve_one(model, visit, planned[matrix.name], settings, options, factor)
        solved[matrix] = Solved(row, tensors, visit.stats.gram if settings.reconstruct else None)
        if visit.is_last_of_block and not settings.reconstruct:
            commit(visit.block)
        yield row


@dataclass
class Solved:
    """A matrix of a block that is not committed yet: its row of the manifest, its tensors as they are stored, and the
    Gram that its error is measured by, where its weights may still change."""

    row: dict[str, Any]
    tensors: dict[str, Tensor]
    gram: Tensor | None

    def read(self) -> CompressedLinear:
        num_out, num_in = self.row["shape"]
        dtype = getattr(torch, self.row["dtype"])
        return layout.unpack(self.tensors, (num_out, num_in), target_from_dict(self.row), dtype, self.row["name"])

    def replace(self, weight: Tensor, dense: Tensor) -> Tensor:
        """Store another weight (O, I) on the same mask, and return it as it is stored; `dense` is the original."""
        self.tensors = layout.pack(replace(self.read(), weight=weight), weight.dtype)
        result, gram = self.read(), cast(Tensor, self.gram)
        installed = result.weight.to(dense.device)
        self.row["sha256"], self.row["zeros"] = layout.digest(result), int((result.weight == 0).sum())
        self.row["output_error"] = output_error(dense, installed.float(), gram)
        return installed


def _committed(folder: Path, entries: Sequence[dict[str, Any]]) -> Callable[[int], dict[str, Tensor] | None]:
    """The weights of a block by matrix name, for blocks that were solved before."""

    rows_of = {entry["block"]: entry["matrices"] for entry in entries}

    def weights(block: int) -> dict[str, Tensor] | None:
        if block not in rows_of:
            return None
        entries = [MatrixEntry.from_row(row, folder / JOURNAL) for row in rows_of[block]]
        return {entry.name: read_matrix(folder, entry).weight for entry in entries}

    return weights


def solve_one(
    model: StreamedModel,
    visit: Visit,
    planned: PlannedMatrix,
    settings: Settings,
    options: SolverOptions,
    fisher: Tensor | None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Solve and install one matrix: its row of the manifest, and its tensors as they are stored.

    What is installed, judged and later exported is what was stored, not what the solver held.
    """
    matrix, name = visit.matrix, visit.matrix.name
    weight = visit.weight.float().clone()
    stats = replace(visit.stats, output_fisher=fisher)
    wanted, propagation_damp = compensated(weight, stats, settings.propagation or 0.0, options.damp, name)
    solution = SOLVERS[str(settings.solver)](wanted, stats, planned.target, options, name)
    dtype = model.source_dtypes[matrix.parameter]
    tensors = layout.pack(solution, dtype)
    result = layout.unpack(tensors, matrix.shape, planned.target, dtype)
    if not bool(result.weight.isfinite().all()):
        raise ActivationError(f"{name}: its weights overflow {dtype} after the update; raise --damp, or skip it.")
    installed = result.weight.to(weight.device)
    install(visit.weight, installed)
    pruned = matrix.numel - int(result.mask.sum())
    row = {
        "name": name,
        "parameter": matrix.parameter,
        "tensor": model.tensor_key(matrix),
        "index": matrix.index,
        "transposed": matrix.transposed,
        "shape": list(matrix.shape),
        "dtype": str(dtype).removeprefix("torch."),
        "stored": list(tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "sha256": layout.digest(result),
        **target_to_dict(planned.target),
        "sparsity": pruned / matrix.numel,
        "pruned": pruned,
        "zeros": int((result.weight == 0).sum()),
        "sensitivity": planned.sensitivity,
        "output_error": output_error(weight, installed.float(), visit.stats.gram),
        "damp": solution.damp,
        "propagation_damp": propagation_damp,
        "precision": str(solution.precision).removeprefix("torch."),
        "num_tokens": visit.stats.num_tokens,
    }
    return row, tensors
