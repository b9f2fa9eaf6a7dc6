"""Heat maps of the matrices of an artifact: a row for each layer, a column for each kind of matrix."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mspc.pages.html import Html, element
from mspc.pages.subject import Subject

Row = Mapping[str, Any]
Places = Mapping[str, Mapping[str, Sequence[Row]]]
"""Matrices by layer and kind. The experts of a layer share a place."""


@dataclass(frozen=True)
class Map:
    """One figure of all matrices: `of` gives its value at a place, `shade` the strength of its colour, 0 to 1."""

    title: str
    caption: str
    hue: str
    of: Callable[[Sequence[Row]], float]
    shade: Callable[[float], float]
    shown: Callable[[float], str]


def heat_maps(subject: Subject) -> Html:
    """Sparsity and bits, then the predicted loss, where there is one, and the error."""
    places = places_of(subject.rows)
    return element("div", *(_drawn(one, places) for one in _maps(subject, places)), class_="maps")


def places_of(rows: Sequence[Row]) -> Places:
    places: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        layer, kind = place_of(row["name"])
        places.setdefault(layer, {}).setdefault(kind, []).append(row)
    return places


def place_of(name: str) -> tuple[str, str]:
    """`model.layers.3.mlp.experts.down_proj[7]` -> layer 3, kind `mlp.experts.down_proj`."""
    parts = re.sub(r"\[\d+\]$", "", name).split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if at is None or at == len(parts) - 1:
        return "", name
    return parts[at], ".".join("*" if part.isdecimal() else part for part in parts[at + 1 :])


def _maps(subject: Subject, places: Places) -> list[Map]:
    maps = [
        Map("Sparsity", "share of zeros, percent", "a", lambda rows: _mean(rows, "sparsity"), float,
            lambda value: f"{100 * value:.0f}"),
        Map("Bits", "of each kept weight; 16 is not quantized", "b", lambda rows: _mean(rows, "bits"),
            lambda bits: math.log2(max(bits, 1.0)) / 4, lambda bits: f"{bits:.3g}"),
    ]  # fmt: skip
    if subject.predicted:
        sums = [_sum(rows, "sensitivity") for kinds in places.values() for rows in kinds.values()]
        maps.append(
            Map("Predicted loss", "share of the sum over all matrices, percent", "c",
                lambda rows: _sum(rows, "sensitivity") / sum(sums), lambda value: value * sum(sums) / max(sums),
                lambda value: f"{100 * value:.1f}")
        )  # fmt: skip
    if any(row["output_error"] is None for row in subject.rows):  # recovered: it was that of other weights
        return maps
    errors = [_mean(rows, "output_error") for kinds in places.values() for rows in kinds.values()]
    maps.append(
        Map("Output error", "relative squared error of each output, percent", "c",
            lambda rows: _mean(rows, "output_error"), lambda value: value / max(max(errors), 1e-300),
            lambda value: f"{100 * value:.1f}")
    )  # fmt: skip
    return maps


def _drawn(one: Map, places: Places) -> Html:
    kinds = list(dict.fromkeys(kind for of_layer in places.values() for kind in of_layer))
    head = [element("th", name, scope="col", title=kind) for name, kind in zip(short(kinds), kinds, strict=True)]
    lines = []
    for layer, of_layer in places.items():
        cells = (_cell(one, of_layer.get(kind)) for kind in kinds)
        lines.append(element("tr", element("th", layer, scope="row"), *cells))
    grid = element("table", element("thead", element("tr", element("th"), *head)), element("tbody", *lines),
                   class_=f"heat {one.hue}")  # fmt: skip
    caption = element("figcaption", element("b", one.title), " ", one.caption)
    return element("figure", caption, element("div", grid, class_="scroll"))


def _cell(one: Map, rows: Sequence[Row] | None) -> Html:
    if rows is None:
        return element("td", class_="none")
    value = one.of(rows)
    shade = min(max(one.shade(value), 0.0), 1.0)
    return element("td", one.shown(value), style=f"--v:{shade:.3f}", title=_tip(rows))


def _tip(rows: Sequence[Row]) -> str:
    """The text that appears over a cell."""
    row, more = rows[0], f" and {len(rows) - 1} more" if len(rows) > 1 else ""
    stored = 8 * sum(row["bytes"] for row in rows) / sum(map(_numel, rows))
    return (
        f"{row['name']}{more}: {row['pattern']}, {_mean(rows, 'sparsity'):.2%} zeros, {_mean(rows, 'bits'):.3g} bits, "
        f"stored in {stored:.3f} bits per weight"
    )


def short(kinds: Sequence[str]) -> list[str]:
    """The last words of the kinds, without the ending that they share; the whole kinds where these are the same."""
    last = [kind.rpartition(".")[2] for kind in kinds]
    if len(last) > 1 and all(name.endswith("_proj") for name in last):
        last = [name.removesuffix("_proj") for name in last]
    return last if len(set(last)) == len(last) else list(kinds)


def _numel(row: Row) -> int:
    num_out, num_in = row["shape"]
    return int(num_out * num_in)


def _mean(rows: Sequence[Row], key: str) -> float:
    """The mean of a figure over weights."""
    return float(sum(row[key] * _numel(row) for row in rows) / sum(map(_numel, rows)))


def _sum(rows: Sequence[Row], key: str) -> float:
    return float(sum(row[key] for row in rows))
