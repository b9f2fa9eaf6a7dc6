"""The same pruning job in mspc and in llm-compressor, side by side: seconds, peak memory and quality.

    python benchmarks/speed.py examples/tiny_llama [MODEL...] [--random 300m] [--repeats 3] [--threads 2]

The job is 50% unstructured sparsity of the matrices in the decoder blocks, in float32 on the CPU. It uses the same
128 x 256 calibration tokens for all. Every matrix gets the same sparsity, except with `default`, which allocates it.
llm-compressor runs SparseGPT in an environment of its own, installed from llmcompressor-requirements.txt, and again if
that file changes. Every run is a process of its own with the same OMP_NUM_THREADS. The tools take turns, and the
medians are compared.

    seconds  mspc: the whole of `compress`, with reading and writing. llm-compressor: the call of `oneshot` alone, with
             model and tokens in memory; seconds of loading and saving are in the JSON.
    process  from the start of the process to its end, with imports
    cpu      seconds of all threads; other work on the machine changes them less
    gap      log(perplexity / dense perplexity) of each text; a random model has none

The exit code is 1 if a result has other matrices or another sparsity than the job.
"""

import argparse
import datetime
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from environments import environment, variables_of_its_own
from llmcompressor_job import peak_memory
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import mspc
from mspc.model.hub import load_tokenizer
from mspc.sizes import in_words
from mspc.text.tokens import calibration_tokens

TIERS: dict[str, dict[str, Any]] = {
    "obs uniform": {"solver": "obs", "criterion": "obs", "allocator": "uniform", "propagation": 0.0},
    "fast": {"effort": "fast"},
    "default": {"effort": "default"},
}
"""Recipes of mspc. The first is the algorithm that llm-compressor runs."""

BASELINE = "llm-compressor"
SPARSITY, DAMPING, SEED = 0.5, 0.01, 0
SPARSITY_TOLERANCE = 1e-3  # llm-compressor removes one weight too many in every block of 128 columns
SEQUENCE_LENGTH, MAX_WINDOWS = 256, 100  # of the perplexity

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "llmcompressor-requirements.txt"
TOKENIZER = HERE.parent / "examples" / "tiny_llama"
RANDOM = {
    "300m": {
        "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 16, "max_position_embeddings": 512,
    },
    "300m-4": {  # four of the 24 blocks of 300m: the same work a block in a sixth of the time
        "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16,
        "num_key_value_heads": 16, "max_position_embeddings": 512,
    },
    "20m": {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 8, "max_position_embeddings": 512,
    },
}  # fmt: skip
MSPC_JOB = "--mspc-job"
"""First argument of this script in the process that runs mspc; the second argument is a file with the job."""


@dataclass(frozen=True)
class Model:
    name: str
    folder: Path
    is_random: bool
    calibration_sha256: str
    ids_file: Path
    """The calibration tokens, for llm-compressor."""


def write_random(size: str, folder: Path) -> None:
    """A Llama with random weights in bf16, and the bundled tokenizer."""
    torch.manual_seed(SEED)
    vocabulary = json.loads((TOKENIZER / "config.json").read_text())["vocab_size"]
    config = LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, dtype="bfloat16", **RANDOM[size])
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / file, folder / file)


def prepare(args: argparse.Namespace, folder: Path, work: Path, *, is_random: bool) -> Model:
    tokens = calibration_tokens(
        load_tokenizer(folder), args.calibration, args.num_sequences, args.sequence_length, SEED
    )
    name = folder.resolve().name.replace("_", "-")
    file = work / f"{name}-ids.safetensors"
    save_file({"ids": tokens.ids.contiguous()}, file)
    return Model(name, folder.resolve(), is_random, tokens.sha256, file)


def run_process(command: list[str], threads: int) -> tuple[dict[str, Any], float]:
    """The JSON on the last line of output, and the seconds that the process took."""
    variables = dict(os.environ) if command[0] == sys.executable else variables_of_its_own()
    variables |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    begin = time.monotonic()
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    seconds = time.monotonic() - begin
    if done.returncode:
        sys.exit(f"{done.stderr[-2000:]}\n{' '.join(command)} failed.")
    return json.loads(done.stdout.splitlines()[-1]), seconds


def run_llmcompressor(args: argparse.Namespace, python: Path, model: Model, out: Path) -> dict[str, Any]:
    command = [str(python), str(HERE / "llmcompressor_job.py"), str(model.folder), str(model.ids_file), str(out)]
    command += ["--sparsity", str(SPARSITY), "--dampening", str(DAMPING), "--batch-size", str(args.batch_size)]
    report, seconds = run_process(command, args.threads)
    return report | {"process_seconds": seconds}


def run_mspc(args: argparse.Namespace, tier: str, model: Model, out: Path) -> dict[str, Any]:
    recipe = mspc.Recipe(
        **TIERS[tier],
        sparsity=SPARSITY,
        damp=DAMPING,
        calibration=args.calibration,
        num_sequences=args.num_sequences,
        sequence_length=args.sequence_length,
        seed=SEED,
        device="cpu",
        dtype="float32",
        eval=False,
    )
    job = out.with_suffix(".job")
    job.write_text(json.dumps({"model": str(model.folder), "recipe": recipe.to_dict(), "out": str(out)}))
    report, seconds = run_process([sys.executable, str(Path(__file__).resolve()), MSPC_JOB, str(job)], args.threads)
    manifest = json.loads((out / "mspc.json").read_text())
    if manifest["calibration"]["sha256"] != model.calibration_sha256:
        sys.exit("mspc and llm-compressor had different calibration tokens.")
    report["seconds"], report["achieved"] = manifest["seconds"], manifest["sparsity"]["achieved"]
    report["sparsity"] = {row["parameter"]: row["sparsity"] for row in manifest["matrices"]}
    return report | {"process_seconds": seconds}


def mspc_job(file: Path) -> None:
    """Run a job of `run_mspc` in this process, and print the result for it."""
    job = json.loads(file.read_text())
    recipe, compress = mspc.Recipe.from_dict(job["recipe"]), mspc.compress  # imported before the clock starts
    cpu = time.process_time()
    compress(job["model"], recipe, out=job["out"], progress=False)
    cpu = time.process_time() - cpu
    threads = torch.get_num_threads()
    report = {"cpu_seconds": cpu, "dtype": recipe.dtype, "threads": threads, "peak_memory_bytes": peak_memory()}
    print(json.dumps(report))


def compare(args: argparse.Namespace, python: Path, model: Model, work: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """The runs of every tool, which take turns, and the folder of the last result of each."""
    runs: dict[str, list[dict[str, Any]]] = {tool: [] for tool in (BASELINE, *args.tiers)}
    folders = {tool: work / f"{model.name}-{tool.replace(' ', '-')}" for tool in runs}
    for repeat in range(args.repeats):
        for tool, own in runs.items():
            shutil.rmtree(folders[tool], ignore_errors=True)
            load = os.getloadavg()[0]
            if tool == BASELINE:
                run = run_llmcompressor(args, python, model, folders[tool])
            else:
                run = run_mspc(args, tool, model, folders[tool])
            own.append(run | {"load_average_before": load})
            print(f"{model.name} {repeat + 1}/{args.repeats} {tool}: {run['seconds']:.1f} s", flush=True)
    return runs, folders


def wrong(runs: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> list[str]:
    """Descriptions of results that differ from the job."""
    found = []
    matrices = set(runs[args.tiers[0]][0]["sparsity"])
    for tool, own in runs.items():
        for run in own:
            if other := matrices ^ set(run["sparsity"]):
                found.append(f"{tool}: pruned by one tool only: {', '.join(sorted(other))}")
            shares = {"all together": run["achieved"]} if "achieved" in run else run["sparsity"]
            off = [name for name, share in shares.items() if abs(share - SPARSITY) > SPARSITY_TOLERANCE]
            if off:
                found.append(f"{tool}: not {SPARSITY:.0%} sparse: {', '.join(off)}")
            if run["threads"] != args.threads or run["dtype"] != "float32":
                found.append(f"{tool}: ran with {run['threads']} threads in {run['dtype']}")
    return list(dict.fromkeys(found))


def rows_of(runs: dict[str, list[dict[str, Any]]], perplexities: dict[str, list[float]]) -> list[dict[str, Any]]:
    medians = ("seconds", "process_seconds", "cpu_seconds", "import_seconds", "load_seconds", "save_seconds")
    rows: list[dict[str, Any]] = []
    for tool, own in runs.items():
        row: dict[str, Any] = {"tool": tool}
        row |= {name: statistics.median(run[name] for run in own) for name in medians if name in own[0]}
        first = rows[0] if rows else row
        for name in ("seconds", "process_seconds", "cpu_seconds"):
            row[f"{name}_ratio"] = row[name] / first[name]
        shares = [share for run in own for share in run["sparsity"].values()]
        row["sparsity"] = {"matrices": len(own[0]["sparsity"]), "least": min(shares), "most": max(shares)}
        row["peak_memory_bytes"] = max(run["peak_memory_bytes"] for run in own)
        row["dtype"], row["threads"] = own[0]["dtype"], own[0]["threads"]
        if tool in perplexities:
            row["perplexity"] = perplexities[tool]
            row["gap"] = [math.log(p / d) for p, d in zip(perplexities[tool], perplexities["dense"], strict=True)]
        hidden = ("sparsity", "versions", "dtype", "threads")
        row["runs"] = [{name: value for name, value in run.items() if name not in hidden} for run in own]
        rows.append(row)
    return rows


def shown(argument: str) -> str:
    """An argument; only the name, if it is an absolute path."""
    return Path(argument).name if argument.startswith("/") else argument


def evaluate(folder: Path, texts: list[str]) -> list[float]:
    options: dict[str, Any] = {"sequence_length": SEQUENCE_LENGTH, "max_windows": MAX_WINDOWS, "progress": False}
    return [mspc.evaluate(folder, text, **options).perplexity for text in texts]


def table_of(model: Model, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{model.name}, medians", box=None, pad_edge=False)
    for heading in ("tool", "seconds", "ratio", "process", "ratio", "cpu", "ratio", "peak memory", "gap"):
        table.add_column(heading, justify="left" if heading == "tool" else "right")
    for row in rows:
        cells = []
        for name in ("seconds", "process_seconds", "cpu_seconds"):
            cells += [f"{row[name]:.1f}", f"{row[f'{name}_ratio']:.2f}"]
        gaps = " / ".join(f"{gap:.4f}" for gap in row.get("gap", ())) or "-"
        table.add_row(row["tool"], *cells, in_words(row["peak_memory_bytes"]), gaps)
    return table


def write_result(
    args: argparse.Namespace, model: Model, dense: list[float], rows: list[dict[str, Any]], theirs: dict[str, str]
) -> None:
    today = datetime.date.today().isoformat()
    ours = {name: version(name) for name in ("mspc", "torch", "transformers", "safetensors", "numpy")}
    result = {
        "date": today,
        "command": f"python benchmarks/speed.py {' '.join(map(shown, sys.argv[1:]))}",
        "model": model.name,
        "parameters": sum(p.numel() for p in on_meta(model.folder).parameters()),
        "hardware": f"CPU, {platform.machine()}, {os.cpu_count()} cores, {args.threads} threads, float32",
        "versions": {"python": platform.python_version()} | ours,
        "llmcompressor_versions": dict(sorted(theirs.items(), key=lambda item: item[0].lower())),
        "configuration": {
            "sparsity": SPARSITY,
            "pattern": "unstructured",
            "damping": DAMPING,
            "calibration": shown(args.calibration),
            "num_sequences": args.num_sequences,
            "sequence_length": args.sequence_length,
            "seed": SEED,
            "calibration_sha256": model.calibration_sha256,
            "llmcompressor_batch_size": args.batch_size,
            "tiers": {tier: TIERS[tier] for tier in args.tiers},
            "repeats": args.repeats,
            "text": [shown(text) for text in args.text],
            "max_windows": MAX_WINDOWS,
        },
        "dense": dense,
        "rows": rows,
    }
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / f"speed_{model.name}_cpu_{today}.json").write_text(json.dumps(result, indent=1) + "\n")


def on_meta(folder: Path) -> torch.nn.Module:
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def benchmark(args: argparse.Namespace, python: Path, model: Model, work: Path) -> list[str]:
    """Run, show and write the comparison for one model. Returns what was wrong with it."""
    runs, folders = compare(args, python, model, work)
    perplexities: dict[str, list[float]] = {}
    if not model.is_random:
        perplexities = {tool: evaluate(path, args.text) for tool, path in {"dense": model.folder, **folders}.items()}
    for folder in folders.values():
        shutil.rmtree(folder)
    rows = rows_of(runs, perplexities)
    write_result(args, model, perplexities.get("dense", []), rows, runs[BASELINE][0]["versions"])
    Console(width=130).print(table_of(model, rows))
    return [f"{model.name}: {what}" for what in wrong(runs, args)]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*", help="checkpoint folders")
    parser.add_argument("--random", nargs="+", default=[], choices=list(RANDOM), help="sizes of random Llamas to add")
    parser.add_argument("--tiers", nargs="+", default=list(TIERS), choices=list(TIERS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--num-sequences", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--text", action="append", help="test text, repeatable [builtin]")
    parser.add_argument(
        "--batch-size", type=int, default=1, help="sequences per batch of llm-compressor [1, its default]"
    )
    parser.add_argument("--venv", type=Path, default=HERE.parent / "out" / "llmcompressor-venv")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args()
    args.text = args.text or ["builtin"]
    if not args.models and not args.random:
        parser.error("give a model, or --random")
    return args


def main() -> None:
    args = parse_arguments()
    python = environment(args.venv, REQUIREMENTS)
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="mspc-speed-") as name:
        work = Path(name)
        for folder in args.models:
            problems += benchmark(args, python, prepare(args, folder, work, is_random=False), work)
        for size in args.random:
            folder = work / f"random-{size}"
            write_random(size, folder)
            problems += benchmark(args, python, prepare(args, folder, work, is_random=True), work)
    for problem in problems:
        print("WRONG", problem)
    sys.exit(bool(problems))


if __name__ == "__main__":
    if sys.argv[1:2] == [MSPC_JOB]:
        mspc_job(Path(sys.argv[2]))
    else:
        main()
