"""Makers of the rows of quality_real.py: each turns a dense folder into another one, in processes of its own.

A maker returns what `measured` says of its processes, and in `size` how the bytes of the result are counted.
"""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environments import environment
from real_process import RowError, measured, version_of
from real_rows import Row

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Job:
    """The inputs that all rows of a model share."""

    reference: Path
    """The dense folder."""
    calibration: Path
    """Calibration documents, `.jsonl`."""
    tokens: Path
    """The calibration sequences cut out of them, `ids` (N, T) int64."""
    calibration_sha256: str
    """The digest of the ids."""
    num_sequences: int
    sequence_length: int
    group_size: int
    threads: int
    environments: Path
    """The folder of the environments of other tools."""
    shared: Path
    """The folder for what several rows of this model need."""


MADE = "made.json"
"""The name of the file that says what a row took, without judging it."""


def artifact_of(row: str, shared: Path) -> Path:
    """The folder of the artifact of a row that other rows continue, with `MADE` in its parent."""
    return shared / "kept" / row / "artifact"


def of_mspc(options: tuple[str, ...], out: Path, job: Job) -> dict[str, Any]:
    """`mspc compress`, which goes on from an artifact in `out`, then the dense export, whose seconds do not count."""
    artifact = out / "artifact"
    text = ["--calibration", job.calibration, "--num-sequences", job.num_sequences, "--seed", "0", "--no-eval"]
    machine = ["--sequence-length", job.sequence_length, "--device", "cpu", "--threads", job.threads]
    command = [sys.executable, "-m", "mspc", "compress", job.reference, "--out", artifact, *options, *text, *machine]
    found = measured([*command, "--resume"], job.threads, out / "compress.log")
    manifest = artifact / "mspc.json"
    digest = json.loads(manifest.read_text(encoding="utf-8"))["calibration"]["sha256"]
    if digest != job.calibration_sha256:
        raise RowError("mspc had other calibration tokens than the other tools.")
    found["size"] = {"kind": "manifest", "file": str(manifest)}
    dense = [sys.executable, "-m", "mspc", "export", artifact, "dense", "--out", out / "dense", "--no-verify"]
    measured(dense, job.threads, out / "export.log")
    return found | {"version": version_of(Path(sys.executable), "torch")}


def of_llamacpp(options: tuple[str, ...], out: Path, job: Job) -> dict[str, Any]:
    """One of ggml's types for every matrix, with an importance matrix that all types share."""
    python = environment(job.environments / "llamacpp", HERE / "llamacpp-requirements.txt")
    script = [sys.executable, HERE / "real_ggml.py"]
    importance = job.shared / "importance.safetensors"
    measuring: dict[str, Any] = {}
    if not importance.is_file():
        measuring = measured([*script, "importance", job.reference, job.tokens, importance], job.threads, out / "i.log")
    library = next(python.parents[1].glob("lib/python*/site-packages/xllamacpp/*.so"))
    command = [*script, "quantize", job.reference, importance, library, *options, out]
    found = measured(command, job.threads, out / "quantize.log")
    found = _together(found, measuring) if measuring else found
    found["size"] = {"kind": "written", "file": str(out / "bytes.json")}
    return found | {"version": version_of(python, "xllamacpp")}


def of_llmcompressor(options: tuple[str, ...], out: Path, job: Job) -> dict[str, Any]:
    python = environment(job.environments / "llmcompressor", HERE / "llmcompressor-requirements.txt")
    command = [python, HERE / "real_llmcompressor.py", *options, job.reference, job.tokens, out / "dense"]
    found = measured(command, job.threads, out / "llmcompressor.log")
    return found | {"size": _size(options), "version": version_of(python, "llmcompressor")}


def of_gptqmodel(options: tuple[str, ...], out: Path, job: Job) -> dict[str, Any]:
    """In the environment of mspc, whose extra `gptq` it is."""
    command = [sys.executable, HERE / "real_gptqmodel.py", *options, job.reference, job.tokens, out / "dense"]
    found = measured(command, job.threads, out / "gptqmodel.log")
    return found | {"size": _size(options), "version": version_of(Path(sys.executable), "gptqmodel")}


def of_autoround(options: tuple[str, ...], out: Path, job: Job) -> dict[str, Any]:
    python = environment(job.environments / "autoround", HERE / "autoround-requirements.txt")
    command = [python, HERE / "real_autoround.py", *options, job.reference, job.tokens, out / "dense"]
    found = measured(command, job.threads, out / "autoround.log")
    return found | {"size": _size(options), "version": version_of(python, "auto-round")}


def _size(options: tuple[str, ...]) -> dict[str, Any]:
    """Codes with a 16-bit scale a group; or 16-bit values of what is kept, and a bit a weight that says where."""
    given = dict(zip(options[-4::2], options[-3::2], strict=False))
    if "--bits" not in given:
        return {"kind": "zeros", "row_offsets": "--structure" not in options}
    return {"kind": "grid", "bits": int(given["--bits"]), "group_size": int(given["--group-size"])}


def _together(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two commands as one: seconds are added, and the peak is the higher one."""
    both = {"peak_memory_bytes": max(first["peak_memory_bytes"], second["peak_memory_bytes"])}
    both |= {name: round(first[name] + second[name], 1) for name in ("seconds", "cpu_seconds")}
    return first | both | {"command": f"{first['command']}; {second['command']}"}


MAKERS: dict[str, Callable[[tuple[str, ...], Path, Job], dict[str, Any]]] = {
    "mspc": of_mspc,
    "llamacpp": of_llamacpp,
    "llmcompressor": of_llmcompressor,
    "gptqmodel": of_gptqmodel,
    "autoround": of_autoround,
}


def make(row: Row, out: Path, job: Job) -> dict[str, Any]:
    """Make a row in the new folder `out`, whose `dense` is the result. Raises RowError.

    A row that continues another one starts with its artifact, if that is there. Its cost is that of both.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    options = tuple(str(job.group_size) if option == "GROUP" else option for option in row.options)
    earlier = artifact_of(row.continues, job.shared)
    goes_on = bool(row.continues) and earlier.is_dir()
    if goes_on:
        shutil.copytree(earlier, out / "artifact")
    try:
        found = MAKERS[row.maker](options, out, job)
    except SystemExit as error:  # an environment that cannot be installed
        raise RowError(str(error)[-600:]) from error
    if goes_on:
        found = _together(found, json.loads((earlier.parent / MADE).read_text(encoding="utf-8")))
    return found
