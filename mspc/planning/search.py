"""Searching for a plan: levels of sparsity are switched between matrices for as long as held-out text gains by it.

It begins at the plan of the loss curves. A walk that is the run itself by the present plan has the recipe's solver make
every matrix at the levels about its own. Then the model is whole in memory, and a few generations of `evolution` look
for a plan whose predictions are nearer to those of the dense model.

Levels make good what the matrices before them have lost by the plan of the walk, and so are only about right for other
plans. Hence the plan that was found is walked by in its turn, and what it reaches in a walk of its own is what counts.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from mspc.errors import InputError
from mspc.memory import free_memory
from mspc.model.streamed import StreamedModel
from mspc.passes.blocks import batches_of
from mspc.passes.walk import install, walk
from mspc.planning.allocation import highest_level
from mspc.planning.evolution import Judge, Levels, Space, evolve
from mspc.planning.solver_options import solver_options
from mspc.progress import Progress, Step, log
from mspc.settings import MIXED_OF, MIXED_PATTERN, Settings
from mspc.solvers import SOLVERS
from mspc.solvers.error_compensation import compensated
from mspc.types import NM, MatricesByBlock, Matrix, Target, Unstructured, flatten

WINDOW = 2
"""Sixteenths that the level of a matrix may move within one walk."""
GENERATIONS = 6
"""After so many, and a gain, there is another walk."""

Weights = Mapping[int, Tensor]
"""Of one matrix (O, I), by level: how many sixteenths of it, or of its groups of N:16, are zero."""
Tick = Callable[[str], bool]


@dataclass(frozen=True)
class Found:
    """The best levels; their KL divergence on all held-out text, and that of the first; what it took."""

    levels: Levels
    divergence: float
    first: float
    generations: int
    minutes: float


def search(
    model: StreamedModel,
    ids: Tensor,
    held_out: Tensor,
    matrices: MatricesByBlock,
    fisher: Mapping[str, Tensor],
    start: Levels,
    settings: Settings,
    progress: Progress,
) -> Found:
    """Search for the minutes of the recipe. Weights are made on `ids` (N, T), and judged on `held_out` (N, T).

    `fisher` has the Fisher factors by matrix name.
    """
    flat, begin, seconds = (
        flatten(matrices),
        time.monotonic(),
        60 * settings.search_minutes,
    )
    sizes = [matrix.numel for matrix in flat]
    budget = int(settings.target_sparsity * MIXED_OF * sum(sizes))
    rng, plan, tried, generations, late = random.Random(settings.seed), start, dict[Levels, float](), 0, False
    with torch.no_grad(), progress.stage("Search (seconds)", round(seconds)) as step:
        tick, dense = _clock(begin, seconds, step), dense_predictions(model, held_out)
        while plan not in tried:
            walked, window = plan, 0 if late else WINDOW
            weights = make_weights(model, ids, matrices, fisher, walked, window, settings, tick)
            space = Space(sizes, [range(min(of), max(of) + 1) for of in weights], budget)
            with model.whole():
                judge = judge_of(model, held_out, dense, flat, weights)
                for count, (plan, kl) in enumerate(evolve(walked, judge, space, len(held_out), rng, tried)):
                    tried.setdefault(walked, kl)
                    generations += count > 0
                    late = tick(f"generation {generations}, KL {kl:.4f}")
                    if late or (count >= GENERATIONS and plan != walked):
                        break
            log.info(f"Search: KL {tried[walked]:.4f} nats in walk {len(tried)}, {generations} generations so far.")
    best = min(tried, key=lambda levels: tried[levels])
    if late and generations == 0:
        log.info("Note: the first walk took all the time, so the plan is that of the curves; raise --search-minutes.")
    return Found(best, tried[best], tried[start], generations, (time.monotonic() - begin) / 60)


def _clock(begin: float, seconds: float, step: Step) -> Tick:
    """What moves a stage on by the seconds that have passed, and says whether the time is up."""
    told = 0

    def tick(detail: str) -> bool:
        nonlocal told
        passed = time.monotonic() - begin
        while told < min(int(passed), round(seconds)):
            step(detail)
            told += 1
        return passed >= seconds

    return tick


def make_weights(
    model: StreamedModel,
    ids: Tensor,
    matrices: MatricesByBlock,
    fisher: Mapping[str, Tensor],
    plan: Levels,
    window: int,
    settings: Settings,
    tick: Tick,
) -> list[dict[int, Tensor]]:
    """The weights of every matrix at the levels about its own in `plan`, where all matrices before it have theirs."""
    options, solve = solver_options(settings), SOLVERS[str(settings.solver)]
    flat = flatten(matrices)
    level_of, made = dict(zip(flat, plan, strict=True)), dict[Matrix, dict[int, Tensor]]()
    dense = batches_of(model, ids) if settings.propagation else ()
    for visit in walk(model, batches_of(model, ids), matrices, dense=dense):
        name, weight, own = visit.matrix.name, visit.weight.float().clone(), level_of[visit.matrix]
        stats = replace(visit.stats, output_fisher=fisher[name].to(weight.device))
        wanted, _ = compensated(weight, stats, settings.propagation or 0.0, options.damp, name)
        made[visit.matrix] = {
            level: solve(wanted, stats, target_of(settings, level), options, name).weight.to("cpu", model.dtype)
            for level in range(max(own - window, 0), min(own + window, highest_level(settings)) + 1)
        }
        install(visit.weight, made[visit.matrix][own])
        tick(name)
    return [made[matrix] for matrix in flat]


def target_of(settings: Settings, level: int) -> Target:
    mixed = settings.pattern == MIXED_PATTERN
    return Target(NM(MIXED_OF - level, MIXED_OF) if mixed else Unstructured(level / MIXED_OF), settings.grid)


def dense_predictions(model: StreamedModel, held_out: Tensor) -> list[Tensor]:
    with model.whole():
        return [predictions(model, ids) for ids in held_out]


def predictions(model: StreamedModel, ids: Tensor) -> Tensor:
    """Log-probabilities (T, V) of one sequence (T,), by a model that is whole in memory."""
    return log_softmax(model.model(input_ids=ids[None].to(model.device), use_cache=False).logits[0].float(), -1)


def judge_of(
    model: StreamedModel,
    held_out: Tensor,
    dense: Sequence[Tensor],
    matrices: Sequence[Matrix],
    weights: Sequence[Weights],
) -> Judge:
    """What installs levels in a model that is whole in memory: KL divergence from the dense one, in nats a token."""
    places = [matrix.read(model.model.get_parameter(matrix.parameter)) for matrix in matrices]
    installed = [-1] * len(places)

    def judge(levels: Levels, sequences: Sequence[int]) -> float:
        for i, level in enumerate(levels):
            if level != installed[i]:
                install(places[i], weights[i][level])
                installed[i] = level
        total = 0.0
        for n in sequences:
            total += float(kl_div(predictions(model, held_out[n]), dense[n], log_target=True, reduction="sum"))
        return total / (len(sequences) * held_out.shape[1])

    return judge


def check_memory(model: StreamedModel, held_out: Tensor, matrices: MatricesByBlock) -> None:
    """Raises InputError where what a search holds does not fit."""
    numel = sum(matrix.numel for of_block in matrices for matrix in of_block)
    host, levels = torch.device("cpu"), numel * (2 * WINDOW + 1) * model.dtype.itemsize
    whole = sum(parameter.numel() * parameter.itemsize for parameter in model.model.parameters())
    whole += held_out.numel() * model.config.get_text_config().vocab_size * torch.float32.itemsize
    needs = {host: levels + whole} if model.device == host else {host: levels, model.device: whole}
    for device, need in needs.items():
        if (free := free_memory(device)) < need:
            raise InputError(
                f"The allocator search holds the whole model, and {2 * WINDOW + 1} levels of its matrices on the cpu: "
                f"{need / 1e9:.1f} GB on {device}, where {free / 1e9:.1f} GB are free. Use --allocator auto, which "
                "loads a block at a time; fewer --num-sequences need a little less."
            )
