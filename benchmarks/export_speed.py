"""Seconds and GB/s (of the bf16 weights that go in) of every export, without verification, on the CPU.

    python benchmarks/export_speed.py [--blocks 4] [--json FILE]

The model has the blocks of Llama-3.2-1B (2048/8192) and a small vocabulary; its weights are random and pruned by
magnitude, since only bytes matter here. Reading the artifact and all digests are included.
"""

import argparse
import copy
import json
import platform
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from memory import CONFIG, TOKENIZER
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

import mspc

SETTINGS = {
    "50%": ({"sparsity": 0.5}, ("dense", "sparse")),
    "2:4": ({"pattern": "2:4"}, ("dense", "sparse")),
    "2:4+int4 g32": (
        {"pattern": "2:4", "bits": 4, "group_size": 32},
        ("dense", "sparse", "gptq", "compressed-tensors", "gguf", "onnx"),
    ),
}


def write_model(folder: Path, blocks: int) -> Path:
    config = copy.deepcopy(CONFIG)
    config.num_hidden_layers = blocks
    config.vocab_size = json.loads((TOKENIZER / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((TOKENIZER / file).read_bytes())
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--json", type=Path, default=Path("out/export_speed.json"))
    args = parser.parse_args()
    rows = []
    table = Table("artifact", "format", "weights in", "files out", "seconds", "GB/s", box=None)
    with tempfile.TemporaryDirectory(prefix="mspc-speed-") as name:
        work = Path(name)
        model = write_model(work / "model", args.blocks)
        for setting, (options, formats) in SETTINGS.items():
            recipe = mspc.Recipe(
                **options, solver="mask", criterion="magnitude", allocator="uniform", num_sequences=1,
                sequence_length=32,
            )  # fmt: skip
            artifact = mspc.compress(model, recipe, out=work / "artifact", overwrite=True, progress=False)
            for format_name in formats:
                extra = {"weights": "matmulnbits"} if format_name == "onnx" else {}
                begin = time.perf_counter()
                out = artifact.export(format_name, work / "out", overwrite=True, verify=False, progress=False, **extra)
                seconds = time.perf_counter() - begin
                read = sum(path.stat().st_size for path in model.glob("*.safetensors")) / 1e9
                written = sum(path.stat().st_size for path in out.iterdir()) / 1e9
                rows.append(
                    {"artifact": setting, "format": format_name, "gb_in": read, "gb_out": written, "seconds": seconds}
                )
                table.add_row(
                    setting,
                    format_name,
                    f"{read:.2f} GB",
                    f"{written:.2f} GB",
                    f"{seconds:.1f}",
                    f"{read / seconds:.2f}",
                )
    result = {
        "date": date.today().isoformat(), "hardware": f"CPU, {torch.get_num_threads()} threads, {platform.machine()}",
        "torch": torch.__version__, "blocks": args.blocks, "rows": rows,
    }  # fmt: skip
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
