"""Compress the bundled model to 3.25 bits per weight, offline, and show it next to the dense model.

python examples/demo.py [--out out/demo]
"""

import argparse
import logging
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

import mspc
from mspc.sizes import in_words

MODEL = Path(__file__).parent / "tiny_llama"
# The default, 128 sequences, takes half as long again and gives a slightly better model.
RECIPE = mspc.Recipe(bits_per_weight=3.25, group_size=64, num_sequences=16)
WINDOWS = 50


def size(folder: Path) -> str:
    """Size of all weights in a folder."""
    return in_words(sum(file.stat().st_size for file in folder.rglob("*.safetensors")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the artifact")
    args = parser.parse_args()

    logging.basicConfig(format="%(message)s")
    logging.getLogger("mspc").setLevel(logging.INFO)
    begin = time.monotonic()
    artifact = mspc.compress(MODEL, RECIPE, out=args.out, overwrite=True)
    dense = mspc.evaluate(MODEL, max_windows=WINDOWS)
    compressed = mspc.evaluate(artifact, max_windows=WINDOWS)
    manifest = artifact.manifest

    table = Table(title=f"{MODEL.name} at {RECIPE.bits_per_weight} bits per weight")
    for heading in ("", "dense", "compressed"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row(f"perplexity on {WINDOWS} test windows", f"{dense.perplexity:.2f}", f"{compressed.perplexity:.2f}")
    table.add_row("bits per weight of the compressed matrices", "16", f"{manifest['bits_per_weight']:.3f}")
    table.add_row("zeros in these matrices", "0%", f"{manifest['sparsity']['achieved']:.1%}")
    table.add_row("size of all weights, embeddings included", size(MODEL), size(args.out))
    Console(width=100).print(table)
    print(f"{manifest['seconds']:.0f} s to compress, {time.monotonic() - begin:.0f} s in all.")


if __name__ == "__main__":
    main()
