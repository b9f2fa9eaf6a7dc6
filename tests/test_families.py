"""Every architecture from the checkpoint to the dense export, with transformers itself as the oracle."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import mspc
from mspc.errors import InputError
from mspc.text.tokens import calibration_tokens


def compressed(source: Path, out: Path, calibration: Path, **changes: Any) -> mspc.Artifact:
    values = {"sparsity": 0.5, "bits": 4, "group_size": 32, "num_sequences": 8, "sensitivity_sequences": 4}
    return tiny.compress(source, out, calibration, **values | changes)


def weight_of(model: PreTrainedModel, row: dict[str, Any]) -> torch.Tensor:
    """The matrix (O, I) of a manifest's row in a loaded model."""
    module = model.get_submodule(row["name"])
    return module.weight.T if isinstance(module, Conv1D) else module.weight


@dataclass
class Case:
    """A model that was compressed with the defaults, and exported."""

    family: str
    source: Path
    artifact: mspc.Artifact
    dense: Path


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def case(request, folder_of, calibration, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    source = folder_of(request.param)
    artifact = compressed(source, folder / "artifact", calibration)
    return Case(request.param, source, artifact, artifact.export("dense", folder / "dense"))


def test_manifest_has_every_matrix_in_execution_order_and_the_exact_sparsity(case):
    """Oracle: the table of each architecture's layers, and the sizes of the whole model's weights."""
    manifest, whole = case.artifact.manifest, tiny.reference(case.source)
    expected = [
        f"{tiny.blocks_name(case.family)}.{block}.{name}"
        for block in range(2)
        for group in tiny.GROUPS[case.family]
        for name in group
    ]
    assert [row["name"] for row in manifest["matrices"]] == expected
    shapes = [list(weight_of(whole, row).shape) for row in manifest["matrices"]]
    assert [row["shape"] for row in manifest["matrices"]] == shapes
    total = sum(math.prod(shape) for shape in shapes)
    assert sum(row["pruned"] for row in manifest["matrices"]) == total // 2
    assert manifest["sparsity"] == {"requested": 0.5, "achieved": 0.5}
    assert all(row["bits"] == 4 and row["num_tokens"] == 8 * tiny.LENGTH for row in manifest["matrices"])


def test_the_plan_follows_the_loss_curves(case):
    """The sensitivity of a plan by curves is a predicted loss: finite, above zero where something goes; never even."""
    rows = case.artifact.manifest["matrices"]
    assert all(0 < row["sensitivity"] < math.inf for row in rows if row["pruned"])
    assert len({row["sparsity"] for row in rows}) > 2


def test_dense_export_is_the_artifact(case, test_text):
    """Oracle: transformers on the exported folder. The source scores otherwise, so this compares compressed models."""
    after = tiny.agreed_perplexity(case.dense, test_text)
    assert tiny.agreed_perplexity(case.artifact.path, test_text, case.dense) == pytest.approx(after, rel=1e-5)
    assert tiny.agreed_perplexity(case.source, test_text) != pytest.approx(after, rel=1e-4)


def test_dense_export_has_the_zeros_and_the_grid_of_the_manifest(case):
    """Oracle: counting, in the model that transformers loads."""
    whole = tiny.reference(case.dense)
    for row in case.artifact.manifest["matrices"]:
        weight = weight_of(whole, row)
        assert int((weight == 0).sum()) == row["zeros"] >= row["pruned"], row["name"]
        assert row["pruned"] == round(row["sparsity"] * weight.numel())
        assert max(len(group.unique()) for group in weight.reshape(-1, 32)) <= 2**4, row["name"]


def test_what_is_not_compressed_stays_bit_by_bit(case):
    """Oracle: the tensors of the source's files. Every compressed one differs."""
    before, after = tiny.tensors(case.source), tiny.tensors(case.dense)
    compressed = {row["tensor"] for row in case.artifact.manifest["matrices"]}
    assert before.keys() == after.keys() > compressed
    for key in before:
        assert torch.equal(before[key], after[key]) == (key not in compressed), key
        assert before[key].dtype == after[key].dtype


def test_each_matrix_was_solved_on_what_the_compressed_ones_before_it_give(case, calibration):
    """Oracle: the output error on hooked inputs of a transformers model in which all matrices before were replaced."""
    whole, compressed = tiny.reference(case.source), tiny.reference(case.dense)
    ids = calibration_tokens(tiny.byte_tokenizer(), str(calibration), 8, tiny.LENGTH, seed=0).ids
    for row in case.artifact.manifest["matrices"]:
        weight, result = weight_of(whole, row), weight_of(compressed, row)
        inputs = tiny.inputs_of(whole, ids, [row["name"]])[row["name"]]
        error = float((inputs @ (weight - result).T).square().sum() / (inputs @ weight.T).square().sum())
        assert row["output_error"] == pytest.approx(error, rel=1e-3), row["name"]
        weight.copy_(result)


@pytest.mark.parametrize(("solver", "bits", "group_size"), [("obs", 4, 32), ("mask", 16, None)])
def test_two_of_four(solver, bits, group_size, llama, calibration, test_text, tmp_path):
    """Oracle: counting in every four weights of a row; perplexity by transformers."""
    options = {"pattern": "2:4", "solver": solver, "bits": bits, "group_size": group_size}
    artifact = tiny.compress(llama, tmp_path / "out", calibration, **options)
    dense = artifact.export("dense", tmp_path / "dense")
    whole = tiny.reference(dense)
    for row in artifact.manifest["matrices"]:
        assert int((weight_of(whole, row).reshape(-1, 4) != 0).sum(1).max()) == 2
        assert (row["pattern"], row["sensitivity"]) == ("2:4", None)
    assert artifact.manifest["sparsity"]["achieved"] == 0.5
    tiny.agreed_perplexity(artifact.path, test_text, dense)


def test_n_of_sixteen(llama, calibration, tmp_path):
    """Oracle: counting in every sixteen weights of a row. The total is as near as one N in the smallest matrix."""
    artifact = compressed(llama, tmp_path / "out", calibration, sparsity=0.6, pattern="N:16")
    rows = artifact.manifest["matrices"]
    whole = tiny.reference(artifact.export("dense", tmp_path / "dense"))
    for row in rows:
        keep = int(row["pattern"].removesuffix(":16"))
        kept = (weight_of(whole, row).reshape(-1, 16) != 0).sum(1)
        assert int(kept.max()) == keep
        assert row["pruned"] == math.prod(row["shape"]) * (16 - keep) // 16
    assert len({row["pattern"] for row in rows}) > 2
    sizes = [math.prod(row["shape"]) for row in rows]
    assert abs(artifact.manifest["sparsity"]["achieved"] - 0.6) <= min(sizes) / 16 / sum(sizes)


def mean_squared_gradients(whole: PreTrainedModel, names: list[str], ids: torch.Tensor) -> list[float]:
    weights = [whole.get_submodule(name).weight.requires_grad_(True) for name in names]
    of_sequences = [
        [float(g.square().mean()) for g in torch.autograd.grad(tiny.losses(whole, sequence[None]).mean(), weights)]
        for sequence in ids[:4]
    ]
    return torch.tensor(of_sequences).mean(0).tolist()


def mean_squared_inputs(whole: PreTrainedModel, names: list[str], ids: torch.Tensor) -> list[float]:
    return [float(inputs.square().mean()) for inputs in tiny.inputs_of(whole, ids, names).values()]


@pytest.mark.parametrize(("sensitivity", "oracle"), [("fisher", mean_squared_gradients), ("gram", mean_squared_inputs)])
def test_other_sensitivities(sensitivity, oracle, llama, calibration, tmp_path):
    """Oracle: autograd, and hooks, on the whole transformers model and the same calibration sequences."""
    asked = {"allocator": "trace-rank", "sensitivity": sensitivity}
    rows = compressed(llama, tmp_path / "out", calibration, **asked).manifest["matrices"]
    ids = calibration_tokens(tiny.byte_tokenizer(), str(calibration), 8, tiny.LENGTH, 0).ids
    expected = oracle(tiny.reference(llama), [row["name"] for row in rows], ids)
    assert [row["sensitivity"] for row in rows] == pytest.approx(expected, rel=1e-4)


def test_skipped_matrices_stay_dense(llama, calibration, tmp_path):
    """Oracle: the tensors of the source. What is skipped does not count for the sparsity."""
    artifact = compressed(llama, tmp_path / "out", calibration, skip=("down_proj", r"layers\.0\.self_attn"))
    before, after = tiny.tensors(llama), tiny.tensors(artifact.export("dense", tmp_path / "dense"))
    changed = [key.removeprefix("model.layers.") for key in before if not torch.equal(before[key], after[key])]
    expected = [f"{block}.mlp.{name}_proj.weight" for block in (0, 1) for name in ("gate", "up")]
    assert sorted(changed) == sorted([*expected, *(f"1.self_attn.{name}_proj.weight" for name in "qkvo")])
    assert artifact.manifest["sparsity"]["achieved"] == 0.5


def test_fused_experts_that_cannot_be_compressed_are_refused_by_name(folder_of, calibration, tmp_path, monkeypatch):
    monkeypatch.setattr("mspc.model.matrices.expert_matrices", lambda *_: [])
    with pytest.raises(InputError) as caught:
        compressed(folder_of("mixtral"), tmp_path / "out", calibration)
    for part in ("mlp.experts.gate_up_proj (4, 128, 32)", "mlp.experts.down_proj (4, 32, 64)", "--skip experts"):
        assert part in str(caught.value)


@pytest.mark.parametrize("sensitivity", ["hutchinson", "fisher"])
def test_mixture_of_experts_without_its_experts(sensitivity, folder_of, calibration, test_text, tmp_path):
    """Oracle: transformers. Attention is compressed, experts and routers are not; names in the files are the old."""
    source = folder_of("mixtral")
    tiny.agreed_perplexity(source, test_text)
    options = {"skip": ("experts",), "allocator": "trace-rank", "sensitivity": sensitivity}
    artifact = compressed(source, tmp_path / "out", calibration, **options)
    dense = artifact.export("dense", tmp_path / "dense")
    before, after = tiny.tensors(source), tiny.tensors(dense)
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {f"model.layers.{block}.self_attn.{name}_proj.weight" for block in (0, 1) for name in "qkvo"}
    tiny.agreed_perplexity(artifact.path, test_text, dense)
