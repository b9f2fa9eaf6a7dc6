"""Decoding of a mixture of experts on the CPU: dense in transformers, and compressed in mspc, in turns.

    python benchmarks/moe_decoding.py [MODEL] [--rounds 7] [--tokens 16] [--threads 1] [--json FILE]

Without MODEL it is a Mixtral of random weights: 4 blocks of 8 experts, 2 for each token. It is compressed by magnitude,
as only bytes matter here, and loaded by `mspc.load`, where experts stay compressed. A round decodes the same tokens
with every model, one at a time with a cache; ratios are those of the rounds. `read` is the bytes of the matrices in
blocks that one token multiplies with: of experts only those that it is routed to.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import mspc
from mspc.runtime.linear import SparseLinear

SETTINGS: dict[str, dict[str, Any]] = {
    "50%": {"sparsity": 0.5},
    "2:4 + int4": {"pattern": "2:4", "bits": 4},
}
BY_MAGNITUDE = {"solver": "mask", "criterion": "magnitude", "allocator": "uniform", "propagation": 0.0, "eval": False}
CHOSEN, EXPERTS = 2, 8


def random_mixtral(folder: Path) -> Path:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN, sliding_window=None,
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def bytes_read(model: torch.nn.Module) -> int:
    """Bytes of the matrices in blocks that one token reads."""
    size = 0.0
    for name, module in model.named_modules():
        own = [*module.parameters(recurse=False)] if ".layers." in name else []
        if isinstance(module, SparseLinear):
            own = [*module.buffers(), *own]
        routed = "experts" in name
        size += sum(tensor.nbytes for tensor in own) * (CHOSEN / EXPERTS if routed else 1)
    return int(size)


@torch.inference_mode()
def seconds_a_token(model: Any, ids: torch.Tensor) -> float:
    """Decode given tokens one at a time, so that every model has the same inputs.

    On one thread it is the time of its core: other processes do not count.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    out = model(input_ids=ids[:, :8], use_cache=True)
    begin = clock()
    for position in range(8, ids.shape[1]):
        out = model(input_ids=ids[:, position : position + 1], past_key_values=out.past_key_values, use_cache=True)
    return (clock() - begin) / (ids.shape[1] - 8)


def models_of(source: Path, folder: Path) -> dict[str, Any]:
    def dense(**options: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.bfloat16, trust_remote_code=False, **options
        ).eval()

    found = {
        "dense, transformers": dense(),
        "dense, transformers, experts in a loop": dense(experts_implementation="eager"),
    }
    ids = torch.randint(0, 4096, (8, 64), generator=torch.Generator().manual_seed(0))
    for name, setting in SETTINGS.items():
        out = folder / name.replace(" ", "").replace(":", "of")
        recipe = mspc.Recipe(**BY_MAGNITUDE, **setting)
        mspc.compress(source, recipe, out=out, calibration=ids, progress=False)
        found[f"mspc, {name}"] = mspc.load(out)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = given.model or random_mixtral(folder / "source")
        models = models_of(source, folder)
        torch.set_num_threads(given.threads)
        ids = torch.randint(0, 4096, (1, 8 + given.tokens), generator=torch.Generator().manual_seed(1))
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for number in range(given.rounds + 1):
            for name, model in models.items():
                took = seconds_a_token(model, ids)
                if number:  # the first round warms up
                    seconds[name].append(took)
        rows = []
        first = seconds["dense, transformers"]
        for name, model in models.items():
            ratio = statistics.median(a / b for a, b in zip(first, seconds[name], strict=True))
            took = statistics.median(seconds[name])
            read = bytes_read(model)
            rows.append(
                {"model": name, "tokens_per_second": 1 / took, "x dense": ratio, "read": read, "seconds": seconds[name]}
            )
            print(f"{name}: {1 / took:.1f} tokens/s, x{ratio:.2f}, {read / 1e6:.1f} MB a token", flush=True)
    record = {
        "date": date.today().isoformat(),
        "hardware": f"CPU, {os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f} at the end",
        "torch": torch.__version__, "transformers": transformers.__version__, "threads": given.threads,
        "model": str(given.model or random_mixtral.__name__), "rows": rows,
    }  # fmt: skip
    if given.json:
        given.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
