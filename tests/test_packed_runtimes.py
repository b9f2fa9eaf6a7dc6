"""Packed exports in the real loaders; and faults that those loaders do not notice, which `verify` must.

A loader failure that is known is asserted by calling the loader, so that the day it works is seen.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from exporters import formats, verification
from mspc.progress import Silent

pytest.importorskip("gptqmodel")
pytest.importorskip("optimum")
pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.filterwarnings("ignore")  # the loaders' own

SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def without_genai(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its model builder takes seconds for every export; test_onnx_runtimes has it."""
    quick = replace(formats.FORMATS["gptq"], runtimes=("transformers", "gptqmodel"))
    monkeypatch.setitem(formats.FORMATS, "gptq", quick)


def runtimes_of(folder: Path) -> dict[str, dict[str, object]]:
    return json.loads((folder / "verification.json").read_text())["runtimes"]


@pytest.mark.parametrize("format_name", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3", marks=SLOW), pytest.param("opt", marks=SLOW)])
def test_families_in_their_runtimes(family, format_name, artifact_of, tmp_path):
    for result in runtimes_of(artifact_of(family).export(format_name, tmp_path / "out", progress=False)).values():
        assert result["status"] == "verified"
        assert result["relative_error"] < 0.02


@pytest.mark.parametrize("format_name", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize(
    "grid",
    [{"bits": 2}, {"bits": 3}, {"bits": 8}, {"asymmetric": True}, {"pattern": "2:4", "group_size": "row"}],
    ids=str,
)
def test_grids_in_their_runtimes(grid, format_name, artifact_of, tmp_path):
    for result in runtimes_of(
        artifact_of("llama", **grid).export(format_name, tmp_path / "out", progress=False)
    ).values():
        assert result["status"] == "verified"


@SLOW
def test_the_trained_model_writes_the_same_text_everywhere(artifact_of, tmp_path):
    artifact = artifact_of("bundled", pattern="2:4", bits=8)
    for format_name in ("dense", "gptq", "compressed-tensors"):
        results = runtimes_of(artifact.export(format_name, tmp_path / format_name, progress=False))
        for result in results.values():
            assert result["greedy_tokens_equal"] == 16


def test_gpt2_is_read_by_gptqmodel_and_known_to_fail_in_transformers(artifact_of, tmp_path):
    out = artifact_of("gpt2").export("gptq", tmp_path / "out", progress=False)
    assert runtimes_of(out)["gptqmodel"]["status"] == "verified"
    assert runtimes_of(out)["transformers"]["status"] == "unsupported"
    with pytest.raises(AttributeError, match="weight"):
        transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float16)


def test_mixed_bits_are_read_by_gptqmodel_and_known_to_fail_in_transformers(mixed, tmp_path):
    out = mixed.export("gptq", tmp_path / "gptq", progress=False)
    assert runtimes_of(out)["gptqmodel"]["status"] == "verified"
    assert runtimes_of(out)["transformers"]["status"] == "unsupported"
    with pytest.raises(RuntimeError, match="size mismatch|mismatch"):
        transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float16)
    out = mixed.export("compressed-tensors", tmp_path / "ct", progress=False)
    assert runtimes_of(out)["transformers"]["status"] == "verified"


# Silent failures


def spoiled(folder: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, object]], None]) -> Path:
    """A copy with other tensors and another quantization_config, whose export manifest has the new digests."""
    out = tiny.copied(folder, tmp_path / "spoiled")
    tensors = load_file(out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    (out / "quantize_config.json").write_text(json.dumps(config["quantization_config"]))
    tiny.redigest(out)
    return out


@pytest.mark.parametrize("asymmetric", [False, pytest.param(True, marks=SLOW)])
def test_zero_points_of_the_other_version_are_noticed(asymmetric, artifact_of, tmp_path):
    """The loaders read them without a word, one step off."""
    folder = artifact_of("llama", asymmetric=asymmetric).export(
        "gptq", tmp_path / "out", reference=True, progress=False
    )

    def change(tensors, config):
        config["checkpoint_format"] = "gptq" if asymmetric else "gptq_v2"

    report = verification.verify(spoiled(folder, tmp_path, change), None, Silent())
    assert len(report["weights"]["wrong"]) == 14
    assert report["runtimes"]["gptqmodel"]["status"] == "mismatch"
    assert report["runtimes"]["gptqmodel"]["relative_error"] > 0.1


def test_sparse_compressed_tensors_become_random_weights_and_are_noticed(artifact_of, tmp_path):
    """The loader finds no compressor for the format, and reports its tensors as unexpected only."""
    folder = artifact_of("llama", pattern="2:4").export(
        "compressed-tensors", tmp_path / "out", reference=True, progress=False
    )

    def change(tensors, config):
        for name in [name for name in tensors if name.endswith(".weight_packed")]:
            base = name.removesuffix("weight_packed")
            packed = tensors.pop(name)
            tensors[f"{base}compressed"] = torch.zeros(len(packed), packed.shape[1] * 4, dtype=torch.float16)
            tensors[f"{base}bitmask"] = torch.full((len(packed), packed.shape[1]), 0b0101, dtype=torch.uint8)
            tensors[f"{base}shape"] = tensors.pop(f"{base}weight_shape")[:, None]
            del tensors[f"{base}weight_scale"]
        config["config_groups"], config["format"] = {}, "dense"
        config["sparsity_config"] = {
            "format": "sparse-24-bitmask", "sparsity_structure": "2:4", "global_sparsity": 0.5, "targets": ["Linear"],
            "ignore": ["lm_head"], "registry_requires_subclass": False,
        }  # fmt: skip

    report = verification.verify(spoiled(folder, tmp_path, change), None, Silent())
    assert report["runtimes"]["transformers"]["status"] == "mismatch"
    assert report["runtimes"]["transformers"]["relative_error"] > 0.5
    assert len(report["weights"]["wrong"]) == 14


@SLOW
def test_a_zero_point_of_zero_in_the_first_version_is_noticed(calibration, tmp_path):
    """The files hold the right weights, and the loader's carry spoils the neighbours: only logits can tell."""
    model = tiny.make("llama", hidden_size=64)
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):  # positive weights: the smallest is 0, which is then code 0
            model.model.layers[0].mlp.get_submodule(name).weight.abs_()
    tiny.save(model, tmp_path / "model")
    options = {"bits": 4, "group_size": 32, "asymmetric": True, "solver": "mask", "criterion": "magnitude"}
    artifact = tiny.compress(tmp_path / "model", tmp_path / "artifact", calibration, allocator="uniform", **options)
    folder = artifact.export("gptq", tmp_path / "out", reference=True, progress=False)

    def change(tensors, config):
        config["checkpoint_format"] = "gptq"
        for name in [name for name in tensors if name.endswith(".qzeros")]:
            zeros = [[(word >> (4 * i)) & 15 for i in range(8)] for word in tensors[name].flatten().tolist()]
            words = [sum(((zero - 1) & 15) << (4 * i) for i, zero in enumerate(eight)) for eight in zeros]
            signed = [word - 2**32 if word >= 2**31 else word for word in words]
            tensors[name] = torch.tensor(signed, dtype=torch.int32).view_as(tensors[name])

    report = verification.verify(spoiled(folder, tmp_path, change), None, Silent())
    assert report["weights"]["wrong"] == []
    assert report["runtimes"]["gptqmodel"]["status"] == "mismatch"
    assert report["runtimes"]["gptqmodel"]["relative_error"] > 0.1
