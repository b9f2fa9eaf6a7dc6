"""Resuming a finished artifact: it is complete, or `--resume --recover` trains what a run without it left."""

import json
import shutil
from pathlib import Path
from typing import Any

from mspc.pipeline.stopwatch import SECONDS
from mspc.progress import log
from mspc.storage.artifact import EXPORTS, MATRICES, MEASUREMENTS, OWN_TEXT, PAGE, PLAN, REPORT
from mspc.storage.files import sha256_of, write_json
from mspc.storage.journal import Journal
from mspc.storage.manifest import MANIFEST, read_manifest
from mspc.storage.output_folder import publish

RECOVERY = ("recover", "recover_lr")


def is_finished(folder: Path, out: Path, header: dict[str, Any]) -> bool:
    """Resume a folder that is complete, if it is. Raises InputError if it is that of another run."""
    if not (folder / MANIFEST).is_file() or reopened(folder, header):
        return False
    manifest = read_manifest(folder)
    Journal.compare(folder, manifest, header)
    discard_work(folder, manifest)
    publish(folder, out)
    log.info(f"{out} is complete already.")
    return True


def discard_work(folder: Path, manifest: dict[str, Any]) -> None:
    """Remove what only an unfinished run needs, matrices before they were recovered too."""
    for path in (folder / MATRICES).glob("*.safetensors"):
        if f"{MATRICES}/{path.name}" not in manifest["files"]:
            path.unlink()
    for name in (MEASUREMENTS, OWN_TEXT):
        shutil.rmtree(folder / name, ignore_errors=True)
    Journal.discard(folder)


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
    how = manifest["allocation"] | ({"time": manifest["time"]} if "time" in manifest else {})
    plan = {"file": PLAN, "sha256": sha256_of(folder / PLAN), "matrices": [], "allocation": how}
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
