"""Models and the tasks of lm-evaluation-harness: the same questions for every kind of folder, and paired differences.

The harness makes prompts, scores and standard errors. Here are the model that it asks, the differences between two
models on the same questions, and errors in words.
"""

import difflib
import gc
import importlib
import logging
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mspc import threads
from mspc.errors import InputError, MspcError, in_brief, is_out_of_memory
from mspc.model.hub import load_tokenizer, resolve
from mspc.progress import Progress, as_progress
from mspc.runtime.loading import load

MISSING = (
    "--tasks needs lm-evaluation-harness ({name} is missing), in mspc's extra lm-eval: pip install '.[lm-eval]' in "
    "mspc's folder."
)
Key = tuple[str, str, str]
"""Task, metric and filter."""


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One metric of one task or group of tasks, and of the reference if there is one."""

    task: str
    metric: str
    filter: str
    """The name of what the harness does to answers before it scores them; `none` is nothing."""
    value: float
    stderr: float | None
    """Standard error over questions, by the harness; None where it has none."""
    higher_is_better: bool | None
    questions: int | None
    num_fewshot: int | None
    version: str | None
    """Version of the task. Scores of different versions cannot be compared."""
    reference: float | None = None
    reference_stderr: float | None = None
    difference: float | None = None
    """`value` - `reference`."""
    difference_stderr: float | None = None
    """Standard error of the mean over questions of what they differ by; None if the metric is no such mean."""

    @property
    def key(self) -> Key:
        return self.task, self.metric, self.filter


@dataclass(frozen=True)
class TaskResult:
    """The scores of one model, and the values of its single questions."""

    scores: tuple[TaskScore, ...]
    answers: Mapping[Key, Mapping[int, float]]
    """The value of each question by its number, for metrics that are their mean."""
    harness: str
    """Version of lm-evaluation-harness."""

    def to_dict(self) -> dict[str, Any]:
        """The scores as an object of JSON, without what is None."""
        rows = [{name: value for name, value in asdict(score).items() if value is not None} for score in self.scores]
        return {"tasks": rows, "lm_eval_version": self.harness}


@dataclass(frozen=True, slots=True)
class Request:
    """The options of an evaluation, checked."""

    tasks: tuple[str, ...]
    limit: int | None
    num_fewshot: int | None
    include_path: Path | None
    batch_size: int

    def __post_init__(self) -> None:
        if not self.tasks or not all(self.tasks):
            raise InputError("tasks must be names of tasks, such as arc_easy,hellaswag.")
        least = {"limit": 1, "num_fewshot": 0, "batch_size": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < lowest):
                raise InputError(f"{name} must be a whole number of at least {lowest}, not {value!r}.")
        if self.include_path is not None and not self.include_path.is_dir():
            raise InputError(f"include_path {self.include_path} is no folder. Give one with task files (.yaml).")


def evaluate_tasks(
    model: Any,
    tasks: str | Sequence[str],
    *,
    tokenizer: Any = None,
    against: Any = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    batch_size: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    progress: bool | Any | Progress = True,
) -> TaskResult:
    """Scores of a model on tasks of lm-evaluation-harness, with standard errors; needs the extra `mspc[lm-eval]`.

    Args:
        model: Whatever `mspc.load` takes (the whole model is in memory, its matrices compressed), or a transformers
            model in memory.
        tasks: Names of tasks or groups, patterns such as `mmlu_*`, or task files; a string may hold several, with
            commas between them.
        tokenizer: Tokenizer of the prompts; None: the one in the model's folder.
        against: Another model, asked the same, or the `TaskResult` of one. Scores get a difference with the standard
            error of paired questions, which is smaller than that of two separate scores.
        limit: Ask only the first questions of each task.
        num_fewshot: Examples in each prompt; None: what the task says.
        include_path: Folder with task files of your own. They may run Python that they name.
        batch_size: Prompts at a time.
        device: Device of a model that is not in memory yet.
        dtype: Dtype of a model that is not in memory yet; auto: float32 on a CPU.
        threads: Threads of the CPU for each operation. None: OMP_NUM_THREADS, or the cores that the process may use.
        progress: True, False, or a callable that gets an `Event`.

    Raises InputError for an unknown task, one whose data cannot be reached, and an option that a task ignores.
    """
    names = tasks.split(",") if isinstance(tasks, str) else tasks
    folder = None if include_path is None else Path(include_path)
    request = Request(tuple(name.strip() for name in names), limit, num_fewshot, folder, batch_size)
    shown = as_progress(progress)
    options = {"tokenizer": tokenizer, "device": device, "dtype": dtype, "count": threads, "progress": shown}
    reference = against if against is None or isinstance(against, TaskResult) else _answer(against, request, **options)
    found = _answer(model, request, **options)
    return found if reference is None else compared(found, reference)


def _answer(
    model: Any, request: Request, *, tokenizer: Any, device: str, dtype: str, count: int | None, progress: Progress
) -> TaskResult:
    """The scores of one model, which is in memory only meanwhile. Tasks are read before the model is."""
    threads.check(count)
    model = getattr(model, "path", model)  # of an Artifact
    folder = resolve(str(model)) if isinstance(model, str | Path) else None
    with _quiet():
        lm_eval, harness = _installed()
        with harness.alone():
            chosen = _tasks(request, progress)
            if folder is None:
                tokenizer = tokenizer or _tokenizer_of(model)
            else:
                with progress.stage("Loading the model", 1) as step:
                    tokenizer = tokenizer or load_tokenizer(folder)
                    model = load(folder, device, dtype)
                    step()
            with threads.using(count, next(model.parameters()).device, precise=False):
                asked = harness.Asked(model, tokenizer, request.batch_size, progress)
                raw = _in_words(
                    lm_eval.simple_evaluate, asked, tasks=chosen, num_fewshot=request.num_fewshot, limit=request.limit
                )
    del asked, model
    gc.collect()  # the next model needs the memory
    return result_of(raw, lm_eval.__version__)


def _tokenizer_of(model: Any) -> Any:
    """The tokenizer in the folder of a model in memory. Raises InputError if it has none."""
    name = getattr(getattr(model, "config", None), "name_or_path", "")
    if not name or not Path(name).is_dir():
        raise InputError("A model in memory needs tokenizer=.")
    return load_tokenizer(Path(name))


def _installed() -> tuple[Any, Any]:
    """The harness, and the module that knows it. Raises InputError, naming the extra, if it is not installed."""
    try:
        return importlib.import_module("lm_eval"), importlib.import_module("mspc.bench.harness")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(("mspc", "exporters")):
            raise
        raise InputError(MISSING.format(name=error.name)) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the remarks of the harness inside, and keep it from stdout."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)


def _in_words(evaluate: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The result of the harness. Its errors, which have no types of their own, become InputErrors."""
    try:
        return evaluate(*arguments, **options)
    except Exception as error:
        if isinstance(error, MspcError) or is_out_of_memory(error):
            raise
        raise InputError(f"lm-evaluation-harness cannot ask this ({in_brief(error)}). Choose another task.") from error


def _tasks(request: Request, progress: Progress) -> list[Any]:
    """The tasks and groups of a request, with their data."""
    with progress.stage("Reading tasks", 1) as step:
        manager, names = _known(request)
        chosen: list[Any] = []
        for name in names:
            try:
                loaded = manager.load([name])
            except Exception as error:
                raise InputError(_why(name, error)) from error
            tasks, groups = loaded["tasks"], loaded.get("groups") or {}
            _check_shots(request, tasks)
            chosen += [groups[name]] if name in groups else list(tasks.values())
        step()
    return chosen


def _known(request: Request) -> tuple[Any, list[str]]:
    """The tasks that exist, and the names that are asked for, patterns expanded.

    The harness takes long to find its thousands of tasks, so they are left out where those of `include_path` suffice.
    """
    manager_of = importlib.import_module("lm_eval.tasks").TaskManager
    folder = None if request.include_path is None else str(request.include_path)
    if folder is not None:
        own = manager_of(include_path=folder, include_defaults=False)
        if set(request.tasks) <= set(own.all_subtasks):
            return own, list(request.tasks)
    elif all(name.endswith((".yaml", ".yml")) and Path(name).is_file() for name in request.tasks):
        return manager_of(include_defaults=False), list(request.tasks)
    manager = manager_of(include_path=folder)
    return manager, [match for name in request.tasks for match in matches(name, manager.all_tasks)]


def matches(name: str, known: Sequence[str]) -> list[str]:
    """The tasks that a name or pattern stands for. Raises InputError, with the closest name, for an unknown one."""
    if name in known or Path(name).is_file():
        return [name]
    is_pattern = any(sign in name for sign in "*?[")
    if is_pattern and (found := sorted(task for task in known if fnmatchcase(task, name))):
        return found
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "`lm_eval ls tasks` lists those of lm-evaluation-harness."
    raise InputError(
        f"Unknown task {name!r}: {hint} Tasks of your own are in task files (.yaml), in a folder given with "
        "--include-path."
    )


def _why(name: str, error: Exception) -> str:
    """The reason why a task cannot be read."""
    if isinstance(error, ConnectionError) or "offline" in str(error).lower() or "reach" in str(error).lower():
        return (
            f"Task {name!r}: its data set cannot be reached ({in_brief(error)}). Check the network and HF_HUB_OFFLINE, "
            "or write a task file with data of your own, and give its folder with --include-path."
        )
    if isinstance(error, ImportError):
        return f"Task {name!r} needs a package that is not installed ({in_brief(error)}). Install it."
    return f"Task {name!r} cannot be read ({in_brief(error)}). Correct its task file, or choose another task."


def _check_shots(request: Request, tasks: Mapping[str, Any]) -> None:
    """Raises InputError for a task that ignores the number of examples: one whose file says 0 keeps 0."""
    if not request.num_fewshot:
        return
    for name, task in tasks.items():
        if task.get_config("num_fewshot") == 0:
            raise InputError(
                f"Task {name!r} has no examples (its file says num_fewshot: 0), whatever --num-fewshot says. Leave "
                "--num-fewshot out."
            )


def result_of(raw: Mapping[str, Any], version: str) -> TaskResult:
    """The results of the harness as scores, tasks in its order. Values that are no number are left out."""
    scores, answers = [], {}
    for task, values in raw["results"].items():
        for name, value in values.items():
            metric, comma, filter_name = name.partition(",")
            if not comma or metric.endswith("_stderr") or not _is_number(value):
                continue
            score = TaskScore(
                task, metric, filter_name, float(value), _number(values.get(f"{metric}_stderr,{filter_name}")),
                (raw.get("higher_is_better", {}).get(task) or {}).get(metric),
                (raw.get("n-samples", {}).get(task) or {}).get("effective"),
                raw.get("n-shot", {}).get(task), _text(raw.get("versions", {}).get(task)),
            )  # fmt: skip
            scores.append(score)
            if single := _single(raw.get("samples", {}).get(task, ()), score):
                answers[score.key] = single
    return TaskResult(tuple(scores), answers, version)


def _single(samples: Sequence[Mapping[str, Any]], score: TaskScore) -> dict[int, float] | None:
    """The value of each question; None if the score is not their mean."""
    found = {
        sample["doc_id"]: float(sample[score.metric])
        for sample in samples
        if sample.get("filter") == score.filter and _is_number(sample.get(score.metric))
    }
    if not found or not math.isclose(statistics.fmean(found.values()), score.value, rel_tol=1e-9, abs_tol=1e-12):
        return None
    return found


def compared(found: TaskResult, reference: TaskResult) -> TaskResult:
    """Scores next to those of a reference. Raises InputError if the two were not asked the same."""
    others = {score.key: score for score in reference.scores}
    scores = []
    for score in found.scores:
        other = others.get(score.key)
        asked = [(one.questions, one.num_fewshot, one.version) for one in (score, other) if one is not None]
        if other is None or asked[0] != asked[1]:
            raise InputError(f"{score.task}: the reference was not asked the same questions. Evaluate it again.")
        scores.append(replace(
            score, reference=other.value, reference_stderr=other.stderr, difference=score.value - other.value,
            difference_stderr=paired_stderr(found.answers.get(score.key), reference.answers.get(score.key)),
        ))  # fmt: skip
    return replace(found, scores=tuple(scores))


def paired_stderr(one: Mapping[int, float] | None, other: Mapping[int, float] | None) -> float | None:
    """Standard error of the mean difference over the same questions: s / sqrt(n), s with n - 1 in its denominator."""
    if not one or not other or one.keys() != other.keys() or len(one) < 2:
        return None
    return statistics.stdev(one[number] - other[number] for number in one) / math.sqrt(len(one))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) or (hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _text(value: object) -> str | None:
    return None if value is None else str(value)
