"""Compress the bundled model to the default size, that of int4, offline, and show what it cost.

python examples/demo.py [--out out/demo]
"""

import argparse
import logging
from pathlib import Path

from rich.console import Console
from rich.table import Table

import mspc
from mspc.sizes import in_words

MODEL = Path(__file__).parent / "tiny_llama"
# The default, 128 sequences, takes half as long again and gives a slightly better model.
RECIPE = mspc.Recipe(num_sequences=16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the artifact")
    args = parser.parse_args()

    logging.basicConfig(format="%(message)s")
    logging.getLogger("mspc").setLevel(logging.INFO)
    manifest = mspc.compress(MODEL, RECIPE, out=args.out, overwrite=True).manifest
    cost, size = manifest["evaluation"], manifest["bytes"]

    table = Table(title=f"{MODEL.name} at {RECIPE.settings().bits_per_weight} bits per weight")
    for heading in ("", "dense", "compressed"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row(
        f"perplexity on {cost['windows']} windows that nothing else has seen",
        f"{cost['dense_perplexity']['mean']:.2f}",
        f"{cost['perplexity']['mean']:.2f}",
    )
    table.add_row("KL from the dense model, nats per token", "0", f"{cost['divergence']['mean']:.4f}")
    table.add_row("bits per weight of the compressed matrices", "16", f"{manifest['bits_per_weight']:.3f}")
    table.add_row("zeros in these matrices", "0%", f"{manifest['sparsity']['achieved']:.1%}")
    table.add_row("size of all weights, embeddings included", in_words(size["dense"]), in_words(size["artifact"]))
    Console(width=100).print(table)
    print(f"{manifest['seconds']:.0f} s.")


if __name__ == "__main__":
    main()
