"""The steps around every format: refusals before any work, a folder that appears whole, and its verification."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from exporters.formats import FORMATS, load
from exporters.manifest import write_export_manifest
from exporters.reference import Reference, reference_of
from exporters.verification import failures, in_short, reference_for, verify
from mspc.errors import InputError, StorageError, VerificationError, unknown
from mspc.model.auto_class import is_multimodal
from mspc.model.hub import load_config
from mspc.model.vocabulary import check_tokenizer_of
from mspc.progress import Progress, Silent, log
from mspc.storage.artifact import ArtifactSource
from mspc.storage.manifest import EXPORT_MANIFEST
from mspc.storage.output_folder import is_empty, made_and_held, publish, recover, sibling
from mspc.types import PlannedMatrix


def export(
    artifact: Path,
    format_name: str,
    out: Path,
    *,
    overwrite: bool = False,
    verified: bool = True,
    keep_reference: bool = False,
    options: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write `artifact` in a format of `FORMATS` to the folder `out`, which appears when it is whole and verified.

    With `keep_reference`, the logits that `verify` compares with without the artifact are kept next to `out`.
    Raises InputError for an unknown format or option, for what the format cannot hold, and for an existing
    output. Raises VerificationError when the export does not hold or compute the same as the artifact.
    """
    progress = progress or Silent()
    source = ArtifactSource(artifact)
    config = json.loads((artifact / "config.json").read_text(encoding="utf-8"))
    chosen = check(format_name, [entry.planned for entry in source.entries], config, artifact, options or {})
    if keep_reference and not verified:
        raise InputError("--reference keeps what the verification computes. Leave --no-verify or --reference out.")
    _check_out(artifact, out, overwrite)
    source.check_files()
    for difference in check_tokenizer_of(artifact):
        log.warning(difference)
    replaced = out.is_dir() and not is_empty(out)
    reference = _write(source, artifact, format_name, chosen, out, verified, progress)
    if keep_reference or replaced:
        _keep(reference if keep_reference else None, reference_of(out))
    return out


def _keep(reference: Reference | None, path: Path) -> None:
    """Write the reference next to a finished export, or remove that of an older one. Raises StorageError."""
    try:
        if reference is not None:
            reference.save(path)
        elif path.is_file():  # or a folder that is read-only would be touched
            path.unlink()
    except (OSError, StorageError) as error:
        raise StorageError(
            f"The export is complete, but {path} next to it cannot be changed ({error.__cause__ or error}). Verify it "
            "with --against ARTIFACT."
        ) from error


def _write(
    source: ArtifactSource, artifact: Path, format_name: str, options: Any, out: Path, verified: bool,
    progress: Progress,
) -> Reference | None:  # fmt: skip
    """Write the folder next to its place, verify it, and put it there; returns the results of the artifact."""
    module, partial = load(format_name), sibling(out, "new")
    with made_and_held(partial):
        for path in partial.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            with progress.stage(f"Exporting {format_name}", len(source.keys())) as step:
                module.export(source, partial, options, step)
            for note in module.notes(source.entries, options):
                log.warning(note)
            write_export_manifest(partial, format_name, options, source)
            reference = reference_for(artifact, progress) if verified else None
            if reference is not None:
                _verify(partial, artifact, reference, progress)
            else:
                log.warning(f"{out} was not verified; `mspc verify {out} --against {artifact}` does that any time.")
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        publish(partial, out)
    return reference


def check(
    format_name: str,
    matrices: Sequence[PlannedMatrix],
    config: dict[str, Any],
    folder: Path,
    options: dict[str, Any] | None = None,
) -> Any:
    """The format's `Options`, if it can hold such matrices, and the model and tokenizer of the folder.

    Raises InputError, naming what it accepts.
    """
    module = load(format_name)
    chosen = _options(module, format_name, options or {})
    for matrix in matrices:
        if matrix.name.endswith("]") and not FORMATS[format_name].holds_slices:
            raise InputError(
                f"{matrix.name}: {format_name} cannot hold one slice of a parameter; export dense, or leave it out "
                "with --skip."
            )
    if not FORMATS[format_name].holds_slices and is_multimodal(load_config(folder)):
        raise InputError(
            f"{folder} sees or hears, and {format_name} would hold its language model alone; export dense or sparse."
        )
    module.check(matrices, config, chosen, folder)
    return chosen


def _options(module: ModuleType, format_name: str, values: dict[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(module.Options)}
    for name in values:
        if name not in known:
            if not known:
                raise InputError(f"{format_name} has no option --{name.replace('_', '-')}; it has none at all.")
            raise unknown(f"option of {format_name}", name, known)
    return module.Options(**values)


def _check_out(artifact: Path, out: Path, overwrite: bool) -> None:
    if out.resolve() == artifact.resolve():
        raise InputError(f"--out {out} is the artifact itself; choose another folder.")
    recover(out)
    if out.exists() and (not out.is_dir() or not is_empty(out)):
        if not (out / EXPORT_MANIFEST).is_file():
            raise InputError(f"{out} is not empty and was not exported by mspc; choose another --out.")
        if not overwrite:
            raise InputError(f"{out} holds an older export; choose another --out, or --overwrite it.")


def _verify(folder: Path, artifact: Path, reference: Reference, progress: Progress) -> None:
    result = verify(folder, artifact, progress, reference)
    if found := failures(result):
        raise VerificationError(f"The export is wrong and was not kept: {in_short(found)}.")
    if not any(found["status"] == "verified" for found in result["runtimes"].values()):
        log.warning("The weights were read back and are right, but no runtime has run this export.")
