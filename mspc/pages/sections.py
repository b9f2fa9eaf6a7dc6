"""The sections of a page: what was made of a model and how, what it cost, and several artifacts compared."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mspc.goals import budget_of
from mspc.pages import plots
from mspc.pages.heat import heat_maps
from mspc.pages.html import Html, element, joined, note, section, table
from mspc.pages.subject import Mean, Subject, interval_in_words, signed
from mspc.pipeline.summary import HEADINGS, hurt_line, matrix_rows, number, recovery_line, unused_note
from mspc.sizes import in_words
from mspc.storage.manifest import is_recovered

INTERVALS = (
    "Intervals are 95% t-intervals of the mean over windows, those of perplexities in log space. They treat windows as "
    "independent. Those of two perplexities may overlap where one model is clearly worse, because texts differ more "
    "than models do. The interval of the KL divergence does not have this problem."
)
NOT_EVALUATED = (
    "Not measured: the run was made without evaluation, or too little text was left. Give the dense model with "
    "--against to measure it now."
)


def artifact(subject: Subject, title: Html | None) -> Html:
    """All that the page says about one artifact, under a title unless the page has it already."""
    parts = (
        title, _lead(subject), _figures(subject), *_warnings(subject), _cost(subject),
        section("Where the bits went", heat_maps(subject)), _forecast(subject), _made(subject), _seconds(subject),
        _matrices(subject),
    )  # fmt: skip
    return element("article", *parts)


def _lead(subject: Subject) -> Html:
    manifest, settings = subject.manifest, subject.manifest["settings"]
    budget = budget_of({key: value for key, value in settings.items() if value is not None})
    asked = f"--{budget.replace('_', '-')} {settings[budget]}" if budget else None
    how = f"a budget ({asked})" if asked else f"pattern {settings['pattern']} and {settings['bits']} bits"
    if settings.get("plan") is not None:
        how = "a given plan"
    if settings.get("keep_zeros"):
        how = f"the zeros of the checkpoint and {settings['bits']} bits"
    made = "recovered" if is_recovered(manifest) else "one-shot"
    return element(
        "p", "Made from ", element("b", manifest["source"]["name"]), f" with {how}, effort {settings['effort']}: ",
        f"{len(subject.rows)} matrices, {manifest['sparsity']['achieved']:.2%} zeros, "
        f"{manifest['bits_per_weight']:.3f} bits per weight, {made}.", class_="lead",
    )  # fmt: skip


def _figures(subject: Subject) -> Html:
    """The numbers that a reader looks for first."""
    shown: list[tuple[str, str, str]] = []
    if sizes := subject.bytes:
        dense, small = sizes["dense"], sizes["sparse_export"]
        factor = f"{dense / small:.1f} times less than" if small < dense else "not less than"
        shown.append(("size of weights", in_words(small), f"{factor} {in_words(dense)}"))
    shown.append(("bits per weight", f"{subject.manifest['bits_per_weight']:.3f}", "embeddings and head not counted"))
    if found := subject.evaluation:
        before, after = found["dense_perplexity"], found["perplexity"]
        shown.append(("perplexity", number(after["mean"]), f"{number(before['mean'])} before"))
        kl = found["divergence"]
        shown.append(("KL from the dense model", number(kl["mean"]), interval_in_words(kl) or "nats per token"))
    cards = (
        element("div", element("dt", name), element("dd", value), element("dd", more, class_="more"))
        for name, value, more in shown
    )
    return element("dl", *cards, class_="figures")


def _warnings(subject: Subject) -> Iterator[Html]:
    said = [hurt_line({**subject.manifest, "evaluation": subject.evaluation})]
    if unused := subject.manifest.get("unused_tensors"):
        said.append(unused_note(unused))
    yield from (element("p", line[0].upper() + line[1:], class_="warning") for line in said if line)


def _cost(subject: Subject) -> Html:
    found = subject.evaluation
    parts: list[object] = []
    if found is None:
        parts.append(element("p", NOT_EVALUATED))
    else:
        named = (("perplexity before", "dense_perplexity"), ("perplexity after", "perplexity"),
                 ("KL from the dense model, nats per token", "divergence"))  # fmt: skip
        rows = [[name, number(found[key]["mean"]), interval_in_words(found[key])] for name, key in named]
        if subject.gap is not None:
            rows.append(["log-perplexity above dense, nats per token", signed(subject.gap), ""])
        parts += [table(("on test text", "mean", "95% interval"), rows), note(_text_line(found), " ", INTERVALS)]
    if sizes := subject.bytes:
        names = (("dense model", "dense"), ("sparse export", "sparse_export"), ("this artifact", "artifact"),
                 ("embeddings and head, in each of them", "embeddings"))  # fmt: skip
        rows = [[name, in_words(sizes[key]), f"{sizes[key] / sizes['dense']:.1%}"] for name, key in names]
        parts.append(table(("weights of the", "bytes", "of dense"), rows))
    return section("What it cost", *parts)


def _text_line(found: Mapping[str, Any]) -> str:
    digest = f", sha256 {found['sha256'][:12]}" if found.get("sha256") else ""
    origin = found.get("origin") or "They neither calibrated nor chose the plan; measured by compress."
    return (
        f"{found['tokens']:,} tokens, {found['windows']} windows of {found['sequence_length']} of {found['text']}"
        f"{digest}. {origin}"
    )


def _forecast(subject: Subject) -> Html | None:
    """The losses that were predicted, before and after the plan was chosen, compared with the measured one."""
    found: list[tuple[str, Mean]] = []
    if subject.predicted is not None:
        found.append(("predicted by loss curves", {"mean": subject.predicted, "interval": None}))
    if subject.validated is not None:
        found.append(("KL of the plan, validated", {"mean": subject.validated, "interval": None}))
    is_forecast = bool(found)
    if subject.evaluation and subject.evaluation["divergence"]["mean"] is not None:
        found.append(("KL measured", subject.evaluation["divergence"]))
    if subject.gap is not None:
        found.append(("log-perplexity above dense", {"mean": subject.gap, "interval": None}))
    if not is_forecast:
        return None
    parts: list[object] = [plots.forecast(found, subject.place)] if plots.is_installed() else []
    rows = [[name, signed(mean["mean"]), interval_in_words(mean)] for name, mean in found]
    parts.append(table(("nats per token", "loss", "95% interval"), rows))
    parts.append(note(
        "Loss curves predict each matrix alone, and the sum is theirs. Plans are validated with approximate weights "
        "on text used for nothing else. What is measured is the finished model on test text."
    ))  # fmt: skip
    tried = (subject.manifest.get("allocation") or {}).get("tried") or {}
    if len(tried) > 1:
        chosen = subject.manifest["allocation"]["chosen"]
        plans = [[name, number(kl), "chosen" if name == chosen else ""] for name, kl in tried.items()]
        parts.append(table(("plans that were compared", "KL on validation text", ""), plans))
    return section("Predicted and measured", *parts)


def _made(subject: Subject) -> Html:
    manifest = subject.manifest
    text, allocation, plan = manifest["calibration"], manifest.get("allocation") or {}, manifest.get("plan")
    digests = manifest["source"]["sha256"]
    begin = f", each window begins with token {text['bos'][0]}" if text.get("bos") else ""
    chosen = allocation.get("chosen")
    rows: list[tuple[str, object]] = [
        ("source", manifest["source"]["name"]),
        ("weights of the source, sha256", _lines(f"{file}: {sha}" for file, sha in digests.items())),
        ("asked for", _lines(f"{key} = {_value(value)}" for key, value in manifest["recipe"].items())),
        ("calibration text", f"{text['source']}, {text['tokens']:,} tokens{begin}"),
        ("calibration text, sha256", element("code", text["sha256"])),
        ("plan", f"given, sha256 {plan}" if plan else f"chosen: {chosen}" if chosen else "by the settings"),
        ("mspc", f"{manifest['mspc_version']}, format {manifest['format_version']}"),
        ("peak memory", in_words(manifest["peak_memory_bytes"])),
    ]  # fmt: skip
    if found := manifest.get("recovery"):
        rows.insert(-2, ("recovery", recovery_line(found)))
    if "threads" in manifest:
        rows.append(("threads", manifest["threads"]))
    settings = ((key, element("code", _value(value))) for key, value in manifest["settings"].items())
    details = element("details", element("summary", "All settings"), table(("setting", "value"), settings, left=2))
    return section("How it was made", table(("", ""), rows, left=2, class_="facts"), details)


def _lines(values: Iterator[str]) -> Html:
    lines = list(values)
    return joined(element("div", element("code", line)) for line in lines) if lines else Html("nothing")


def _value(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _seconds(subject: Subject) -> Html | None:
    stages = subject.manifest.get("seconds_by_stage")
    if not stages:
        return None
    whole = subject.manifest["seconds"]
    stages = {**stages, "The rest": max(whole - sum(stages.values()), 0.0)}
    longest = max(*stages.values(), 1e-9)
    rows = (
        (name, element("i", class_="bar", style=f"width:{100 * seconds / longest:.1f}%"), f"{seconds:,.1f}",
         f"{seconds / max(whole, 1e-9):.0%}")
        for name, seconds in stages.items()
    )  # fmt: skip
    total = ("in all", "", f"{whole:,.1f}", "")
    return section("Seconds", table(("stage", "", "seconds", "share"), [*rows, total], left=2, class_="bars"))


def _matrices(subject: Subject) -> Html:
    rows = matrix_rows(subject.manifest)
    return element("details", element("summary", f"All {len(rows)} matrices"), table(HEADINGS, rows))


def comparison(subjects: Sequence[Subject]) -> Html:
    """Several artifacts in a table, and the sizes and losses of those that were evaluated in a plot."""
    measured = [subject for subject in subjects if subject.evaluation and subject.bytes]
    rows = [[subject.place, *_row(subject)] for subject in subjects]
    dense = _dense(measured)
    if len({subject.text for subject in measured}) > 1:
        plot = note(
            "No plot: they were evaluated on different texts, so their losses cannot be compared. Give the dense model "
            "with --against, which measures all of them on the same text."
        )
    elif len(measured) < 2:
        plot = note(
            "No plot: fewer than two of them were evaluated. Give the dense model with --against to measure them now."
        )
    else:
        plot = (
            plots.frontier(measured, dense.evaluation if dense else None)
            if plots.is_installed()
            else note(plots.MISSING)
        )
    if dense:
        rows.insert(0, ["", *_dense_row(dense)])
    head = (
        *("", "artifact", "weights", "of dense", "bits per weight", "zeros", "perplexity", "KL from dense", "gap"),
        "seconds",
    )
    explained = note(
        "Weights are those of the sparse export, embeddings included. KL is in nats per token, and the gap is the "
        "log-perplexity above the dense model. The line joins those that no other beats in size and in loss."
    )
    return element("article", element("h2", "Compared"), plot, table(head, rows, left=2, class_="compared"), explained)


def _dense(measured: Sequence[Subject]) -> Subject | None:
    """An artifact that tells the perplexity of the dense model of all of them, if they have one."""
    models = {json.dumps([one.manifest["source"]["sha256"], one.text], default=str) for one in measured}
    return measured[0] if len(models) == 1 else None


def _dense_row(subject: Subject) -> list[object]:
    assert subject.bytes
    assert subject.evaluation
    before = number(subject.evaluation["dense_perplexity"]["mean"])
    return ["dense", in_words(subject.bytes["dense"]), "100.0%", "", "", before, "0", "0", ""]


def _row(subject: Subject) -> list[object]:
    sizes, found, manifest = subject.bytes, subject.evaluation, subject.manifest
    size = (in_words(sizes["sparse_export"]), f"{sizes['sparse_export'] / sizes['dense']:.1%}") if sizes else ("-", "-")
    means = [number(found[key]["mean"]) if found else "-" for key in ("perplexity", "divergence")]
    gap = "-" if subject.gap is None else signed(subject.gap)
    made = (f"{manifest['bits_per_weight']:.3f}", f"{manifest['sparsity']['achieved']:.1%}")
    name = subject.name + " (recovered)" * is_recovered(manifest)
    return [name, *size, *made, *means, gap, f"{manifest['seconds']:,.0f}"]
