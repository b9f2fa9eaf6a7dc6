"""Faults that `verify` must catch, each made by hand in an export that was right; and what it must not call a fault."""

import json
import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import tiny
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import mspc
from exporters import reference as reference_module
from exporters import runtimes, verification
from exporters.runtimes import Runner, Runtime, Unsupported
from exporters.verification import in_words
from mspc.cli.main import app
from mspc.errors import InputError, StorageError, VerificationError
from mspc.progress import Silent
from mspc.storage.manifest import EXPORT_MANIFEST

SHARD = "model.safetensors"
MATRIX = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def artifact(llama: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> mspc.Artifact:
    out = tmp_path_factory.mktemp("verify") / "artifact"
    return tiny.compress(llama, out, calibration, pattern="2:4")


@pytest.fixture(scope="module")
def exported(artifact: mspc.Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artifact.export("dense", tmp_path_factory.mktemp("verify") / "dense", reference=True, progress=False)


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy to spoil, with the reference next to it."""
    return tiny.copied(exported, tmp_path / "dense")


def check(folder: Path, against: Path | None = None) -> dict[str, object]:
    return verification.verify(folder, against, Silent())


def edit_weight(folder: Path, change: Callable[..., None]) -> None:
    """Change one matrix of the export, and the digest of its file as well."""
    tensors = load_file(folder / SHARD)
    change(tensors[f"{MATRIX}.weight"])
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})
    tiny.redigest(folder)


@pytest.mark.parametrize("against", [True, False])
def test_a_right_export_is_verified(against, folder, artifact):
    report = check(folder, artifact.path if against else None)
    assert verification.failures(report) == []
    zeros = sum(row["zeros"] for row in artifact.manifest["matrices"])
    assert report["weights"] == {"matrices": 14, "zeros": zeros, "wrong": []}
    result = report["runtimes"]["transformers"]
    assert result["status"] == "verified"
    assert result["relative_error"] < 1e-6
    assert result["greedy_tokens_compared"] == result["greedy_tokens_equal"] == reference_module.NEW_TOKENS
    assert json.loads((folder / "verification.json").read_text()) == report


def test_a_flipped_byte_a_truncated_and_a_missing_file_are_named(folder):
    content = bytearray((folder / SHARD).read_bytes())
    content[-1] ^= 1
    (folder / SHARD).write_bytes(content)
    assert f"{SHARD} does not have the bytes that were written" in verification.failures(check(folder))
    (folder / SHARD).write_bytes(content[:-100])
    assert any("cannot be read" in wrong for wrong in verification.failures(check(folder)))
    (folder / "config.json").unlink()
    assert "config.json is missing" in verification.failures(check(folder))


def test_one_wrong_weight_is_named_with_its_place(folder, artifact):
    def change(weight):
        row = int((weight[:, 5] != 0).nonzero()[0])
        weight[row, 5] += 1e-3

    edit_weight(folder, change)
    (wrong,) = check(folder, artifact.path)["weights"]["wrong"]
    assert wrong.startswith(f"{MATRIX}: 1 of 2,048 weights differ, the first at (")
    (wrong,) = check(folder)["weights"]["wrong"]
    assert wrong == f"{MATRIX}: its digest is not that of the artifact"


def test_lost_zeros_and_full_groups_are_counted(folder):
    edit_weight(folder, lambda weight: weight[0, :4].fill_(1.0))
    (wrong,) = check(folder)["weights"]["wrong"]
    assert wrong == f"{MATRIX}: it has 1,022 zeros, and 1,024 weights were pruned"

    def balance(weight):
        weight[1, (weight[1] != 0).nonzero()[:2, 0]] = 0.0

    edit_weight(folder, balance)
    (wrong,) = check(folder)["weights"]["wrong"]
    assert wrong == f"{MATRIX}: 4 weights of one group of 4 are not zero, and its pattern is 2:4"


def test_an_index_that_names_other_tensors_is_a_fault(folder):
    keys = list(load_file(folder / SHARD))
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys[1:], SHARD)}
    (folder / f"{SHARD}.index.json").write_text(json.dumps(index))
    (wrong,) = check(folder)["weights"]["wrong"]
    assert "does not name the tensors that the files hold" in wrong


@pytest.mark.parametrize("name", ["../config.json", "/etc/hostname"])
def test_an_export_manifest_that_points_outside_is_refused(name, folder):
    manifest = json.loads((folder / EXPORT_MANIFEST).read_text())
    manifest["files"][name] = "0" * 64
    (folder / EXPORT_MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="points outside its folder"):
        check(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"format_version": 1}', "lacks files, format, matrices, options"),
        ('{"format_version": 9, "format": "dense", "options": {}, "files": {}, "matrices": []}', "upgrade"),
    ],
)
def test_export_manifests_that_cannot_be_used(content, message, folder):
    (folder / EXPORT_MANIFEST).write_text(content)
    with pytest.raises(InputError, match=message):
        check(folder)


def test_folders_that_are_no_exports(artifact):
    with pytest.raises(InputError, match=r"is not an export of mspc.*no mspc_export\.json"):
        check(artifact.path)


@pytest.mark.parametrize(("format_name", "verified"), [("dense", True), ("dense", False), ("sparse", True)])
def test_no_reference_is_shipped_unless_it_is_asked_for(format_name, verified, artifact, tmp_path, caplog):
    """Files and weights can be checked without; runtimes cannot, and that is said."""
    out = artifact.export(format_name, tmp_path / "export", verify=verified, progress=False)
    assert list(tmp_path.rglob("*.npz")) == []
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    report = check(out)
    assert verification.failures(report) == []
    assert report["weights"]["matrices"] == 14
    assert {found["status"] for found in report["runtimes"].values()} == {"not run"}
    assert "No runtime was run: the right logits are not here; give --against ARTIFACT" in caplog.text
    against = check(out, artifact.path)
    assert verification.failures(against) == []
    assert against["runtimes"]["transformers"]["status"] == "verified"
    assert list(tmp_path.rglob("*.npz")) == []


@pytest.mark.parametrize("format_name", ["dense", "sparse", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_reference_is_kept_next_to_the_export(format_name, artifact, tmp_path):
    """The same export without it, and one that replaces it removes it."""
    pytest.importorskip("onnxscript") if format_name == "onnx" else None
    out = tmp_path / "a.b" / "export"
    artifact.export(format_name, out, reference=True, progress=False)
    assert sorted(path.name for path in out.parent.iterdir()) == ["export", "export.verification.npz"]
    assert list(out.rglob("*.npz")) == []
    assert "verified" in {found["status"] for found in check(out)["runtimes"].values()}
    moved = out.rename(tmp_path / "moved")
    assert {found["status"] for found in check(moved)["runtimes"].values()} == {"not run"}
    moved.rename(out)
    artifact.export(format_name, out, overwrite=True, verify=False, progress=False)
    assert [path.name for path in out.parent.iterdir()] == ["export"]


def test_a_reference_of_another_artifact_is_not_compared_with(artifact, llama, calibration, tmp_path, caplog):
    """An export that was moved leaves its reference to whatever takes its place."""
    other = tiny.compress(llama, tmp_path / "artifact", calibration, effort="fast")
    out = artifact.export("dense", tmp_path / "export", reference=True, progress=False)
    out.rename(tmp_path / "moved")
    other.export("dense", out, verify=False, progress=False)
    report = check(out)
    assert verification.failures(report) == []
    assert report["runtimes"]["transformers"]["status"] == "not run"
    assert "export.verification.npz is of another artifact, so it is not compared with." in caplog.text
    shutil.rmtree(out)
    (tmp_path / "moved").rename(out)
    assert check(out)["runtimes"]["transformers"]["status"] == "verified"


def test_a_reference_is_whole_or_not_there(folder, monkeypatch):
    right = tiny.kept_reference(folder)

    def cut(file: IO[bytes], **_: object) -> None:
        file.write(b"PK")
        raise OSError("full")

    monkeypatch.setattr(np, "savez", cut)
    with pytest.raises(StorageError, match="full"):
        right.save(reference_module.reference_of(folder))
    assert tiny.kept_reference(folder).logits.tolist() == right.logits.tolist()
    assert list(folder.parent.glob(".*")) == []


def one_array() -> bytes:
    np.save(file := BytesIO(), np.zeros(3))
    return file.getvalue()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no arrays", one_array()])
def test_a_damaged_reference_is_named(content, folder):
    reference_module.reference_of(folder).write_bytes(content)
    with pytest.raises(InputError, match=r"dense\.verification\.npz cannot be read .*Give --against ARTIFACT"):
        check(folder)


def test_a_reference_needs_the_verification(artifact, tmp_path):
    with pytest.raises(InputError, match="Leave --no-verify or --reference out"):
        artifact.export("dense", tmp_path / "out", verify=False, reference=True, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_another_artifact_is_not_compared_and_leaves_the_report_alone(folder, llama, calibration, tmp_path):
    check(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = tiny.compress(llama, tmp_path / "other", calibration, effort="fast")
    with pytest.raises(InputError, match=r"dense was not exported from .*other: 14 of 14 matrices are others there"):
        check(folder, other.path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_artifact_that_is_damaged_is_not_compared_either(folder, artifact, tmp_path):
    damaged = Path(shutil.copytree(artifact.path, tmp_path / "artifact"))
    file = next(iter(artifact.manifest["files"]))
    content = bytearray((damaged / file).read_bytes())
    content[-1] ^= 1
    (damaged / file).write_bytes(content)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match=f"{file} is damaged"):
        check(folder, damaged)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# Runtimes, played by a module of the test


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("a_runtime")
    monkeypatch.setitem(sys.modules, "a_runtime", module)
    monkeypatch.setitem(runtimes.RUNTIMES, "transformers", Runtime("a_runtime", "1.0", "pip install it"))
    return module


def result(folder: Path) -> tuple[str, str]:
    report = check(folder)
    of = report["runtimes"]["transformers"]
    assert bool(verification.failures(report)) == (of["status"] in ("mismatch", "failed"))
    return of["status"], of.get("reason", "")


def raising(error: Exception) -> Callable[..., object]:
    def load(*_: object) -> object:
        print("a banner")
        raise error

    return load


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (Unsupported("it never could"), "unsupported", "it never could"),
        (ModuleNotFoundError(name="a_package"), "not installed", "a_package is missing: pip install it"),
        (RuntimeError("size mismatch"), "failed", "RuntimeError: size mismatch"),
    ],
    ids=repr,
)
def test_only_a_runtime_that_raises_anything_else_has_failed(error, status, reason, runtime, folder):
    runtime.load = raising(error)
    assert result(folder) == (status, reason)


def test_stdout_is_json_whatever_a_runtime_prints(runtime, folder):
    runtime.load = raising(Unsupported("it never could"))
    done = CliRunner().invoke(app, ["verify", str(folder), "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["runtimes"]["transformers"]["status"] == "unsupported"


@pytest.mark.parametrize("fault", ["none", "logits", "nan", "shape", "tokens", "tokens too close to call"])
def test_what_a_runtime_computes_is_compared(fault, runtime, folder):
    right = tiny.kept_reference(folder)
    logits, tokens, margins = right.logits.copy(), right.tokens.copy(), right.margins.copy()
    if fault == "logits":
        logits *= 1.05
    elif fault == "nan":
        logits[0, 0, 0] = np.nan
    elif fault == "shape":
        logits = logits[..., :-1]
    elif fault.startswith("tokens"):
        tokens[3] += 1
        margins[3] = 0.0 if fault.endswith("call") else margins[3]
    replace(right, margins=margins).save(reference_module.reference_of(folder))
    runtime.load = lambda *_: Runner("1", 1e-2, lambda ids: logits, lambda prompt, count: tokens.tolist(), pytest.fail)
    status, reason = result(folder)
    report = json.loads((folder / "verification.json").read_text())["runtimes"]["transformers"]
    assert ("3 greedy tokens equal, the next too close to call" in in_words(report)) == fault.endswith("call")
    expected = {
        "none": ("verified", ""),
        "logits": ("mismatch", "off by 0.05, more than 0.01"),
        "nan": ("mismatch", "off by nan"),
        "shape": ("mismatch", "its logits have shape"),
        "tokens": ("mismatch", "greedy tokens"),
        "tokens too close to call": ("verified", ""),
    }[fault]
    assert status == expected[0]
    assert expected[1] in reason


def test_an_export_that_is_wrong_is_not_kept(runtime, artifact, tmp_path):
    runtime.load = raising(RuntimeError("size mismatch"))
    with pytest.raises(VerificationError, match=r"was not kept: transformers: RuntimeError: size mismatch"):
        artifact.export("dense", tmp_path / "dense", progress=False)
    assert list(tmp_path.iterdir()) == []
