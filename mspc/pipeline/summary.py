"""The manifest of an artifact in words and as a table."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mspc.sizes import in_words

HEADINGS = ("matrix", "shape", "pattern", "sparsity", "bits", "sensitivity", "output error", "damp", "zeros")


def summary(manifest: Mapping[str, Any]) -> str:
    """The run in one paragraph."""
    sparsity = manifest["sparsity"]
    line = (
        f"{len(manifest['matrices'])} matrices, sparsity {sparsity['achieved']:.2%}, "
        f"{manifest['bits_per_weight']:.3f} bits per weight, {manifest['seconds']:.1f} s, "
        f"peak memory {in_words(manifest['peak_memory_bytes'])}."
    )
    difference = sparsity["achieved"] - sparsity["requested"]
    if abs(difference) > 5e-5:
        line += f" Requested: {sparsity['requested']:.2%}; the pattern allows nothing nearer ({difference:+.2%})."
    return line


def unused_note(names: Sequence[str]) -> str:
    """A note about the tensors of a checkpoint that are no part of its model, such as an adapter."""
    shown, one = ", ".join(names[:3]), len(names) == 1
    note = f"{len(names):,} tensor{'' if one else 's'} of the checkpoint, such as {shown}, belong{'s' * one} to no "
    note += "parameter of the model and change nothing."
    return note + " Merge the adapter first (merge_and_unload of peft)." * any("lora_" in name for name in names)


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
