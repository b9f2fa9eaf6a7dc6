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
    wants_curves,
    wants_sensitivity,
    wants_trial,
)
from mspc.planning.curve import Curve
from mspc.planning.measurements import fisher_factors, loss_curves, measure_of, sensitivities
from mspc.planning.search import check_memory, search
from mspc.planning.solver_options import solver_options
from mspc.planning.validation import try_plans
from mspc.progress import Reporter
from mspc.recipe import CURVES, SEARCH, Recipe
from mspc.storage.checkpoint import Checkpoint
from mspc.types import Matrix, PlannedMatrix

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

    recipe: Recipe
    checkpoint: Checkpoint
    open_model: Callable[..., StreamedModel]
    ids: Tensor
    held_out: Tensor | None
    """Sequences (N, T) that nothing is measured on, to try plans on."""
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

    def plan(self, model: StreamedModel, fisher: dict[str, Tensor]) -> Chosen:
        recipe = self.recipe
        measured: dict[str, float] = {}
        if wants_sensitivity(recipe):
            # Fused attention has no second derivative.
            on = self.open_model(eager=True) if measure_of(recipe) == "hutchinson" else model
            measured = sensitivities(on, self.ids, self.matrices, recipe, self.identity, self.folder, self.reporter)
        if not wants_curves(recipe):
            return Chosen(allocate(recipe, self.matrices, measured))
        dense = DenseWalk(model, self.ids[: recipe.sensitivity_sequences], self.matrices)
        curves = loss_curves(
            dense, fisher, recipe, solver_options(recipe), self.identity, self.folder, self.reporter
        )  # fmt: skip
        if recipe.has_budget:
            plans = allocate_bytes(recipe, self.matrices, curves, self.num_bytes(), self.dtype())
        elif recipe.allocator == SEARCH:
            return self.searched(model, fisher, curves)
        elif wants_trial(recipe):
            plans = candidates(recipe, self.matrices, curves)
        else:
            return Chosen(allocate(recipe, self.matrices, measured, curves))
        return self.best_of(dense, fisher, plans)

    def best_of(self, dense: DenseWalk, fisher: dict[str, Tensor], plans: dict[str, list[PlannedMatrix]]) -> Chosen:
        """The plan that does least harm on the held-out text; the first, where there is none or nothing to choose."""
        likeliest = next(iter(plans))
        if len(plans) == 1 or not wants_trial(self.recipe) or self.held_out is None:
            return Chosen(plans[likeliest], likeliest)
        tried = try_plans(dense, self.held_out, fisher, plans, solver_options(self.recipe), self.reporter)
        best = min(tried, key=lambda name: tried[name])
        self.reporter.say(f"Plan: {best} ({', '.join(f'{name} {kl:.4f}' for name, kl in tried.items())} nats of KL).")
        return Chosen(plans[best], best, tried)

    def searched(self, model: StreamedModel, fisher: dict[str, Tensor], curves: dict[str, Curve]) -> Chosen:
        """The best plan that a search finds, from that of least predicted loss on."""
        assert self.held_out is not None
        start = cheapest_levels(self.recipe, self.matrices, curves)
        found = search(model, self.ids, self.held_out, self.matrices, fisher, start, self.recipe, self.reporter)
        return Chosen(
            planned_levels(self.recipe, self.matrices, found.levels, curves),
            SEARCH,
            {CURVES: found.first, SEARCH: found.divergence},
            {"generations": found.generations, "minutes": found.minutes},
        )

    def check(self, model: StreamedModel) -> None:
        """Raises InputError, before anything is measured, for a size that cannot be reached or memory that is short."""
        if self.recipe.has_budget:
            check_bytes(self.recipe, self.matrices, self.num_bytes(), self.dtype())
        if self.recipe.allocator == SEARCH and self.held_out is not None:
            check_memory(model, self.held_out, self.matrices)

    def without_effect(self, model: StreamedModel) -> Iterator[str]:
        """Notes on what was asked and changes nothing."""
        recipe = self.recipe
        if recipe.allocator == SEARCH and not wants_curves(recipe):
            given = "the plan is given" if recipe.plan else "no zeros are asked for"
            why = f"every matrix gets {recipe.pattern}" if recipe.fixed_pattern else given
            yield f"Note: the allocator search has nothing to share out: {why}."
        elif recipe.allocator != SEARCH and recipe.search_minutes != Recipe.search_minutes:
            yield f"Note: search_minutes is for the allocator search, and it is {recipe.allocator}."
        names = [
            f"{model.block_name(index)}.{name}".removesuffix(".weight")
            for index, block in enumerate(model.blocks)
            for name, _ in block.named_parameters()
        ]
        for pattern in recipe.skip:
            if not any(re.search(pattern, name) for name in names):
                yield (
                    f"Note: --skip {pattern} matches no matrix of a block, such as {names[0]}; embeddings and the "
                    "output head are never compressed."
                )

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
