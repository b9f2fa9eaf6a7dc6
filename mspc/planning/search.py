"""Searching for a plan: an evolutionary search moves sparsity between matrices while that helps on validation text.

It starts at the plan of the loss curves. A walk by the present plan solves every matrix at the levels around its own.
Then the model is held whole in memory, and a few generations of `evolution` look for a plan whose predictions are
closer to those of the dense model.

The weights of a level compensate for the errors of earlier matrices under the plan of the walk. For other plans they
are approximate, so the best plan gets a walk of its own, and its divergence there is what counts.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from mspc import threads
from mspc.errors import InputError
from mspc.memory import free_memory
from mspc.model.streamed import StreamedModel
from mspc.passes.blocks import logits_bytes, own_batches
from mspc.passes.walk import install, walk
from mspc.planning.allocation import highest_level
from mspc.planning.evolution import Judge, Levels, Space, evolve
from mspc.planning.measurements import Measurements
from mspc.planning.solver_options import solver_options
from mspc.progress import Step, log
from mspc.settings import ALL, MIXED_OF, MIXED_PATTERN, Settings
from mspc.sizes import in_words
from mspc.solvers import SOLVERS
from mspc.solvers.error_compensation import compensated
from mspc.solvers.quadratic import solver_bytes
from mspc.types import NM, CompressedLinear, GramStats, MatricesByBlock, Matrix, Target, Unstructured, flatten

WINDOW = 2
"""Sixteenths that the level of a matrix may move within one walk."""
GENERATIONS = 6
"""Minimum number of generations before another walk, which also needs a better plan."""

Weights = Mapping[int, Tensor]
"""Weights (O, I) of one matrix by level, the number of sixteenths of it (or of each group of N:16) that are zero."""
Tick = Callable[[str], bool]
"""Advances the stage by the seconds that have passed, with a text to show. Returns True if the time is up."""


@dataclass(frozen=True)
class SearchResult:
    levels: Levels
    """The best plan."""
    divergence: float
    """Its KL divergence from the dense model on the validation text, in nats per token."""
    first: float
    """The divergence of the first plan."""
    generations: int
    minutes: float


def search(measurements: Measurements, validation: Tensor, fisher: Mapping[str, Tensor], start: Levels) -> SearchResult:
    """Search for `search_minutes`. Plans are judged on `validation` (N, T); `fisher` has the factors by matrix name."""
    model, settings, matrices = measurements.model, measurements.settings, measurements.matrices
    flat, begin, seconds = flatten(matrices), time.monotonic(), 60 * settings.search_minutes
    sizes = [matrix.numel for matrix in flat]
    budget = int(settings.target_sparsity * MIXED_OF * sum(sizes))
    rng, plan, tried, generations, late = random.Random(settings.seed), start, dict[Levels, float](), 0, False
    with torch.no_grad(), measurements.progress.stage("Search (seconds)", round(seconds)) as step:
        tick, dense = _clock(begin, seconds, step), dense_predictions(model, validation)
        while plan not in tried:
            walked, window = plan, 0 if late else WINDOW
            weights = make_weights(measurements, fisher, walked, window, tick)
            space = Space(sizes, [range(min(levels), max(levels) + 1) for levels in weights], budget)
            with model.whole():
                judge = judge_of(model, validation, dense, flat, weights)
                for count, (plan, kl) in enumerate(evolve(walked, judge, space, len(validation), rng, tried)):
                    tried.setdefault(walked, kl)
                    generations += count > 0
                    late = tick(f"generation {generations}, KL {kl:.4f}")
                    if late or (count >= GENERATIONS and plan != walked):
                        break
            log.info(
                f"Search: KL {tried[walked]:.4f} nats per token in walk {len(tried)}, {generations} generations so far."
            )
    best = min(tried, key=lambda levels: tried[levels])
    if late and generations == 0:
        log.warning("the first walk took all the time, so the plan is that of the loss curves. Raise --search-minutes.")
    return SearchResult(best, tried[best], tried[start], generations, (time.monotonic() - begin) / 60)


def _clock(begin: float, seconds: float, step: Step) -> Tick:
    shown = 0

    def tick(detail: str) -> bool:
        nonlocal shown
        passed = time.monotonic() - begin
        while shown < min(int(passed), round(seconds)):
            step(detail)
            shown += 1
        return passed >= seconds

    return tick


def make_weights(
    measurements: Measurements, fisher: Mapping[str, Tensor], plan: Levels, window: int, tick: Tick
) -> list[dict[int, Tensor]]:
    """The weights of each matrix at the levels within `window` of its own, after earlier ones are solved by `plan`."""
    model, matrices, settings = measurements.model, measurements.matrices, measurements.settings
    options, solve = solver_options(settings), SOLVERS[str(settings.solver)]
    flat = flatten(matrices)
    level_of, made = dict(zip(flat, plan, strict=True)), dict[Matrix, dict[int, Tensor]]()
    dense = own_batches(model, measurements.ids) if settings.propagation else ()

    def solved_for(name: str, wanted: Tensor, stats: GramStats, target: Target) -> CompressedLinear:
        return solve(wanted, stats, target, options, name)

    batches, all_tokens = own_batches(model, measurements.ids), settings.route == ALL
    for visit in walk(model, batches, matrices, dense=dense, all_tokens=all_tokens):
        name, weight, own = visit.matrix.name, visit.weight.float().clone(), level_of[visit.matrix]
        stats = replace(visit.stats, output_fisher=fisher[name].to(weight.device))
        wanted, _ = compensated(weight, stats, settings.propagation or 0.0, options.damp, name)
        levels = range(max(own - window, 0), min(own + window, highest_level(settings)) + 1)
        targets = [target_of(settings, level, weight.shape[1]) for level in levels]
        solved = threads.run(partial(solved_for, name, wanted, stats), targets, solver_bytes(visit.matrix.shape))
        made[visit.matrix] = {
            level: found.weight.to("cpu", model.dtype) for level, found in zip(levels, solved, strict=True)
        }
        install(visit.weight, made[visit.matrix][own])
        tick(name)
    return [made[matrix] for matrix in flat]


def target_of(settings: Settings, level: int, num_inputs: int) -> Target:
    mixed = settings.pattern == MIXED_PATTERN
    pattern = NM(MIXED_OF - level, MIXED_OF) if mixed else Unstructured(level / MIXED_OF)
    return Target(pattern, settings.grid_for(num_inputs))


def dense_predictions(model: StreamedModel, validation: Tensor) -> list[Tensor]:
    with model.whole():
        return list(threads.run(partial(predictions, model), validation, logits_bytes(model, validation[0])))


def predictions(model: StreamedModel, ids: Tensor) -> Tensor:
    """Log-probabilities (T, V) of one sequence (T,), by a model that is whole in memory."""
    return log_softmax(model.model(input_ids=ids[None].to(model.device), use_cache=False).logits[0].float(), -1)


def judge_of(
    model: StreamedModel,
    validation: Tensor,
    dense: Sequence[Tensor],
    matrices: Sequence[Matrix],
    weights: Sequence[Weights],
) -> Judge:
    """A function that installs levels in a model that is whole in memory, and measures the KL divergence from `dense`.

    The divergence is in nats per token.
    """
    parameters = [matrix.read(model.model.get_parameter(matrix.parameter)) for matrix in matrices]
    installed = [-1] * len(parameters)

    def judge(levels: Levels, sequences: Sequence[int]) -> float:
        for i, level in enumerate(levels):
            if level != installed[i]:
                install(parameters[i], weights[i][level])
                installed[i] = level

        def divergence(n: int) -> float:
            return float(kl_div(predictions(model, validation[n]), dense[n], log_target=True, reduction="sum"))

        found = threads.run(divergence, sequences, logits_bytes(model, validation[0]))
        return sum(found) / (len(sequences) * validation.shape[1])

    return judge


def check_memory(model: StreamedModel, validation: Tensor, matrices: MatricesByBlock) -> None:
    """Raises InputError if a search needs more memory than is free."""
    host = torch.device("cpu")
    levels, whole = memory_of_search(model, model.dtype, validation.numel(), matrices)
    needs = {host: levels + whole} if model.device == host else {host: levels, model.device: whole}
    for device, need in needs.items():
        if (free := free_memory(device)) < need:
            raise InputError(
                f"The allocator search holds the whole model, and {2 * WINDOW + 1} levels of its matrices on the cpu. "
                f"It needs {in_words(need)} on {device}, and {in_words(free)} are free. Use --allocator auto, "
                "which loads one block at a time, or fewer --num-sequences, which need a little less."
            )


def memory_of_search(
    model: StreamedModel, dtype: torch.dtype, tokens: int, matrices: MatricesByBlock
) -> tuple[int, int]:
    """Bytes that a search needs for the levels of the matrices in host memory, and for the model on its device.

    `dtype` is that of the model, and `tokens` are those of the validation text.
    """
    numel = sum(matrix.numel for matrix in flatten(matrices))
    whole = sum(parameter.numel() * dtype.itemsize for parameter in model.model.parameters())
    predictions = tokens * model.config.get_text_config().vocab_size * torch.float32.itemsize
    return numel * (2 * WINDOW + 1) * dtype.itemsize, whole + predictions
