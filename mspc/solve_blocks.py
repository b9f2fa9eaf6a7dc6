"""Walk through a model, solve every matrix by the plan, and commit each block as soon as it is solved."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mspc.artifact import MATRICES, read_matrix
from mspc.blocks import Batch
from mspc.checkpoint import sha256_of, write_tensors
from mspc.errors import ActivationError
from mspc.formats import canonical
from mspc.journal import Journal
from mspc.linalg import output_error
from mspc.models import StreamedModel
from mspc.plan import target_to_dict
from mspc.recipe import Recipe
from mspc.solvers import SOLVERS, SolverOptions
from mspc.solvers.propagation import propagated
from mspc.types import Matrix, PlannedMatrix
from mspc.walk import Visit, install, walk


def solve_blocks(
    model: StreamedModel,
    batches: Sequence[Batch],
    matrices: Sequence[Sequence[Matrix]],
    plan: Sequence[PlannedMatrix],
    recipe: Recipe,
    folder: Path,
    journal: Journal,
    *,
    dense: Sequence[Batch] = (),
    fisher: dict[str, Tensor] | None = None,
) -> Iterator[str]:
    """The name of each matrix when it is solved. Blocks that the journal holds are installed, not solved again.

    `dense` are the batches once more, for propagation; `fisher` the Fisher factors by matrix name.
    """
    planned = {matrix.name: matrix for matrix in plan}
    options = solver_options(recipe)
    rows: list[dict[str, Any]] = []
    stored: dict[str, Tensor] = {}
    for visit in walk(model, batches, matrices, _committed(folder, journal.blocks), dense=dense):
        factor = fisher[visit.matrix.name].to(visit.weight.device) if fisher else None
        row, tensors = solve_one(model, visit, planned[visit.matrix.name], recipe, options, factor)
        row["file"] = f"{MATRICES}/{visit.block:05d}.safetensors"
        rows.append(row)
        stored |= {f"{visit.matrix.name}.{part}": tensor for part, tensor in tensors.items()}
        if visit.is_last_of_block:
            write_tensors(folder / row["file"], stored)
            digest = sha256_of(folder / row["file"])
            journal.commit({"block": visit.block, "file": row["file"], "sha256": digest, "matrices": rows})
            rows, stored = [], {}
        yield visit.matrix.name


def solver_options(recipe: Recipe) -> SolverOptions:
    return SolverOptions(
        criterion=recipe.criterion, damp=recipe.damp, activation_order=recipe.activation_order,
        iterations=recipe.iterations or 0,
    )  # fmt: skip


def _committed(folder: Path, entries: Sequence[dict[str, Any]]) -> Callable[[int], dict[str, Tensor] | None]:
    """The weights of a block by matrix name, for blocks that were solved before."""

    rows_of = {entry["block"]: entry["matrices"] for entry in entries}

    def weights(block: int) -> dict[str, Tensor] | None:
        if block not in rows_of:
            return None
        return {row["name"]: read_matrix(folder, row).weight for row in rows_of[block]}

    return weights


def solve_one(
    model: StreamedModel,
    visit: Visit,
    planned: PlannedMatrix,
    recipe: Recipe,
    options: SolverOptions,
    fisher: Tensor | None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Solve and install one matrix: its row of the manifest, and its tensors as they are stored.

    What is installed, judged and later exported is what was stored, not what the solver held.
    """
    matrix, name = visit.matrix, visit.matrix.name
    weight = visit.weight.float().clone()
    stats = replace(visit.stats, fisher=fisher)
    wanted = propagated(weight, stats, recipe.propagation or 0.0, options.damp, name)
    solution = SOLVERS[str(recipe.solver)](wanted, stats, planned.target, options, name)
    dtype = model.source_dtypes[matrix.parameter]
    tensors = canonical.pack(solution, dtype)
    result = canonical.unpack(tensors, matrix.shape, planned.target, dtype)
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
        "sha256": canonical.digest(result),
        **target_to_dict(planned.target),
        "sparsity": pruned / matrix.numel,
        "pruned": pruned,
        "zeros": int((result.weight == 0).sum()),
        "sensitivity": planned.sensitivity,
        "output_error": output_error(weight, installed.float(), visit.stats.gram),
        "damp": solution.damp,
        "precision": str(solution.precision).removeprefix("torch."),
        "num_tokens": visit.stats.num_tokens,
    }
    return row, tensors
