"""The forecast of a run: its seconds, memory and disk, what does not fit, and what would.

`mspc plan` shows it, and `compress` begins with it: both have the same figures. Nothing is read but shapes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mspc.memory import free_memory
from mspc.model.hub import choose_device, choose_sequence_length
from mspc.model.open import choose_dtype
from mspc.model.outline import outlined
from mspc.model.streamed import StreamedModel
from mspc.passes.inputs import shared_inputs
from mspc.pipeline.cost import peak_memory
from mspc.pipeline.demand import BASE, Demand, demand_of, output_bytes
from mspc.pipeline.outer import planned_outer
from mspc.pipeline.rates import GPU_BYTES, Rates, known, table
from mspc.pipeline.route_checks import check_route
from mspc.pipeline.stage_work import stages_of
from mspc.pipeline.workload import Workload
from mspc.planning.allocation import allocate, check_plan, choose_group_size
from mspc.planning.plan_file import read_plan
from mspc.recipe import Recipe
from mspc.settings import Settings
from mspc.sizes import in_words
from mspc.types import MatricesByBlock, PlannedMatrix, flatten

MEMORY_ERROR = 0.1
"""Stated error of forecasts of memory and disk. What exceeds the free bytes by more is refused."""
MEASURED, OF_TABLE = (0.8, 1.4), (0.4, 2.5)
"""The range of the seconds as factors, by rates that were measured here and by those of a table."""
HERE, CPU = "here", "cpu"


@dataclass(frozen=True)
class Forecast:
    """The costs of one run before it is made."""

    model: str
    blocks: int
    matrices: int
    weights: int
    """Weights of all matrices."""
    widest: tuple[int, int]
    """Shape (O, I) of the matrix with the most inputs."""
    source_bytes: int
    output_bytes: int
    """Size of the output folder; under a size budget at most."""
    seconds_by_stage: Mapping[str, float]
    """By the titles under which the manifest has them."""
    rates: Rates
    demand: Demand
    ranks: int
    """Ranks that share the run. `demand` is that of each."""
    problems: tuple[str, ...]
    """Sentences about memory that is too small, each with what to change. Empty: nothing is known to fail."""

    @property
    def disk_problem(self) -> str | None:
        """A sentence about a disk that is too small for the output; None if it is large enough, or not known."""
        free = self.demand.disk_free
        if free is None or free >= self.output_bytes:
            return None
        need = in_words(self.output_bytes)
        return f"The output needs about {need}, and {in_words(free)} are free. Free some space or choose another --out."

    @property
    def all_problems(self) -> list[str]:
        return [*self.problems, *([self.disk_problem] if self.disk_problem else [])]

    @property
    def seconds(self) -> float:
        return sum(self.seconds_by_stage.values())

    @property
    def range(self) -> tuple[float, float]:
        low, high = MEASURED if self.rates.measured else OF_TABLE
        return low * self.seconds, high * self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain values, in bytes and seconds."""
        low, high = self.range
        return {
            "model": self.model, "blocks": self.blocks, "matrices": self.matrices, "weights": self.weights,
            "widest_matrix": list(self.widest), "source_bytes": self.source_bytes,
            "output_bytes": self.output_bytes, "ranks": self.ranks, **self.demand.to_dict(),
            "seconds_by_stage": {name: round(value, 3) for name, value in self.seconds_by_stage.items()},
            "seconds": round(self.seconds, 3), "seconds_from": round(low, 3), "seconds_to": round(high, 3),
            "rates": {"of": self.rates.device, "threads": self.rates.threads, "date": self.rates.date,
                      "measured": self.rates.measured},
            "problems": self.all_problems,
        }  # fmt: skip

    def line(self) -> str:
        """The forecast in one line."""
        return (
            f"Forecast: {span(*self.range)}, {in_words(self.demand.host_peak)} of memory"
            + (f" and {in_words(self.demand.device_peak)} of the GPU's" if self.demand.device_peak else "")
            + (f" for each of {self.ranks} ranks" if self.ranks > 1 else "")
            + f", an output of {in_words(self.output_bytes)} (`mspc plan` shows the parts; {self.rates.origin})."
        )


def span(low: float, high: float) -> str:
    """`"4 to 9 minutes"`, or `"50 minutes to 2.2 hours"`."""
    (first, unit), (last, other) = _in_unit(low), _in_unit(high)
    if unit != other:
        return f"{first} {unit} to {last} {other}"
    return f"{last} {unit}" if first == last else f"{first} to {last} {unit}"


UNITS = (("seconds", 1.0, 100.0), ("minutes", 60.0, 100.0), ("hours", 3600.0, 72.0), ("days", 86400.0, float("inf")))
"""Units of time, their seconds, and the number of them from which the next one is used."""


def _in_unit(seconds: float) -> tuple[str, str]:
    """A number with two digits or more, and its unit."""
    unit, size, _ = next(entry for entry in UNITS if seconds < entry[1] * entry[2])
    value = seconds / size
    return (f"{value:.0f}" if value >= 9.5 else f"{value:.1f}".removesuffix(".0")), unit


@dataclass(frozen=True)
class Place:
    """The device of a forecast: its name in words, its kind, and its free bytes, or None where nobody knows."""

    device: torch.device
    free: int | None
    free_host: int | None

    @staticmethod
    def named(name: str, ranks: int = 1) -> "Place":
        """`here`, `cpu`, a GPU that need not be there (`h200`, `a100`), or a device of this machine.

        `ranks` are those that will be started on this machine, if they are not yet.
        """
        if name in GPU_BYTES:
            return Place(torch.device("cuda"), GPU_BYTES[name], None)
        device = choose_device("auto" if name == HERE else name)
        host = free_memory(torch.device("cpu")) // ranks
        used = min(BASE["cpu"], peak_memory())  # this process has loaded already what every run loads
        return Place(device, free_memory(device) if device.type == "cuda" else host, host + used)


def forecast_run(
    model: StreamedModel, name: str, matrices: MatricesByBlock, settings: Settings, plan: Sequence[PlannedMatrix],
    place: Place, rates: Rates, *, spill: Path | None = None, out: Path | None = None, ranks: int = 1,
) -> Forecast:  # fmt: skip
    """The forecast for a model on meta, whose `source` has the shapes and dtypes of the weights.

    `settings` has the sequence length and the group size of the model. Raises InputError for a plan that does not fit.
    """
    check_plan(plan)
    dtype = choose_dtype(settings.dtype, model.source, place.device)
    load = Workload(
        model, matrices, shared_inputs(model, matrices), settings, plan, place.device, dtype, rates.threads, spill,
        place.free, ranks,
    )  # fmt: skip
    seconds = {title: work.seconds(rates) for title, work in stages_of(load).items()}
    demand = demand_of(load, out)
    return Forecast(
        name, load.blocks, len(load.flat), sum(matrix.numel for matrix in load.flat),
        max((matrix.shape for matrix in load.flat), key=lambda shape: shape[1]), load.source_bytes,
        output_bytes(load), seconds, rates, demand, ranks, tuple(_problems(load, demand, place)),
    )  # fmt: skip


def forecast_of(
    name: str,
    recipe: Recipe,
    device: str = HERE,
    threads: int = 1,
    spill: Path | None = None,
    out: Path | None = None,
    ranks: int = 1,
) -> Forecast:
    """The forecast of `compress` for a folder, hub id or .gguf file, by its config.json alone.

    Raises InputError for whatever `compress` would refuse because of the shapes.
    """
    place = Place.named(device, ranks)
    rates = table(device, threads) if device in GPU_BYTES else known(place.device, threads)
    model, settings = outlined(name), recipe.settings()
    settings = replace(settings, sequence_length=choose_sequence_length(model.config, settings.sequence_length))
    model.check_selection(settings.skip, settings.only, (), settings.include)
    matrices = model.matrices(settings.skip, (), settings.only, settings.include)
    settings = choose_group_size(settings, matrices)
    planned_outer(model, settings, recipe.asked())  # refused here as there
    check_route(model, matrices, settings)
    return forecast_run(
        model, name, matrices, settings, assumed_plan(settings, matrices), place, rates, spill=spill, out=out,
        ranks=ranks,
    )  # fmt: skip


def assumed_plan(settings: Settings, matrices: MatricesByBlock) -> list[PlannedMatrix]:
    """A plan that costs about what that of the run will: the one given, or else the same target for every matrix."""
    if settings.plan is not None:
        return read_plan(Path(settings.plan), flatten(matrices))
    if settings.has_budget:
        settings = replace(
            settings, bits_per_weight=None, target_size=None, ms_per_token=None, speedup=None, fixed_bits=None,
            sparsity=0.25, bits=settings.fixed_bits or 4, pattern=UNKNOWN,
        )  # fmt: skip
    elif settings.keep_zeros and settings.sparsity is None:
        settings = replace(settings, sparsity=0.5)
    return allocate(settings, matrices, {})


UNKNOWN = "unstructured"
"""The pattern that is assumed under a size budget."""


def _problems(load: Workload, demand: Demand, place: Place) -> Iterator[str]:
    """Sentences about all that will not fit."""
    for what, need, free in (
        ("memory of the GPU", demand.device_need, place.free if place.device.type == "cuda" else None),
        ("memory", demand.host_need, place.free_host),
    ):
        if free is not None and need > free * (1 + MEMORY_ERROR):
            yield (
                f"The run needs about {in_words(need)} of {what}, and {in_words(free)} are free. "
                f"{_remedy(load, what, free)}"
            )


def _remedy(load: Workload, what: str, free: int) -> str:
    """The first change, or two, with which it fits."""
    for words, changed in _changes(load):
        demand = demand_of(changed, None)
        need = demand.host_need if what == "memory" else demand.device_need
        if need <= free:
            return f"It fits with {words} (about {in_words(need)})."
    return "Free some, use a machine with more, or a smaller model: no option makes it fit."


def _changes(load: Workload) -> Iterator[tuple[str, Workload]]:
    """Options that take less memory, from those that cost nothing to those that cost quality."""
    spilled = replace(load, spill=Path("."))
    if load.spill is None:
        yield "--spill DIR", spilled
    few = load.settings.num_sequences
    while few > 16:
        few //= 2
        settings = replace(load.settings, num_sequences=few)
        yield f"--num-sequences {few}", replace(load, settings=settings)
        yield f"--spill DIR --num-sequences {few}", replace(spilled, settings=settings)
    if load.settings.effort != "fast" and not load.settings.has_budget:
        settings = replace(load.settings, effort="fast", solver="fisher", propagation=0.0, allocator="estimate")
        yield "--effort fast", replace(load, settings=settings)
        yield "--effort fast --spill DIR", replace(spilled, settings=settings)
