"""Exported gptq folders in auto-gptq 0.7.1, which is archived: relative errors of logits and equal greedy tokens.

    python benchmarks/verify_autogptq.py [--venv FOLDER] [--json FILE] [--bits 2 3 4 8]

auto-gptq imports only with old packages, so it gets a virtual environment of its own, with what
autogptq-requirements.txt names, made again only when that file changes. The bundled model and a random one are
compressed and exported here and loaded there, on the CPU in float32. auto-gptq gets two things wrong without an error.
They are shown and are not failures; any other mismatch makes the exit code 1.

1. It takes every folder for the first version of the format, so it misreads gptq_v2, that of asymmetric grids.
2. A model whose output head is tied to its embeddings loses both: accelerate ties them again after loading, to a head
   that no file holds. The same folder with a copy of the embeddings stored as `lm_head.weight` is the control: the loss
   is called known only if that folder is right.
"""

import argparse
import datetime
import json
import math
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from environments import environment, variables_of_its_own
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from verify_all import model_folder

import mspc
from exporters.reference import PROMPT, Reference, compute_reference
from exporters.runtimes import FLOAT32
from exporters.verification import comparable_tokens
from mspc.storage.artifact import REFERENCE

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "autogptq-requirements.txt"
PACKAGE = "auto-gptq"
MODELS = ("bundled", "llama")
MISREAD = "known: misreads gptq_v2"
LOST = "known: loses tied embeddings"
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Case:
    """An exported folder and the results of its artifact."""

    model: str
    bits: int
    checkpoint_format: str
    head: str
    """own; tied, so no file holds it; or stored: tied, with a copy in the file."""
    folder: Path
    reference: Reference


def make_cases(model: str, bits: int, work: Path, *, asymmetric: bool) -> list[Case]:
    recipe = mspc.Recipe(
        bits=bits, sparsity=0.5, group_size=128, asymmetric=asymmetric, allocator="uniform", num_sequences=16,
        sequence_length=64,
    )  # fmt: skip
    artifact = mspc.compress(model_folder(model, work), recipe, out=work / "artifact", overwrite=True, progress=False)
    reference = compute_reference(artifact.path)
    checkpoint_format = "gptq_v2" if asymmetric else "gptq"
    folder = artifact.export("gptq", work / f"{model}-int{bits}-{checkpoint_format}", verify=False, progress=False)
    reference.save(folder / REFERENCE)
    tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    cases = [Case(model, bits, checkpoint_format, "tied" if tied else "own", folder, reference)]
    if tied:
        cases.append(Case(model, bits, checkpoint_format, "stored", store_head(folder), reference))
    return cases


def store_head(folder: Path) -> Path:
    """A copy of the folder whose file holds the output head too."""
    copy = folder.with_name(f"{folder.name}-stored")
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    save_file(tensors | {HEAD: tensors[EMBEDDINGS].clone()}, copy / "model.safetensors", {"format": "pt"})
    return copy


def run_autogptq(python: Path, cases: list[Case], out: Path) -> dict[str, Any]:
    """Its report: versions, layers by folder, failures by folder. The arrays are left in `out`."""
    out.mkdir()
    command = [str(python), str(HERE / "autogptq_logits.py"), str(PROMPT), str(out), *(str(c.folder) for c in cases)]
    variables = variables_of_its_own() | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr[-2000:]}\n{PACKAGE} did not start; remove its environment and run this again.")
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def compare(case: Case, report: dict[str, Any], out: Path) -> dict[str, Any]:
    """One row of the result; `status` is verified, mismatch, failed, or the known misreading of gptq_v2."""
    row: dict[str, Any] = {
        "model": case.model,
        "artifact": f"50%+int{case.bits} g128" + (" asymmetric" if case.checkpoint_format == "gptq_v2" else ""),
        "checkpoint_format": case.checkpoint_format,
        "head": case.head,
        "tolerance": FLOAT32,
    }
    if reason := report["failed"].get(case.folder.name):
        return row | {"status": "failed", "reason": reason}
    with np.load(out / f"{case.folder.name}.npz", allow_pickle=False) as file:
        logits, tokens = file["logits"], file["tokens"]
    expected = case.reference.logits
    error = float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))
    compared = comparable_tokens(case.reference, float(np.abs(logits - expected).max()))
    equal = int(np.cumprod(tokens == case.reference.tokens).sum())
    right = error <= FLOAT32 and equal >= compared
    wrong = MISREAD if case.checkpoint_format == "gptq_v2" else "mismatch"
    return row | {
        "status": "verified" if right else wrong,
        "relative_error": error if math.isfinite(error) else None,  # JSON has no NaN
        "greedy_tokens_compared": compared,
        "greedy_tokens_equal": equal,
        "greedy_tokens": tokens.tolist(),
        "artifact_tokens": case.reference.tokens.tolist(),
        "layers": report["layers"][case.folder.name],
    }


def excuse_tied(rows: list[dict[str, Any]]) -> None:
    """A mismatch of a tied head becomes the known loss where the same folder with the head stored is right."""
    keys = ("model", "artifact", "checkpoint_format")
    right = [[row[key] for key in keys] for row in rows if row["head"] == "stored" and row["status"] == "verified"]
    for row in rows:
        if row["head"] == "tied" and row["status"] == "mismatch" and [row[key] for key in keys] in right:
            row["status"] = LOST


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("model", "artifact", "format", "head", "relative error", "greedy tokens equal", "status"):
        table.add_column(heading)
    for row in rows:
        found = ("", "")
        if row["status"] != "failed":
            error = "not finite" if row["relative_error"] is None else f"{row['relative_error']:.1e}"
            found = (error, f"{row['greedy_tokens_equal']} of {len(row['artifact_tokens'])}")
        table.add_row(row["model"], row["artifact"], row["checkpoint_format"], row["head"], *found, row["status"])
    return table


def main() -> None:
    today = datetime.date.today().isoformat()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=HERE.parent / ".venv-autogptq")
    parser.add_argument("--json", type=Path, default=Path("out/verify_autogptq.json"))
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8], choices=[2, 3, 4, 8])
    args = parser.parse_args()
    python = environment(args.venv, REQUIREMENTS, built_last=PACKAGE, variables={"BUILD_CUDA_EXT": "0"})
    with tempfile.TemporaryDirectory(prefix="mspc-autogptq-") as name:
        work = Path(name)
        cases = []
        for model in MODELS:
            for bits in args.bits:
                cases += make_cases(model, bits, work, asymmetric=False)
            cases += make_cases(model, 4, work, asymmetric=True)
        report = run_autogptq(python, cases, work / "found")
        rows = [compare(case, report, work / "found") for case in cases]
    excuse_tied(rows)
    ours = {name: version(name) for name in ("mspc", "torch", "transformers", "safetensors", "numpy")}
    result = {
        "date": today,
        "command": "make verify-autogptq",
        "hardware": f"CPU, {platform.machine()}, float32",
        "versions": {"python": platform.python_version()} | ours,
        "autogptq_versions": dict(sorted(report["versions"].items(), key=lambda item: item[0].lower())),
        "rows": rows,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1))
    Console(width=150).print(table_of(rows))
    wrong = [row for row in rows if row["status"] in ("mismatch", "failed")]
    for row in wrong:
        print("WRONG", row["model"], row["artifact"], row.get("reason", row.get("relative_error")))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
