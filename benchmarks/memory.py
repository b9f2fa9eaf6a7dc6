"""Peak memory of compressing a model of Llama-3.2-1B's shape on the CPU: the model is never whole in memory.

    python benchmarks/memory.py [--folder DIR]

Writes a random checkpoint of that shape (16 layers, 2048/8192, bf16, about 2.5 GB). A process of its own compresses it
with 16 sequences of 512 tokens.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from mspc.sizes import in_words

TOKENIZER = Path(__file__).parent.parent / "examples" / "tiny_llama"
CONFIG = LlamaConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=4096,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    tie_word_embeddings=True,
    dtype="bfloat16",
)


def write_model(folder: Path, config: LlamaConfig = CONFIG) -> None:
    """Write random weights, one shard per layer, so that writing needs the memory of one layer."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[2] if ".layers." in name else "outer"
        shards.setdefault(part, {})[name] = parameter
    weight_map = {}
    for number, tensors in enumerate(shards.values(), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        values = {
            name: torch.ones(p.shape, dtype=torch.bfloat16)
            if p.ndim == 1
            else torch.randn(p.shape, generator=generator).mul_(p.shape[1] ** -0.5).bfloat16()
            for name, p in tensors.items()
        }
        save_file(values, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(values, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / file, folder / file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="mspc-memory-"))
    model = folder / "llama-1b-shape"
    if not model.exists():
        model.mkdir(parents=True)
        write_model(model)
    options = ["--sparsity", "0.5", "--num-sequences", "16", "--sequence-length", "512"]
    command = [sys.executable, "-m", "mspc", "compress", str(model), "--out", str(folder / "out"), "--overwrite"]
    subprocess.run([*command, *options], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    manifest = json.loads((folder / "out" / "mspc.json").read_text())
    print(f"peak {in_words(manifest['peak_memory_bytes'])}, {manifest['seconds']:.0f} s")
    if args.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
