"""Proof that an export holds and computes what the artifact does, in three independent steps.

1. The bytes of every file are those that were written.
2. Every matrix, read back by code that shares nothing with the packer, equals the canonical one exactly; its zeros and
   the groups of its N:M pattern are counted.
3. Every runtime that the format is made for loads the folder; its logits on fixed tokens are within the tolerance of
   its arithmetic, and its greedy tokens are the same up to the first that is too close to call.

A runtime is `verified`, `unsupported` (it rules the format out, with the reason), `not installed` (with the remedy), or
it is a `mismatch` or has `failed`; only the last two, and any wrong weight, are failures.
"""

import hashlib
import importlib.metadata
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from exporters import runtimes
from exporters.formats import FORMATS
from exporters.reading import Decoded, reader_of
from exporters.record import NAME as RECORD
from exporters.record import read_record
from exporters.reference import Reference, compute_reference, load_reference
from mspc.errors import InputError, MspcError
from mspc.progress import Reporter
from mspc.storage.artifact import REPORT, ArtifactSource
from mspc.storage.files import sha256_of, write_json
from mspc.types import CompressedLinear

# What reading a damaged export comes to: readers do not look twice.
UNREADABLE = (MspcError, OSError, LookupError, TypeError, ValueError)
PACKAGES = ("torch", "transformers", "safetensors", "numpy")


def verify(folder: Path, against: Path | None, reporter: Reporter) -> dict[str, Any]:
    """The report, which is also written to `verification.json`.

    Without `against`, matrices are compared with the digests in the export's record, and logits with those that the
    artifact had when it was exported. Raises InputError for a folder that is no export, or one of another artifact.
    """
    record = read_record(folder)
    artifact = ArtifactSource(against, exact=True) if against else None
    if artifact:
        _check_origin(folder, record, artifact)
    if against:
        with reporter.stage("Reference logits", 1) as step:
            reference = compute_reference(against)
            step("")
        reference.save(folder)
    else:
        reference = load_reference(folder)
    report = {
        "format": record["format"],
        "against": "artifact" if against else "record",
        "files": _check_files(folder, record),
        "weights": _check_weights(folder, record, artifact, reporter),
        "runtimes": {},
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    for name in FORMATS[record["format"]].runtimes:
        with reporter.stage(f"Verifying in {name}", 1) as step:
            report["runtimes"][name] = result = check_runtime(name, folder, record, reference)
            step(result["status"])
        reporter.say(f"{name}: {in_words(result)}")
    write_json(folder / REPORT, report)
    return report


def _check_origin(folder: Path, record: dict[str, Any], artifact: ArtifactSource) -> None:
    of_artifact = {row["name"]: row["sha256"] for row in artifact.manifest["matrices"]}
    differ = [row["name"] for row in record["matrices"] if of_artifact.get(row["name"]) != row["sha256"]]
    if differ:
        raise InputError(
            f"{folder} was not exported from {artifact.folder}: {len(differ)} of {len(record['matrices'])} matrices "
            f"are others there, such as {differ[0]}. Give the artifact that it came from, or leave --against out."
        )
    artifact.check_files()  # or the export would be blamed


def failures(report: dict[str, Any]) -> list[str]:
    """What is wrong, in words; empty when the export is right."""
    wrong = [*report["files"]["wrong"], *report["weights"]["wrong"]]
    for name, result in report["runtimes"].items():
        if result["status"] in ("mismatch", "failed"):
            wrong.append(f"{name}: {result['reason']}")
    return wrong


def in_short(found: list[str]) -> str:
    """The first few failures, and how many more there are."""
    shown = "; ".join(found[:3])
    return shown if len(found) <= 3 else f"{shown}; and {len(found) - 3} more (see {REPORT})"


def _check_files(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    wrong = []
    for name, digest in record["files"].items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{folder / RECORD} points outside its folder, at {name!r}; do not use this export.")
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif sha256_of(path) != digest:
            wrong.append(f"{name} does not have the bytes that were written")
    return {"checked": len(record["files"]), "wrong": wrong}


def _check_weights(
    folder: Path, record: dict[str, Any], artifact: ArtifactSource | None, reporter: Reporter
) -> dict[str, Any]:
    wrong, zeros = [], 0
    rows = {row["name"]: row for row in artifact.manifest["matrices"]} if artifact else {}
    try:
        read = reader_of(record["format"], folder)
    except UNREADABLE as error:
        return {"matrices": 0, "zeros": 0, "wrong": [f"the weights cannot be read back ({error!r})"]}
    with reporter.stage("Reading weights back", len(record["matrices"])) as step:
        for row in record["matrices"]:
            canonical = artifact.matrix(rows[row["name"]]) if artifact else None
            try:
                decoded = read(row)
                difference = difference_of(row, decoded, canonical)
            except UNREADABLE as error:
                difference = f"it cannot be read back ({error!r})"
            if difference:
                wrong.append(f"{row['name']}: {difference}")
            else:
                zeros += int((decoded.weight == 0).sum())
            step(row["name"])
    return {"matrices": len(record["matrices"]), "zeros": zeros, "wrong": wrong}


def difference_of(row: dict[str, Any], decoded: Decoded, canonical: CompressedLinear | None) -> str | None:
    """How a matrix read back differs from the canonical one, or from its row of the record when that is not at hand."""
    if decoded.weight.shape != tuple(row["shape"]):
        return f"it has shape {decoded.weight.shape} instead of {tuple(row['shape'])}"
    nonzero = decoded.weight != 0
    if int((~nonzero).sum()) < row["pruned"]:
        return f"it has {int((~nonzero).sum()):,} zeros, and {row['pruned']:,} weights were pruned"
    if row["pattern"] != "unstructured":
        keep, of = map(int, row["pattern"].split(":"))
        fullest = int(nonzero.reshape(-1, of).sum(1).max())
        if fullest > keep:
            return f"{fullest} weights of one group of {of} are not zero, and its pattern is {row['pattern']}"
    if canonical is None:
        return _digest_difference(row, decoded)
    if decoded.codes is None:
        expected = canonical.weight.to(getattr(torch, decoded.dtype)).float().numpy()
        return _first_difference("weights", decoded.weight, expected)
    assert canonical.codes is not None
    pairs = (
        ("codes", decoded.codes, canonical.codes.values),
        ("scales", decoded.scales, canonical.codes.scales),
        ("zero points", decoded.zeros, canonical.codes.zeros),
    )
    return next(
        (text for what, a, b in pairs if a is not None and (text := _first_difference(what, a, b.numpy()))), None
    )


def _first_difference(what: str, found: NDArray[Any], expected: NDArray[Any]) -> str | None:
    if found.shape != expected.shape:
        return f"its {what} have shape {found.shape} instead of {expected.shape}"
    differs = found != expected
    if not differs.any():
        return None
    at = tuple(int(i) for i in np.argwhere(differs)[0])
    return (
        f"{int(differs.sum()):,} of {differs.size:,} {what} differ, the first at {at}: {found[at]} instead of "
        f"{expected[at]}"
    )


def _digest_difference(row: dict[str, Any], decoded: Decoded) -> str | None:
    if decoded.codes is not None:
        parts = [decoded.codes, decoded.scales, decoded.zeros]
    elif row["bits"] == 16 and decoded.dtype in (row["dtype"], "float32"):
        weight = torch.from_numpy(decoded.weight)
        stored = weight.to(getattr(torch, row["dtype"]))
        if not stored.float().equal(weight):
            return f"it has values that {row['dtype']} does not have"
        parts = [stored.flatten().view(torch.uint8).numpy()]
    else:
        return None  # rounded once more on the way: only the artifact can tell
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(np.ascontiguousarray(part).tobytes())
    return (
        None if sha256.hexdigest() == row["sha256"] else "what was read back does not have the digest of the artifact"
    )


def check_runtime(name: str, folder: Path, record: dict[str, Any], reference: Reference) -> dict[str, Any]:
    """One runtime's result: its status, and the numbers or the reason."""
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # banners and pages of settings, from some
            runner = runtimes.load(name, folder, record)
            logits = runner.logits(reference.ids)
            tokens = runner.generate(reference.prompt, len(reference.tokens))
    except runtimes.Unsupported as limit:
        return {"status": "unsupported", "reason": str(limit)}
    except ModuleNotFoundError as missing:
        return {"status": "not installed", "reason": f"{missing.name} is missing: {runtimes.RUNTIMES[name].install}"}
    except Exception as raised:  # whatever a runtime raises is what its user would meet
        return {"status": "failed", "reason": f"{type(raised).__name__}: {raised}"}
    expected = reference.logits
    result: dict[str, Any] = {"status": "verified", "version": runner.version, "tolerance": runner.tolerance}
    if logits.shape != expected.shape:
        return result | {"status": "mismatch", "reason": f"its logits have shape {logits.shape}, not {expected.shape}"}
    error = float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))
    compared = comparable_tokens(reference, float(np.abs(logits - expected).max()))
    equal = np.cumprod(np.array(tokens) == reference.tokens).sum() if len(tokens) == len(reference.tokens) else 0
    result |= {"relative_error": error, "greedy_tokens_compared": compared, "greedy_tokens_equal": int(equal)}
    result["greedy_tokens"] = tokens
    if not error <= runner.tolerance:
        return result | {
            "status": "mismatch",
            "reason": f"logits are off by {error:.2g}, more than {runner.tolerance:g}",
        }
    if equal < compared:
        return result | {
            "status": "mismatch",
            "reason": f"greedy tokens {tokens[:compared]} differ from the artifact's",
        }
    return result


def in_words(result: dict[str, Any]) -> str:
    if result["status"] != "verified":
        return f"{result['status']} ({result['reason']})"
    error, tokens = result["relative_error"], result["greedy_tokens_equal"]
    rest = ", the next too close to call" if tokens < len(result["greedy_tokens"]) else ""
    return f"verified, relative error {error:.1e}, the first {tokens} greedy tokens equal{rest}"


def comparable_tokens(reference: Reference, error: float) -> int:
    """How many greedy tokens come before the first whose lead over the second choice such an error could turn over.

    `error` is the largest seen on the fixed tokens; twice it moves a lead, and other tokens may see twice as much.
    """
    close = np.flatnonzero(reference.margins <= 4 * error)
    return int(close[0]) if len(close) else len(reference.margins)
