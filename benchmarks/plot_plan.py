"""Plot the sparsity and the predicted loss of every matrix of an artifact, by block. For plans by loss curves.

python benchmarks/plot_plan.py ARTIFACT OUT.png
"""

import sys
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt

from mspc.storage.manifest import read_manifest


def plot(folder: str, out: str) -> None:
    manifest = read_manifest(Path(folder))
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in manifest["matrices"]:
        lines[row["name"].rpartition(".")[2]].append((row["sparsity"], row["sensitivity"] or 0.0))
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 6.5), sharex=True, layout="constrained")
    for name, points in lines.items():
        above.plot([sparsity for sparsity, _ in points], marker="o", label=name)
        below.plot([1e3 * loss for _, loss in points], marker="o")
    achieved = manifest["sparsity"]["achieved"]
    above.axhline(achieved, color="black", linewidth=1, linestyle=":", label=f"all: {achieved:.1%}")
    above.set(
        ylabel="sparsity", ylim=(0, 1), title=f"{manifest['source']['name']}, {manifest['settings']['allocator']}"
    )
    above.legend(ncols=2, fontsize="small")
    below.set(xlabel="block", ylabel="predicted loss, millinats per token", ylim=(0, None))
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    plot(*sys.argv[1:])
