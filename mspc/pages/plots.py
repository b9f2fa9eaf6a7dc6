"""Plots of a page, drawn by matplotlib as SVG in the page, in the colours that the page has in light and dark."""

import io
import re
import warnings
from collections.abc import Sequence
from typing import Any

from mspc.pages.html import Html, element, printable
from mspc.pages.subject import Mean, Subject

MISSING = "Plots need matplotlib: the extra plots of mspc (pip install '.[plots]' in its folder)."
COLOURS = {"#010101": "var(--ink)", "#020202": "var(--faint)", "#030303": "var(--accent)", "#040404": "var(--line)"}
INK, FAINT, ACCENT, LINE = COLOURS
"""Colours that matplotlib writes, and that the style of the page replaces."""
LONGEST_LABEL = 28


def is_installed() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def frontier(subjects: Sequence[Subject]) -> Html:
    """KL divergence and perplexity over the size of the weights, all evaluated on one text."""
    panels = [("divergence", "KL from the dense model, nats per token"), ("perplexity", "perplexity")]

    def draw(figure: Any) -> None:
        for axis, (key, title) in zip(figure.subplots(1, 2), panels, strict=True):
            _panel(axis, subjects, key)
            axis.set_title(title, loc="left")
            axis.set_xlabel("weights of the sparse export, MB")

    return _svg("frontier", (8.6, 3.7), draw)


def _panel(axis: Any, subjects: Sequence[Subject], key: str) -> None:
    points = []
    for subject in subjects:
        assert subject.bytes
        assert subject.evaluation
        found = subject.evaluation[key]
        if found["mean"] is not None:
            points.append((subject.bytes["sparse_export"] / 1e6, found, subject.name))
    best = _undominated([(size, found["mean"]) for size, found, _ in points])
    axis.plot([size for size, _ in best], [mean for _, mean in best], "-", color=ACCENT, linewidth=1, alpha=0.6)
    middle = sum(size for size, _, _ in points) / max(len(points), 1)
    for size, found, name in points:
        if key == "divergence":  # texts differ more than models, so intervals of perplexities would hide the points
            axis.errorbar(size, found["mean"], _around(found), fmt="none", ecolor=FAINT, elinewidth=1)
        axis.plot(size, found["mean"], "o", color=ACCENT, markersize=5)
        right = size <= middle
        axis.annotate(
            _label(name), (size, found["mean"]), (6 if right else -6, 5), textcoords="offset points",
            ha="left" if right else "right", fontsize=8, parse_math=False,
        )  # fmt: skip
    if key == "perplexity" and subjects[0].evaluation:
        dense = subjects[0].evaluation["dense_perplexity"]["mean"]
        if dense is not None:
            axis.axhline(dense, color=FAINT, linewidth=1, linestyle=":")
            axis.annotate("dense", (1, dense), (-4, 3), xycoords=("axes fraction", "data"), color=FAINT,
                          textcoords="offset points", ha="right", fontsize=8)  # fmt: skip
    axis.margins(0.12, 0.15)
    if key == "divergence":
        axis.set_ylim(bottom=0)


def _undominated(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other point beats in size and in loss, by size."""
    best: list[tuple[float, float]] = []
    for size, loss in sorted(points):
        if not best or loss < best[-1][1]:
            best.append((size, loss))
    return best


def forecast(found: Sequence[tuple[str, Mean]]) -> Html:
    """Losses in nats per token, from the prediction to the measurement, each with its interval if it has one."""

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for place, (_, mean) in enumerate(found):
            axis.plot([0, mean["mean"]], [-place, -place], color=LINE, linewidth=1)
            if mean["interval"] is not None:
                axis.errorbar(mean["mean"], -place, xerr=_around(mean), ecolor=INK, elinewidth=1, capsize=3)
            axis.plot(mean["mean"], -place, "o", color=ACCENT, markersize=6)
        axis.set_yticks([-place for place in range(len(found))], [name for name, _ in found])
        axis.set_xlim(left=min(0.0, *(mean["mean"] for _, mean in found)))
        axis.set_ylim(0.6 - len(found), 0.6)
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        axis.set_xlabel("nats per token")

    return _svg("forecast", (8.6, 0.75 + 0.34 * len(found)), draw)


def _around(found: Mean) -> Any:
    """The lengths of an interval on both sides of its mean, as matplotlib takes them."""
    if found["interval"] is None or None in found["interval"]:
        return None
    low, high = found["interval"]
    return [[max(found["mean"] - low, 0.0)], [max(high - found["mean"], 0.0)]]


def _label(name: str) -> str:
    shown = " ".join(printable(name).split())
    return shown if len(shown) <= LONGEST_LABEL else shown[: LONGEST_LABEL - 1] + "…"


def _svg(name: str, inches: tuple[float, float], draw: Any) -> Html:
    """A figure as an element of the page, with text as text, and no address."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9,
        "text.color": INK, "axes.edgecolor": LINE, "axes.labelcolor": FAINT, "axes.titlecolor": INK,
        "xtick.color": LINE, "ytick.color": LINE, "xtick.labelcolor": FAINT, "ytick.labelcolor": INK,
        "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none", "axes.linewidth": 1,
        "figure.facecolor": "none", "savefig.facecolor": "none",
    }  # fmt: skip
    file = io.StringIO()
    with rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about letters that its font lacks; the browser has others
        figure = Figure(figsize=inches, layout="constrained")
        draw(figure)
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\s(xmlns(:\w+)?|width|height)="[^"]*"', "", svg[: svg.index(">")]) + svg[svg.index(">") :]
    svg = svg.replace("xlink:href", "href").replace("<svg", '<svg role="img"', 1)
    for place in ('id="', 'href="#', "url(#"):  # ids are those of one figure, and the page may have several
        svg = svg.replace(place, f"{place}{name}-")
    for written, meant in COLOURS.items():
        svg = svg.replace(written, meant)
    return element("div", Html(svg), class_="plot")
