"""Exporters: an artifact to the files that one kind of runtime loads. They pack what the solver decided, and no more.

Each format is one module with a function `export(artifact, out)` that fills an empty folder.
"""

import importlib
import shutil
from pathlib import Path

from mspc.artifact import ArtifactSource
from mspc.errors import InputError, unknown
from mspc.output import publish

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
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise InputError(f"{out} is not empty; choose another --out, or --overwrite it.")
    partial = out.with_name(f".{out.name}.new")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    importlib.import_module(FORMATS[format_name]).export(source, partial)
    publish(partial, out)
    return out
