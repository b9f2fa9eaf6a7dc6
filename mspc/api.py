"""The public functions: compress a model; export, verify, evaluate and load the result, and let it write."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from exporters import exporting, formats, verification
from mspc import ranks
from mspc.errors import InputError, Stopped, StorageError, VerificationError
from mspc.kernels.slow import slow_note
from mspc.model.hub import choose_device, load_tokenizer, resolve, without_progress
from mspc.passes.perplexity import Perplexity
from mspc.pipeline.evaluation import evaluate_folder, evaluate_module
from mspc.pipeline.forecasting import Forecast, Place, forecast_of
from mspc.pipeline.rates import GPU_BYTES, calibrate
from mspc.pipeline.run import Run
from mspc.pipeline.sharing import held_by_first
from mspc.pipeline.summary import summary, to_html
from mspc.progress import Event, Progress, as_progress, log
from mspc.ranks import check as check_ranks
from mspc.recipe import Recipe
from mspc.runtime.generation import Generation, check_options, request
from mspc.runtime.linear import SparseLinear
from mspc.runtime.loading import INPUTS, load
from mspc.runtime.product_times import known_or_measured
from mspc.storage.artifact import EXPORTS
from mspc.storage.manifest import read_entries, read_manifest
from mspc.storage.output_folder import sibling, working_folder
from mspc.text.given import check_given
from mspc.text.reading import Reading, save_tokenizer
from mspc.threads import check as check_threads
from mspc.threads import count as count_threads
from mspc.threads import using
from mspc.types import PlannedMatrix

ProgressLike = bool | Callable[[Event], object] | Progress
"""True: a progress bar on stderr. A callable gets an `Event` after each step; one that returns False stops the run."""


@dataclass(frozen=True)
class Artifact:
    """A folder that `compress` wrote."""

    path: Path

    def __init__(self, path: str | Path) -> None:
        object.__setattr__(self, "path", Path(path))

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The content of mspc.json, read once. Raises InputError if the folder is no artifact."""
        return read_manifest(self.path)

    def export(self, format_name: str, out: str | Path, **options: Any) -> Path:
        """See `mspc.export`."""
        return export(self, format_name, out, **options)

    def load(self, **options: Any) -> PreTrainedModel:
        """See `mspc.load`."""
        return load(self.path, **options)

    def __str__(self) -> str:
        return f"{self.path}: {summary(self.manifest)}"

    def _repr_html_(self) -> str:
        """The matrices as a table, for notebooks."""
        return f"<p><code>{self.path}</code>: {summary(self.manifest)}</p>{to_html(self.manifest)}"


def compress(
    model: str | Path | PreTrainedModel,
    recipe: Recipe | None = None,
    *,
    out: str | Path,
    tokenizer: Any = None,
    calibration: str | Path | Sequence[str] | Tensor | None = None,
    progress: ProgressLike = True,
    measurements: str | Path | None = None,
    spill: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    exports: Sequence[str] = (),
    threads: int | None = None,
    force: bool = False,
) -> Artifact:
    """Prune and quantize the matrices of a model, each according to its sensitivity.

    Args:
        model: Checkpoint folder, .gguf file, hub id, or a transformers model in memory, which stays as it is. (It is
            saved next to `out` meanwhile.)
        recipe: What to make of it; `Recipe()` gives it 4.25 bits per weight, and 8 for head and embeddings.
        out: Folder to write.
        tokenizer: Tokenizer of the calibration text; None: the one in the model's folder.
        calibration: Name of a text source, a list of documents, or token ids, an integer tensor (N, T) of N sequences.
            None: what the recipe says.
        progress: See `ProgressLike`. If a callable returns False, the run stops after the current block and raises
            `Stopped`; `resume` continues it.
        measurements: Folder that keeps gradients and loss curves for runs with another budget.
        spill: Folder for activations that do not fit in memory.
        resume: Continue a run that was cut off.
        overwrite: Replace an older artifact once the new one is complete.
        exports: Formats to write to `out/exports/` too.
        threads: Threads of the CPU, which change no byte. None: OMP_NUM_THREADS, or the cores that the process may use.
        force: Start a run that by its forecast does not fit in memory.

    Raises the errors of `mspc.errors`.
    """
    shown, recipe, out = as_progress(progress), Recipe() if recipe is None else recipe, Path(out).absolute()
    if not isinstance(recipe, Recipe):
        raise InputError(f"recipe must be an mspc.Recipe, such as Recipe(sparsity=0.5), not {recipe!r}.")
    if isinstance(exports, str):
        raise InputError(f"exports must be a list of formats, such as [{exports!r}], not a string.")
    exports = tuple(dict.fromkeys(exports))
    check_given(calibration, "calibration")
    check_threads(threads)
    for name in exports:
        formats.load(name)  # so that a mistake is found before any work

    def check_exports(plan: list[PlannedMatrix], config: dict[str, Any], folder: Path) -> None:
        for name in exports:
            exporting.check(name, plan, config, folder)

    if isinstance(model, PreTrainedModel) and tokenizer is None and not isinstance(calibration, Tensor):
        raise InputError("A model in memory needs tokenizer=, or calibration= as token ids (N, T).")
    if "gguf" in exports and recipe.group_size in (None, "auto"):  # it knows groups of 32 only
        settings = recipe.settings()
        recipe = replace(recipe, group_size=32) if settings.quantizes or settings.quantizes_outer else recipe
    start = partial(Run, recipe, out, resume, check_exports, known_or_measured, shown, tokenizer, calibration)
    run = None if isinstance(model, PreTrainedModel) else start(_name_of(model))  # checks before a folder is made
    try:
        folder = Path(ranks.by_first(lambda: str(working_folder(out, resume=resume, overwrite=overwrite))))
        with held_by_first(folder), _saved(model, tokenizer, out) as source:
            run = run or start(source)
            with using(threads, run.device) as run.threads:
                run.force = force
                run.compress(folder, Path(measurements) if measurements else None, Path(spill) if spill else None)
    except Stopped as stopped:
        raise Stopped(f"{stopped} What is finished is kept, and resume continues it.") from stopped
    artifact = Artifact(out)
    if not ranks.is_first():
        return artifact
    entries = read_entries(artifact.manifest, out)
    if note := slow_note([entry.stored for entry in entries], run.device.type):
        log.info(note)
    for name in exports:
        export(artifact, name, artifact.path / EXPORTS / name, overwrite=resume, progress=shown)
    return artifact


def forecast(
    model: str | Path,
    recipe: Recipe | None = None,
    *,
    out: str | Path | None = None,
    device: str = "here",
    threads: int | None = None,
    spill: str | Path | None = None,
    calibrated: bool = False,
    ranks: int = 1,
) -> Forecast:
    """Seconds, memory and disk of `compress` with the same options, by config.json alone; no weight is read.

    Args:
        model: Checkpoint folder, .gguf file (only its header is read), or hub id (only config.json is downloaded).
        recipe: What to make of it. Its device does not count.
        out: Folder whose free space is compared; None: the disk is not checked.
        device: here, cpu or cuda:1 (devices of this machine, whose free memory is compared), h200 or a100 (tables).
        threads: Threads of the CPU for each rank; None: OMP_NUM_THREADS, or the cores that the process may use.
        spill: Folder for activations, as for `compress`.
        ranks: Processes that share the run; of more than 8 GPUs, 8 are on a machine.
        calibrated: Measure the device first, in some seconds. The rates are kept in the cache folder.

    Raises InputError for what `compress` would refuse by the shapes; `problems` of the result has what does not fit.
    """
    check_threads(threads)
    if not isinstance(model, str | Path):
        raise InputError(f"model must be a folder, a .gguf file or a hub id, not a {type(model).__name__}.")
    if calibrated and device in GPU_BYTES:
        raise InputError(f"Device {device} is a table, and only a device of this machine can be measured.")
    check_ranks(ranks)
    number = count_threads(threads)
    if threads is None and device not in GPU_BYTES:
        number = max(1, number // ranks)  # as `--ranks` starts them
    if calibrated:
        calibrate(Place.named(device).device, number)
    return forecast_of(
        str(model), Recipe() if recipe is None else recipe, device, number, Path(spill) if spill else None,
        Path(out) if out else None, ranks,
    )  # fmt: skip


def _name_of(model: object) -> str:
    if not isinstance(model, str | Path):
        raise InputError(f"model must be a folder, a hub id or a transformers model, not a {type(model).__name__}.")
    return str(model)


@contextmanager
def _saved(model: object, tokenizer: Any, out: Path) -> Iterator[str]:
    """The folder of a model in memory, which is saved next to `out` for as long as the context lasts."""
    if not isinstance(model, PreTrainedModel):
        yield ""
        return
    parent = sibling(out, "source")  # `out` is held, so this can only be the leftover of a run that was killed
    shutil.rmtree(parent, ignore_errors=True)
    name = Path(model.config.name_or_path).name
    folder = parent / (type(model).__name__ if name in ("", "..", "None") else name)
    before = model.config.architectures, model.config.dtype
    try:
        with without_progress():
            model.save_pretrained(folder)
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
        yield str(folder)
    except OSError as error:
        raise StorageError(f"The model cannot be saved to {folder} ({error}). Free some space, or move out.") from error
    finally:
        model.config.architectures, model.config.dtype = before
        shutil.rmtree(parent, ignore_errors=True)


def export(
    artifact: Artifact | str | Path,
    format_name: str,
    out: str | Path,
    *,
    overwrite: bool = False,
    verify: bool = True,
    reference: bool = False,
    progress: ProgressLike = True,
    **options: Any,
) -> Path:
    """Write an artifact in a format that a runtime loads, and verify it there; returns `out`.

    `format_name` is one of `exporters.formats.FORMATS`, and `options` are those of the format. `reference` keeps the
    logits of the artifact in a file next to `out`, with which `verify` runs the runtimes without the artifact. Raises
    InputError for an artifact that the format cannot hold, and VerificationError if the export computes something else.
    """
    path = artifact.path if isinstance(artifact, Artifact) else Path(artifact)
    return exporting.export(
        path, format_name, Path(out), overwrite=overwrite, verified=verify, keep_reference=reference,
        options=options, progress=as_progress(progress),
    )  # fmt: skip


def verify(
    folder: str | Path,
    against: Artifact | str | Path | None = None,
    *,
    long: bool = False,
    progress: ProgressLike = True,
) -> dict[str, Any]:
    """Read an export back and run it in each runtime that is installed; returns what was compared.

    `against` is the artifact that the export was made from. Without it, the export's own record counts, and runtimes
    are run only if the logits were kept at export (`reference=True`). With `long`, a sequence exceeds every window and
    original context, not only those that 2048 tokens reach. Raises VerificationError for a mismatch.
    """
    artifact = against.path if isinstance(against, Artifact) else against
    path = None if artifact is None else Path(artifact)
    result = verification.verify(Path(folder), path, as_progress(progress), long=long)
    if wrong := verification.failures(result):
        raise VerificationError(f"{folder} is wrong: {verification.in_short(wrong)}.")
    return result


def evaluate(
    model: str | Path | Artifact | PreTrainedModel,
    text: str | Path | Sequence[str] | Tensor = "builtin",
    *,
    tokenizer: Any = None,
    sequence_length: int | None = None,
    max_windows: int | None = None,
    against: str | Path | Artifact | PreTrainedModel | None = None,
    device: str = "auto",
    dtype: str = "auto",
    bos: str = "auto",
    text_column: str | None = None,
    text_encoding: str | None = None,
    threads: int | None = None,
    inputs: str = "int16",
    progress: ProgressLike = True,
) -> Perplexity:
    """Perplexity on test text, cut into windows that do not overlap, with 95% intervals over the windows.

    Args:
        model: Checkpoint folder, .gguf file, hub id, artifact, dense or sparse export (a block at a time in memory),
            or a transformers model in memory, such as `mspc.load` returns.
        text: Name of a text source, a list of documents, or token ids, an integer tensor (N, T) of N windows.
        tokenizer: Tokenizer of the text; None: the one in the model's folder.
        sequence_length: Tokens per window; None: 2048, or the model's maximum if that is less.
        max_windows: Measure only the first windows.
        against: Another model, such as the one before compression: its perplexity and the KL divergence from its
            predictions are measured too.
        device: Device of a model that is not in memory yet.
        dtype: Dtype of the forward passes of a model that is not in memory yet.
        bos: Whether each window begins with a BOS token, which is not scored: auto (as the tokenizer begins a text),
            yes or no.
        text_column: Field or column of the text; None: the first of text, messages and conversations.
        text_encoding: Encoding of .txt files; None: UTF-8.
        threads: See `compress`.
        inputs: int8: measure `model` with inputs of codes rounded to 8 bits, as `load` can. It is loaded whole then.
        progress: See `ProgressLike`.
    """
    model, against = (part.path if isinstance(part, Artifact) else part for part in (model, against))
    check_given(text, "text")
    text, shown = str(text) if isinstance(text, Path) else text, as_progress(progress)
    reading = Reading(bos, text_column, text_encoding)
    model = _with_inputs(model, inputs, device, dtype)
    if isinstance(model, PreTrainedModel) or isinstance(against, PreTrainedModel):
        if tokenizer is None and isinstance(model, str | Path) and not isinstance(text, Tensor):
            tokenizer = load_tokenizer(resolve(str(model)))
        model, against = (
            load(part, device, dtype) if isinstance(part, str | Path) else part for part in (model, against)
        )
        assert model is not None
        with using(threads, next(model.parameters()).device, precise=False):
            return evaluate_module(model, text, reading, tokenizer, sequence_length, max_windows, against, shown)
    assert model is not None
    with using(threads, choose_device(device)):
        return evaluate_folder(
            model, text, reading, tokenizer, sequence_length, max_windows, device, dtype, against, shown
        )


def _with_inputs(model: Any, inputs: str, device: str, dtype: str) -> Any:
    """The model in memory where `inputs` are not the usual ones. Raises InputError if it is there already."""
    if inputs == INPUTS[0]:
        return model
    if isinstance(model, PreTrainedModel):
        raise InputError(f"inputs={inputs!r} is for a model that is not in memory yet. Give it to mspc.load.")
    return load(model, device, dtype, inputs=inputs)


def generate(
    model: str | Path | Artifact | PreTrainedModel,
    prompt: str,
    *,
    tokenizer: Any = None,
    max_new_tokens: int | None = None,
    raw: bool = False,
    temperature: float | None = None,
    seed: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    inputs: str = "int16",
    progress: ProgressLike = True,
) -> Generation:
    """Let a model answer or continue a prompt; iterate over the result to get the text in pieces, as it is written.

    Args:
        model: Artifact, dense or sparse export, checkpoint folder, .gguf file, hub id, or a transformers model.
        prompt: Message to the model, in its chat template; without one, the beginning of the text.
        tokenizer: Tokenizer of prompt and text; None: the one in the model's folder.
        max_new_tokens: Most tokens to write; None: 256. The context of the model is a limit, too.
        raw: Continue the prompt as it is, even if there is a chat template.
        temperature: Draw tokens from the probabilities at this temperature; None or 0: take the likeliest ones.
        seed: Decides the draws, on one device; None: 0.
        device: Device of a model that is not in memory yet.
        dtype: Dtype of the computation of a model that is not in memory yet; auto: float32 on a CPU.
        threads: Threads of the CPU for each operation. None: OMP_NUM_THREADS, or the cores that the process may use.
        inputs: See `load`; for a model that is not in memory yet.
        progress: See `ProgressLike`.

    The result has, while and after it is read, `ids`, `prompt_tokens`, `prefill_seconds`, `decode_seconds`,
    `tokens_per_second` and `ended`. Raises InputError before weights are read for a prompt that is empty or longer than
    the context, a model without tokenizer, and other wrong values.
    """
    check_options(max_new_tokens, temperature, seed)
    check_threads(threads)
    if not isinstance(prompt, str):
        raise InputError(f"prompt must be a string, not a {type(prompt).__name__}.")
    model, shown = model.path if isinstance(model, Artifact) else model, as_progress(progress)
    source = model if isinstance(model, PreTrainedModel) else resolve(_name_of(model))
    if isinstance(source, PreTrainedModel):
        _with_inputs(source, inputs, device, dtype)
    asked = request(source, tokenizer, prompt, raw, max_new_tokens)
    if isinstance(source, Path):
        with shown.stage("Loading the model", 1) as step:
            source = load(source, device, dtype, inputs=inputs)
            step()
        stored = [layer.matrix for layer in source.modules() if isinstance(layer, SparseLinear)]
        if note := slow_note(stored, source.device.type):
            log.info(note)
    return Generation(source, asked, temperature or 0.0, seed or 0, threads, shown)
