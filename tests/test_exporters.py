"""Exports of every format: an old output is there until a new one is; bad artifacts are refused."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file
from test_resume import killed_at

import mspc
from exporters import exporting, verification
from exporters.formats import FORMATS
from mspc.errors import InputError, StorageError
from mspc.formats import layout
from mspc.planning.measurements import Measurements
from mspc.progress import Silent
from mspc.storage import files
from mspc.storage.artifact import REPORT
from mspc.storage.manifest import EXPORT_MANIFEST, MANIFEST, MatrixEntry
from mspc.storage.output_folder import held, sibling
from mspc.types import CompressedLinear, Matrix, Target, Unstructured


@pytest.fixture(scope="module")
def recipe(calibration: Path) -> mspc.Recipe:
    options = {"bits": 4, "group_size": 32, "allocator": "uniform", "num_sequences": 4, "sequence_length": 32}
    return mspc.Recipe(calibration=str(calibration), **options)


@pytest.fixture(scope="module")
def artifact(llama: Path, recipe: mspc.Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mspc.compress(llama, recipe, out=tmp_path_factory.mktemp("exporters") / "artifact", progress=False).path


def export(artifact: Path, out: Path, *, overwrite: bool = False, verified: bool = False) -> Path:
    return exporting.export(artifact, "dense", out, overwrite=overwrite, verified=verified)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_artifact_gives_the_same_bytes(artifact, tmp_path):
    assert content(export(artifact, tmp_path / "a")) == content(export(artifact, tmp_path / "b"))


def test_killed_at_every_flush_the_older_is_whole_and_the_next_works(artifact, tmp_path):
    out = export(artifact, tmp_path / "out")
    older = content(out)
    newer = older | {"tokenizer_config.json": b"{}"}
    source = Path(shutil.copytree(artifact, tmp_path / "artifact"))
    (source / "tokenizer_config.json").write_bytes(b"{}")
    kills = 0
    while killed_at(kills + 1, os, "fsync", lambda: export(source, out, overwrite=True)):
        kills += 1
        found = content(out)
        assert found == older or found["tokenizer_config.json"] == b"{}", f"killed at flush {kills}"
        assert EXPORT_MANIFEST in found
    assert kills > 5
    found = content(out)
    assert {name: found[name] for name in newer if name != EXPORT_MANIFEST} == {
        name: newer[name] for name in newer if name != EXPORT_MANIFEST
    }
    assert not sibling(out, "new").exists()


@pytest.mark.parametrize(("owner", "name", "call"), [(Path, "rename", 1), (Path, "rename", 2), (shutil, "rmtree", 2)])
def test_killed_while_the_older_is_replaced(owner, name, call, artifact, tmp_path):
    """Oracle: the older export, before a kill between the renames and after; the new one once it has its place."""
    out = export(artifact, tmp_path / "out")
    older = content(out)
    source = Path(shutil.copytree(artifact, tmp_path / "artifact"))
    (source / "tokenizer_config.json").write_bytes(b"{}")
    assert killed_at(call, owner, name, lambda: export(source, out, overwrite=True))
    assert sibling(out, "old").is_dir() == ((owner, call) != (Path, 1))
    with pytest.raises(InputError, match="holds an older export"):
        export(source, out)
    assert (content(out) == older) == (owner is Path)
    export(source, out, overwrite=True)
    assert (out / "tokenizer_config.json").read_bytes() == b"{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "out"]


def test_a_full_disk_leaves_the_older(artifact, tmp_path, monkeypatch):
    out = export(artifact, tmp_path / "out")
    older = content(out)

    def full(*_: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(StorageError, match="No space left"):
        export(artifact, out, overwrite=True)
    assert content(out) == older
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_in_use_is_not_touched(artifact, tmp_path):
    partial = sibling(tmp_path / "out", "new")
    partial.mkdir()
    (partial / "a file").write_text("of another process")
    with held(partial), pytest.raises(InputError, match="is being written by another mspc process"):
        export(artifact, tmp_path / "out")
    assert content(partial) == {"a file": b"of another process"}


def test_a_damaged_artifact_is_refused(artifact, tmp_path):
    source = Path(shutil.copytree(artifact, tmp_path / "artifact"))
    file = source / "matrices" / "00001.safetensors"
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)
    with pytest.raises(InputError, match=r"00001\.safetensors is damaged: mspc wrote other bytes"):
        export(source, tmp_path / "out")
    file.unlink()
    with pytest.raises(InputError, match=r"00001\.safetensors is missing, and mspc wrote it"):
        export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_gone_is_named(artifact, tmp_path):
    source = Path(shutil.copytree(artifact, tmp_path / "artifact"))
    (source / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="its tokenizer cannot be loaded"):
        export(source, tmp_path / "out", verified=True)
    assert not (tmp_path / "out").exists()


def test_unknown_formats_and_options_are_refused(artifact, tmp_path):
    with pytest.raises(InputError, match="Unknown format 'dens': did you mean 'dense'"):
        exporting.export(artifact, "dens", tmp_path / "out")
    with pytest.raises(InputError, match="dense has no option --weights"):
        exporting.export(artifact, "dense", tmp_path / "out", options={"weights": "int4"})


def test_an_artifact_made_of_an_export_is_no_export(artifact, recipe, tmp_path):
    """The files that an export is known by do not travel on: an export would replace the artifact as an older one."""
    dense = export(artifact, tmp_path / "dense", verified=True)
    again = mspc.compress(dense, recipe, out=tmp_path / "again", progress=False).path
    left_behind = {path.name for path in dense.iterdir()} - {path.name for path in again.iterdir()}
    assert left_behind >= {EXPORT_MANIFEST, REPORT}
    before = content(again)
    with pytest.raises(InputError, match="is not empty and was not exported by mspc"):
        export(artifact, again, overwrite=True)
    assert content(again) == before


def test_compress_exports_in_the_same_call(llama, recipe, tmp_path):
    with pytest.raises(InputError, match="Unknown format 'gptk'"):
        mspc.compress(llama, recipe, out=tmp_path / "out", exports=["gptk"], progress=False)
    assert not (tmp_path / "out").exists()
    artifact = mspc.compress(llama, recipe, out=tmp_path / "out", exports=["dense"], progress=False)
    out = artifact.path / "exports" / "dense"
    first = content(out)
    assert verification.failures(verification.verify(out, artifact.path, Silent())) == []
    shutil.rmtree(artifact.path / "exports")
    mspc.compress(llama, recipe, out=tmp_path / "out", exports=["dense"], resume=True, progress=False)
    again = content(out)
    assert again == first


OF_BUDGET = "A size budget may choose 16, 8, 4, 3 or 2 bits. model.layers.0.self_attn.q_proj: "
EARLY = [
    ("gguf", {"bits": 3}, "gguf takes 4 or 8 bits in groups of 32"),
    ("gguf", {"bits": 4, "group_size": 16}, "gguf takes 4 or 8 bits in groups of 32"),
    ("gguf", {"bits": 4, "asymmetric": True}, "gguf takes symmetric grids"),
    ("gguf", {"bits_per_weight": 4.0}, f"{OF_BUDGET}gguf takes 4 or 8 bits"),
    ("gguf", {"target_size": "110KB"}, f"{OF_BUDGET}gguf takes 4 or 8 bits"),
    ("gptq", {"sparsity": 0.5}, "gptq holds quantized weights, and no matrix has a grid"),
    ("gptq", {"bits": 4, "group_size": 16}, "gptq takes groups of 32, 64, 128 or row, not of 16"),
    ("gptq", {"bits_per_weight": 4.0, "group_size": 16}, "gptq takes groups of 32, 64, 128 or row, not of 16"),
    ("compressed-tensors", {"pattern": "2:4"}, "compressed-tensors holds quantized weights"),
    ("compressed-tensors", {"bits": 8, "group_size": 8}, "compressed-tensors takes groups of 32, 64, 128 or row"),
]


@pytest.mark.parametrize(("format_name", "options", "message"), EARLY, ids=str)
def test_what_an_export_cannot_hold_is_said_before_any_work(
    format_name, options, message, llama, calibration, tmp_path, monkeypatch
):
    for measure in ("sensitivities", "fisher_factors", "loss_curves"):
        monkeypatch.setattr(Measurements, measure, lambda *_: pytest.fail("measured"))
    monkeypatch.setattr("mspc.pipeline.run.solve_blocks", lambda *args, **kwargs: pytest.fail("solved"))
    monkeypatch.setattr("mspc.pipeline.run.draw", lambda *_: pytest.fail("text was read"))
    with pytest.raises(InputError) as caught:
        tiny.compress(llama, tmp_path / "out", calibration, exports=["dense", format_name], **options)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx_ir", "onnxscript", "onnx", "gguf"])
def test_a_missing_package_is_named_before_any_work(package, llama, calibration, tmp_path, monkeypatch):
    """As if the package were not installed: Python refuses to import a module that is None."""
    format_name = "gguf" if package == "gguf" else "onnx"
    monkeypatch.setitem(sys.modules, package, None)
    ours = ("exporters.onnx", "exporters.gguf", "exporters.reading.")
    for name in [name for name in sys.modules if name.startswith(ours)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("mspc.api.Run", lambda *_: pytest.fail("began"))
    with pytest.raises(InputError, match=rf"needs {package}, in mspc's extra {format_name}: pip install"):
        tiny.compress(llama, tmp_path / "out", calibration, exports=["dense", format_name], bits=4)
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_is_asked_for_twice_is_made_once(llama, recipe, tmp_path):
    artifact = mspc.compress(llama, recipe, out=tmp_path / "out", exports=["dense", "dense"], progress=False)
    assert [path.name for path in (artifact.path / "exports").iterdir()] == ["dense"]


def test_a_budget_may_be_exported_by_what_holds_mixed_bits(llama, calibration, tmp_path):
    """Oracle: the weights read back, in the verification."""
    recipe = {"bits_per_weight": 6.0, "skip": ["k_proj", "v_proj"], "group_size": 32}
    artifact = tiny.compress(llama, tmp_path / "out", calibration, exports=["compressed-tensors"], **recipe)
    assert artifact.manifest["bits_per_weight"] <= 6.0
    assert (artifact.path / "exports" / "compressed-tensors" / EXPORT_MANIFEST).is_file()


@pytest.fixture(scope="module")
def sliced(folder_of, recipe, tmp_path_factory) -> tuple[Path, dict[int, torch.Tensor]]:
    """An artifact with two slices of one 3-D parameter, added by hand; and their weights (O, I) by index."""
    out, name = tmp_path_factory.mktemp("sliced") / "artifact", "model.layers.0.mlp.experts.down_proj"
    asked = mspc.Recipe(**recipe.to_dict() | {"group_size": 16, "skip": ["experts"]})
    mspc.compress(folder_of("gpt_oss"), asked, out=out, progress=False)
    manifest = json.loads((out / MANIFEST).read_text())
    fused, weights = tiny.tensors(folder_of("gpt_oss"))[name], {}
    for index in (1, 3):
        address = Matrix(name, (fused.shape[2], fused.shape[1]), index, transposed=True)
        weight = address.read(fused).clone()
        mask = (torch.arange(weight.numel()) % 2 == index // 2).view(weight.shape)
        weights[index] = weight * mask
        target = Target(Unstructured(0.5))
        parts = layout.pack(CompressedLinear(weights[index], mask, target), weight.dtype)
        file = f"matrices/slice{index}.safetensors"
        save_file({f"{address.name}.{part}": tensor for part, tensor in parts.items()}, out / file)
        digest = layout.digest(CompressedLinear(weights[index], mask, target))
        entry = MatrixEntry(
            address, name, target, weight.dtype, tuple(parts), 0, digest, mask.numel() // 2, mask.numel() // 2, None,
            0.0, 0.0, 0.0, "float32", 1, file,
        )  # fmt: skip
        manifest["matrices"].append(entry.to_row())
    (out / MANIFEST).write_text(json.dumps(manifest))
    return out, weights


@pytest.mark.parametrize("format_name", FORMATS)
def test_slices_of_one_tensor_are_all_written_or_refused(format_name, sliced, folder_of, tmp_path):
    artifact, weights = sliced
    if format_name != "dense":  # sparse holds all slices of a parameter, or none
        with pytest.raises(InputError, match=rf"experts\.down_proj\[1\]: {format_name} cannot hold one slice"):
            exporting.export(artifact, format_name, tmp_path / "out")
        return
    out = exporting.export(artifact, format_name, tmp_path / "out")  # read back, and run in transformers
    name = "model.layers.0.mlp.experts.down_proj"
    before, after = tiny.tensors(folder_of("gpt_oss"))[name], tiny.tensors(out)[name]
    assert torch.equal(mspc.load(artifact).get_parameter(name), after)
    for index in range(len(before)):
        assert torch.equal(after[index].T, weights.get(index, before[index].T))


def test_an_entry_that_comes_twice_is_refused(artifact, tmp_path):
    source = Path(shutil.copytree(artifact, tmp_path / "artifact"))
    manifest = json.loads((source / MANIFEST).read_text())
    manifest["matrices"].append(manifest["matrices"][3])
    (source / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="has more than one entry for model.layers.0.self_attn.o_proj"):
        export(source, tmp_path / "out")
