"""Turns a request into a plan of measurements, and checks it before any model is made."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mspc import threads
from mspc.bench.decoder import Shape
from mspc.bench.formats import DENSE, parse_format
from mspc.bench.mixtures import is_mixture, mixture_bytes
from mspc.bench.models import (
    SHAPES,
    TINYGEMM,
    TORCH16,
    bytes_of_matrix,
    check_format,
    check_model,
    compute_dtype,
    copied_bytes,
    matrices_of,
    outer_bytes,
    random_bytes,
    shape_of,
)
from mspc.bench.peers.blocks import misfit
from mspc.bench.peers.engines import AUTO, NONE, choose, formats_of
from mspc.bench.peers.files import ONNX, RUN_BY, is_sparse, kind_of
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
HEAD_BITS = {"cuda": 16, "cpu": 8}
PEER_BYTES = {"Q4_0": 0.6, "Q4_K": 0.6, "Q8_0": 1.1, "int4": 1.2}
"""Bytes a weight in the memory of another engine: an estimate, with room to load."""


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
    peers: str = NONE
    """Other engines, as in `engines.choose`. The default of the command line is `auto`."""
    head_bits: int | None = None


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
    peer: str | None = None
    """The other engine that runs it, with random weights in `format`, or `file`."""
    file: Path | None = None


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
    """Lines about rows that are not measured, and why."""
    evaluation: Evaluation | None = None
    """None: no perplexity is measured."""
    inputs: str = INPUTS[0]
    """As in `load`."""
    head_bits: int = 16
    """Bits of the head of random weights in codes; 16 is a dense one."""
    any_peers: bool = False
    """Other engines were not asked for by name: one that fails is left out."""

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
    head_bits = _head_bits(request, device)
    engines, left_out = _engines(request, device, head_bits)
    shapes, limit = _shapes(request, device)
    groups = []
    for shape, paths in shapes:
        group, reason = _candidates(request, shape, paths)
        peers, reasons = _peers(shape, engines, group, [] if request.shapes else paths)
        groups.append((*group, *peers))
        left_out += [f"torch's int4 is left out: {reason}"] if reason else []
        left_out += reasons
    repeats = REPEATS[device.type] if request.repeats is None else request.repeats
    if repeats < 1:
        raise InputError(f"--repeats must be at least 1, not {repeats}.")
    plan = Plan(
        tuple(groups),
        _sizes("--batch", request.batches, BATCHES[device.type], None),
        _sizes("--context", request.contexts, CONTEXTS[device.type], None if limit is None else limit - 1),
        _sizes("--prefill", request.prefills, PREFILLS[device.type], limit),
        repeats, device, tuple(left_out), _evaluation(request), request.inputs, head_bits, request.peers == AUTO,
    )  # fmt: skip
    if request.inputs != INPUTS[0] and not any(has_codes(one) for group in plan.groups for one in group):
        raise InputError(f"--inputs {request.inputs} has no effect on matrices without codes. Leave it out.")
    check_memory(plan, free_memory(device))
    return plan


def has_codes(candidate: Candidate) -> bool:
    """Tell if mspc multiplies codes of this candidate."""
    if candidate.peer is not None or candidate.format in (TINYGEMM, TORCH16):
        return False
    if candidate.format is not None:
        return is_mixture(candidate.format) or parse_format(candidate.format).grid is not None
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
        if not request.shapes and kind_of(path) != ONNX:
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
    models = [] if request.shapes else [path for path in paths if kind_of(path) != ONNX]
    of_models = [Candidate(path, shape, folder=resolve(path)) for path in models]
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
        mixture_bytes(shape, name) if is_mixture(name) else check_format(shape, name)
    return baselines + [Candidate(name, shape, name) for name in formats if name != DENSE], reason


def _head_bits(request: Request, device: torch.device) -> int:
    """Bits of the head of random weights in codes: on a CPU those that `compress` gives it, on CUDA a dense one."""
    bits = HEAD_BITS[device.type] if request.head_bits is None else request.head_bits
    if bits not in (4, 8, 16):
        raise InputError(f"--head-bits must be 4, 8 or 16, not {bits}.")
    return bits


def _engines(request: Request, device: torch.device, head_bits: int) -> tuple[list[str], list[str]]:
    """The other engines to measure, and lines about those that are not. Raises InputError for one that cannot be."""
    if device.type != "cpu" and request.peers in (AUTO, NONE):
        return [], []
    engines, told = choose(request.peers)
    for reason, is_so in (
        (f"--peers measures other engines on a CPU, not on {device.type}. Leave it out, or add --device cpu.",
         device.type != "cpu"),
        ("--head-bits 16 is not for other engines, whose heads have 4 or 8. Leave it out, or choose --peers none.",
         head_bits == 16),
    ):  # fmt: skip
        if is_so and engines:
            if request.peers == AUTO:
                return [], [reason]
            raise InputError(reason)
    return engines, [told] if told else []


def _peers(
    shape: Shape, engines: list[str], group: list[Candidate], paths: list[str]
) -> tuple[list[Candidate], list[str]]:
    """Rows of other engines for a shape, with more to compare them with; and what does not fit, and why.

    Raises InputError for a path that only another engine runs, and none of them is measured.
    """
    for path in paths:
        if kind_of(path) == ONNX and not set(RUN_BY[ONNX]) & set(engines):
            raise InputError(
                f"{path} is an ONNX model, for {' and '.join(RUN_BY[ONNX])} on a CPU. Name one of them in --peers."
            )
    if not engines:
        return [], []
    found, left_out = [Candidate("bf16 (torch)", shape, TORCH16)], []
    if not any(candidate.format == "int4" for candidate in group):
        try:
            check_format(shape, "int4")
            found.append(Candidate("int4", shape, "int4"))
        except InputError as error:
            left_out.append(f"mspc's int4 is left out: {error}")
    for engine, name in formats_of(engines):
        if reason := misfit(shape, name):
            left_out.append(f"{engine} {name} is left out of {shape.name}: {reason}.")
        else:
            found.append(Candidate(f"{engine} {name}", shape, name, peer=engine))
    for path in paths:
        for engine in RUN_BY.get(kind_of(path) or "", ()):
            if engine == "openvino" and is_sparse(Path(path)):
                left_out.append(f"openvino is left out of {path}: it does not know mspc's operator.")
            elif engine in engines:
                found.append(Candidate(f"{engine} {path}", shape, kind_of(path), peer=engine, file=Path(path)))
    return found, left_out


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


def needed_bytes(plan: Plan, candidate: Candidate) -> int:
    """Bytes of the weights of a candidate in memory, without those that others share, and of its caches."""
    shape, dtype = candidate.shape, compute_dtype(plan.device)
    tokens = max(max(plan.batches) * (max(plan.contexts) + 1), *plan.prefills)
    weights, head = shape.block_weights * shape.blocks, shape.hidden * shape.vocabulary
    if candidate.folder is not None:
        matrices = matrices_of(candidate.folder)
        dense = dtype.itemsize * (weights - sum(math.prod(matrix.shape) for matrix in matrices))
        stored = sum(bytes_of_matrix(matrix) for matrix in matrices)
        return max(dense, 0) + stored + outer_bytes(shape, dtype) + shape.cache_bytes(tokens, dtype.itemsize)
    if candidate.file is not None:
        files = candidate.file.glob("*.onnx*") if candidate.file.is_dir() else [candidate.file]
        return 2 * sum(file.stat().st_size for file in files)
    if candidate.peer is not None:
        return int(PEER_BYTES[candidate.format or ""] * weights) + 2 * head
    assert candidate.format is not None
    return _bytes_of_format(shape, candidate.format, dtype) + 2 * head + shape.cache_bytes(tokens, dtype.itemsize)


def _bytes_of_format(shape: Shape, name: str, dtype: torch.dtype) -> int:
    return mixture_bytes(shape, name) if is_mixture(name) else random_bytes(shape, name, dtype)


def check_memory(plan: Plan, free: int) -> None:
    """Raises InputError if the largest candidate with random weights and its cache do not fit."""
    dtype = compute_dtype(plan.device)
    for group in plan.groups:
        shape = group[0].shape
        tokens = max(max(plan.batches) * (max(plan.contexts) + 1), *plan.prefills)
        cache = shape.cache_bytes(tokens, dtype.itemsize)
        for candidate in group:
            if candidate.format is None or candidate.peer is not None:
                continue
            weights = _bytes_of_format(shape, candidate.format, dtype) + outer_bytes(shape, dtype)
            weights += copied_bytes(shape, candidate.format) if plan.device.type == "cuda" else 0
            if weights + cache > free:
                raise InputError(
                    f"{candidate.name} of {shape.name} needs {in_words(weights)} for weights and {in_words(cache)} "
                    f"for the cache of {tokens:,} tokens, but {plan.device} has {in_words(free)} free. Choose "
                    "--shapes 1b, a smaller --batch or --context, or another --device."
                )
