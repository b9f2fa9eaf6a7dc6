"""Making a plan: what has to be measured for it, and the allocation that follows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mspc.allocation import allocate, allocate_bytes, wants_curves, wants_sensitivity
from mspc.checkpoint import Checkpoint
from mspc.measurements import fisher_factors, loss_curves, measure_of, sensitivities
from mspc.models import StreamedModel
from mspc.recipe import Recipe
from mspc.report import Reporter
from mspc.solve_blocks import solver_options
from mspc.types import Matrix, PlannedMatrix

HEADER_BYTES = 600
"""Of a matrix's tensors in the header of a safetensors file, at most about."""


@dataclass(frozen=True)
class Planner:
    """One run's measurements, kept in `folder`, and its plan."""

    recipe: Recipe
    checkpoint: Checkpoint
    open_model: Callable[..., StreamedModel]
    ids: Tensor
    matrices: Sequence[Sequence[Matrix]]
    identity: dict[str, Any]
    folder: Path
    reporter: Reporter

    def fisher(self, model: StreamedModel) -> dict[str, Tensor]:
        """The Fisher factors by matrix name, where solver or allocator need them."""
        if self.recipe.solver != "kfac" and not wants_curves(self.recipe):
            return {}
        return fisher_factors(
            model, self.ids, self.matrices, self.recipe, self.identity, self.folder, self.reporter
        )  # fmt: skip

    def plan(self, model: StreamedModel, fisher: dict[str, Tensor]) -> list[PlannedMatrix]:
        recipe = self.recipe
        measured: dict[str, float] = {}
        if wants_sensitivity(recipe):
            # Fused attention has no second derivative.
            on = self.open_model(eager=True) if measure_of(recipe) == "hutchinson" else model
            measured = sensitivities(on, self.ids, self.matrices, recipe, self.identity, self.folder, self.reporter)
        if not wants_curves(recipe):
            return allocate(recipe, self.matrices, measured)
        curves = loss_curves(
            model, self.ids, self.matrices, fisher, recipe, solver_options(recipe), self.identity, self.folder,
            self.reporter,
        )  # fmt: skip
        if not recipe.has_budget:
            return allocate(recipe, self.matrices, measured, curves)
        return allocate_bytes(recipe, self.matrices, curves, self.num_bytes(), self.dtype())

    def check_budget(self) -> None:
        """Raises InputError, before anything is measured, for a size that cannot be reached."""
        if self.recipe.has_budget:
            allocate_bytes(self.recipe, self.matrices, None, self.num_bytes(), self.dtype())

    def num_bytes(self) -> int:
        """What the recipe's budget leaves for the matrices."""
        flat = [matrix for of_block in self.matrices for matrix in of_block]
        numel = sum(matrix.numel for matrix in flat)
        if self.recipe.bits_per_weight is not None:
            return int(self.recipe.bits_per_weight * numel / 8)
        whole = sum((self.checkpoint.folder / shard).stat().st_size for shard in self.checkpoint.shards())
        rest = whole - numel * self.dtype().itemsize + HEADER_BYTES * len(flat)
        return self.recipe.target_bytes - rest

    def dtype(self) -> torch.dtype:
        """Of the checkpoint's weights."""
        name = next(key for key in self.checkpoint.keys() if key.endswith("weight"))  # noqa: SIM118
        return next(tensor.dtype for _, tensor in self.checkpoint.read([name]))
