"""Making a plan: the measurements that the settings need, and the choice of a plan by them."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mspc import ranks
from mspc.model.streamed import StreamedModel
from mspc.passes.walk import DenseWalk
from mspc.planning.allocation import (
    allocate,
    allocate_bytes,
    candidates,
    cheapest_levels,
    check_bytes,
    planned_levels,
)
from mspc.planning.curve import Curve
from mspc.planning.measurements import Measurements
from mspc.planning.search import check_memory, search
from mspc.planning.time_budget import TimeBudget
from mspc.planning.validation import validate_plans
from mspc.planning.without_gradient import with_layer_errors, with_medians, without_gradient_note
from mspc.progress import Progress, log
from mspc.settings import ALL, CURVES, SEARCH, Settings
from mspc.storage.checkpoint import Checkpoint
from mspc.types import UNQUANTIZED_BITS, MatricesByBlock, PlannedMatrix, flatten

HEADER_BYTES, SLICE_BYTES = 600, 100
"""Upper estimates for the entries of a matrix in the header of a safetensors file, and for those that slices add."""


@dataclass(frozen=True)
class PlanChoice:
    """A plan and how it was chosen."""

    plan: list[PlannedMatrix]
    name: str | None = None
    divergences: dict[str, float] = field(default_factory=dict)
    """KL divergence from the dense model of each plan that was validated, in nats per token."""
    search: dict[str, float] = field(default_factory=dict)
    """Generations and minutes of the search, if one was made."""


@dataclass(frozen=True)
class Planner:
    """Measures what a run needs, and chooses its plan. Measurements are kept in `folder`."""

    settings: Settings
    checkpoint: Checkpoint
    open_model: Callable[..., StreamedModel]
    ids: Tensor
    validation: Tensor | None
    """Sequences (N, T) on which plans are compared and nothing is measured."""
    matrices: MatricesByBlock
    identity: dict[str, Any]
    folder: Path
    progress: Progress
    saved_bytes: int = 0
    """Bytes that quantized matrices outside of the blocks save."""
    time_budget: TimeBudget | None = None
    """None without a budget in time, and where the plan is there."""
    spill: Path | None = None
    """Folder for output Fisher factors; None: they stay in memory."""
    without_gradient: set[str] = field(default_factory=set)
    """Names of matrices that were to be measured by gradients, and have none."""

    def measurements(self, model: StreamedModel) -> Measurements:
        return Measurements(
            model, self.ids, self.matrices, self.settings, self.identity, self.folder, self.progress, self.spill
        )  # fmt: skip

    def fisher(self, model: StreamedModel) -> dict[str, Tensor]:
        """The Fisher factors by matrix name; empty if neither the solver nor the allocator needs them."""
        needed = self.settings.needs_fisher or self.settings.needs_curves
        found = self.measurements(model).fisher_factors() if needed else {}
        self.without_gradient.update(name for name, factor in found.items() if not factor.any())
        return with_layer_errors(found, self.without_gradient)

    def not_measured(self) -> dict[str, list[str]]:
        """The entry of the manifest about matrices without a gradient, if there are any. They are logged."""
        names = sorted(self.without_gradient)
        if names:
            log.warning(without_gradient_note(names))
        return {"without_gradient": names} if names else {}

    def plan(self, model: StreamedModel, fisher: dict[str, Tensor]) -> PlanChoice:
        settings = self.settings
        sensitivities: dict[str, float] = {}
        if settings.needs_sensitivity:
            # Fused attention has no second derivative.
            differentiable = self.open_model(eager=True) if settings.measure == "hutchinson" else model
            measured = self.measurements(differentiable)
            sensitivities, unknown = with_medians(measured.sensitivities(), settings.measure)
            self.without_gradient.update(unknown)
        if not settings.needs_curves:
            return PlanChoice(allocate(settings, self.matrices, sensitivities))
        ids, all_tokens = self.ids[: settings.sensitivity_sequences], settings.route == ALL
        dense = DenseWalk(model, ids, self.matrices, all_tokens=all_tokens)
        curves = self.measurements(model).loss_curves(dense, fisher)
        if self.time_budget is not None:
            return PlanChoice(self.time_budget.allocate(curves), CURVES)
        if settings.has_budget:
            return PlanChoice(allocate_bytes(settings, self.matrices, curves, self.num_bytes(), self.dtype()), CURVES)
        if settings.allocator == SEARCH:
            return self.searched(model, fisher, curves)
        if settings.validates_plans:
            return self.best_of(dense, fisher, candidates(settings, self.matrices, curves))
        return PlanChoice(allocate(settings, self.matrices, sensitivities, curves))

    def best_of(self, dense: DenseWalk, fisher: dict[str, Tensor], plans: dict[str, list[PlannedMatrix]]) -> PlanChoice:
        """The plan with the lowest divergence on the validation text; the first plan if nothing is validated."""
        first = next(iter(plans))
        if len(plans) == 1 or self.validation is None:
            return PlanChoice(plans[first], first)
        divergences = validate_plans(dense, self.validation, fisher, plans, self.settings.damp, self.progress)
        best = min(divergences, key=lambda name: divergences[name])
        shown = ", ".join(f"{name} {kl:.4f}" for name, kl in divergences.items())
        log.info(f"Plan: {best} (KL in nats per token: {shown}).")
        return PlanChoice(plans[best], best, divergences)

    def searched(self, model: StreamedModel, fisher: dict[str, Tensor], curves: dict[str, Curve]) -> PlanChoice:
        """The best plan that a search finds from the plan with the lowest predicted loss."""
        assert self.validation is not None
        start = cheapest_levels(self.settings, self.matrices, curves)
        measured, validation = self.measurements(model), self.validation
        found = ranks.by_first(lambda: asdict(search(measured, validation, fisher, start)))
        return PlanChoice(
            planned_levels(self.settings, self.matrices, found["levels"], curves),
            SEARCH,
            {CURVES: found["first"], SEARCH: found["divergence"]},
            {name: found[name] for name in ("generations", "minutes")},
        )

    def check(self, model: StreamedModel) -> None:
        """Raises InputError, before anything is measured, for a size that is too small or a lack of memory."""
        if self.settings.has_budget and not self.settings.has_time_budget:
            check_bytes(self.settings, self.matrices, self.num_bytes(), self.dtype())
        if self.settings.allocator == SEARCH and self.validation is not None:
            check_memory(model, self.validation, self.matrices)

    def num_bytes(self) -> int:
        """Number of bytes that the size budget leaves for the matrices."""
        flat = flatten(self.matrices)
        numel = sum(matrix.numel for matrix in flat)
        if self.settings.bits_per_weight is not None:
            return int(self.settings.bits_per_weight * numel / 8)
        whole = self.checkpoint.dense_bytes()
        rest = whole - self.saved_bytes - numel * self.dtype().itemsize + HEADER_BYTES * len(flat)
        rest += SLICE_BYTES * sum(matrix.index is not None for matrix in flat)
        return self.settings.target_bytes - rest

    def dtype(self) -> torch.dtype:
        """The dtype of the checkpoint's weights."""
        name = next(key for key in self.checkpoint.keys() if key.endswith("weight"))  # noqa: SIM118
        return next(tensor.dtype for _, tensor in self.checkpoint.read([name]))


def mixture_lines(plan: Sequence[PlannedMatrix]) -> list[str]:
    """A summary of a plan, with one line for each number of bits."""
    parts: dict[int, list[PlannedMatrix]] = defaultdict(list)
    for matrix in plan:
        parts[matrix.target.bits or UNQUANTIZED_BITS].append(matrix)
    whole = sum(matrix.numel for matrix in plan)
    lines = []
    for bits, part in sorted(parts.items(), reverse=True):
        numel = sum(matrix.numel for matrix in part)
        sparsities = [matrix.target.pattern.sparsity for matrix in part]
        mean = sum(matrix.target.pattern.sparsity * matrix.numel for matrix in part) / numel
        count = "1 matrix" if len(part) == 1 else f"{len(part)} matrices"
        lines.append(
            f"Mixture: {count} ({numel / whole:.0%} of the weights) at {bits} bits, sparsity {mean:.0%} "
            f"({min(sparsities):.0%} to {max(sparsities):.0%})."
        )
    return lines
