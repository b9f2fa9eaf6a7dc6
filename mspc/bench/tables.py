"""A result of the bench in tables and words. A format that is no faster than the baseline is called no gain."""

from collections.abc import Iterator
from statistics import median
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
        yield from _beside(model, rows, result)
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
    rate, of_rate = _bandwidth(rows)
    headings = (
        "ms a token, 10%..90%",
        "tokens/s",
        "GB/s",
        of_rate,
        "bytes alone, ms",
        f"x {compared_with(result)}",
        *_perplexity_heading(rows),
    )
    table = _titled(f"{model}: decoding", result, "context", "batch", "format", *headings)
    for first in rows[0]["decode"]:
        for row, step in _same(rows, "decode", first):
            table.add_row(
                str(step["context"]),
                str(step["batch"]),
                label(row),
                milliseconds(step["seconds"]),
                f"{step['tokens_per_second']['median']:,.1f}",
                f"{step['bytes_per_second']['median'] / 1e9:,.1f}",
                f"{step[rate]:.0%}",
                f"{step['predicted_seconds'] * 1e3:.3f}",
                gain(row, step, baseline),
                *_perplexity_cell(row, rows),
            )
    return table


def _bandwidth(rows: list[dict[str, Any]]) -> tuple[str, str]:
    """The share of a bandwidth that a table shows, and its heading: read where that was measured."""
    is_read = all(step.get("share_of_read") is not None for row in rows for step in row["decode"])
    return ("share_of_read", "of read") if is_read else ("share_of_copy", "of copy")


def _same(
    rows: list[dict[str, Any]], stage: str, first: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The rows that have a step of the same sizes, with it."""
    sizes = [size for size in ("batch", "context", "tokens") if size in first]
    for row in rows:
        yield from ((row, step) for step in row[stage] if all(step[size] == first[size] for size in sizes))


def _beside(model: str, rows: list[dict[str, Any]], result: dict[str, Any]) -> Iterator[Table]:
    """Speeds relative to other engines, at the sizes that these have."""
    peers = [row["name"] for row in rows if row.get("peer")]  # older results do not say
    for stage, words, columns in (
        ("decode", "decoding", ("context", "batch")),
        ("prefill", "prefill", ("tokens",)),
    ):
        firsts: list[dict[str, Any]] = next((row[stage] for row in rows if row.get("peer")), [])
        if not firsts:
            continue
        table = _titled(f"{model}: {words}, times as fast as", result, *columns, "format", *peers)
        for first in firsts:
            for row, step in _same(rows, stage, first):
                if not row.get("peer"):
                    sizes = [str(step[column]) for column in columns]
                    table.add_row(*sizes, label(row), *(gain(row, step, peer) for peer in peers))
        yield table


def _prefill(model: str, rows: list[dict[str, Any]], result: dict[str, Any]) -> Table:
    baseline = result["configuration"]["baseline"]
    headings = ("ms to first token, 10%..90%", "tokens/s", "bytes and products alone, ms", f"x {compared_with(result)}")
    table = _titled(f"{model}: prefill", result, "prompt", "format", *headings)
    for first in rows[0]["prefill"]:
        for row, step in _same(rows, "prefill", first):
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
    return (
        str(row["name"]) if row["random_weights"] or row.get("peer") else f"{row['name']} ({row['format']}{recovered})"
    )


def milliseconds(seconds: dict[str, float]) -> str:
    return f"{seconds['median'] * 1e3:.3f} {seconds['p10'] * 1e3:.3f}..{seconds['p90'] * 1e3:.3f}"


def gain(row: dict[str, Any], step: dict[str, Any], baseline: str) -> str:
    """Speed of a step divided by that of a baseline or another engine, in words."""
    if baseline in (row["baseline"], row["name"]):
        return "1"
    ratio = _ratio(step, baseline)
    if ratio is None:
        return "-"
    words = f"{ratio['median']:.2f} {ratio['p10']:.2f}..{ratio['p90']:.2f}"
    return words if is_gain(ratio) else f"{words} no gain"


def _ratio(step: dict[str, Any], baseline: str) -> dict[str, float] | None:
    """The spread of a speedup. Older results have its median only."""
    if baseline not in step["speedup"]:
        return None
    spreads = step.get("speedup_spread", {})
    return spreads.get(baseline) or dict.fromkeys(("p10", "median", "p90"), step["speedup"][baseline])


def is_gain(ratio: dict[str, float]) -> bool:
    """Tell if a speedup is above 1 outside the noise: its 10th percentile, in the two decimals that are shown."""
    return round(ratio["p10"], 2) > 1


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
    slowed = [
        step["seconds"]["median"] / step["processor_seconds"]["median"]
        for row in result["rows"]
        for step in row["decode"]
        if step.get("processor_seconds")
    ]
    if slowed and median(slowed) > BUSY:
        yield (
            f"Other processes ran: tokens took x{median(slowed):.2f} of their time of the processor. Long steps are "
            "disturbed more than short ones, so ratios need an idle machine."
        )
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
                ratios = [_ratio(step, baseline) for step in row[stage]]
                known = [ratio for ratio in ratios if ratio is not None]
                if row["baseline"] == baseline or not known:
                    continue
                if any(is_gain(ratio) for ratio in known):
                    medians = [ratio["median"] for ratio in known]
                    span = f"{min(medians):.2f} to {max(medians):.2f}" if len(known) > 1 else f"{medians[0]:.2f}"
                    gained.append(f"{label(row)} {span}")
                else:
                    lost.append(label(row))
            if gained or lost:
                parts = [f"x {compared_with(result)}: {', '.join(gained)}"] if gained else []
                parts += [f"no gain over {compared_with(result)}: {', '.join(lost)}"] if lost else []
                yield f"{model}, {words}: {'; '.join(parts)}."
