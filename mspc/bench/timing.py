"""Times steps without waiting for launches, and measures the most that the device can do."""

import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mspc.kernels.cpu import memory

Step = Callable[[], Tensor]
WARM_UPS = {"cuda": 20, "cpu": 1}
REPEATS = {"cuda": 200, "cpu": 9}
MOST_SECONDS = 10.0
"""Most seconds of one measurement; a slower step is repeated less often."""
COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}
"""Size of the tensor that is copied to measure bandwidth: many times the cache."""
GEMM_SIZE = {"cuda": 8192, "cpu": 512}
PACKAGES = ("mspc", "torch", "triton", "transformers")


def spread(samples: Sequence[float]) -> dict[str, float]:
    """The median and the 10th and 90th percentiles."""
    if len(samples) == 1:
        return dict.fromkeys(("p10", "median", "p90"), samples[0])  # quantiles want two
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return {"p10": tenths[0], "median": statistics.median(samples), "p90": tenths[8]}


def inverse(seconds: dict[str, float], amount: float) -> dict[str, float]:
    """The spread of `amount` / seconds."""
    return {"p10": amount / seconds["p90"], "median": amount / seconds["median"], "p90": amount / seconds["p10"]}


def ratios(base: dict[str, Any], own: dict[str, Any], *, in_turns: bool) -> dict[str, float]:
    """The spread of seconds of a baseline / own seconds, round by round if both took turns.

    Otherwise p10 and p90 are the least and the most that the two spreads allow.
    """
    theirs, ours = base.get("round_seconds"), own.get("round_seconds")  # older results have none
    if in_turns and theirs and ours:
        return spread([other / one for other, one in zip(theirs, ours, strict=True)])
    other, one = base["seconds"], own["seconds"]
    pairs = {"p10": ("p10", "p90"), "median": ("median", "median"), "p90": ("p90", "p10")}
    return {name: other[a] / one[b] for name, (a, b) in pairs.items()}


def captured(step: Step, device: torch.device) -> Step:
    """The step as one CUDA graph, whose result is overwritten by every replay; elsewhere the step itself."""
    if device.type != "cuda":
        return step
    # The first calls allocate and tune, so they run before the capture, on another stream, as torch wants it.
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def device_seconds(step: Step, device: torch.device, repeats: int) -> list[float]:
    """Seconds of each repeat after warm-ups; on CUDA by events on the device, so that the host may run ahead."""
    if device.type != "cuda":
        return host_seconds(lambda: bool(step().numel()), device, repeats)
    repeats = _affordable(step, device, repeats)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize(device)
    for begin, end in events:
        begin.record()
        step()
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) / 1e3 for begin, end in events]


def host_seconds(run: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each repeat by the clock of the host, for steps that end there."""
    return [_timed(run) for _ in range(_affordable(run, device, repeats))]


def _affordable(run: Callable[[], object], device: torch.device, repeats: int) -> int:
    """Warm up, and return the number of repeats that there is time for, at least 1."""
    for _ in range(WARM_UPS[device.type] - 1):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)

    def last() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return max(1, min(repeats, int(MOST_SECONDS / _timed(last))))


def _timed(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The highest rates of the device in this run: bytes read and written, and floating point operations, a second."""

    copy: dict[str, float]
    gemm: dict[str, float]
    read: dict[str, float] | None = None
    """Bytes read a second, on a CPU: a step of decoding writes next to nothing."""

    @property
    def bandwidth(self) -> float:
        """Bytes a second, read if that was measured, or else copied."""
        return (self.read or self.copy)["median"]

    def seconds(self, num_bytes: float, flops: float) -> float:
        """The least time of a step that must move `num_bytes` and do `flops` operations."""
        return max(num_bytes / self.bandwidth, flops / self.gemm["median"])


def measure_ceilings(device: torch.device, dtype: torch.dtype, repeats: int) -> Ceilings:
    source = torch.empty(COPY_BYTES[device.type], dtype=torch.uint8, device=device).fill_(1)
    read = None
    if device.type == "cpu":
        source = memory.copied(source)
        words = source.view(torch.int64)
        read = inverse(spread(device_seconds(lambda: words.sum(), device, repeats)), source.nbytes)
    target = torch.empty_like(source)
    copied = device_seconds(captured(lambda: target.copy_(source), device), device, repeats)
    size = GEMM_SIZE[device.type]
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    # At most 20 repeats: products heat the device, which then runs slower than in decoding.
    multiplied = device_seconds(captured(lambda: a @ b, device), device, min(repeats, 20))
    return Ceilings(inverse(spread(copied), 2 * source.nbytes), inverse(spread(multiplied), 2.0 * size**3), read)


def describe_device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"type": device.type, "name": _cpu_name(), "threads": torch.get_num_threads(), "clocks": None}
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "clocks": clocks(device),
    }


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def clocks(device: torch.device) -> dict[str, float] | None:
    """MHz, watts and degrees at this moment from nvidia-smi, or None without it."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return None
    fields = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return dict(zip(fields, (float(value) for value in done.stdout.split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found | {"cuda": torch.version.cuda}
