"""A result of the bench in tables and words. A format that is no faster than the baseline is called no gain."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from mspc.sizes import in_words

BUSY = 1.05
"""Seconds by the clock divided by those of the processor, above which other processes are said to have run."""


def groups(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each model shape, by its name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        found.setdefault(row["model"], []).append(row)
    return found


def tables(result: dict[str, Any]) -> Iterator[Table]:
    for model, rows in groups(result).items():
        yield _sizes(model, rows, result)
        yield _decode(model, rows, result)
        if any(row["prefill"] for row in rows):
            yield _prefill(model, rows, result)


def _titled(title: str, result: dict[str, Any], *headings: str) -> Table:
    table = Table(title=f"{title} ({result['device']['name']}; {result['label']})", box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("format", "runs on") else "right")
    return table


def _sizes(model: str, rows: list[dict[str, Any]], result: dict[str, Any]) -> Table:
    headings = ("format", "runs on", "bits/weight", "weights", "peak memory")
    table = _titled(f"{model}: sizes", result, *headings, *_perplexity_heading(rows))
    for row in rows:
        peak, copied = row["peak_memory_bytes"], row["copied_bits_per_weight"]
        table.add_row(
            label(row),
            row["engine"],
            f"{row['bits_per_weight']:.3f}" + (f" + {copied:.3f}" if copied else ""),
            in_words(row["weight_bytes"]),
            "-" if peak is None else in_words(peak),
            *_perplexity_cell(row, rows),
        )
    return table


def _perplexity_heading(rows: list[dict[str, Any]]) -> list[str]:
    """A column, unless it would be empty."""
    return ["perplexity"] if any(row["perplexity"] is not None for row in rows) else []


def _perplexity_cell(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    found = "-" if row["perplexity"] is None else f"{row['perplexity']:.3f}"
    return [found for _ in _perplexity_heading(rows)]


def _decode(model: str, rows: list[dict[str, Any]], result: dict[str, Any]) -> Table:
    baseline = result["configuration"]["baseline"]
    headings = (
        "ms a token, 10%..90%",
        "tokens/s",
        "GB/s",
        "of copy",
        "bytes alone, ms",
        f"x {compared_with(result)}",
        *_perplexity_heading(rows),
    )
    table = _titled(f"{model}: decoding", result, "context", "batch", "format", *headings)
    for number in range(len(rows[0]["decode"])):
        for row in rows:
            if len(row["decode"]) <= number:
                continue
            step = row["decode"][number]
            table.add_row(
                str(step["context"]),
                str(step["batch"]),
                label(row),
                milliseconds(step["seconds"]),
                f"{step['tokens_per_second']['median']:,.1f}",
                f"{step['bytes_per_second']['median'] / 1e9:,.1f}",
                f"{step['share_of_copy']:.0%}",
                f"{step['predicted_seconds'] * 1e3:.3f}",
                gain(row, step, baseline),
                *_perplexity_cell(row, rows),
            )
    return table


def _prefill(model: str, rows: list[dict[str, Any]], result: dict[str, Any]) -> Table:
    baseline = result["configuration"]["baseline"]
    headings = ("ms to first token, 10%..90%", "tokens/s", "bytes and products alone, ms", f"x {compared_with(result)}")
    table = _titled(f"{model}: prefill", result, "prompt", "format", *headings)
    for number in range(len(rows[0]["prefill"])):
        for row in rows:
            step = row["prefill"][number]
            table.add_row(
                str(step["tokens"]),
                label(row),
                milliseconds(step["seconds"]),
                f"{step['tokens_per_second']['median']:,.0f}",
                f"{step['predicted_seconds'] * 1e3:.3f}",
                gain(row, step, baseline),
            )
    return table


def lines_of(row: dict[str, Any], result: dict[str, Any]) -> Iterator[str]:
    """A row in lines, to show when it is known."""
    ending = "" if row["perplexity"] is None else f", perplexity {row['perplexity']:.3f}"
    size = f"{row['bits_per_weight']:.3f} bits/weight, {in_words(row['weight_bytes'])}"
    yield f"{row['model']}, {label(row)}: {size}{ending}"
    kinds = (
        ("decode", "context {context}, batch {batch}", "a token"),
        ("prefill", "prompt {tokens}", "to first token"),
    )
    for stage, where, of_what in kinds:
        for step in row[stage]:
            gained = f"x {compared_with(result)} {gain(row, step, result['configuration']['baseline'])}"
            speed = f"{step['tokens_per_second']['median']:,.1f} tokens/s"
            yield f"  {where.format(**step)}: {step['seconds']['median'] * 1e3:.3f} ms {of_what}, {speed}, {gained}"


def compared_with(result: dict[str, Any]) -> str:
    """The baseline in words. On a CPU the dense one is computed in float32."""
    baseline, dtype = (str(result["configuration"][key]) for key in ("baseline", "dtype"))
    return f"dense {dtype}" if baseline == "bf16" and dtype != "bfloat16" else baseline


def label(row: dict[str, Any]) -> str:
    """The name of a row, with its format if the name is a path, and whether it was recovered."""
    recovered = ", recovered" * bool(row.get("recovered"))  # older results do not say
    return str(row["name"]) if row["random_weights"] else f"{row['name']} ({row['format']}{recovered})"


def milliseconds(seconds: dict[str, float]) -> str:
    return f"{seconds['median'] * 1e3:.3f} {seconds['p10'] * 1e3:.3f}..{seconds['p90'] * 1e3:.3f}"


def gain(row: dict[str, Any], step: dict[str, Any], baseline: str) -> str:
    """Speed of a step divided by that of the baseline, in words."""
    if row["baseline"] == baseline:
        return "1"
    ratio = step["speedup"].get(baseline)
    if ratio is None:
        return "-"
    return f"{ratio:.2f}" if is_gain(ratio) else f"{ratio:.2f} no gain"


def is_gain(ratio: float) -> bool:
    """Tell if a speedup is above 1 in the two decimals that are shown."""
    return round(ratio, 2) > 1


def notes(result: dict[str, Any]) -> Iterator[str]:
    """Notes on the figures of models: the dtype that they are computed in, and the text of their perplexity."""
    computed = result["configuration"]["dtype"]
    others: dict[str, list[str]] = {}
    for row in result["rows"]:
        if row["stored_dtype"] not in (None, computed):
            others.setdefault(row["stored_dtype"], []).append(row["name"])
    for stored, names in others.items():
        wider = "; dense weights take 32 bits then" if computed == "float32" else ""
        yield f"Stored in {stored} and computed in {computed}{wider}: {', '.join(names)}."
    for row in result["rows"]:
        repacked = row.get("repacked_bits_per_weight", 0)  # older results do not say
        if repacked > 1.02 * row["bits_per_weight"]:
            yield f"{label(row)} takes {repacked:.3f} bits a weight here, with the padding of its kernels."
    if any(row["perplexity"] is not None for row in result["rows"]):
        of = result["configuration"]["perplexity"]
        yield f"Perplexities are of at most {of['max_windows']} windows of the text {of['text']}, which is not much."


def predictions(result: dict[str, Any]) -> Iterator[str]:
    """A line for each model that was made for a time: what was predicted, and what was measured."""
    threads = result["device"].get("threads")
    for row in result["rows"]:
        said = row.get("predicted")  # older results do not say
        steps = [step for step in row["decode"] if said and all(step[key] == said[key] for key in ("batch", "context"))]
        if not said or not steps:
            continue
        predicted, seconds, of_processor = said["predicted_ms"], steps[0]["seconds"], steps[0]["processor_seconds"]
        measured = 1e3 * (of_processor or seconds)["median"]
        line = f"{label(row)}: {predicted:.3g} ms a token predicted, {measured:.3g} measured"
        line += f" ({measured / predicted - 1:+.0%})"
        clock = 1e3 * seconds["median"]
        if clock > BUSY * measured:
            line += f" by the time of the processor; {clock:.3g} by the clock, because other processes ran"
        if (said["device"], said["threads"]) != (result["device"]["name"], threads):
            line += f". It was predicted for {said['device']} with {said['threads']} threads"
        yield f"{line}."


def verdicts(result: dict[str, Any]) -> Iterator[str]:
    """A line for each shape and stage: the formats that gained over the baseline, and those that did not."""
    baseline = result["configuration"]["baseline"]
    for model, rows in groups(result).items():
        for stage, words in (("decode", "decoding"), ("prefill", "prefill")):
            gained, lost = [], []
            for row in rows:
                ratios = [step["speedup"].get(baseline) for step in row[stage]]
                known = [ratio for ratio in ratios if ratio is not None]
                if row["baseline"] == baseline or not known:
                    continue
                if is_gain(max(known)):
                    span = f"{min(known):.2f} to {max(known):.2f}" if len(known) > 1 else f"{known[0]:.2f}"
                    gained.append(f"{label(row)} {span}")
                else:
                    lost.append(label(row))
            if gained or lost:
                parts = [f"x {compared_with(result)}: {', '.join(gained)}"] if gained else []
                parts += [f"no gain over {compared_with(result)}: {', '.join(lost)}"] if lost else []
                yield f"{model}, {words}: {'; '.join(parts)}."
