"""The main job on the bundled model, offline: half of the weights to zero where it hurts least, the rest to 4 bits.

python examples/demo.py [--out out/demo]
"""

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

import mspc

MODEL = Path(__file__).parent / "tiny_llama"
WINDOWS = 200


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    args = parser.parse_args()

    begin = time.monotonic()
    artifact = mspc.compress(MODEL, mspc.Recipe(sparsity=0.5, bits=4), out=args.out, overwrite=True)
    dense = mspc.evaluate(MODEL, max_windows=WINDOWS)
    compressed = mspc.evaluate(args.out, max_windows=WINDOWS)
    manifest = artifact.manifest

    table = Table(title=f"{MODEL.name}: 50% of the weights zero, allocated by sensitivity, the others int4")
    for heading in ("", "dense", "compressed"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row(f"perplexity, {WINDOWS} test windows", f"{dense.perplexity:.3f}", f"{compressed.perplexity:.3f}")
    table.add_row("sparsity of the pruned matrices", "0%", f"{manifest['sparsity']['achieved']:.2%}")
    table.add_row("bits per weight of the pruned matrices", "16", f"{manifest['bits_per_weight']:.3f}")
    sizes = [f"{weight_bytes(folder) / 1e6:.2f} MB" for folder in (MODEL, args.out)]
    table.add_row("all weights, embeddings included", *sizes)
    table.add_row("seconds to compress", "", f"{manifest['seconds']:.1f}")
    table.add_row("seconds in all", "", f"{time.monotonic() - begin:.1f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
