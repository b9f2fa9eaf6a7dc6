"""Rates of a device, by which the work of a run becomes seconds: measured here, or from a table with its date.

Rates are of one thread. A kind of work has amounts of its own:

    product, half, double   floating point operations of products in float32, bfloat16 and float64
    factor                  I^3 of a Cholesky factor and the inverse by it
    eigen                   I^3 of an eigendecomposition
    select, sort            numbers, for the k-th smallest of a matrix, and for all of them in order
    near, middle, far       bytes that operations without products read and write, by the size of their tensors: in a
                            cache, in memory that the process has, and in memory that the system gives it each time
    read, hash, write       bytes of weight files
    call                    operations so short that starting them is what takes time
    exchange                bytes that a rank sends; always from a table
"""

import json
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch

from mspc.numerics.linalg import precise_matmul
from mspc.numerics.masking import kth_lowest
from mspc.storage.checkpoint import read_file
from mspc.storage.files import cache_folder, sha256_of, write_json, write_tensors
from mspc.threads import matmul, using

VERSION = 1
"""To be raised when rates mean something else."""
SIZE, ROWS = 1024, 3072
"""Width of the matrices that are measured, and rows of the products: pieces for two threads."""
LARGEST_KEPT = 2**25
"""Bytes of a tensor up to which the C library keeps freed memory; that of larger ones goes back to the system."""
REPEATS = 3
"""Runs of each measurement; the middle one counts."""
STARTING = {"cpu": 3.0, "cuda": 10.0}
"""Seconds for reading text, building the model and its trial, by type of device. They are no stage."""
EXCHANGE = {"cpu": 1e9, "cuda": 100e9}
"""Bytes a second that a rank sends to others of its machine: by gloo as seen on 2 cores, and a guess for NVLink."""


@dataclass(frozen=True)
class Rates:
    """Amounts per second by kind, of one thread of a device."""

    device: str
    """Its name."""
    threads: int
    date: str
    measured: bool
    """False for those of a table."""
    by_kind: Mapping[str, float]
    shared: float = 0.8
    """The share of a thread's speed that each further thread adds."""
    exchange: float = EXCHANGE["cpu"]
    """Bytes a second that a rank sends to others."""

    @property
    def origin(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        if self.measured:
            return f"rates of {self.device}, {threads}, measured here on {self.date}"
        return f"rates of a table of {self.date} for {self.device}, not measured here"

    def seconds(self, kind: str, amount: float, ways: float = 1) -> float:
        """Seconds of some work that can be shared by `ways` threads. The kind `seconds` takes what it says."""
        if kind == "seconds":
            return amount
        if kind == "exchange":
            return amount / self.exchange
        return amount / self.by_kind[kind] / (1 + self.shared * (max(min(self.threads, ways), 1) - 1))


CPU = {
    "product": 78e9, "half": 190e9, "double": 43e9, "factor": 33e9, "eigen": 7e9, "select": 140e6, "sort": 10e6,
    "near": 45e9, "middle": 25e9, "far": 4.6e9, "read": 1.9e9, "hash": 1.5e9, "write": 1e9, "call": 280e3,
}  # fmt: skip
H200 = {
    "product": 50e12, "half": 430e12, "double": 50e12, "factor": 20e12, "eigen": 5e11, "select": 4e10, "sort": 5e9,
    "near": 3.4e12, "middle": 3.4e12, "far": 3.4e12, "read": 3e9, "hash": 1.8e9, "write": 1e9, "call": 150e3,
}  # fmt: skip
A100 = {
    **H200, "product": 16e12, "half": 170e12, "double": 15e12, "factor": 8e12, "eigen": 25e10, "select": 2e10,
    "sort": 3e9, "near": 1.4e12, "middle": 1.4e12, "far": 1.4e12,
}  # fmt: skip
TABLES = {
    "cpu": ("one busy core of an AMD EPYC of 2022 (Zen 4)", "2026-11-30", CPU),
    "h200": ("an NVIDIA H200, estimated from its data sheet", "2026-11-30", H200),
    "a100": ("an NVIDIA A100, estimated from its data sheet", "2026-11-30", A100),
}
"""Description, date and rates. Nothing was measured on a GPU: those are shares of what the data sheets promise."""
GPU_BYTES = {"h200": 139 * 2**30, "a100": 79 * 2**30}
"""Memory of a GPU that programs can use."""


def sharing(device_type: str, threads: int) -> int:
    """The number of threads that share work on a device. `threads.using` changes nothing on a GPU."""
    return threads if device_type == "cpu" else 1


def table(name: str, threads: int) -> Rates:
    described, day, by_kind = TABLES[name]
    threads = sharing("cuda" if name in GPU_BYTES else "cpu", threads)
    return Rates(described, threads, day, False, by_kind, exchange=EXCHANGE["cuda" if name in GPU_BYTES else "cpu"])


def device_name(device: torch.device) -> str:
    """The name of a GPU, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def _file(name: str, threads: int) -> Path:
    safe = "".join(letter if letter.isalnum() else "-" for letter in name)
    return cache_folder() / "rates" / f"{safe}-{threads}.json"


def known(device: torch.device, threads: int) -> Rates:
    """The rates that were measured on a device with this number of threads, else those of the table that is nearest."""
    name, threads = device_name(device), sharing(device.type, threads)
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):  # none, or a damaged one
        kept = json.loads(_file(name, threads).read_text(encoding="utf-8"))
        by_kind = {kind: float(kept["by_kind"][kind]) for kind in CPU}
        if kept["version"] == VERSION and all(rate > 0 for rate in by_kind.values()):
            return Rates(name, threads, str(kept["date"]), True, by_kind, float(kept["shared"]), EXCHANGE[device.type])
    if device.type == "cuda":
        return table("a100" if "A100" in name else "h200", threads)
    return table("cpu", threads)


def calibrate(device: torch.device, threads: int | None, clock: Callable[[], float] = time.perf_counter) -> Rates:
    """Measure the rates of a device in some seconds, and keep them in the cache folder."""
    with using(1, device), precise_matmul():
        by_kind = _measured(device, clock)
    with using(threads, device) as number:
        number = sharing(device.type, number)
        shared = _shared(device, number, by_kind["product"]) if number > 1 else 0.8
    rates = Rates(device_name(device), number, date.today().isoformat(), True, by_kind, shared, EXCHANGE[device.type])
    write_json(_file(rates.device, number), asdict(rates) | {"version": VERSION})
    return rates


def _measured(device: torch.device, clock: Callable[[], float]) -> dict[str, float]:
    """The rates of one thread by kind."""

    def seconds(work: Callable[[], object]) -> float:
        work()
        found = []
        for _ in range(REPEATS):
            begin = clock()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            found.append(clock() - begin)
        return max(sorted(found)[REPEATS // 2], 1e-9)

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, SIZE, generator=generator).to(device) for rows in (ROWS, SIZE))
    gram = b.T @ b / SIZE + torch.eye(SIZE, device=device)
    small, large, tiny = a[:256], a.repeat(8, 1), torch.ones(SIZE, device=device)
    operations = 2 * ROWS * SIZE * SIZE
    torch.empty(LARGEST_KEPT - 2**16, dtype=torch.uint8)  # once such a size is freed, smaller ones are kept
    kinds = {
        "product": (operations, lambda: a @ b),
        "half": (operations, lambda: a.bfloat16() @ b.bfloat16()),
        "double": (operations // 3, lambda: a[:SIZE].double() @ b.double()),
        "factor": (SIZE**3, lambda: torch.cholesky_inverse(torch.linalg.cholesky(gram))),
        "eigen": (SIZE**3, lambda: torch.linalg.eigh(gram)),
        "select": (a.numel(), lambda: kth_lowest(a, a.numel() // 2)),
        "sort": (b.numel(), lambda: b.double().flatten().sort()),
        "near": (60 * small.nbytes, lambda: [small * 2.0 + small for _ in range(10)]),
        "middle": (30 * a.nbytes, lambda: [a * 2.0 + a for _ in range(5)]),
        "far": (6 * large.nbytes, lambda: large * 2.0 + large),
        "call": (2000, lambda: [tiny.add_(1.0) for _ in range(2000)]),
    }
    found = {kind: amount / seconds(work) for kind, (amount, work) in kinds.items()}
    return found | _of_files(a.cpu(), seconds)


def _of_files(tensor: torch.Tensor, seconds: Callable[[Callable[[], object]], float]) -> dict[str, float]:
    """Rates of weight files in a temporary folder, as they are when the system has them in memory."""
    with tempfile.TemporaryDirectory() as folder:
        file, tensors = Path(folder) / "rates.safetensors", {f"{i}": tensor.bfloat16() for i in range(8)}
        size = sum(one.nbytes for one in tensors.values())
        write = size / seconds(lambda: write_tensors(file, tensors))
        read = size / seconds(lambda: [one.float() for _, one in read_file(file, list(tensors))])
        return {"read": read, "hash": size / seconds(lambda: sha256_of(file)), "write": write}


def _shared(device: torch.device, threads: int, alone: float) -> float:
    """The share that each further thread adds to products in pieces, of one thread's rate."""
    a, b = torch.randn(threads * ROWS, SIZE, device=device), torch.randn(SIZE, SIZE, device=device)
    matmul(a, b)
    begin = time.perf_counter()
    matmul(a, b)
    together = 2 * len(a) * SIZE * SIZE / (time.perf_counter() - begin)
    return min(max((together / alone - 1) / (threads - 1), 0.0), 1.0)
