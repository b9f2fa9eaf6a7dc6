"""What an export says of itself, in `mspc_export.json`: format, options, the digest of every file, and the matrices.

Written last, so a folder that has it is whole. `verify` needs nothing else to tell what the files must hold.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mspc.errors import InputError
from mspc.storage.artifact import EXPORT_RECORD, ArtifactSource
from mspc.storage.files import sha256_of, write_json
from mspc.version import __version__

NAME = EXPORT_RECORD
FORMAT_VERSION = 1
ROW_KEYS = ("name", "parameter", "tensor", "index", "transposed", "shape", "dtype", "sha256", "pattern", "sparsity",
            "bits", "group_size", "symmetric", "pruned", "zeros")  # fmt: skip


def write_record(out: Path, format_name: str, options: Any, artifact: ArtifactSource) -> None:
    # A README is there to be edited.
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.suffix != ".md")
    manifest = artifact.manifest
    record = {
        "format_version": FORMAT_VERSION,
        "mspc_version": __version__,
        "format": format_name,
        "options": asdict(options),
        "source": manifest["source"]["name"],
        "sparsity": manifest["sparsity"]["achieved"],
        "files": {str(path.relative_to(out)): sha256_of(path) for path in files},
        "matrices": [{key: row[key] for key in ROW_KEYS if key in row} for row in manifest["matrices"]],
    }
    write_json(out / NAME, record)


def read_record(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    if not path.is_file():
        raise InputError(f"{folder} is not an export of mspc, or not a whole one: it has no {NAME}.")
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = record["format_version"]
        missing = {"format", "options", "files", "matrices"} - record.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read ({error!r}); export again.") from error
    if missing:
        raise InputError(f"{path} lacks {', '.join(sorted(missing))}; export again.")
    if version > FORMAT_VERSION:
        raise InputError(
            f"{folder} was exported in version {version}; this mspc reads up to {FORMAT_VERSION}: upgrade."
        )
    return record


def is_export(folder: Path) -> bool:
    return (folder / NAME).is_file()
