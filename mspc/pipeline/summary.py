"""The manifest of an artifact in words and as a table."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from mspc.goals import budget_of
from mspc.progress import log
from mspc.settings import DEFAULT_BITS_PER_WEIGHT, DEFAULT_OUTER_BITS, fixed_pattern
from mspc.sizes import in_words
from mspc.storage.manifest import is_recovered
from mspc.types import UNQUANTIZED_BITS

HURT = 0.5
"""KL divergence from the dense model, in nats per token, above which a model is called badly hurt."""
DEFAULT_GOAL = (
    f"No goal was given: {DEFAULT_BITS_PER_WEIGHT:g} bits per weight, the size of int4 with groups of 64, spent where "
    f"it lowers the loss most, and {DEFAULT_OUTER_BITS} bits for head and embeddings. Choose another with "
    "--bits-per-weight, --target-size, --sparsity, --pattern or --bits."
)
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
    return line + " Recovered after one-shot compression." * is_recovered(manifest)


def time_line(found: Mapping[str, Any]) -> str:
    """The part `time` of a manifest in words."""
    return (
        f"Time: {found['predicted_ms']:.3g} ms a token predicted for {found['threads']} of the threads of "
        f"{found['device']} (batch {found['batch']}, context {found['context']}): matrices {found['matrices_ms']:.3g}, "
        f"head {found['head_ms']:.3g}, all else {found['rest_ms']:.3g}. That is {found['speedup']:.2f} times the speed "
        f"of bfloat16 there ({found['bfloat16_ms']:.3g} ms, by {found['bfloat16_by']}). `mspc bench` measures it."
    )


def recovery_line(found: Mapping[str, Any]) -> str:
    """The part `recovery` of a manifest in words."""
    before, after = (number(found[f"divergence_{when}"]) for when in ("before", "after"))
    if not found["best_step"]:
        return (
            f"Recovery: none of {found['steps']} steps brought the model nearer to the dense one than one-shot, whose "
            f"KL on validation text is {before} nats per token. All weights stay as they were."
        )
    return (
        f"Recovery: KL from the dense model {before} one-shot and {after} recovered, nats per token, on "
        f"{found['validation_tokens']:,} tokens of validation text. Step {found['best_step']} of {found['steps']} was "
        f"the best, trained on {found['tokens']:,} tokens of {found['text']}."
    )


def unused_note(names: Sequence[str]) -> str:
    """A note about the tensors of a checkpoint that are no part of its model, such as an adapter."""
    shown, one = ", ".join(names[:3]), len(names) == 1
    note = f"{len(names):,} tensor{'' if one else 's'} of the checkpoint, such as {shown}, belong{'s' * one} to no "
    note += f"parameter of the model and change{'s' * one} nothing."
    return note + " Merge the adapter first (merge_and_unload of peft)." * any("lora_" in name for name in names)


def report(manifest: Mapping[str, Any]) -> None:
    """Log what the compression cost, and loudly if it cost too much."""
    for line in cost_lines(manifest):
        log.info(line)
    if said := hurt_line(manifest):
        log.error(said)


def cost_lines(manifest: Mapping[str, Any]) -> list[str]:
    """The cost in predictions, bytes and seconds, a line each, as far as the manifest has it."""
    lines = [time_line(found)] if (found := manifest.get("time")) else []
    if found := manifest.get("recovery"):
        lines.append(recovery_line(found))
    if found := manifest.get("evaluation"):
        before, after, kl = (mean_in_words(found[key]) for key in ("dense_perplexity", "perplexity", "divergence"))
        lines.append(
            f"Cost: perplexity {before} before, {after} after; KL from the dense model {kl} nats per token "
            f"({found['windows']} windows of {found['sequence_length']} tokens of {found['text']} that neither "
            "calibrated nor chose the plan; 95% intervals over windows)."
        )
        lines += outer_lines(found.get("outer", ()), manifest.get("outer", ()))
    if sizes := manifest.get("bytes"):
        dense, sparse, embeddings = sizes["dense"], sizes["sparse_export"], sizes["embeddings"]
        factor = f"{dense / sparse:.1f} times smaller" if sparse < dense else "not smaller"
        lines.append(
            f"Size: weights of {in_words(dense)} before and {in_words(sparse)} as the sparse export, "
            f"{factor}. Embeddings and head, which are {outer_in_words(manifest.get('outer', ()))}, are "
            f"{in_words(embeddings)} of it ({embeddings / sparse:.0%}). This folder has "
            f"{in_words(sizes['artifact'])} of weights, {in_words(sizes['folder'])} in all, exports aside."
        )
    if stages := manifest.get("seconds_by_stage"):
        rest = max(manifest["seconds"] - sum(stages.values()), 0.0)
        each = ", ".join(f"{name.lower()} {seconds:.1f}" for name, seconds in (stages | {"the rest": rest}).items())
        lines.append(f"Seconds: {each}; {manifest['seconds']:.1f} in all.")
    return lines


def outer_lines(steps: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The cost of quantizing the head and the embeddings, a line each; `steps` is the part of the evaluation."""
    lines = []
    for before, after in pairwise(steps):
        role = after["quantized"][-1]
        bits = next(row["bits"] for row in rows if row["role"] == role or "tied" in row)
        costs = [[number(one[what]["mean"]) for one in (before, after)] for what in ("perplexity", "divergence")]
        (perplexity, after_it), (kl, kl_after) = costs
        lines.append(
            f"{role.capitalize()} in {bits} bits, on the same windows: perplexity {perplexity} before, {after_it} "
            f"after; KL from the dense model {kl} before, {kl_after} after."
        )
    return lines


def outer_in_words(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "not compressed"
    if any("tied" in row for row in rows):
        return f"one matrix in {rows[0]['bits']} bits"
    bits = {row["role"]: str(row["bits"]) for row in rows}
    return f"in {bits.get('embeddings', UNQUANTIZED_BITS)} and {bits.get('head', UNQUANTIZED_BITS)} bits"


def mean_in_words(found: Mapping[str, Any]) -> str:
    """A mean with its interval, from the manifest, where None stands for infinity."""
    mean, interval = found["mean"], found["interval"]
    return number(mean) + ("" if interval is None else f" ({number(interval[0])} to {number(interval[1])})")


def number(value: float | None) -> str:
    """Four digits, without an exponent where the value is neither very large nor very small."""
    if value is None or value == math.inf:
        return "inf"
    if value == 0 or not 1e-4 <= value < 1e9:
        return f"{value:.3g}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(value)))}f}"


def hurt_line(manifest: Mapping[str, Any]) -> str | None:
    """A warning that the model is badly hurt, with what would help, by the settings; None if it is not."""
    found = manifest.get("evaluation")
    divergence = None if found is None else found["divergence"]["mean"]
    if found is None or (divergence is not None and divergence <= HURT):
        return None
    asked = manifest["settings"]
    budget = budget_of(asked)
    helps = []
    if budget:
        larger = "a smaller" if budget == "speedup" else "a larger"
        helps.append(f"{larger} --{budget.replace('_', '-')} than {asked[budget]}")
    elif asked.get("keep_zeros"):  # the zeros were there before
        helps.append(f"more --bits than {asked['bits']}")
    elif "plan" not in asked:
        if asked["bits"] != UNQUANTIZED_BITS:
            helps.append(f"more --bits than {asked['bits']}")
        if fixed_pattern(asked["pattern"]) is not None:
            helps.append(f"a pattern that keeps more than {asked['pattern']}")
        elif manifest["sparsity"]["achieved"] > 0:
            helps.append(f"less --sparsity than {manifest['sparsity']['achieved']:.2g}")
        helps.append("--bits-per-weight, which mixes sparsity and bits, for the same size")
    else:
        helps.append("a plan with more bits and less sparsity")
    if asked["effort"] == "fast":
        helps.append("--effort default")
    helps.append("calibration text of the kind that the model is for (--calibration), and more of it (--num-sequences)")
    kl = number(divergence)
    return (
        f"the model is badly hurt: its KL from the dense model is {kl} nats per token, above {HURT}. It no longer says "
        f"what the dense model says. What helps: {'; '.join(helps)}."
    )


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
            "-" if row["output_error"] is None else f"{row['output_error']:.2e}",
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
