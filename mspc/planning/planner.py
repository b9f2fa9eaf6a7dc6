"""Making a plan: what has to be measured for it, and the allocation that follows."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from mspc.planning.measurements import fisher_factors, loss_curves, sensitivities
from mspc.planning.search import check_memory, search
from mspc.planning.solver_options import solver_options
from mspc.planning.validation import try_plans
from mspc.progress import Progress, log
from mspc.settings import CURVES, SEARCH, Settings
from mspc.storage.checkpoint import Checkpoint
from mspc.types import MatricesByBlock, PlannedMatrix, flatten

HEADER_BYTES = 600
"""Of a matrix's tensors in the header of a safetensors file, at most about."""


@dataclass(frozen=True)
class Chosen:
    """A plan; its name, the KL divergence from the dense model of each plan that was tried, where some were, and what a
    search took."""

    plan: list[PlannedMatrix]
    name: str | None = None
    tried: dict[str, float] = field(default_factory=dict)
    took: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Planner:
    """One run's measurements, kept in `folder`, and its plan."""

    settings: Settings
    checkpoint: Checkpoint
    open_model: Callable[..., StreamedModel]
    ids: Tensor
    held_out: Tensor | None
    """Sequences (N, T) that nothing is measured on, to try plans on."""
    matrices: MatricesByBlock
    identity: dict[str, Any]
    folder: Path
    progress: Progress

    def fisher(self, model: StreamedModel) -> dict[str, Tensor]:
        """The Fisher factors by matrix name, where solver or allocator need them."""
        if self.settings.solver != "kfac" and not self.settings.needs_curves:
            return {}
        return fisher_factors(
            model, self.ids, self.matrices, self.settings, self.identity, self.folder, self.progress
        )  # fmt: skip

    def plan(self, model: StreamedModel, fisher: dict[str, Tensor]) -> Chosen:
        settings = self.settings
        measured: dict[str, float] = {}
        if settings.needs_sensitivity:
            # Fused attention has no second derivative.
            on = self.open_model(eager=True) if settings.measure == "hutchinson" else model
            measured = sensitivities(on, self.ids, self.matrices, settings, self.identity, self.folder, self.progress)
        if not settings.needs_curves:
            return Chosen(allocate(settings, self.matrices, measured))
        dense = DenseWalk(model, self.ids[: settings.sensitivity_sequences], self.matrices)
        curves = loss_curves(
            dense, fisher, settings, solver_options(settings), self.identity, self.folder, self.progress
        )  # fmt: skip
        if settings.has_budget:
            plans = allocate_bytes(settings, self.matrices, curves, self.num_bytes(), self.dtype())
        elif settings.allocator == SEARCH:
            return self.searched(model, fisher, curves)
        elif settings.validates_plans:
            plans = candidates(settings, self.matrices, curves)
        else:
            return Chosen(allocate(settings, self.matrices, measured, curves))
        return self.best_of(dense, fisher, plans)

    def best_of(self, dense: DenseWalk, fisher: dict[str, Tensor], plans: dict[str, list[PlannedMatrix]]) -> Chosen:
        """The plan that does least harm on the held-out text; the first, where there is none or nothing to choose."""
        likeliest = next(iter(plans))
        if len(plans) == 1 or not self.settings.validates_plans or self.held_out is None:
            return Chosen(plans[likeliest], likeliest)
        tried = try_plans(dense, self.held_out, fisher, plans, solver_options(self.settings), self.progress)
        best = min(tried, key=lambda name: tried[name])
        log.info(f"Plan: {best} ({', '.join(f'{name} {kl:.4f}' for name, kl in tried.items())} nats of KL).")
        return Chosen(plans[best], best, tried)

    def searched(self, model: StreamedModel, fisher: dict[str, Tensor], curves: dict[str, Curve]) -> Chosen:
        """The best plan that a search finds, from that of least predicted loss on."""
        assert self.held_out is not None
        start = cheapest_levels(self.settings, self.matrices, curves)
        found = search(model, self.ids, self.held_out, self.matrices, fisher, start, self.settings, self.progress)
        return Chosen(
            planned_levels(self.settings, self.matrices, found.levels, curves),
            SEARCH,
            {CURVES: found.first, SEARCH: found.divergence},
            {"generations": found.generations, "minutes": found.minutes},
        )

    def check(self, model: StreamedModel) -> None:
        """Raises InputError, before anything is measured, for a size that cannot be reached or memory that is short."""
        if self.settings.has_budget:
            check_bytes(self.settings, self.matrices, self.num_bytes(), self.dtype())
        if self.settings.allocator == SEARCH and self.held_out is not None:
            check_memory(model, self.held_out, self.matrices)

    def unmatched_skips(self, model: StreamedModel) -> Iterator[str]:
        """A note for each --skip that matches no matrix."""
        names = [
            f"{model.block_name(index)}.{name}".removesuffix(".weight")
            for index, block in enumerate(model.blocks)
            for name, _ in block.named_parameters()
        ]
        for pattern in self.settings.skip:
            if not any(re.search(pattern, name) for name in names):
                yield (
                    f"Note: --skip {pattern} matches no matrix of a block, such as {names[0]}; embeddings and the "
                    "output head are never compressed."
                )

    def num_bytes(self) -> int:
        """What the recipe's budget leaves for the matrices."""
        flat = flatten(self.matrices)
        numel = sum(matrix.numel for matrix in flat)
        if self.settings.bits_per_weight is not None:
            return int(self.settings.bits_per_weight * numel / 8)
        whole = sum((self.checkpoint.folder / shard).stat().st_size for shard in self.checkpoint.shards())
        rest = whole - numel * self.dtype().itemsize + HEADER_BYTES * len(flat)
        return self.settings.target_bytes - rest

    def dtype(self) -> torch.dtype:
        """Of the checkpoint's weights."""
        name = next(key for key in self.checkpoint.keys() if key.endswith("weight"))  # noqa: SIM118
        return next(tensor.dtype for _, tensor in self.checkpoint.read([name]))


def mixture_lines(plan: Sequence[PlannedMatrix]) -> list[str]:
    """What a plan is made of, in one line for each number of bits."""
    parts: dict[int, list[PlannedMatrix]] = defaultdict(list)
    for matrix in plan:
        parts[matrix.target.grid.bits if matrix.target.grid else 16].append(matrix)
    whole = sum(matrix.numel for matrix in plan)
    lines = []
    for bits, part in sorted(parts.items(), reverse=True):
        numel = sum(matrix.numel for matrix in part)
        sparsities = [matrix.target.pattern.sparsity for matrix in part]
        mean = sum(matrix.target.pattern.sparsity * matrix.numel for matrix in part) / numel
        lines.append(
            f"Mixture: {len(part)} matrices ({numel / whole:.0%} of the weights) at {bits} bits, sparsity {mean:.0%} "
            f"({min(sparsities):.0%} to {max(sparsities):.0%})."
        )
    return lines
