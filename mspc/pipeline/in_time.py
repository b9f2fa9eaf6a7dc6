"""The budget in time of a run: the work of a token of its model, and the timings of the machine that will serve it."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch

from mspc.errors import InputError
from mspc.model.streamed import StreamedModel
from mspc.pipeline.outer import PlannedOuter
from mspc.planning.time_budget import TimeBudget
from mspc.planning.timings import Timings, read_timings
from mspc.planning.token_work import TokenWork, work_of
from mspc.progress import Progress, log
from mspc.settings import Settings
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


def token_work(
    model: StreamedModel, matrices: MatricesByBlock, irregular: Collection[str], outer: Sequence[PlannedOuter]
) -> TokenWork:
    """The work of a token, by the shapes of a model that may be on meta."""
    everything = [block.matrices for block in model.sorted_blocks((), irregular)]
    name = model.source.types()[model.tensor_key(flatten(matrices)[0])][0]
    head = next((one.grid for one in outer if one.outer.role == HEAD or one.outer.tied is not None), None)
    quantized_lookup = any(one.outer.role == EMBEDDINGS for one in outer)
    return work_of(model, matrices, everything, head, quantized_lookup, getattr(torch, name))
