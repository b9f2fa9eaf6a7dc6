"""The parts of gpu.py. Each consists of units, which are measured, written and resumed one by one.

A unit is a name and a function that returns `{"rows": [...]}`, rows of plain values for a table, or `{"bench": row}`, a
row of `mspc bench`.
"""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mspc.bench.decoder import Operations, OuterLayers, Shape
from mspc.bench.formats import DENSE, Source, describe, parse_format, random_stored
from mspc.bench.models import SHAPES, TINYGEMM, compute_dtype, random_bytes, random_linear, random_outer
from mspc.bench.request import Candidate, Plan
from mspc.bench.run import choose_operations, measure
from mspc.bench.timing import Ceilings, captured, device_seconds, measure_ceilings, spread
from mspc.formats import layout
from mspc.kernels import KERNELS, cusparselt, dispatch
from mspc.kernels.timings import Choice
from mspc.numerics.linalg import add_gram, precise_matmul, symmetrize
from mspc.progress import Console, Progress
from mspc.runtime.linear import SparseLinear
from mspc.solvers import SOLVERS, SolverOptions
from mspc.types import GramStats

Result = dict[str, Any]
Unit = tuple[str, Callable[[], Result]]
FORMATS = (
    DENSE, TINYGEMM, "int4", "2:4+int4", "int3", "2:4", "8:16", "6:16", "5:16", "4:16", "50%", "int8", "8:16+int4"
)  # fmt: skip
"""The formats that are measured, the most wanted first."""
CHECKED = (*FORMATS[2:], "int2", "50%+int4", "50%+int3", "5:16+int3", "2:4+int8")
"""The formats whose kernels are compared with float64."""
ROTATED_BYTES = 2e8
"""Bytes of the copies of a layer that take turns, so that none stays in the cache of the device."""
TINY = Shape("tiny", 128, 256, 2, 4, 2, 32, 260, tied=False)

EFFICIENCY = {
    DENSE: (0.88, 0.88), TINYGEMM: (0.65, 0.80), "int4": (0.65, 0.80), "2:4+int4": (0.65, 0.80), "2:4": (0.80, 0.80),
    "8:16": (0.80, 0.80), "6:16": (0.80, 0.80), "5:16": (0.80, 0.80), "4:16": (0.80, 0.80), "50%": (0.60, 0.60),
    "int3": (0.65, 0.80), "int8": (0.65, 0.80), "8:16+int4": (0.11, 0.16),
}  # fmt: skip
"""Least and greatest share of the copy bandwidth that the linear layers of a format are expected to reach."""
SECONDS_OF_PRODUCT, SECONDS_OF_REST = 2e-6, 12e-6
"""Seconds of a product in addition to its bytes, four to a block, and of all other kernels of a block."""


def predicted(shape: Shape, name: str, bandwidth: float) -> tuple[float, float]:
    """Least and greatest seconds of a token at batch 1 and short context, predicted before any measurement."""
    dtype = torch.bfloat16
    head = shape.hidden * shape.vocabulary * dtype.itemsize / (EFFICIENCY[DENSE][0] * bandwidth)
    fixed = shape.blocks * (4 * SECONDS_OF_PRODUCT + SECONDS_OF_REST) + head
    shares = EFFICIENCY[name]
    least, greatest = (random_bytes(shape, name, dtype) / (share * bandwidth) for share in shares[::-1])
    return fixed + least, fixed + greatest


@dataclass
class Slot:
    """The device, the sizes, and the objects that all parts share."""

    device: torch.device
    is_dry: bool = False
    progress: Progress = field(default_factory=Console)

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.device)

    @property
    def repeats(self) -> int:
        return 2 if self.is_dry else 200

    def shape(self, name: str) -> Shape:
        return TINY if self.is_dry else SHAPES[name]

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """(O, I) of the linear layers of all shapes."""
        shapes = (TINY,) if self.is_dry else tuple(SHAPES.values())
        return {f"{shape.name} {layer}": size for shape in shapes for layer, size in shape.linears().items()}

    @cached_property
    def ceilings(self) -> Ceilings:
        return measure_ceilings(self.device, self.dtype, self.repeats)

    @cached_property
    def operations(self) -> tuple[Operations, str]:
        return choose_operations(self.device)

    def plan(self) -> Plan:
        """The steps of the end-to-end parts."""
        steps = ((1, 2), (8,), (8,)) if self.is_dry else ((1, 4, 8, 32), (128, 2048), (512, 2048))
        return Plan((), *steps, self.repeats, self.device, ())


def ceilings(slot: Slot) -> Iterator[Unit]:
    def of_device() -> Result:
        found = {"copy, GB/s": (slot.ceilings.copy, 1e9), "gemm, TFLOP/s": (slot.ceilings.gemm, 1e12)}
        rows = [
            {"what": what} | {key: rate / unit for key, rate in rates.items()} for what, (rates, unit) in found.items()
        ]
        return {"rows": rows}

    def of_software() -> Result:
        on_gpu = slot.device.type == "cuda"
        has_cusparselt = on_gpu and torch.backends.cusparselt.is_available()
        version = torch.backends.cusparselt.version() if has_cusparselt else None
        rows = [
            {"what": "cuSPARSELt", "found": version},
            {"what": "torch.cuda._compile_kernel", "found": hasattr(torch.cuda, "_compile_kernel")},
            {"what": "norms and rotations", "found": slot.operations[1]},
        ]
        return {"rows": rows}

    yield "device", of_device
    yield "software", of_software


def kernel_errors(slot: Slot) -> Iterator[Unit]:
    """Compare each kernel with float64, for 1 token to its MAX_TOKENS, and its dense weight, which must be equal."""
    size = (64, 256) if slot.is_dry else (2048, 4096)
    for name in CHECKED:
        matrix = describe(size, parse_format(name), name)
        for kernel_name, kernel in KERNELS.items():
            if kernel.supports(matrix, torch.bfloat16):
                what = {"kernel": kernel_name, "format": name}
                yield f"{kernel_name} {name}", lambda w=what, k=kernel, m=matrix: _errors_of(slot, w, k, m)


def _errors_of(slot: Slot, what: Result, kernel: Any, matrix: Any) -> Result:
    stored = random_stored(matrix, Source.seeded(0, torch.device("cpu")))
    repacked = {part: tensor.to(slot.device) for part, tensor in kernel.repack(stored, matrix).items()}
    exact = matrix if matrix.grid is None else replace(matrix, dtype=torch.float32)  # codes times scales, not rounded
    weight = layout.decode(stored, exact, "m").weight
    expanded = dispatch.expand(kernel, repacked, matrix, torch.bfloat16)
    fused, rows = Choice(kernel.MAX_TOKENS, "fused", 0), []
    for tokens in sorted({1, 2, 4, 7, kernel.MAX_TOKENS}):
        x = torch.randn(tokens, matrix.shape[1], generator=torch.Generator().manual_seed(tokens)).bfloat16()
        y = dispatch.multiply(fused, x.to(slot.device), kernel, repacked, matrix).cpu().double()
        expected = x.double() @ weight.double().T
        error = float((y - expected).norm() / expected.norm())
        equal = bool(torch.equal(expanded.cpu(), weight.bfloat16()))
        # The result is rounded to bfloat16, by up to 2^-9 of it.
        rows.append({**what, "tokens": tokens, "relative error": error, "right": error < 2**-8, "weight equal": equal})
    return {"rows": rows, "wrong": not all(row["right"] and row["weight equal"] for row in rows)}


def layers(slot: Slot) -> Iterator[Unit]:
    """Time every linear layer by itself, and compare it with the time of its bytes and with the dense layer."""
    tokens = (1, 2) if slot.is_dry else (1, 2, 4, 8, 16, 32, 64)
    for layer, size in slot.layers.items():
        yield layer, lambda layer=layer, size=size: {"rows": list(_layer_rows(slot, layer, size, tokens))}


def _layer_rows(slot: Slot, layer: str, size: tuple[int, int], tokens: tuple[int, ...]) -> Iterator[Result]:
    dense: dict[int, float] = {}
    for name in FORMATS:
        copies = [random_linear(size, name, Source.seeded(0, slot.device), slot.dtype, layer)]
        num_bytes = sum(tensor.nbytes for tensor in copies[0].buffers())
        if isinstance(copies[0], SparseLinear):
            num_bytes -= copies[0].copied_bytes()  # which these tokens do not read
        while len(copies) * num_bytes < ROTATED_BYTES and not slot.is_dry:
            copies.append(copy.deepcopy(copies[0]))
        for count in tokens:
            x = torch.randn(count, size[1], device=slot.device).to(slot.dtype)

            def in_turn(x: Tensor = x, copies: Any = copies) -> Tensor:
                return [layer(x) for layer in copies][-1]

            with torch.no_grad():
                took = spread(device_seconds(captured(in_turn, slot.device), slot.device, slot.repeats))
            seconds = took["median"] / len(copies)
            dense.setdefault(count, seconds)
            moved = num_bytes + x.nbytes + count * size[0] * x.itemsize
            floor = slot.ceilings.seconds(moved, 2 * size[0] * size[1] * count)
            yield {
                "layer": layer, "format": name, "tokens": count, "µs": seconds * 1e6, "floor, µs": floor * 1e6,
                "share of floor": floor / seconds, "x bf16": dense[count] / seconds,
            }  # fmt: skip


def decode(slot: Slot, name: str) -> Iterator[Unit]:
    """Run `mspc bench` on a shape, one format after the other."""
    shape, plan = slot.shape(name), slot.plan()
    outer: list[OuterLayers] = []
    baselines = {DENSE: "bf16", TINYGEMM: "int4"}

    def of_format(format_name: str) -> Result:
        if not outer:
            outer.append(random_outer(shape, plan.length, slot.device))
        label = "int4 (torch)" if format_name == TINYGEMM else format_name
        candidate = Candidate(label, shape, format_name, baseline=baselines.get(format_name))
        (row,) = measure((candidate,), plan, outer[0], slot.operations[0], slot.ceilings, slot.progress)
        least, greatest = predicted(shape, format_name, slot.ceilings.copy["median"])
        return {"bench": row, "predicted_seconds": [least, greatest]}

    for format_name in FORMATS:
        yield format_name, lambda format_name=format_name: of_format(format_name)


def cusparselt_products(slot: Slot) -> Iterator[Unit]:
    """2:4 in bfloat16 on sparse tensor cores, with the best algorithm of a search, compared with the dense product."""
    if reason := cusparselt.missing(slot.device):
        yield "all", lambda: {"rows": [{"what": f"no cuSPARSELt: {reason}"}]}
        return
    for layer, size in slot.layers.items():
        yield layer, lambda layer=layer, size=size: {"rows": list(_cusparselt_rows(slot, layer, size))}


def _cusparselt_rows(slot: Slot, layer: str, size: tuple[int, int]) -> Iterator[Result]:
    matrix = describe(size, parse_format("2:4"), layer)
    stored = random_stored(matrix, Source.seeded(0, torch.device("cpu")))
    dense = layout.decode(stored, matrix, layer).weight.to(slot.device)
    packed = cusparselt.compress(dense)
    for tokens in (64, 256, 1024, 2048, 4096):
        x = torch.randn(tokens, size[1], device=slot.device).to(slot.dtype)
        algorithm = cusparselt.search(x, packed)

        def sparse(x: Tensor = x, algorithm: int = algorithm) -> Tensor:
            return cusparselt.matmul(x, packed, algorithm)

        error = float((sparse().float() - (x @ dense.T).float()).norm() / (x @ dense.T).float().norm())
        took = {
            "dense": spread(device_seconds(captured(lambda x=x: x @ dense.T, slot.device), slot.device, 50)),
            "2:4": spread(device_seconds(captured(sparse, slot.device), slot.device, 50)),
        }
        yield {
            "layer": layer, "tokens": tokens, "algorithm": algorithm, "relative error": error,
            "µs": took["2:4"]["median"] * 1e6, "dense, µs": took["dense"]["median"] * 1e6,
            "x bf16": took["dense"]["median"] / took["2:4"]["median"],
        }  # fmt: skip


def compression(slot: Slot) -> Iterator[Unit]:
    """Time the compression: the Gram of 262,144 tokens, and one matrix by each solver."""
    shape = slot.shape("8b")
    num_tokens = 256 if slot.is_dry else 2**18
    for num_inputs in (shape.hidden, shape.intermediate):
        yield f"gram of {num_inputs}", lambda n=num_inputs: {"rows": [_gram_row(slot, n, num_tokens)]}
    for solver in ("obs", "admm"):
        for layer in ("out", "gate_up", "down"):
            size = shape.linears()[layer]
            yield f"{solver} {layer}", lambda s=solver, z=size: {"rows": [_solver_row(slot, s, z)]}


def _gram(slot: Slot, num_inputs: int, num_tokens: int) -> Tensor:
    gram = torch.zeros(num_inputs, num_inputs, device=slot.device)
    part = torch.randn(min(num_tokens, 4096), num_inputs, device=slot.device)
    with precise_matmul():
        for _ in range(num_tokens // len(part)):
            add_gram(gram, part)
    return symmetrize(gram)


def _gram_row(slot: Slot, num_inputs: int, num_tokens: int) -> Result:
    took = _synchronized(slot, lambda: _gram(slot, num_inputs, num_tokens), warm_ups=1)
    return {"inputs": num_inputs, "tokens": num_tokens, "seconds": took}


def _solver_row(slot: Slot, solver: str, size: tuple[int, int]) -> Result:
    generator = torch.Generator(slot.device).manual_seed(0)
    weight = torch.randn(size, device=slot.device, generator=generator) / size[1] ** 0.5
    stats = GramStats(_gram(slot, size[1], 2 * max(size[1], 128)), 2 * max(size[1], 128))
    target, options = parse_format("2:4+int4"), SolverOptions()
    took = _synchronized(slot, lambda: SOLVERS[solver](weight, stats, target, options, "m"), warm_ups=0)
    return {"solver": solver, "rows": size[0], "columns": size[1], "target": "2:4+int4", "seconds": took}


def _synchronized(slot: Slot, run: Callable[[], object], warm_ups: int) -> float:
    """Seconds of one call on the host, all work on the device included."""

    def whole() -> None:
        run()
        if slot.device.type == "cuda":
            torch.cuda.synchronize(slot.device)

    for _ in range(warm_ups):
        whole()
    begin = time.perf_counter()
    whole()
    return time.perf_counter() - begin


PARTS: dict[str, Callable[[Slot], Iterator[Unit]]] = {
    "ceilings": ceilings,
    "kernels": kernel_errors,
    "decode-1b": lambda slot: decode(slot, "1b"),
    "decode-8b": lambda slot: decode(slot, "8b"),
    "layers": layers,
    "cusparselt": cusparselt_products,
    "compression": compression,
}
"""The parts by value. A run that is cut off has measured the first ones."""
