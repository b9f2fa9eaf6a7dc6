"""The export manifest, `mspc_export.json`: format, options, the digest of every file, and the matrices.

It is written last, so a folder that has it is whole. `verify` needs nothing else to know what the files must hold.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mspc.errors import InputError
from mspc.storage.artifact import ArtifactSource
from mspc.storage.files import sha256_of, write_json
from mspc.storage.manifest import EXPORT_MANIFEST, MatrixEntry, is_recovered, read_entries
from mspc.version import __version__

FORMAT_VERSION = 1


@dataclass(frozen=True)
class ExportManifest:
    format: str
    options: dict[str, Any]
    files: dict[str, str]
    """The sha256 of every file, by its path in the folder."""
    entries: list[MatrixEntry]
    """Those of the artifact."""


def write_export_manifest(out: Path, format_name: str, options: Any, artifact: ArtifactSource) -> None:
    # A README may be edited.
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.suffix != ".md")
    values = {
        "format_version": FORMAT_VERSION,
        "mspc_version": __version__,
        "format": format_name,
        "options": asdict(options),
        "source": artifact.manifest["source"]["name"],
        "sparsity": artifact.manifest["sparsity"]["achieved"],
        "files": {str(path.relative_to(out)): sha256_of(path) for path in files},
        "matrices": [entry.to_row() for entry in artifact.entries],
    }
    results = ("settings", "bits_per_weight", "bytes", "evaluation", "time")  # for the card of an upload
    values |= {key: artifact.manifest[key] for key in results if key in artifact.manifest}
    if is_recovered(artifact.manifest):
        values["recovery"] = artifact.manifest["recovery"]
    write_json(out / EXPORT_MANIFEST, values)


def read_export_manifest(folder: Path) -> ExportManifest:
    """Raises InputError for a folder that is not a whole export, or whose export manifest is damaged."""
    path = folder / EXPORT_MANIFEST
    if not path.is_file():
        raise InputError(f"{folder} is not an export of mspc, or not a whole one: it has no {EXPORT_MANIFEST}.")
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = values["format_version"]
        missing = {"format", "options", "files", "matrices"} - values.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read ({error!r}); export again.") from error
    if missing:
        raise InputError(f"{path} lacks {', '.join(sorted(missing))}; export again.")
    if version > FORMAT_VERSION:
        raise InputError(
            f"{folder} was exported in version {version}; this mspc reads up to {FORMAT_VERSION}: upgrade."
        )
    return ExportManifest(values["format"], values["options"], values["files"], read_entries(values, path))
