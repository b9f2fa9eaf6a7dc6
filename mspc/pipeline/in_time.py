"""The budget in time of a run: the work of a token of its model, and the timings of the machine that will serve it."""

import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mspc.errors import InputError
from mspc.model.streamed import StreamedModel
from mspc.pipeline.outer import PlannedOuter
from mspc.planning.time_budget import TimeBudget
from mspc.planning.timings import Timings, check_there, read_timings, write_timings
from mspc.planning.token_work import TokenWork, work_of
from mspc.progress import Progress, log
from mspc.recipe import Recipe
from mspc.settings import Settings
from mspc.storage.artifact import TIMINGS
from mspc.storage.files import sha256_of, write_atomically
from mspc.storage.journal import Journal
from mspc.storage.manifest import MANIFEST, read_manifest
from mspc.types import EMBEDDINGS, HEAD, MatricesByBlock, flatten

TimeProducts = Callable[[TokenWork, Settings, int, Progress], Timings]
"""Gives the timings of this CPU for a number of threads: those that were kept, else measured now."""


def time_budget_of(
    settings: Settings, model: StreamedModel, matrices: MatricesByBlock, irregular: Collection[str],
    outer: Sequence[PlannedOuter], threads: int, time_products: TimeProducts, progress: Progress,
) -> TimeBudget | None:  # fmt: skip
    """The budget, checked; None for a run without one.

    Raises InputError for a device whose products nobody timed, and for what `TimeBudget.check` refuses.
    """
    if not settings.has_time_budget:
        return None
    work = token_work(model, matrices, irregular, outer)
    if settings.timings is not None:
        timings = read_timings(Path(settings.timings))
    elif model.device.type in ("cpu", "meta"):
        timings = time_products(work, settings, threads, progress)
    else:
        raise InputError(
            f"A budget in time is for a CPU, and the run is on {model.device}. Bring the timings of the machine that "
            "will serve with timings, or choose device cpu."
        )
    log.info(f"Timings of {timings.origin}.")
    budget = TimeBudget(settings, work, timings)
    budget.check()
    return budget


def is_planned(folder: Path, resume: bool) -> bool:
    """Tell if a run goes on with the plan that it has, so that it needs no timings, and none can refuse it."""
    return resume and ((folder / MANIFEST).is_file() or Journal.has_plan(folder))


def identity_of(settings: Settings, folder: Path) -> dict[str, Any]:
    """The settings of a run in its header, with the digest of timings that were given.

    The timings that the run keeps in its own folder, which its recipe names, count as those that it was begun with.
    Raises InputError for a file that is missing.
    """
    values = settings.to_dict()
    if settings.timings is None:
        return {"settings": values}
    check_there(file := Path(settings.timings))
    if file.resolve() == (folder / TIMINGS).resolve() and (before := _header(folder)) is not None:
        given = before["settings"].get("timings")
        if given is None:
            return {"settings": {name: value for name, value in values.items() if name != "timings"}}
        values["timings"] = given
    return {"settings": values, "timings": sha256_of(file)}


def _header(folder: Path) -> dict[str, Any] | None:
    """The identity of the run in a folder, finished or not."""
    return read_manifest(folder) if (folder / MANIFEST).is_file() else Journal.header_in(folder)


def keep_timings(recipe: Recipe, settings: Settings, folder: Path, budget: TimeBudget | None) -> Recipe:
    """Write the timings of a run to its folder, and give the recipe that names them there.

    `budget` is None for a run that has its plan. Without a budget in time the recipe stays as it is.
    """
    kept = folder / TIMINGS
    if settings.timings is not None:
        write_atomically(kept, partial(shutil.copyfile, settings.timings))
    elif budget is not None:
        write_timings(kept, budget.timings)
    return replace(recipe, timings=TIMINGS) if settings.has_time_budget and kept.is_file() else recipe


@contextmanager
def choices_named(settings: Settings) -> Iterator[None]:
    """Raises InputError, with the bits that a budget may choose if it does, for an export that cannot hold them."""
    try:
        yield
    except InputError as error:
        if settings.fixed_bits is not None:
            raise
        kind = "budget in time" if settings.has_time_budget else "size budget"
        raise InputError(f"A {kind} may choose 16, 8, 4, 3 or 2 bits. {error}") from error


def token_work(
    model: StreamedModel, matrices: MatricesByBlock, irregular: Collection[str], outer: Sequence[PlannedOuter]
) -> TokenWork:
    """The work of a token, by the shapes of a model that may be on meta."""
    everything = [block.matrices for block in model.sorted_blocks((), irregular)]
    name = model.source.types()[model.tensor_key(flatten(matrices)[0])][0]
    head = next((one.grid for one in outer if one.outer.role == HEAD or one.outer.tied is not None), None)
    quantized_lookup = any(one.outer.role == EMBEDDINGS for one in outer)
    return work_of(model, matrices, everything, head, quantized_lookup, getattr(torch, name))
