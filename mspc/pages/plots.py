"""Plots of a page, drawn by matplotlib as SVG in the page, in the colours that the page has in light and dark."""

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from mspc.pages.html import Html, element
from mspc.pages.subject import Mean, Subject

MISSING = "Plots need matplotlib: the extra plots of mspc (pip install '.[plots]' in its folder)."
COLOURS = {"#010101": "var(--ink)", "#020202": "var(--faint)", "#030303": "var(--accent)", "#040404": "var(--line)"}
INK, FAINT, ACCENT, LINE = COLOURS
"""Colours that matplotlib writes, and that the style of the page replaces."""


def is_installed() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def frontier(subjects: Sequence[Subject], dense: Mapping[str, Any] | None) -> Html:
    """KL divergence and perplexity over the size of the weights, with the number of each artifact at its point.

    All of them were evaluated on one text. `dense` is an evaluation that has the perplexity of their dense model.
    """
    panels = [("divergence", "KL from the dense model, nats per token"), ("perplexity", "perplexity")]

    def draw(figure: Any) -> None:
        for axis, (key, title) in zip(figure.subplots(1, 2), panels, strict=True):
            _panel(axis, subjects, key)
            axis.set_title(title, loc="left")
            axis.set_xlabel("weights of the sparse export, MB")
            if key == "divergence":
                axis.set_ylim(bottom=0)
            elif dense and (mean := dense["dense_perplexity"]["mean"]) is not None:
                axis.axhline(mean, color=FAINT, linewidth=1, linestyle=":")
                axis.annotate("dense", (0, mean), (4, 3), xycoords=("axes fraction", "data"), color=FAINT,
                              textcoords="offset points")  # fmt: skip

    return _svg("frontier", (8.6, 3.7), draw)


def _panel(axis: Any, subjects: Sequence[Subject], key: str) -> None:
    points = []
    for subject in subjects:
        assert subject.bytes
        assert subject.evaluation
        found = subject.evaluation[key]
        if found["mean"] is not None and math.isfinite(found["mean"]):
            points.append((subject.bytes["sparse_export"] / 1e6, found["mean"], subject.place, found))
    best = _undominated([(size, mean) for size, mean, *_ in points])
    axis.plot([size for size, _ in best], [mean for _, mean in best], "-", color=ACCENT, linewidth=1, alpha=0.6)
    for order, (size, mean, place, found) in enumerate(sorted(points, key=lambda point: point[:3])):
        if key == "divergence":  # texts differ more than models, so intervals of perplexities would hide the points
            axis.errorbar(size, mean, _around(found), fmt="none", ecolor=FAINT, elinewidth=1)
        axis.plot(size, mean, "o", color=ACCENT, markersize=5)
        side = 1 if order % 2 else -1  # neighbours have their numbers on different sides
        axis.annotate(str(place), (size, mean), (7 * side, 2), textcoords="offset points",
                      ha="left" if side > 0 else "right")  # fmt: skip
    axis.margins(0.12, 0.15)


def _undominated(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other point beats in size and in loss, by size."""
    best: list[tuple[float, float]] = []
    for size, loss in sorted(points):
        if not best or loss < best[-1][1]:
            best.append((size, loss))
    return best


def forecast(found: Sequence[tuple[str, Mean]], place: int) -> Html:
    """Losses of the artifact at this place in nats per token, predicted and measured, with their intervals."""

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for place, (_, mean) in enumerate(found):
            axis.plot([0, mean["mean"]], [-place, -place], color=LINE, linewidth=1)
            if mean["interval"] is not None:
                axis.errorbar(mean["mean"], -place, xerr=_around(mean), ecolor=INK, elinewidth=1, capsize=3)
            axis.plot(mean["mean"], -place, "o", color=ACCENT, markersize=6)
        axis.set_yticks([-place for place in range(len(found))], [name for name, _ in found])
        if all(mean["mean"] >= 0 for _, mean in found):
            axis.set_xlim(left=0)
        axis.set_ylim(0.6 - len(found), 0.6)
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        axis.set_xlabel("nats per token")

    return _svg(f"forecast{place}", (8.6, 0.75 + 0.34 * len(found)), draw)


def _around(found: Mean) -> Any:
    """The lengths of an interval on both sides of its mean, as matplotlib takes them."""
    if found["interval"] is None or None in found["interval"]:
        return None
    low, high = found["interval"]
    return [[max(found["mean"] - low, 0.0)], [max(high - found["mean"], 0.0)]]


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
