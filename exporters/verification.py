"""Proof that an export holds and computes what the artifact does, in three independent steps.

1. The bytes of every file are those that were written.
2. Every matrix, read back by code that shares nothing with the packer, equals that of the artifact exactly. Its zeros
   and the groups of its N:M pattern are counted.
3. Every runtime that the format is made for loads the folder; its logits on fixed tokens are within the tolerance of
   its arithmetic, and its greedy tokens are the same up to the first that is too close to call. The same is asked of
   the last logits of a sequence that exceeds the windows and original contexts of the config.

A runtime is `verified`, `unsupported` (it rules the format out, with the reason), `not installed` (with the remedy),
`not run` (without the artifact or its logits), or it is a `mismatch` or has `failed`; only the last two, and any wrong
weight, are failures.
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
from exporters.formats import runtimes_of
from exporters.manifest import ExportManifest, read_export_manifest
from exporters.reading import Decoded, reader_of
from exporters.reference import Reference, compute_reference, load_reference
from mspc.errors import InputError, MspcError
from mspc.model.vocabulary import check_tokenizer_of
from mspc.progress import Progress, log
from mspc.storage.artifact import REPORT, ArtifactSource
from mspc.storage.files import sha256_of, write_json
from mspc.storage.manifest import EXPORT_MANIFEST, MatrixEntry
from mspc.types import NM, CompressedLinear

# Errors of readers on a damaged export: they check nothing twice.
UNREADABLE = (MspcError, OSError, LookupError, TypeError, ValueError)
NO_REFERENCE = "the right logits are not here; give --against ARTIFACT, or export with --reference"
PACKAGES = ("torch", "transformers", "safetensors", "numpy")


def verify(
    folder: Path, against: Path | None, progress: Progress, reference: Reference | None = None, *, long: bool = False
) -> dict[str, Any]:
    """The report, which is also written to `verification.json`.

    Without `against`, matrices are compared with the digests in the export manifest, and logits with those that were
    kept at export; without them, no runtime is run. `reference` are the results of `against`, if they are known.
    With `long`, every window and original context is exceeded, however long it is. Raises InputError for a folder
    that is no export, or one of another artifact.
    """
    manifest = read_export_manifest(folder)
    for checked in (folder, against):
        if checked is not None:
            check_tokenizer_of(checked)
    artifact = ArtifactSource(against, exact=True) if against else None
    if artifact:
        _check_origin(folder, manifest, artifact)
    if reference is None:
        reference = reference_for(against, progress, long=long) if against else load_reference(folder, manifest.entries)
    if long and (reference is None or reference.missed):
        beyond = f" beyond {reference.missed}" if reference else ""
        raise InputError(f"{folder} has no logits of the artifact{beyond}: give --against ARTIFACT.")
    report: dict[str, Any] = {
        "format": manifest.format,
        "against": "artifact" if against else "export manifest",
        "files": _check_files(folder, manifest),
        "weights": _check_weights(folder, manifest, artifact, progress),
        "runtimes": {},
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    for name in runtimes_of(manifest.format):
        if reference is None:
            report["runtimes"][name] = {"status": "not run", "reason": NO_REFERENCE}
            continue
        with progress.stage(f"Verifying in {name}", 1) as step:
            report["runtimes"][name] = result = check_runtime(name, folder, manifest, reference)
            step(result["status"])
        log.info(f"{name}: {in_words(result)}")
    if reference is None:
        log.warning(f"Files and weights are checked. No runtime was run: {NO_REFERENCE}.")
    elif reference.missed:
        report["missed"] = reference.missed
        log.warning(f"Not reached: {reference.missed}; mspc verify --against ARTIFACT --long checks it.")
    if reference is not None and reference.beyond:
        report["beyond"] = {"tokens": reference.beyond.ids.shape[1], "exceeded": reference.beyond.exceeded}
    write_json(folder / REPORT, report)
    return report


def reference_for(artifact: Path, progress: Progress, *, long: bool = False) -> Reference:
    with progress.stage("Reference logits", 1) as step:
        reference = compute_reference(artifact, long=long)
        step("")
    return reference


def _check_origin(folder: Path, manifest: ExportManifest, artifact: ArtifactSource) -> None:
    digests = {entry.name: entry.digest for entry in artifact.entries}
    differ = [entry.name for entry in manifest.entries if digests.get(entry.name) != entry.digest]
    if differ:
        raise InputError(
            f"{folder} was not exported from {artifact.folder}: {len(differ)} of {len(manifest.entries)} matrices "
            f"are others there, such as {differ[0]}. Give the artifact that it came from, or leave --against out."
        )
    artifact.check_files()  # or the export would be blamed


def failures(report: dict[str, Any]) -> list[str]:
    """The faults that a report found, in words; empty when the export is right."""
    wrong = [*report["files"]["wrong"], *report["weights"]["wrong"]]
    for name, result in report["runtimes"].items():
        if result["status"] in ("mismatch", "failed"):
            wrong.append(f"{name}: {result['reason']}")
    return wrong


def in_short(found: list[str]) -> str:
    """The first few failures, and how many more there are."""
    shown = "; ".join(found[:3])
    return shown if len(found) <= 3 else f"{shown}; and {len(found) - 3} more (see {REPORT})"


def _check_files(folder: Path, manifest: ExportManifest) -> dict[str, Any]:
    wrong = []
    for name, digest in manifest.files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{folder / EXPORT_MANIFEST} points outside its folder, at {name!r}; do not use it.")
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif sha256_of(path) != digest:
            wrong.append(f"{name} does not have the bytes that were written")
    return {"checked": len(manifest.files), "wrong": wrong}


def _check_weights(
    folder: Path, manifest: ExportManifest, artifact: ArtifactSource | None, progress: Progress
) -> dict[str, Any]:
    wrong, zeros = [], 0
    try:
        read = reader_of(manifest.format, folder)
    except UNREADABLE as error:
        return {"matrices": 0, "zeros": 0, "wrong": [f"the weights cannot be read back ({error!r})"]}
    with progress.stage("Reading weights back", len(manifest.entries)) as step:
        for entry in artifact.entries if artifact else manifest.entries:
            expected = artifact.matrix(entry) if artifact else None
            try:
                decoded = read(entry)
                difference = difference_of(entry, decoded, expected)
            except UNREADABLE as error:
                difference = f"it cannot be read back ({error!r})"
            if difference:
                wrong.append(f"{entry.name}: {difference}")
            else:
                zeros += int((decoded.weight == 0).sum())
            step(entry.name)
    return {"matrices": len(manifest.entries), "zeros": zeros, "wrong": wrong}


def difference_of(entry: MatrixEntry, decoded: Decoded, expected: CompressedLinear | None) -> str | None:
    """The difference, in words, between a matrix that was read back and the expected one, or else its digest."""
    if decoded.weight.shape != entry.shape:
        return f"it has shape {decoded.weight.shape} instead of {entry.shape}"
    nonzero, pattern = decoded.weight != 0, entry.target.pattern
    if int((~nonzero).sum()) < entry.pruned:
        return f"it has {int((~nonzero).sum()):,} zeros, and {entry.pruned:,} weights were pruned"
    if isinstance(pattern, NM):
        fullest = int(nonzero.reshape(-1, pattern.of).sum(1).max())
        if fullest > pattern.keep:
            return f"{fullest} weights of one group of {pattern.of} are not zero, and its pattern is {pattern}"
    if expected is None:
        return _digest_difference(entry, decoded)
    if decoded.codes is None:
        weight = expected.weight.to(getattr(torch, decoded.dtype)).float().numpy()
        return _first_difference("weights", decoded.weight, weight)
    assert expected.codes is not None
    pairs = (
        ("codes", decoded.codes, expected.codes.values),
        ("scales", decoded.scales, expected.codes.scales),
        ("zero points", decoded.zeros, expected.codes.zeros),
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


def _digest_difference(entry: MatrixEntry, decoded: Decoded) -> str | None:
    if decoded.codes is not None:
        parts = [decoded.codes, decoded.scales, decoded.zeros]
    elif entry.target.grid is None and getattr(torch, decoded.dtype) in (entry.dtype, torch.float32):
        weight = torch.from_numpy(decoded.weight)
        stored = weight.to(entry.dtype)
        if not stored.float().equal(weight):
            return f"it has values that {entry.dtype} does not have"
        parts = [stored.flatten().view(torch.uint8).numpy()]
    else:
        return None  # cast on the way: only the artifact can tell
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(np.ascontiguousarray(part).tobytes())
    return None if sha256.hexdigest() == entry.digest else "its digest is not that of the artifact"


def check_runtime(name: str, folder: Path, manifest: ExportManifest, reference: Reference) -> dict[str, Any]:
    """One runtime's result: its status, and the numbers or the reason."""
    beyond, last = reference.beyond, None
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # banners and pages of settings, from some
            runner = runtimes.load(name, folder, manifest)
            logits = runner.logits(reference.ids)
            tokens = runner.generate(reference.prompt, len(reference.tokens))
            if beyond:  # after the others, since it may change the frequencies of dynamic rotary embeddings
                last = runner.last_logits(beyond.ids, beyond.decoded, beyond.logits.shape[1])
    except runtimes.Unsupported as limit:
        return {"status": "unsupported", "reason": str(limit)}
    except ModuleNotFoundError as missing:
        return {"status": "not installed", "reason": f"{missing.name} is missing: {runtimes.RUNTIMES[name].install}"}
    except Exception as raised:  # users of the runtime would meet the same error
        return {"status": "failed", "reason": f"{type(raised).__name__}: {raised}"}
    expected = reference.logits
    result: dict[str, Any] = {"status": "verified", "version": runner.version, "tolerance": runner.tolerance}
    if logits.shape != expected.shape:
        return result | {"status": "mismatch", "reason": f"its logits have shape {logits.shape}, not {expected.shape}"}
    error = _relative_error(logits, expected)
    compared = comparable_tokens(reference, float(np.abs(logits - expected).max()))
    equal = np.cumprod(np.array(tokens) == reference.tokens).sum() if len(tokens) == len(reference.tokens) else 0
    result |= {"relative_error": error, "greedy_tokens_compared": compared, "greedy_tokens_equal": int(equal)}
    result["greedy_tokens"] = tokens
    wrong = _excess(error, runner)
    if wrong is None and equal < compared:
        wrong = f"greedy tokens {tokens[:compared]} differ from the artifact's"
    if beyond and last is not None:
        if last.shape != beyond.logits.shape:
            wrong = wrong or f"its last logits have shape {last.shape}, not {beyond.logits.shape}"
        else:
            result["relative_error_beyond"] = error = _relative_error(last, beyond.logits)
            wrong = wrong or _excess(error, runner, f" beyond {beyond.exceeded}")
    return result if wrong is None else result | {"status": "mismatch", "reason": wrong}


def _relative_error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _excess(error: float, runner: runtimes.Runner, where: str = "") -> str | None:
    return (
        None if error <= runner.tolerance else f"logits{where} are off by {error:.2g}, more than {runner.tolerance:g}"
    )


def in_words(result: dict[str, Any]) -> str:
    if result["status"] != "verified":
        return f"{result['status']} ({result['reason']})"
    error, tokens = result["relative_error"], result["greedy_tokens_equal"]
    rest = ", the next too close to call" if tokens < len(result["greedy_tokens"]) else ""
    beyond = f", {result['relative_error_beyond']:.1e} beyond the limits" if "relative_error_beyond" in result else ""
    return f"verified, relative error {error:.1e}{beyond}, the first {tokens} greedy tokens equal{rest}"


def comparable_tokens(reference: Reference, error: float) -> int:
    """Number of greedy tokens before the first whose lead over the second choice such an error could reverse.

    `error` is the largest seen on the fixed tokens; twice it moves a lead, and other tokens may see twice as much.
    """
    close = np.flatnonzero(reference.margins <= 4 * error)
    return int(close[0]) if len(close) else len(reference.margins)
