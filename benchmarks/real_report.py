"""The results of quality_real.py as a Markdown table, and as a picture of loss against bytes."""

from pathlib import Path
from typing import Any

from real_rows import DENSE, Row

TEXTS = ("prose", "code", "chat")
COLUMNS = (
    "tool", "setting", "bits a weight", "matrices, MB", "all weights, MB", "perplexity: prose, code, chat",
    "KL: prose, code, chat", "top-1: prose, code, chat", "CPU seconds", "peak, GB",
)  # fmt: skip
COLOURS = {
    "mspc default": "#c2185b", "mspc fast": "#f48fb1", "mspc best": "#880e4f", "mspc default + recover": "#6a1b9a",
    "sweep (GPTQ)": "#1565c0", "sweep (SparseGPT)": "#64b5f6", "llama.cpp": "#2e7d32", "llm-compressor GPTQ": "#ef6c00",
    "llm-compressor SparseGPT": "#ffb74d", "llm-compressor Wanda": "#8d6e63", "GPTQModel FOEM": "#00838f",
    "AutoRound": "#9e9d24",
}  # fmt: skip
OURS = "mspc"
WORST = 1.5
"""KL in nats of the worst point that is drawn; others are named in the corner."""


def table(model: str, results: dict[str, dict[str, Any]], rows: list[Row]) -> str:
    """A row for each result in the order of bits a weight; then what failed, and what was not run yet."""
    lines = [f"### {model}", "", f"| {' | '.join(COLUMNS)} |", "|---|---|" + "---:|" * (len(COLUMNS) - 2)]
    known = [results[row.name] for row in rows if row.name in results and "error" not in results[row.name]]
    known.sort(key=lambda result: (-result["bits_per_weight"], result["texts"]["prose"]["divergence"]))
    lines += [_line(result) for result in known]
    lines += _failures(results, rows)
    missing = [f"{row.family} {row.setting}".strip() for row in rows if row.name not in results]
    if missing:
        lines += ["", f"Not run yet: {'; '.join(missing)}."]
    origin = next((result["configuration"]["origin"] for result in known), None)
    return "\n".join([*lines, *(["", origin] if origin else [])]) + "\n"


def _failures(results: dict[str, dict[str, Any]], rows: list[Row]) -> list[str]:
    failed = [row for row in rows if "error" in results.get(row.name, {})]
    lines = [f"- **{row.family} {row.setting}** failed: `{results[row.name]['error']}`" for row in failed]
    return ["", *lines] if lines else []


def _line(result: dict[str, Any]) -> str:
    cells = [result["family"], result["setting"], f"{result['bits_per_weight']:.3f}"]
    cells += [f"{result[name] / 1e6:.1f}" for name in ("matrix_bytes", "weight_bytes")]
    cells.append(_texts(result, "perplexity", "{:.2f}"))
    cells += [_texts(result, "divergence", "{:.4f}"), _texts(result, "top1_agreement", "{:.1%}")]
    cells.append(f"{result['cpu_seconds']:.0f}" if "cpu_seconds" in result else "-")
    cells.append(f"{result['peak_memory_bytes'] / 1e9:.1f}" if "peak_memory_bytes" in result else "-")
    return f"| {' | '.join(cells)} |"


def _texts(result: dict[str, Any], name: str, form: str) -> str:
    return ", ".join(form.format(result["texts"][text][name]) if text in result["texts"] else "-" for text in TEXTS)


def undominated(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in size and in loss, by size."""
    best: list[tuple[float, float]] = []
    for size, loss in sorted(points):
        if not best or loss < best[-1][1]:
            best.append((size, loss))
    return best


def plot(models: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Two panels for each model: mean KL against bytes of the matrices, and perplexity against bytes of everything."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 5.2 * len(models)), layout="constrained", facecolor="white")
    for (model, results), axes in zip(models.items(), figure.subplots(len(models), 2, squeeze=False), strict=True):
        found = [result for name, result in results.items() if "error" not in result and name != DENSE.name]
        dense = results.get(DENSE.name)
        _panel(axes[0], found, "matrix_bytes", divergence)
        axes[0].set(xlabel="compressed matrices, MB", ylabel="KL from the dense model, nats a token", yscale="log")
        _panel(axes[1], found, "weight_bytes", perplexity)
        axes[1].set(xlabel="all weights with embeddings, MB", ylabel="perplexity")
        if dense:
            axes[1].axhline(perplexity(dense), color="#777", linewidth=1, linestyle=":")
            axes[1].annotate("dense", (1, perplexity(dense)), (-4, 3), xycoords=("axes fraction", "data"),
                             textcoords="offset points", ha="right", color="#777", fontsize=8)  # fmt: skip
        axes[0].set_title(f"{model}: mean over {', '.join(text for text in TEXTS if _has(found, text))}", loc="left")
        axes[1].set_title("geometric mean of the perplexities", loc="left")
        axes[0].legend(fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _has(results: list[dict[str, Any]], text: str) -> bool:
    return any(text in result["texts"] for result in results)


def divergence(result: dict[str, Any]) -> float:
    """The mean over the texts."""
    values = [text["divergence"] for text in result["texts"].values()]
    return sum(values) / len(values)


def perplexity(result: dict[str, Any]) -> float:
    """The geometric mean over the texts."""
    product = 1.0
    for text in result["texts"].values():
        product *= text["perplexity"]
    return product ** (1 / len(result["texts"]))


def _panel(axis: Any, results: list[dict[str, Any]], size: str, loss: Any) -> None:
    """Points labelled by their setting, and one frontier line for mspc and one for everything else."""
    drawn = [result for result in results if divergence(result) <= WORST]
    for family in COLOURS:
        own = [result for result in drawn if result["family"] == family]
        if own:
            points = [(result[size] / 1e6, loss(result)) for result in own]
            marker = "o" if family.startswith(OURS) else "s"
            axis.plot(*zip(*points, strict=True), marker, color=COLOURS[family], markersize=5, label=family)
    for mine, style in ((True, "-"), (False, "--")):
        own = [result for result in drawn if result["family"].startswith(OURS) is mine]
        best = undominated([(result[size] / 1e6, loss(result)) for result in own])
        if len(best) > 1:
            axis.plot(*zip(*best, strict=True), style, color=COLOURS["mspc default"] if mine else "#555", linewidth=1)
    for order, result in enumerate(sorted(drawn, key=lambda one: (one[size], loss(one)))):
        side = 1 if order % 2 else -1  # neighbours have their names on different sides
        name, at = result["setting"].replace(", ", ",\n"), (result[size] / 1e6, loss(result))
        axis.annotate(name, at, (6 * side, 3 * side), fontsize=7, textcoords="offset points",
                      ha="left" if side > 0 else "right", va="center")  # fmt: skip
    left_out = [f"{result['family']} {result['setting']}" for result in results if divergence(result) > WORST]
    if left_out:
        axis.annotate(f"KL above {WORST}: {', '.join(left_out)}", (0.01, 0.01), xycoords="axes fraction", fontsize=6)
    axis.margins(0.2, 0.1)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.grid(alpha=0.2)
