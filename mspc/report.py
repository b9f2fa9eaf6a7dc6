"""What a person sees while and after mspc works. Everything here goes to stderr; stdout is for results."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from mspc.types import PlannedMatrix

SECONDS_BETWEEN_LINES = 10.0

Step = Callable[[str], None]


class Reporter(Protocol):
    """Told of stages of work. `stage` gives a function to call after each of `total` steps, with what it did."""

    def stage(self, title: str, total: int) -> Any: ...

    def say(self, line: str) -> None: ...


class Silent:
    """Reports nothing."""

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Step]:
        yield lambda detail: None

    def say(self, line: str) -> None:
        pass


class ConsoleReporter:
    """A progress bar on a terminal; a line a stage, and one every ten seconds, in a log."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Step]:
        if self.console.is_terminal:
            with self._bar() as bar:
                task = bar.add_task(title, total=total, detail="")
                yield lambda detail: bar.update(task, advance=1, detail=detail)
            return
        begin = last = time.monotonic()
        done = 0

        def step(detail: str) -> None:
            nonlocal done, last
            done += 1
            if time.monotonic() - last > SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                self.say(f"{title}: {done}/{total} {detail}".rstrip())

        yield step
        self.say(f"{title}: done in {time.monotonic() - begin:.1f} s")

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", style="dim"),
            console=self.console,
        )

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


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


def mixture_lines(plan: Sequence[PlannedMatrix]) -> list[str]:
    """What a plan is made of, in one line for each number of bits."""
    parts: dict[int, list[PlannedMatrix]] = defaultdict(list)
    for matrix in plan:
        parts[matrix.target.grid.bits if matrix.target.grid else 16].append(matrix)
    whole = sum(matrix.numel for matrix in plan)
    lines = []
    for bits, part in sorted(parts.items(), reverse=True):
        numel = sum(matrix.numel for matrix in part)
        sparsities = [matrix.target.pattern.sparsity for matrix in part]
        mean = sum(matrix.target.pattern.sparsity * matrix.numel for matrix in part) / numel
        lines.append(
            f"Mixture: {len(part)} matrices ({numel / whole:.0%} of the weights) at {bits} bits, sparsity {mean:.0%} "
            f"({min(sparsities):.0%} to {max(sparsities):.0%})."
        )
    return lines


def reconstruction_line(blocks: Sequence[Mapping[str, Any]]) -> str:
    """What tuning gained over all parts, from the commits of the blocks; errors are means of relative ones."""
    parts = [part for block in blocks for part in block["reconstruction"]]
    if not parts:
        return "Reconstruction: no block has a part with several compressed matrices, so nothing was tuned."
    before, after = (sum(part[f"error_{when}"] for part in parts) / len(parts) for when in ("before", "after"))
    seconds, tuned = sum(block["seconds"] for block in blocks), sum(part["tuned"] for part in parts)
    return (
        f"Reconstruction: {tuned} of {len(parts)} parts are nearer to the dense model on text held back, mean relative "
        f"error {before:.4f} before and {after:.4f} after, {seconds:.1f} s."
    )


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
