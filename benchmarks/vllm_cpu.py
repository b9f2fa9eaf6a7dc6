"""Random weights in the shapes of Llama-3.2-1B, served by vLLM's CPU back end in several formats, side by side.

    .venv-vllm/bin/python benchmarks/vllm_cpu.py --out results.json         # `make test-vllm` makes that environment
    .venv-vllm/bin/python benchmarks/vllm_cpu.py --layers 2 --rounds 1 --only 'mspc*'

Every model is in a process of its own, and all are in memory at once. They are timed in turns, so that a busy machine
disturbs all alike, by the modules behind `vllm bench latency` and `vllm bench throughput` (vllm_worker.py). `decoding`
is what each further token takes: the latency of many tokens, less that of the first. The bytes are those of the files.
"""

import argparse
import datetime
import fnmatch
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import vllm_models
from memory import CONFIG

from mspc.bench.timing import describe_device, spread, versions
from mspc.storage.files import write_atomically

MODELS = {
    "bf16": ("bf16", 16),
    "GPTQ int4": ("gptq", 16),
    "mspc int4": ("int4", 16),
    "mspc 2:4+int4": ("2:4+int4", 16),
    "mspc 2:4+int4, 4-bit head": ("2:4+int4", 4),
}
"""Format of the matrices and bits of the head."""
BASES = "bf16", "GPTQ int4"
KV_BYTES = 2**28
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, whose threads are those of OMP_NUM_THREADS
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
Samples = list[tuple[float, float]]
"""Seconds on the clock and of the CPU."""


class Server:
    """A model in vLLM, in a process of its own."""

    def __init__(self, folder: Path, threads: int, compiled: bool, said: Path) -> None:
        options = {"enforce_eager": not compiled, "kv_cache_memory_bytes": KV_BYTES}
        command = [sys.executable, str(Path(__file__).with_name("vllm_worker.py")), str(folder), json.dumps(options)]
        with said.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)},
            )  # fmt: skip
        self.said = said
        self.version = self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.said.stem} does not run:\n{self.said.read_text()[-2000:]}")
        return json.loads(line)

    def seconds(self, *request: Any) -> tuple[float, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        clock, cpu = self._answer()
        return clock, cpu


def workloads(given: argparse.Namespace) -> dict[str, tuple[Any, ...]]:
    """Requests to vllm_worker.py by name."""
    found: dict[str, tuple[Any, ...]] = {
        "first token": ("latency", 1, given.prompt, 1),
        "latency": ("latency", 1, given.prompt, given.new),
    }
    return found | {f"throughput {n}": ("throughput", n, given.short_prompt, given.short_new) for n in given.batches}


def in_turns(
    servers: dict[str, Server], asked: dict[str, tuple[Any, ...]], rounds: int
) -> dict[str, dict[str, Samples]]:
    """Samples of every workload by model; each first asks for a few tokens, to warm up."""
    took: dict[str, dict[str, Samples]] = {name: {work: [] for work in asked} for name in servers}
    for server in servers.values():
        server.seconds("latency", 1, 16, 2)
    for turn in range(rounds):
        for work, request in asked.items():
            for name, server in servers.items():
                took[name][work].append(server.seconds(*request))
        print(f"Round {turn + 1} of {rounds}", flush=True)
    return took


def with_decoding(took: dict[str, Samples], new: int) -> dict[str, Samples]:
    """The samples and, of one further token, those of `decoding`."""
    further = [
        ((clock - of_first) / (new - 1), (cpu - cpu_of_first) / (new - 1))
        for (clock, cpu), (of_first, cpu_of_first) in zip(took["latency"], took["first token"], strict=True)
    ]
    return took | {"decoding": further}


def row_of(name: str, folder: Path, all_samples: dict[str, dict[str, Samples]]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "bytes": vllm_models.num_bytes(folder)}
    for work, samples in all_samples[name].items():
        clocks = [clock for clock, _ in samples]
        row[work] = {
            "seconds": spread(clocks),
            "cpu_seconds": spread([cpu for _, cpu in samples]),
            "samples": samples,
            "speedup": {
                base: spread(
                    [of_base / mine for (of_base, _), mine in zip(all_samples[base][work], clocks, strict=True)]
                )
                for base in BASES
                if base in all_samples
            },
        }
    return row


def table(rows: list[dict[str, Any]], works: Sequence[str]) -> str:
    """Median seconds, in parentheses the 10th and 90th percentiles, and times the speed of the bases."""
    lines = []
    for work in works:
        bases = list(rows[0][work]["speedup"])
        lines.append(f"{work:28} seconds (10%..90%), CPU   " + "   ".join(f"x {base}" for base in bases))
        for row in rows:
            found, cpu = row[work]["seconds"], row[work]["cpu_seconds"]["median"]
            times = "   ".join(f"{row[work]['speedup'][base]['median']:.2f}" for base in bases)
            spread_of = f"{found['median']:.4f} ({found['p10']:.4f}..{found['p90']:.4f}), {cpu:.4f}"
            lines.append(f"  {row['name']:26} {spread_of}   {times}")
    return "\n".join(lines)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    load, chosen = os.getloadavg()[0], [n for n in MODELS if any(fnmatch.fnmatch(n, one) for one in given.only)]
    folders = {name: vllm_models.make(given.work, MODELS[name][0], given.layers, MODELS[name][1]) for name in chosen}
    servers: dict[str, Server] = {}
    try:
        for name, folder in folders.items():
            servers[name] = Server(folder, given.threads, given.compiled, given.work / f"{name}.log")
            print(f"{name}: {vllm_models.num_bytes(folder) / 1e6:,.0f} MB", flush=True)
        took = in_turns(servers, workloads(given), given.rounds)
    finally:
        for server in servers.values():
            server.process.kill()
            server.process.wait()
    took = {name: with_decoding(samples, given.new) for name, samples in took.items()}
    return {
        "date": datetime.date.today().isoformat(),
        "versions": versions() | {"vllm": next(iter(servers.values())).version},
        "device": describe_device(torch.device("cpu")) | {"threads": given.threads},
        "load_average_before": load,
        "load_average_after": os.getloadavg()[0],
        "configuration": {key: value for key, value in vars(given).items() if key not in ("work", "out")},
        "rows": [row_of(name, folder, took) for name, folder in folders.items()],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of names")
    parser.add_argument("--layers", type=int, default=CONFIG.num_hidden_layers)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt, of latencies")
    parser.add_argument("--short-prompt", type=int, default=32, help="tokens of the prompts, of throughputs")
    parser.add_argument("--new", type=int, default=64, help="tokens that follow, of latencies")
    parser.add_argument("--short-new", type=int, default=32, help="tokens that follow, of throughputs")
    parser.add_argument("--batches", type=int, nargs="*", default=[4, 8], help="requests of throughputs")
    parser.add_argument(
        "--compiled", action="store_true", help="by Inductor, as vLLM does by default; takes minutes more"
    )
    parser.add_argument("--work", type=Path, default=Path("out/vllm_cpu"), help="folder of the models, 6 GB")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    result = measure(given)
    print(table(result["rows"], [work for work in result["rows"][0] if work not in ("name", "bytes")]))
    if given.out:
        text = json.dumps(result, indent=1) + "\n"
        write_atomically(given.out, lambda temporary: temporary.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
