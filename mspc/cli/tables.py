"""What the command line prints: tables and paragraphs of a manifest."""

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table


def matrix_table(manifest: dict[str, Any]) -> Table:
    """One row a matrix, for `mspc inspect`."""
    table = Table(box=None, pad_edge=False)
    for heading in ("matrix", "shape", "pattern", "sparsity", "bits", "sensitivity", "output error", "damp", "zeros"):
        table.add_column(heading, justify="left" if heading == "matrix" else "right", no_wrap=True)
    for row in manifest["matrices"]:
        sensitivity = row["sensitivity"]
        table.add_row(
            row["name"],
            "x".join(map(str, row["shape"])),
            row["pattern"],
            f"{row['sparsity']:.2%}",
            str(row["bits"]),
            "-" if sensitivity is None else f"{sensitivity:.2e}",
            f"{row['output_error']:.2e}",
            f"{row['damp']:g}",
            f"{row['zeros']:,}",
        )
    return table


def format_table(formats: Mapping[str, Any], runtimes: Mapping[str, Any]) -> Table:
    """One row a format, for `mspc export --list`."""
    table = Table(box=None, pad_edge=False)
    for heading in ("format", "holds", "patterns and bits", "verified in (tested)", "what zeros gain"):
        table.add_column(heading)
    for name, row in formats.items():
        tested = ", ".join(f"{runtime} {runtimes[runtime].tested}" for runtime in row.runtimes)
        table.add_row(name, row.holds, row.accepts, tested or "weights only", row.zeros)
    return table


def verification_table(result: dict[str, Any]) -> Table:
    """One row a check, for `mspc verify`."""
    table = Table(box=None, pad_edge=False)
    for heading in ("check", "status", "relative error", "greedy tokens equal", ""):
        table.add_column(heading)
    for check, counted in (("files", "checked"), ("weights", "matrices")):
        wrong = result[check]["wrong"]
        table.add_row(check, "mismatch" if wrong else "verified", "", "", f"{result[check][counted]} {counted}")
    for name, of in result["runtimes"].items():
        error, tokens = of.get("relative_error"), of.get("greedy_tokens_equal")
        table.add_row(
            f"{name} {of.get('version', '')}".strip(),
            of["status"],
            "" if error is None else f"{error:.1e}",
            "" if tokens is None else str(tokens),
            escape(of.get("reason", "")),  # mspc[gptq] is no markup
        )
    return table


def summary(manifest: dict[str, Any]) -> str:
    """The run in one paragraph."""
    sparsity = manifest["sparsity"]
    line = (
        f"{len(manifest['matrices'])} matrices, sparsity {sparsity['achieved']:.2%}, "
        f"{manifest['bits_per_weight']:.3f} bits per weight, {manifest['seconds']:.1f} s, "
        f"peak memory {manifest['peak_memory_bytes'] / 1e9:.2f} GB."
    )
    difference = sparsity["achieved"] - sparsity["requested"]
    if abs(difference) > 5e-5:
        line += f" Requested was {sparsity['requested']:.2%}; the pattern allows nothing nearer ({difference:+.2%})."
    return line
