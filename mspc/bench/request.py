"""Turns a request into a plan of measurements, and checks it before any model is made."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mspc import threads
from mspc.bench.decoder import Shape
from mspc.bench.formats import DENSE, parse_format
from mspc.bench.models import (
    SHAPES,
    TINYGEMM,
    check_format,
    check_model,
    compute_dtype,
    copied_bytes,
    matrices_of,
    outer_bytes,
    random_bytes,
    shape_of,
)
from mspc.bench.timing import REPEATS
from mspc.errors import InputError, unknown
from mspc.memory import free_memory
from mspc.model.hub import choose_device, choose_sequence_length, load_config, resolve
from mspc.runtime.loading import INPUTS, check_inputs
from mspc.sizes import in_words
from mspc.storage.manifest import is_artifact
from mspc.storage.sparse_export import is_sparse_export
from mspc.text.reading import Reading

FROM_MODEL = "from-model"
BASELINES = {"bf16": DENSE, "int4": TINYGEMM}
"""The baselines, and the format of each."""
FORMATS = (DENSE, "int4", "2:4", "8:16", "6:16", "2:4+int4")
BATCHES = {"cuda": (1, 4, 8, 32), "cpu": (1,)}
CONTEXTS = {"cuda": (128, 2048), "cpu": (128,)}
MAX_WINDOWS = 20
"""Windows of a perplexity."""
PREFILLS = {"cuda": (512, 2048), "cpu": (128,)}


@dataclass(frozen=True, slots=True)
class Request:
    """The options of the command line. None means the default for the device."""

    paths: tuple[str, ...] = ()
    baseline: str = "bf16"
    shapes: str | None = None
    formats: tuple[str, ...] | None = None
    batches: tuple[int, ...] | None = None
    contexts: tuple[int, ...] | None = None
    prefills: tuple[int, ...] | None = None
    repeats: int | None = None
    device: str = "auto"
    bos: str = "auto"
    perplexity: bool = True
    max_windows: int | None = None
    sequence_length: int | None = None
    threads: int | None = None
    inputs: str = INPUTS[0]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The windows on which the perplexity of models is measured."""

    max_windows: int
    sequence_length: int | None
    """None: 2048, or the model's maximum if that is less."""
    bos: str
    """The choice whether they begin with a BOS token."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A decoder to measure: random weights in `format`, or the model of a folder."""

    name: str
    shape: Shape
    format: str | None = None
    folder: Path | None = None
    baseline: str | None = None
    """Its name in BASELINES, if it is a baseline."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The candidates of each shape, baselines first, and the sizes of the steps."""

    groups: tuple[tuple[Candidate, ...], ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prefills: tuple[int, ...]
    repeats: int
    device: torch.device
    left_out: tuple[str, ...]
    """The reasons why a baseline is not measured."""
    evaluation: Evaluation | None = None
    """None: no perplexity is measured."""
    inputs: str = INPUTS[0]
    """As in `load`."""

    @property
    def length(self) -> int:
        return max(*(context + 1 for context in self.contexts), *self.prefills)


def make_plan(request: Request) -> Plan:
    """The measurements of a request. Raises InputError if one cannot be made, before any model is made."""
    if request.baseline not in BASELINES:
        raise unknown("baseline", request.baseline, BASELINES)
    Reading(request.bos)
    threads.check(request.threads)
    device = choose_device(request.device)
    if device.type not in BATCHES:
        raise InputError(f"The bench measures cuda and cpu, not {device.type}. Choose cuda or cpu with --device.")
    check_inputs(request.inputs, device)
    shapes, limit = _shapes(request, device)
    groups, left_out = [], []
    for shape, paths in shapes:
        group, reason = _candidates(request, shape, paths)
        groups.append(tuple(group))
        left_out += [reason] if reason else []
    repeats = REPEATS[device.type] if request.repeats is None else request.repeats
    if repeats < 1:
        raise InputError(f"--repeats must be at least 1, not {repeats}.")
    plan = Plan(
        tuple(groups),
        _sizes("--batch", request.batches, BATCHES[device.type], None),
        _sizes("--context", request.contexts, CONTEXTS[device.type], None if limit is None else limit - 1),
        _sizes("--prefill", request.prefills, PREFILLS[device.type], limit),
        repeats, device, tuple(left_out), _evaluation(request), request.inputs,
    )  # fmt: skip
    if request.inputs != INPUTS[0] and not any(has_codes(one) for group in plan.groups for one in group):
        raise InputError(f"--inputs {request.inputs} has no effect on matrices without codes. Leave it out.")
    check_memory(plan, free_memory(device))
    return plan


def has_codes(candidate: Candidate) -> bool:
    """Tell if mspc multiplies codes of this candidate."""
    if candidate.format is not None:
        return candidate.format != TINYGEMM and parse_format(candidate.format).grid is not None
    assert candidate.folder is not None
    return any(matrix.grid is not None for matrix in matrices_of(candidate.folder))


def _shapes(request: Request, device: torch.device) -> tuple[list[tuple[Shape, list[str]]], int | None]:
    """Every shape with the paths that have it, and the most tokens that all models allow."""
    if request.shapes in SHAPES:
        if request.paths:
            raise InputError(
                f"--shapes {request.shapes} measures random weights of its own and takes no PATH. Use --shapes "
                f"{FROM_MODEL} for the shapes of {request.paths[0]}."
            )
        if request.shapes == "8b" and device.type == "cpu" and request.device == "auto":
            raise InputError(
                "--shapes 8b is for a GPU, but there is no CUDA here. Choose --shapes 1b, or add --device cpu."
            )
        return [(SHAPES[request.shapes], [])], None
    if request.shapes not in (None, FROM_MODEL):
        raise unknown("shapes", request.shapes, [*SHAPES, FROM_MODEL])
    if not request.paths:
        also = f"--shapes {FROM_MODEL} takes them from PATH. " if request.shapes else ""
        raise InputError(f"{also}Give a PATH (artifact, sparse export or checkpoint), or --shapes 1b or 8b.")
    if request.formats and not request.shapes:
        raise InputError(
            f"--format is for random weights, but {request.paths[0]} has its own. Add --shapes {FROM_MODEL} for "
            "random weights in its shapes, or leave --format out."
        )
    found: dict[Shape, list[str]] = {}
    limits = []
    for path in request.paths:
        folder = resolve(path)
        shape, limit = shape_of(folder)
        if not request.shapes:
            try:
                check_model(folder)
            except InputError as error:
                raise InputError(f"{path} cannot be measured. {error}") from error
        same = next((known for known in found if replace(known, name=shape.name) == shape), shape)
        found.setdefault(same, []).append(path)
        limits += [] if limit is None else [limit]
    return list(found.items()), min(limits, default=None)


def _candidates(request: Request, shape: Shape, paths: list[str]) -> tuple[list[Candidate], str | None]:
    """The candidates of a shape, baselines first, and the reason if torch's int4 is left out."""
    of_models = [] if request.shapes else [Candidate(path, shape, folder=resolve(path)) for path in paths]
    # A checkpoint that is measured anyway is the dense baseline itself.
    dense = next((model for model in of_models if model.folder and _is_dense(model.folder)), None)
    baselines = [replace(dense or Candidate(DENSE, shape, DENSE), baseline="bf16")]
    reason = None
    try:
        check_format(shape, TINYGEMM)
        baselines.append(Candidate("int4 (torch)", shape, TINYGEMM, baseline="int4"))
    except InputError as error:
        if request.baseline == "int4":
            raise
        reason = str(error)
    if not request.shapes:
        return baselines + [model for model in of_models if model is not dense], reason
    formats = dict.fromkeys(request.formats or FORMATS)
    for name in formats:
        check_format(shape, name)
    return baselines + [Candidate(name, shape, name) for name in formats if name != DENSE], reason


def _is_dense(folder: Path) -> bool:
    return not (is_artifact(folder) or is_sparse_export(folder))


def _evaluation(request: Request) -> Evaluation | None:
    """The perplexity to measure. Raises InputError for windows that are not possible, or that nothing uses."""
    asked = {"max_windows": request.max_windows, "sequence_length": request.sequence_length}
    if request.shapes or not request.perplexity:
        reason = f"--shapes {request.shapes}, whose weights are random" if request.shapes else "--no-perplexity"
        for name, value in (asked | {"bos": None if request.bos == "auto" else request.bos}).items():
            if value is not None:
                option = f"--{name.replace('_', '-')} {value}"
                raise InputError(f"{option} has no effect with {reason}. Leave one of the two out.")
        return None
    for name, value, least in (
        ("max-windows", request.max_windows, 1),
        ("sequence-length", request.sequence_length, 2),
    ):
        if value is not None and value < least:
            raise InputError(f"--{name} must be at least {least}, not {value}.")
    for path in request.paths:
        choose_sequence_length(load_config(resolve(path)), request.sequence_length)
    windows = MAX_WINDOWS if request.max_windows is None else request.max_windows
    return Evaluation(windows, request.sequence_length, request.bos)


def _sizes(option: str, asked: Sequence[int] | None, usual: Sequence[int], most: int | None) -> tuple[int, ...]:
    """The sizes asked for, or else the usual ones that the model allows."""
    if asked is None:
        allowed = tuple(size for size in usual if most is None or size <= most)
        return allowed or (min(usual[0], most or usual[0]),)
    for size in asked:
        if size < 1:
            raise InputError(f"{option} must be at least 1, not {size}.")
        if most is not None and size > most:
            raise InputError(f"{option} {size} is longer than the model allows ({most}). Lower it.")
    return tuple(dict.fromkeys(asked))


def check_memory(plan: Plan, free: int) -> None:
    """Raises InputError if the largest candidate with random weights and its cache do not fit."""
    dtype = compute_dtype(plan.device)
    for group in plan.groups:
        shape = group[0].shape
        tokens = max(max(plan.batches) * (max(plan.contexts) + 1), *plan.prefills)
        cache = shape.cache_bytes(tokens, dtype.itemsize)
        for candidate in group:
            if candidate.format is None:
                continue
            weights = random_bytes(shape, candidate.format, dtype) + outer_bytes(shape, dtype)
            weights += copied_bytes(shape, candidate.format) if plan.device.type == "cuda" else 0
            if weights + cache > free:
                raise InputError(
                    f"{candidate.name} of {shape.name} needs {in_words(weights)} for weights and {in_words(cache)} "
                    f"for the cache of {tokens:,} tokens, but {plan.device} has {in_words(free)} free. Choose "
                    "--shapes 1b, a smaller --batch or --context, or another --device."
                )
