"""NaN and infinity in stored matrices, and matrices that nothing describes, are found when they are read, by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import mspc
from mspc.bench.models import check_model
from mspc.errors import InputError

KINDS = {
    "4 bits": ({"bits": 4, "group_size": 32}, "scales"),
    "3 bits, asymmetric": ({"bits": 3, "group_size": 16, "asymmetric": True, "sparsity": 0.0}, "scales"),
    "pruned": ({"sparsity": 0.5}, "values"),
    "2:4": ({"pattern": "2:4"}, "values"),
}
MATRIX = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module", params=KINDS)
def stored(request, llama, calibration, tmp_path_factory) -> tuple[Path, Path, str]:
    """An artifact, its sparse export, and a part of its matrices that holds floats."""
    options, part = KINDS[request.param]
    folder = tmp_path_factory.mktemp("stored")
    artifact = tiny.compress(llama, folder / "artifact", calibration, effort="fast", **options)
    return artifact.path, artifact.export("sparse", folder / "sparse", progress=False), part


def spoil(folder: Path, copy: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a folder, with a change to the tensors of the file that holds `MATRIX`."""
    shutil.copytree(folder, copy)
    for path in copy.rglob("*.safetensors"):
        tensors = load_file(path)
        if any(key.startswith(MATRIX) for key in tensors):
            change(tensors)
            save_file(tensors, path, {"format": "pt"})
    return copy


def readers(folder: Path) -> dict[str, Callable[[], object]]:
    found: dict[str, Callable[[], object]] = {
        "load": lambda: mspc.load(folder, "cpu", check=False),
        "eval": lambda: mspc.evaluate(folder, tiny.ids(2), device="cpu", progress=False),
    }
    if (folder / "mspc.json").is_file():
        del found["eval"]  # it compares digests first
    else:
        found["transformers"] = lambda: AutoModelForCausalLM.from_pretrained(folder)
    return found


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("number", [0, 1], ids=["artifact", "sparse"])
def test_stored_values_that_are_no_numbers_are_named(number, value, stored, tmp_path):
    part = stored[2]
    key = f"{MATRIX}.{part}"
    folder = spoil(stored[number], tmp_path / "spoiled", lambda found: found[key].view(-1)[3:4].fill_(value))
    for reader in readers(folder).values():
        with pytest.raises(InputError, match=rf"{MATRIX}: its {part} contain NaN or infinity"):
            reader()


def without_row(folder: Path, copy: Path, name: str) -> Path:
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    del config["quantization_config"]["matrices"][name]
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize("name", [MATRIX, "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"])
def test_a_matrix_that_the_config_does_not_describe_is_refused(name, stored, tmp_path):
    """Without this, transformers makes up its weights."""
    folder = without_row(stored[1], tmp_path / "spoiled", name)
    for reader in (*readers(folder).values(), lambda: check_model(folder)):
        with pytest.raises(InputError, match=name):
            reader()


@pytest.mark.parametrize("matrices", [..., None, [], "q_proj", 7, {"model": 7}], ids=str)
def test_descriptions_of_another_shape_are_refused(matrices, artifact_of, tmp_path):
    """By transformers too, which would make up the weights."""
    folder = artifact_of("llama").export("sparse", tmp_path / "sparse", verify=False, progress=False)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["matrices"] = matrices
    if matrices is ...:
        del config["quantization_config"]["matrices"]
    (folder / "config.json").write_text(json.dumps(config))
    for reader in (*readers(folder).values(), lambda: check_model(folder)):
        with pytest.raises(InputError, match=r"Get config\.json again|described by an object|holds no model"):
            reader()


def test_no_description_at_all_is_refused(stored, tmp_path):
    folder = shutil.copytree(stored[1], tmp_path / "spoiled")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["matrices"] = {}
    (folder / "config.json").write_text(json.dumps(config))
    for reader in readers(folder).values():
        with pytest.raises(InputError, match=r"model\.layers\.0"):
            reader()
