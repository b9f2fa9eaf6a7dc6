"""Perplexity of every method at equal exact sparsity or size.

    python benchmarks/quality.py examples/tiny_llama --seeds 3 [--plot quality.png]

Each result is written to --results at once, and a rerun skips the results that it finds there. So a long comparison can
be interrupted.

    gap      mean over the texts of log(perplexity / dense perplexity), averaged over the seeds
    spread   standard deviation of the gap over the seeds, which choose the calibration text
    ratio    gap / gap of the uniform OBS sweep of the same setting
    KL       divergence of the predictions from those of the dense model, in nats per token
    seconds  whole run; no method uses the measurements of another

--plot draws the gap against bits per weight, with a line for quantization alone.
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import mspc

SETTINGS: dict[str, dict[str, object]] = {
    "50%": {"sparsity": 0.5},
    "60%": {"sparsity": 0.6},
    "70%": {"sparsity": 0.7},
    "80%": {"sparsity": 0.8},
    "2:4": {"pattern": "2:4"},
    "4:8": {"pattern": "4:8"},
    "8:16": {"pattern": "8:16"},
    "N:16 50%": {"pattern": "N:16", "sparsity": 0.5},
    "50%+int4": {"sparsity": 0.5, "bits": 4},
    "2:4+int4": {"pattern": "2:4", "bits": 4},
    "int8": {"sparsity": 0.0, "bits": 8},
    "int4": {"sparsity": 0.0, "bits": 4},
    "int3": {"sparsity": 0.0, "bits": 3},
    "int2": {"sparsity": 0.0, "bits": 2},
    "3.125 bits": {"bits_per_weight": 3.125},
}


def sweep(criterion: str, allocator: str, **more: object) -> dict[str, object]:
    return {"solver": "obs", "criterion": criterion, "allocator": allocator, "propagation": 0.0} | more


METHODS: dict[str, dict[str, object]] = {
    "obs uniform": sweep("obs", "uniform"),
    "isc uniform": sweep("isc", "uniform"),
    "obs trace-rank": sweep("obs", "trace-rank"),
    "isc trace-rank": sweep("isc", "trace-rank"),
    "obs fisher-rank": sweep("obs", "trace-rank", sensitivity="fisher"),
    "obs owl": sweep("obs", "owl"),
    "obs alpha": sweep("obs", "alpha"),
    "obs curves": sweep("obs", "curves"),
    "admm uniform": {"solver": "admm", "allocator": "uniform", "propagation": 0.0},
    "admm curves": {"solver": "admm", "allocator": "curves", "propagation": 0.0},
    "admm curves propagated": {"solver": "admm", "allocator": "curves", "propagation": 1.0},
    "kfac uniform": {"solver": "kfac", "allocator": "uniform", "propagation": 0.0},
    "kfac curves": {"solver": "kfac", "allocator": "curves", "propagation": 0.0},
    "fast": {"effort": "fast"},
    "default": {"effort": "default"},
    "best": {"effort": "best"},
    "magnitude uniform": {"solver": "mask", "criterion": "magnitude", "allocator": "uniform", "propagation": 0.0},
    "wanda uniform": {"solver": "mask", "criterion": "wanda", "allocator": "uniform", "propagation": 0.0},
    "ria uniform": {"solver": "mask", "criterion": "ria", "allocator": "uniform", "propagation": 0.0},
    "search": {"allocator": "search", "search_minutes": 5.0},
}
ONLY_IF_NAMED = ("search",)
"""Methods that take minutes."""
BASELINE = "obs uniform"
ANNOTATED = "default"
QUANTIZATION = ("int8", "int4", "int3", "int2")


def fits(setting: str, method: str) -> bool:
    """True if the two make a run of its own.

    A fixed pattern or quantization alone leaves nothing to allocate, and a size budget fits the efforts only.
    """
    if "effort" in METHODS[method]:
        return True
    if "bits_per_weight" in SETTINGS[setting]:
        return False
    pattern, sparsity = SETTINGS[setting].get("pattern", "N:16"), SETTINGS[setting].get("sparsity")
    return METHODS[method]["allocator"] == "uniform" or (pattern == "N:16" and sparsity != 0)


def configuration(args: argparse.Namespace) -> dict[str, object]:
    """Everything that a result depends on, except setting, method and seed."""
    return {
        "model": Path(args.model).resolve().name,
        "text": [Path(text).name for text in args.text],
        "calibration": Path(args.calibration).name,
        "num_sequences": args.num_sequences,
        "sequence_length": args.sequence_length,
        "max_windows": args.max_windows,
        "mspc": mspc.__version__,
        "torch": torch.__version__,
    }


def measure(args: argparse.Namespace, recipe: mspc.Recipe, out: Path) -> dict[str, object]:
    artifact = mspc.compress(args.model, recipe, out=out, progress=False)
    manifest = artifact.manifest
    results = [evaluate(artifact.path, text, args, args.model) for text in args.text]
    shutil.rmtree(out)
    return {
        "perplexity": [result.perplexity for result in results],
        "divergence": [result.divergence for result in results],
        "sparsity": manifest["sparsity"]["achieved"],
        "bits_per_weight": manifest["bits_per_weight"],
        "seconds": manifest["seconds"],
        "plan": manifest["allocation"]["chosen"],
    }


def evaluate(path: str | Path, text: str, args: argparse.Namespace, against: str | None = None) -> mspc.Perplexity:
    return mspc.evaluate(
        path, text, sequence_length=args.sequence_length, max_windows=args.max_windows, against=against, progress=False
    )


def gap(perplexities: list[float], dense: list[float]) -> float:
    return statistics.mean(math.log(p / d) for p, d in zip(perplexities, dense, strict=True))


def table_of(results: dict[str, dict], dense: list[float], args: argparse.Namespace) -> Table:
    table = Table(title=f"{Path(args.model).name}, dense perplexity {' / '.join(f'{d:.2f}' for d in dense)}")
    for heading in ("setting", "method"):
        table.add_column(heading)
    for heading in ("perplexity", "gap", "spread", "ratio", "KL", "sparsity", "bits", "seconds"):
        table.add_column(heading, justify="right")
    for setting in args.settings:
        baseline = None
        for method in args.methods:
            runs = [results[key] for seed in range(args.seeds) if (key := f"{setting}|{method}|{seed}") in results]
            if not runs:
                continue
            gaps = [gap(run["perplexity"], dense) for run in runs]
            mean = statistics.mean(gaps)
            baseline = mean if method == BASELINE else baseline
            columns = [statistics.mean(column) for column in zip(*(run["perplexity"] for run in runs), strict=True)]
            table.add_row(
                setting,
                method,
                " / ".join(f"{p:.2f}" for p in columns),
                f"{mean:.4f}",
                f"{statistics.stdev(gaps):.4f}" if len(gaps) > 1 else "-",
                f"{mean / baseline:.2f}" if baseline else "-",
                f"{statistics.mean(statistics.mean(run['divergence']) for run in runs):.4f}",
                f"{runs[0]['sparsity']:.4%}",
                f"{runs[0]['bits_per_weight']:.3f}",
                f"{statistics.mean(run['seconds'] for run in runs):.1f}",
            )
        table.add_section()
    return table


def plot(results: dict[str, dict], dense: list[float], args: argparse.Namespace) -> None:
    """Gap against bits per weight of every method, with a line for quantization alone."""
    import matplotlib.pyplot as plt

    points: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for key, run in results.items():
        if "|" in key:
            setting, method, _ = key.split("|")
            points[method][setting].append((run["bits_per_weight"], gap(run["perplexity"], dense)))
    figure, axes = plt.subplots(figsize=(11, 6), layout="constrained")
    colors = plt.get_cmap("tab20").colors
    named = [method for method in args.methods if method in points]
    for method, color in zip(named, colors * len(named), strict=False):
        means = {
            setting: (runs[0][0], statistics.mean(value for _, value in runs))
            for setting, runs in points[method].items()
        }
        quantized = [means[setting] for setting in QUANTIZATION if setting in means]
        if quantized:
            axes.plot(*zip(*quantized, strict=True), marker="s", color=color)
        pruned = [point for setting, point in means.items() if setting not in QUANTIZATION]
        axes.scatter([bits for bits, _ in pruned], [value for _, value in pruned], color=color, label=method)
        if method == ANNOTATED:
            for setting, point in means.items():
                axes.annotate(setting, point, textcoords="offset points", xytext=(5, -3), fontsize="x-small")
    ticks = (2, 3, 4, 6, 8, 10, 16)
    axes.set(xlabel="bits per weight", ylabel="log(perplexity / dense)", yscale="log", xscale="log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_title(f"{Path(args.model).name}: lines with squares are quantization alone")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(args.plot, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", action="append", help="test text, repeatable [builtin]")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="[all but search]")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-sequences", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--max-windows", type=int, default=100)
    parser.add_argument("--results", type=Path, default=Path("out/quality.json"))
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    args = parser.parse_args()
    args.text = args.text or ["builtin"]
    args.methods = args.methods or [method for method in METHODS if method not in ONLY_IF_NAMED]
    args.results.parent.mkdir(parents=True, exist_ok=True)

    results = json.loads(args.results.read_text()) if args.results.exists() else {"of": configuration(args)}
    if results.get("of") != configuration(args):
        sys.exit(
            f"{args.results} holds results of {results.get('of')}, not of {configuration(args)}. Name another file."
        )
    results.setdefault("dense", [evaluate(args.model, text, args).perplexity for text in args.text])
    for seed in range(args.seeds):
        out = Path(tempfile.mkdtemp(prefix="mspc-quality-")) / "out"
        for setting in args.settings:
            for method in args.methods:
                key = f"{setting}|{method}|{seed}"
                if key in results or not fits(setting, method):
                    continue
                recipe = mspc.Recipe(
                    **SETTINGS[setting],
                    **METHODS[method],
                    calibration=args.calibration,
                    num_sequences=args.num_sequences,
                    sequence_length=args.sequence_length,
                    seed=seed,
                    eval=False,
                )
                results[key] = measure(args, recipe, out)
                print(f"{key}: {results[key]['seconds']:.1f} s", flush=True)
                args.results.write_text(json.dumps(results, indent=1))
        shutil.rmtree(out.parent)
    Console(width=160).print(table_of(results, results["dense"], args))
    if args.plot:
        plot(results, results["dense"], args)


if __name__ == "__main__":
    main()
