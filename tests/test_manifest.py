"""The manifest against the files that it describes, read by safetensors itself."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

import mspc
from mspc.errors import InputError
from mspc.storage.manifest import MANIFEST, read_entries, read_manifest

SHORT = {"num_sequences": 2, "sequence_length": 16}


@pytest.fixture(scope="module")
def compress(llama: Path, calibration: Path):
    """`compress(folder, **recipe)`: a quick artifact of the tiny float32 Llama on 2 x 16 tokens."""

    def make(out: Path, **values: Any) -> mspc.Artifact:
        grid = {"group_size": 32} if "bits" in values else {}
        return tiny.compress(llama, out, calibration, **{"allocator": "uniform", **SHORT, **grid} | values)

    return make


@pytest.fixture(scope="module")
def artifact(compress, tmp_path_factory: pytest.TempPathFactory) -> mspc.Artifact:
    return compress(tmp_path_factory.mktemp("manifest") / "out", sparsity=0.3, bits=4, group_size=16, asymmetric=True)


def weights_of(manifest: dict[str, Any]) -> int:
    return sum(row["shape"][0] * row["shape"][1] for row in manifest["matrices"])


def stored(folder: Path) -> dict[str, torch.Tensor]:
    files = [load_file(path) for path in sorted((folder / "matrices").iterdir())]
    return {key: tensor for file in files for key, tensor in file.items()}


def bits_per_weight(artifact: mspc.Artifact) -> float:
    return 8 * sum(tensor.nbytes for tensor in stored(artifact.path).values()) / weights_of(artifact.manifest)


def test_it_holds_what_it_must(artifact, llama):
    manifest = artifact.manifest
    assert set(manifest) >= {
        *("format_version", "mspc_version", "source", "recipe", "calibration", "sparsity", "bits_per_weight"),
        *("seconds", "seconds_by_stage", "peak_memory_bytes", "matrices", "bytes", "evaluation"),
    }
    assert manifest["format_version"] == 1
    assert manifest["mspc_version"] == mspc.__version__
    assert manifest["source"]["name"] == llama.name
    assert set(manifest["source"]["sha256"]) == {"model.safetensors"}
    assert mspc.Recipe.from_dict(manifest["recipe"]) == mspc.Recipe.from_toml(artifact.path / "recipe.toml")
    assert set(manifest["calibration"]) == {"source", "tokens", "sha256", "bos"}
    assert manifest["calibration"]["tokens"] == 2 * 16
    assert set(manifest["sparsity"]) == {"requested", "achieved"}
    assert manifest["seconds"] > 0
    assert manifest["peak_memory_bytes"] > 2**20


def test_it_holds_every_matrix(artifact, llama):
    shapes = {name: list(tensor.shape) for name, tensor in tiny.tensors(llama).items() if "_proj" in name}
    rows = artifact.manifest["matrices"]
    assert {row["tensor"]: row["shape"] for row in rows} == shapes
    for row in rows:
        assert set(row) >= {
            *("name", "shape", "pattern", "sparsity", "bits", "sensitivity", "output_error", "damp", "num_tokens"),
            "zeros",
        }
        assert (row["num_tokens"], row["bits"], row["sensitivity"]) == (2 * 16, 4, None)
        assert row["damp"] >= 0.01
        assert row["output_error"] > 0
        assert row["zeros"] >= row["pruned"] == round(row["sparsity"] * row["shape"][0] * row["shape"][1])


def test_it_counts_what_is_stored(artifact):
    """Oracle: set bits of the masks, zeros of the weights as transformers loads them."""
    manifest, tensors = artifact.manifest, stored(artifact.path)
    numel = weights_of(manifest)
    assert manifest["bits_per_weight"] == bits_per_weight(artifact)
    kept = sum(int(byte).bit_count() for key in tensors if key.endswith(".mask") for byte in tensors[key].flatten())
    assert numel - kept == round(0.3 * numel)
    assert manifest["sparsity"] == {"requested": 0.3, "achieved": (numel - kept) / numel}
    weights = tiny.reference(artifact.export("dense", artifact.path.parent / "dense")).state_dict()
    for row in manifest["matrices"]:
        assert row["zeros"] == int((weights[row["parameter"]] == 0).sum())


@pytest.mark.parametrize(
    ("values", "sparsity", "bits"),
    [
        ({"sparsity": 0.0, "bits": 4}, 0.0, 4 + 16 / 32),
        ({"pattern": "2:4", "bits": 4}, 0.5, 2 + 1 + 16 / 32),
        ({"pattern": "2:4"}, 0.5, 16 + 1),
        ({"pattern": "N:16", "sparsity": 0.5}, 0.5, 16 + 2),
        ({"pattern": "N:16", "sparsity": 0.98}, 15 / 16, 2 + 0.25),
        ({"sparsity": 0.0, "bits": 8, "group_size": "row", "asymmetric": True}, 0.0, None),
        ({"sparsity": 0.0}, 0.0, 32),
    ],
)
def test_what_is_asked_for_is_stored(values, sparsity, bits, compress, tmp_path):
    """Oracle: the arithmetic of the layout; the model's weights are float32."""
    artifact = compress(tmp_path / "out", **values)
    assert artifact.manifest["sparsity"]["achieved"] == sparsity
    assert artifact.manifest["bits_per_weight"] == bits_per_weight(artifact)
    assert bits is None or artifact.manifest["bits_per_weight"] == bits


def test_an_edited_plan_is_obeyed(compress, tmp_path):
    """One matrix dense, one 2:4 in 8 bits, one all zeros; the rest as it was."""
    plan = tmp_path / "plan.json"
    content = json.loads((compress(tmp_path / "first").path / "plan.json").read_text())
    for row, change in zip(
        content["matrices"],
        ({"sparsity": 0}, {"pattern": "2:4", "sparsity": 0.5, "bits": 8, "group_size": 16}, {"sparsity": 1}),
        strict=False,
    ):
        row.update(change)
    plan.write_text(json.dumps(content))
    manifest = compress(tmp_path / "second", plan=str(plan), allocator=None).manifest
    by_name = {row["name"]: row for row in manifest["matrices"]}
    zeros = sum(row["sparsity"] * row["shape"][0] * row["shape"][1] for row in content["matrices"])
    assert manifest["sparsity"]["requested"] == pytest.approx(zeros / weights_of(manifest))
    assert manifest["sparsity"]["achieved"] == pytest.approx(zeros / weights_of(manifest))
    assert manifest["sparsity"]["achieved"] != 0.5
    for asked in content["matrices"]:
        got = by_name[asked["name"]]
        assert (got["pattern"], got["bits"]) == (asked["pattern"], asked["bits"])
        assert got["sparsity"] == pytest.approx(asked["sparsity"])
    assert manifest["plan"] == hashlib.sha256(plan.read_bytes()).hexdigest()


def test_a_plan_that_was_edited_since_is_another_run(compress, llama, tmp_path):
    """Its path is the same, and so is the recipe, but not what the run would end with."""
    artifact = compress(tmp_path / "out")
    plan = tmp_path / "plan.json"
    plan.write_text((artifact.path / "plan.json").read_text())
    recipe = mspc.Recipe(calibration=artifact.manifest["recipe"]["calibration"], plan=str(plan), **SHORT)
    mspc.compress(llama, recipe, out=tmp_path / "obedient", progress=False)
    mspc.compress(llama, recipe, out=tmp_path / "obedient", progress=False, resume=True)
    plan.write_text(plan.read_text().replace("0.5", "0.25", 1))
    with pytest.raises(InputError, match=r"differs from this one: plan was '\w{64}' and is '\w{64}'\."):
        mspc.compress(llama, recipe, out=tmp_path / "obedient", progress=False, resume=True)


def test_entries_are_written_as_they_were_read(artifact):
    path = artifact.path / MANIFEST
    assert [entry.to_row() for entry in read_entries(artifact.manifest, path)] == artifact.manifest["matrices"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "q_proj .*bits must be 16, 8, 4, 3 or 2, not 5"),
        ({"dtype": "nothing"}, "q_proj .*nothing"),
        ({"shape": [32]}, "q_proj"),
        ({"pattern": "4:2"}, "q_proj .*1 <= N <= M"),
    ],
    ids=str,
)
def test_damaged_entries_are_named(change, message, artifact, tmp_path):
    manifest = json.loads((artifact.path / MANIFEST).read_text())
    manifest["matrices"][0] |= change
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=rf"mspc\.json is damaged at the entry of .*{message}"):
        read_manifest(tmp_path)
