"""The manifest of an artifact in words and as a table."""

from collections.abc import Mapping
from html import escape
from typing import Any

HEADINGS = ("matrix", "shape", "pattern", "sparsity", "bits", "sensitivity", "output error", "damp", "zeros")


def summary(manifest: Mapping[str, Any]) -> str:
    """The run in one paragraph."""
    sparsity = manifest["sparsity"]
    line = (
        f"{len(manifest['matrices'])} matrices, sparsity {sparsity['achieved']:.2%}, "
        f"{manifest['bits_per_weight']:.3f} bits per weight, {manifest['seconds']:.1f} s, "
        f"peak memory {manifest['peak_memory_bytes'] / 1e9:.2f} GB."
    )
    difference = sparsity["achieved"] - sparsity["requested"]
    if abs(difference) > 5e-5:
        line += f" Requested: {sparsity['requested']:.2%}; the pattern allows nothing nearer ({difference:+.2%})."
    return line


def matrix_rows(manifest: Mapping[str, Any]) -> list[list[str]]:
    """One row per matrix, under `HEADINGS`."""
    return [
        [
            row["name"],
            "x".join(map(str, row["shape"])),
            row["pattern"],
            f"{row['sparsity']:.2%}",
            str(row["bits"]),
            "-" if row["sensitivity"] is None else f"{row['sensitivity']:.2e}",
            f"{row['output_error']:.2e}",
            f"{row['damp']:g}",
            f"{row['zeros']:,}",
        ]
        for row in manifest["matrices"]
    ]


def to_html(manifest: Mapping[str, Any]) -> str:
    """The table in HTML, for notebooks."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in HEADINGS)
    rows = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in matrix_rows(manifest))
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
