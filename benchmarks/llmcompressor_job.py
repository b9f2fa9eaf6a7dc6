"""Runs in the environment of llm-compressor, for speed.py: SparseGPT of one model, timed, checked and saved.

    python llmcompressor_job.py MODEL TOKENS.safetensors OUT [--sparsity 0.5] [--batch-size 1] [--dampening 0.01]

TOKENS holds the calibration sequences, `ids` (N, T) int64. Everything is computed in float32, block by block. OUT gets
a plain dense checkpoint in the dtype of MODEL. The last line of output is a JSON object with the seconds of importing,
loading, calling `oneshot` (`cpu_seconds`: of all threads) and saving; with peak memory and versions; and with the
sparsity of every tensor that differs between OUT and MODEL.
"""

import argparse
import json
import resource
import sys
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

IGNORE = "re:.*lm_head"
"""Regular expression for the head. SparseGPTModifier appends a dot to names, so a plain `lm_head` would not match: the
head would be pruned, together with embeddings that are tied to it."""


def peak_memory() -> int:
    """Peak resident memory of this process in bytes.

    Linux has it in /proc; its getrusage would start from the peak of the parent process.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def prune(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds by step, dtype, threads and peak memory."""
    times = [time.monotonic()]
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    times.append(time.monotonic())
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, trust_remote_code=False)
    ids = load_file(args.tokens)["ids"]
    dataset = Dataset.from_dict({"input_ids": ids.tolist()})
    recipe = SparseGPTModifier(
        sparsity=args.sparsity,
        mask_structure="0:0",
        block_size=128,
        dampening_frac=args.dampening,
        targets=["Linear"],
        ignore=[IGNORE],
    )
    times.append(time.monotonic())
    cpu = time.process_time()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=recipe,
        dataset=dataset,
        batch_size=args.batch_size,
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        shuffle_calibration_samples=False,
        pad_to_max_length=False,
    )
    times.append(time.monotonic())
    cpu = time.process_time() - cpu
    dtype = str(model.dtype).removeprefix("torch.")
    stored = AutoConfig.from_pretrained(args.model, trust_remote_code=False).dtype
    model.to(stored).save_pretrained(args.out, save_compressed=False)
    tokenizer.save_pretrained(args.out)
    times.append(time.monotonic())
    names = ("import_seconds", "load_seconds", "seconds", "save_seconds")
    seconds = {name: stop - start for name, start, stop in zip(names, times[:-1], times[1:], strict=True)}
    threads = torch.get_num_threads()
    return seconds | {"cpu_seconds": cpu, "dtype": dtype, "threads": threads, "peak_memory_bytes": peak_memory()}


def changes(before: Path, after: Path) -> dict[str, float]:
    """Share of zeros of every tensor of `after` that differs from that of `before`."""
    import torch
    from safetensors import safe_open

    found: dict[str, float] = {}
    originals = {}
    for path in sorted(before.glob("*.safetensors")):
        file = safe_open(path, "pt")
        originals |= dict.fromkeys(file.keys(), file)
    for path in sorted(after.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                if name not in originals or not torch.equal(tensor, originals[name].get_tensor(name)):
                    found[name] = float((tensor == 0).double().mean())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dampening", type=float, default=0.01)
    args = parser.parse_args()
    report = prune(args)
    report["sparsity"] = changes(args.model, args.out)
    report["versions"] = {found.metadata["Name"]: found.version for found in distributions()}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
