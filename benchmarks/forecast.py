"""The forecast of a run compared with the run itself: CPU seconds by stage, peak memory, size of the output.

    python benchmarks/forecast.py MODEL OPTIONS [--calibrations FILE] [--out FILE.json]

OPTIONS is a recipe as JSON, such as '{"sparsity": 0.5, "num_sequences": 16}'. The run is made with one thread, and all
seconds are those of the CPU, so that other work on the machine counts as little as it can. The rates are measured after
the run; with --calibrations, the medians over earlier calls, too, count. The peak memory is that of the process.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers

import mspc
from mspc.model.outline import outlined
from mspc.pipeline import forecasting, rates, stopwatch
from mspc.storage.sizes import bytes_in

CPU = torch.device("cpu")


def measured_rates(file: Path | None, more: rates.Rates) -> rates.Rates:
    """The medians of all calibrations that a file has, with one more, which is added to the file."""
    kept = json.loads(file.read_text()) if file is not None and file.is_file() else []
    kept.append(dict(more.by_kind))
    if file is not None:
        file.write_text(json.dumps(kept))
    return replace(more, by_kind={kind: statistics.median(one[kind] for one in kept) for kind in more.by_kind})


def forecast_with(model: str, recipe: mspc.Recipe, found: rates.Rates) -> dict[str, Any]:
    """The forecast by certain rates."""
    known = forecasting.known
    forecasting.known = lambda device, threads: found  # type: ignore[assignment]
    try:
        return mspc.forecast(model, recipe, device="cpu", threads=1).to_dict()
    finally:
        forecasting.known = known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("options", type=json.loads)
    parser.add_argument("--calibrations", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    recipe = mspc.Recipe.from_dict(arguments.options)
    stopwatch.time = SimpleNamespace(monotonic=time.process_time)  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        artifact = mspc.compress(arguments.model, recipe, out=Path(folder) / "out", threads=1, progress=False)
        manifest, size = artifact.manifest, bytes_in(artifact.path)
    found = measured_rates(arguments.calibrations, rates.calibrate(CPU, 1, time.process_time))
    expected = forecast_with(arguments.model, recipe, found)
    stages = manifest["seconds_by_stage"] | {
        "the rest": manifest["seconds"] - sum(manifest["seconds_by_stage"].values())
    }
    pairs = {title: (seconds, expected["seconds_by_stage"].get(title, 0.0)) for title, seconds in stages.items()}
    pairs["in all"] = manifest["seconds"], expected["seconds"]
    pairs["peak MB"] = manifest["peak_memory_bytes"] / 1e6, expected["host_peak"] / 1e6
    pairs["output MB"] = size / 1e6, expected["output_bytes"] / 1e6
    for title, (measured, forecast) in pairs.items():
        print(f"{title:26} {measured:10.2f} {forecast:10.2f} {forecast / max(measured, 1e-9) - 1:+.1%}")
    row = {
        "date": time.strftime("%Y-%m-%d"),
        "versions": {
            "mspc": mspc.__version__, "python": sys.version.split()[0], "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "hardware": f"{rates.device_name(CPU)}, one thread of {os.cpu_count()} cores, CPU seconds",
        "model": Path(arguments.model).name,
        "weights": outlined(arguments.model).model.num_parameters(),
        "recipe": arguments.options,
        "rates": dict(found.by_kind),
        "measured and forecast": {title: list(pair) for title, pair in pairs.items()},
    }  # fmt: skip
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
