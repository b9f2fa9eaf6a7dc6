"""Draws a result of the bench: speedup over batch size, and perplexity over tokens a second."""

from pathlib import Path
from typing import Any

from mspc.bench.tables import compared_with, groups, label
from mspc.errors import MspcError
from mspc.storage.files import write_atomically


def check_installed() -> None:
    """Raises MspcError, naming the extra, where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise MspcError(
            "--plot needs matplotlib: the extra plots of mspc (pip install '.[plots]' in its folder)."
        ) from error


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw a row of panels for each shape: speedup in decoding, and perplexity where models have one."""
    from matplotlib.figure import Figure

    of_models = groups(result)
    has_perplexity = any(row["perplexity"] is not None for row in result["rows"])
    columns = 2 if has_perplexity else 1
    figure = Figure(figsize=(8.0 * columns, 4.4 * len(of_models)), layout="constrained")
    axes = figure.subplots(len(of_models), columns, squeeze=False)
    for (model, rows), of_row in zip(of_models.items(), axes, strict=True):
        _speedups(of_row[0], model, rows, result["configuration"]["baseline"])
        of_row[0].set_ylabel(f"times as fast as {compared_with(result)} (below 1: no gain)")
        if has_perplexity:
            _perplexities(of_row[1], model, rows)
    figure.suptitle(f"{result['device']['name']}, {result['label']}, {result['date']}", fontsize="small")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


def _speedups(axis: Any, model: str, rows: list[dict[str, Any]], baseline: str) -> None:
    contexts = list(dict.fromkeys(step["context"] for step in rows[0]["decode"]))
    for number, row in enumerate(rows):
        if row["baseline"] == baseline:
            continue
        for context, style in zip(contexts, ("-", "--", "-.", ":") * len(contexts), strict=False):
            steps = [step for step in row["decode"] if step["context"] == context and baseline in step["speedup"]]
            axis.plot(
                [step["batch"] for step in steps],
                [step["speedup"][baseline] for step in steps],
                style, marker="o", color=f"C{number}", label=f"{label(row)}, context {context}",
            )  # fmt: skip
    axis.axhline(1.0, color="black", linewidth=1)
    batches = [step["batch"] for step in rows[0]["decode"]]
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(set(batches)), [str(batch) for batch in sorted(set(batches))])
    axis.set_ylim(bottom=0)
    axis.set(title=f"{model}, decoding", xlabel="batch size")
    if axis.lines[:-1]:  # all but the line of the baseline
        _add_legend(axis)


def _add_legend(axis: Any) -> None:
    """Add a legend on the right of the axes, where it covers nothing."""
    axis.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0, handlelength=3.5)


def _perplexities(axis: Any, model: str, rows: list[dict[str, Any]]) -> None:
    known = [row for row in rows if row["perplexity"] is not None and row["decode"]]
    for number, row in enumerate(rows):  # the colours of the other panel
        if row not in known:
            continue
        step = row["decode"][0]
        point = step["tokens_per_second"]["median"], row["perplexity"]
        axis.plot(*point, "o", color=f"C{number}", label=label(row))
    if known:
        _add_legend(axis)
        first = known[0]["decode"][0]
        axis.set_xlabel(f"tokens/s at batch {first['batch']}, context {first['context']}")
    axis.set(title=f"{model}, quality", ylabel="perplexity")
    axis.margins(0.25)
