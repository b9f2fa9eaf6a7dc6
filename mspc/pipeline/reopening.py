"""Reopening a finished artifact, so that `--resume --recover` can train what a run without it left."""

import json
import shutil
from pathlib import Path
from typing import Any

from mspc.pipeline.stopwatch import SECONDS
from mspc.storage.artifact import EXPORTS, MEASUREMENTS, PAGE, PLAN, REPORT
from mspc.storage.files import sha256_of, write_json
from mspc.storage.journal import Journal
from mspc.storage.manifest import MANIFEST, read_manifest

RECOVERY = ("recover", "recover_lr")


def reopened(folder: Path, header: dict[str, Any]) -> bool:
    """Make a finished artifact unfinished if only the recovery is missing that `header` asks for; tell if that was so.

    Raises InputError if anything else differs. What was said or exported of the artifact before is removed.
    """
    manifest = read_manifest(folder)
    settings = header["settings"]
    if "recover" not in settings or "recover" in manifest["settings"]:
        return False
    without = {name: value for name, value in settings.items() if name not in RECOVERY}
    Journal.compare(folder, manifest, header | {"settings": without})
    seconds = {"seconds": manifest["seconds"], "stages": manifest["seconds_by_stage"]}
    write_json(folder / MEASUREMENTS / SECONDS, seconds)
    Journal(folder, json.loads(json.dumps(header)), _entries(folder, manifest))
    for name in (PAGE, REPORT):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / EXPORTS, ignore_errors=True)
    (folder / MANIFEST).unlink()  # last: until then, the artifact is whole
    return True


def _entries(folder: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The commits of the run that wrote a manifest."""
    plan = {"file": PLAN, "sha256": sha256_of(folder / PLAN), "matrices": [], "allocation": manifest["allocation"]}
    by_file: dict[str, list[dict[str, Any]]] = {}
    for row in manifest["matrices"]:
        by_file.setdefault(row["file"], []).append(row)
    blocks = [
        {"block": int(Path(file).stem), "file": file, "sha256": manifest["files"][file], "matrices": rows}
        for file, rows in by_file.items()
    ]
    if "reconstruction" in manifest:
        for block in blocks:
            block["reconstruction"] = manifest["reconstruction"] if block is blocks[0] else []
    return [plan, *blocks]
