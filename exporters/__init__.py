"""Exporters: an artifact to the files that one kind of runtime loads. They pack what the solver decided, and no more.

Each format is one module with a function `export(artifact, out)` that fills an empty folder.
"""

import importlib
import json
import shutil
from pathlib import Path

from mspc.artifact import ArtifactSource, is_artifact
from mspc.errors import InputError, unknown
from mspc.output import publish, sibling

FORMATS = {"dense": "exporters.dense"}


def export(artifact: Path, format_name: str, out: Path, *, overwrite: bool = False) -> Path:
    """Write `artifact` in a format of `FORMATS` to the folder `out`, which appears when it is whole.

    Raises InputError for an unknown format and for an output that is there already.
    """
    if format_name not in FORMATS:
        raise unknown("format", format_name, FORMATS)
    source = ArtifactSource(artifact)
    if out.resolve() == artifact.resolve():
        raise InputError(f"--out {out} is the artifact itself; choose another folder.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not _is_export(out):
            raise InputError(f"{out} is not empty and was not exported by mspc; choose another --out.")
        if not overwrite:
            raise InputError(f"{out} holds an older export; choose another --out, or --overwrite it.")
    partial = sibling(out, "new")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    importlib.import_module(FORMATS[format_name]).export(source, partial)
    publish(partial, out)
    return out


def _is_export(folder: Path) -> bool:
    if is_artifact(folder):
        return False
    try:
        return "mspc" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
