"""Tables that the command line prints."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from mspc.pipeline.summary import HEADINGS, matrix_rows


def matrix_table(manifest: dict[str, Any]) -> Table:
    """One row per matrix, for `mspc inspect`."""
    table = Table(box=None, pad_edge=False)
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "matrix" else "right", no_wrap=True)
    for row in matrix_rows(manifest):
        table.add_row(*row)
    return table


def evaluation_line(result: Mapping[str, Any], against: str | None) -> str:
    """One evaluation as a sentence, for `mspc eval`; `result` has the fields of `Perplexity` that are not None."""
    line = "recovered: " * bool(result.get("recovered"))
    line += f"perplexity {_shown(result, 'perplexity')} over {result['tokens']:,} tokens, {_windows(result)}"
    if against is None:
        return line
    return line + (
        f"; {against}: {_shown(result, 'reference_perplexity')}; KL divergence from it "
        f"{_shown(result, 'divergence')} nats per token"
    )


def evaluation_table(results: Sequence[tuple[str, Mapping[str, Any]]], against: str | None) -> Table:
    """One row per model, for `mspc eval` of several; the reference comes first.

    Models with other windows, whose perplexities cannot be compared, say so in their row.
    """
    _, first = results[0]
    table = Table(title=f"{_windows(first)}, 95% intervals", box=None, pad_edge=False)
    for heading in ("model", "perplexity", *(["KL from the reference, nats per token"] if against else [])):
        table.add_column(heading)
    if against is not None:
        table.add_row(escape(f"{against} (reference)"), _shown(first, "reference_perplexity"), "")
    for path, result in results:
        kl = [_shown(result, "divergence")] if against else []
        other = "" if _windows(result) == _windows(first) else f" (on {_windows(result)})"
        recovered = " (recovered)" * bool(result.get("recovered"))
        table.add_row(escape(path + recovered + other), _shown(result, "perplexity"), *kl)
    return table


def task_table(results: Sequence[tuple[str, Any]], against: str | None) -> Table:
    """One row per task, metric and model, for `mspc eval --tasks`; `results` are `TaskResult`s by path.

    The reference is the first row of each task and metric.
    """
    table = Table(title="with standard errors over questions", box=None, pad_edge=False)
    head = ("task", "metric", "model", "value", *(["difference"] if against else []), "questions", "examples")
    for heading in head:
        table.add_column(heading, justify="left" if heading in ("task", "metric", "model") else "right")
    of_path = [(path, {score.key: score for score in result.scores}) for path, result in results]
    for key, first in of_path[0][1].items():
        arrow = {True: " (higher is better)", False: " (lower is better)", None: ""}[first.higher_is_better]
        name = first.metric + (f", {first.filter}" if first.filter != "none" else "") + arrow
        asked = ["" if count is None else f"{count:,}" for count in (first.questions, first.num_fewshot)]
        if against is not None:
            reference = [f"{against} (reference)", _with_error(first.reference, first.reference_stderr), ""]
            table.add_row(*map(escape, [first.task, name, *reference, *asked]))
        for path, scores in of_path:
            score = scores[key]
            shown = [path, _with_error(score.value, score.stderr)]
            difference = [_with_error(score.difference, score.difference_stderr, "+")] if against else []
            table.add_row(*map(escape, [first.task, name, *shown, *difference, *asked]))
    return table


def _with_error(value: float | None, error: float | None, sign: str = "") -> str:
    if value is None:
        return ""
    return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def _windows(result: Mapping[str, Any]) -> str:
    return f"{result['windows']} windows of {result['sequence_length']} of {result['text']}"


def _shown(result: Mapping[str, Any], name: str) -> str:
    """A value with its interval, if it has one."""
    digits = 5 if name == "divergence" else 4
    interval = result.get(f"{name}_interval")
    around = "" if interval is None else f" ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})"
    return f"{result[name]:.{digits}f}{around}"


def format_table(formats: Mapping[str, Any], runtimes: Mapping[str, Any]) -> Table:
    """One row per format, for `mspc export --list`."""
    table = Table(box=None, pad_edge=False)
    for heading in ("format", "holds", "patterns and bits", "verified in (tested)", "what zeros gain"):
        table.add_column(heading)
    for name, row in formats.items():
        tested = ", ".join(f"{runtime} {runtimes[runtime].tested}" for runtime in row.runtimes)
        table.add_row(name, row.holds, row.accepts, tested or "weights only", row.zeros)
    return table


def verification_table(result: dict[str, Any]) -> Table:
    """One row per check, for `mspc verify`."""
    table = Table(box=None, pad_edge=False)
    beyond = ["beyond limits"] if "beyond" in result else []
    for heading in ("check", "status", "relative error", *beyond, "greedy tokens equal", ""):
        table.add_column(heading)
    for check, counted in (("files", "checked"), ("weights", "matrices")):
        wrong = result[check]["wrong"]
        cells = ["", *([""] if beyond else []), "", f"{result[check][counted]} {counted}"]
        table.add_row(check, "mismatch" if wrong else "verified", *cells)
    for name, of in result["runtimes"].items():
        names = ("relative_error", "relative_error_beyond")[: 1 + len(beyond)]
        errors, tokens = [of.get(error) for error in names], of.get("greedy_tokens_equal")
        table.add_row(
            f"{name} {of.get('version', '')}".strip(),
            of["status"],
            *("" if error is None else f"{error:.1e}" for error in errors),
            "" if tokens is None else str(tokens),
            escape(of.get("reason", "")),  # mspc[gptq] is no markup
        )
    return table
