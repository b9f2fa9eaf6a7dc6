"""Reconstruction against hooks on whole transformers models, float64 least squares, and bytes of undisturbed runs."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_resume import content
from torch import nn

import mspc
from mspc.errors import InputError
from mspc.formats import layout
from mspc.model.hub import load_tokenizer
from mspc.model.open import open_model
from mspc.passes.blocks import Call
from mspc.pipeline import solve_blocks
from mspc.pipeline.reconstruct import BATCHES_PER_VALIDATION_BATCH, Sample, tune
from mspc.storage.artifact import read_matrix
from mspc.storage.manifest import MatrixEntry
from mspc.text.tokens import calibration_tokens
from mspc.types import CompressedLinear

CPU = torch.device("cpu")
SEQUENCES, STEPS = 16, 20

PARTS = {
    "llama": ["self_attn", "mlp"],
    "gemma2": ["self_attn", "mlp"],
    "gpt2": ["attn", "mlp"],
    "gpt_neox": ["attention", "mlp"],
    "opt": ["self_attn"],  # its fc1 and fc2 are children of the block each
}

Compress = Callable[..., mspc.Artifact]


@pytest.fixture(scope="module")
def compress(folder_of: Callable[[str], Path], calibration: Path) -> Compress:
    """`compress(out, family, **recipe)`: a quick tuned artifact; `run` are options of the call."""

    def make(out: Path, family: str = "llama", run: dict[str, Any] | None = None, **values: Any) -> mspc.Artifact:
        values = {"solver": "obs", "allocator": "uniform", "sparsity": 0.6, "reconstruct": STEPS} | values
        recipe = mspc.Recipe(calibration=str(calibration), num_sequences=SEQUENCES, sequence_length=32, **values)
        return mspc.compress(folder_of(family), recipe, out=out, **{"progress": False} | (run or {}))

    return make


@pytest.fixture(scope="module")
def tuned(compress: Compress, tmp_path_factory: pytest.TempPathFactory) -> mspc.Artifact:
    return compress(tmp_path_factory.mktemp("tuned") / "out")


@pytest.fixture(scope="module")
def untuned(compress: Compress, tmp_path_factory: pytest.TempPathFactory) -> mspc.Artifact:
    return compress(tmp_path_factory.mktemp("untuned") / "out", reconstruct=0)


@pytest.mark.parametrize(
    ("family", "propagation"),
    [
        *(("llama", 0.0), ("llama", 1.0), ("gpt2", 1.0), ("opt", 0.0)),
        *(pytest.param(family, 1.0, marks=pytest.mark.slow) for family in ("gemma2", "gpt_neox")),
    ],
)
def test_errors_on_validation_text_are_those_of_the_whole_models_and_fell(
    family, propagation, compress, folder_of, calibration, tmp_path
):
    """Oracle: hooks on the dense model and on the artifact as whole transformers models, on the last sequences."""
    artifact = compress(tmp_path / "out", family, propagation=propagation)
    parts = artifact.manifest["reconstruction"]
    names = [part["part"] for part in parts]
    assert names == [f"{tiny.blocks_name(family)}.{block}.{name}" for block in range(2) for name in PARTS[family]]
    ids = calibration_tokens(load_tokenizer(folder_of(family)), str(calibration), SEQUENCES, 32, 0).ids
    ids = ids[-SEQUENCES // BATCHES_PER_VALIDATION_BATCH :]
    dense = tiny.outputs_of(tiny.reference(folder_of(family)), ids, names)
    with open_model(artifact.path, device=CPU, eager=True).whole() as model:
        actual = tiny.outputs_of(model, ids, names)
    for part in parts:
        wanted = dense[part["part"]]
        error = float((actual[part["part"]] - wanted).square().sum() / wanted.square().sum())
        assert part["error_after"] == pytest.approx(error, rel=1e-3)
        assert part["error_after"] <= part["error_before"]
        assert part["tuned"] == (part["error_after"] < part["error_before"])
    assert any(part["tuned"] for part in parts)


def stored(artifact: mspc.Artifact, row: dict[str, Any]) -> CompressedLinear:
    return read_matrix(artifact.path, MatrixEntry.from_row(row, artifact.path))


def rows(artifact: mspc.Artifact) -> list[dict[str, Any]]:
    return artifact.manifest["matrices"]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_masks_are_obeyed_and_rows_describe_what_is_stored(pattern, compress, tmp_path):
    """Oracles: the masks of the run without tuning, which the first block shares; the stored tensors themselves."""
    sparsity = {"sparsity": 0.5, "pattern": pattern}
    before = compress(tmp_path / "before", reconstruct=0, **sparsity)
    after = compress(tmp_path / "after", **sparsity)
    for old, new in zip(rows(before), rows(after), strict=True):
        was, now = stored(before, old), stored(after, new)
        assert bool((now.weight[~now.mask] == 0).all())
        assert not torch.equal(was.weight, now.weight)
        assert new["sha256"] == layout.digest(now)
        assert new["zeros"] == int((now.weight == 0).sum()) >= new["pruned"] == old["pruned"]
        assert new["bytes"] == old["bytes"] == sum(t.nbytes for t in layout.pack(now, now.weight.dtype).values())
        assert list(new) == list(old)
        if ".layers.0." in new["name"]:
            assert torch.equal(was.mask, now.mask)
            assert new["output_error"] != old["output_error"]


def test_the_error_of_a_tuned_matrix_is_that_of_its_stored_weights(folder_of, calibration, tuned):
    """Oracle: float64 products with what the first matrix reads in the transformers model."""
    row, folder = rows(tuned)[0], folder_of("llama")
    ids = calibration_tokens(load_tokenizer(folder), str(calibration), SEQUENCES, 32, 0).ids
    inputs = tiny.inputs_of(tiny.reference(folder), ids, [row["name"]])[row["name"]].double()
    dense, result = tiny.tensors(folder)[row["tensor"]].double(), stored(tuned, row).weight.double()
    error = (inputs @ (dense - result).T).square().sum() / (inputs @ dense.T).square().sum()
    assert row["output_error"] == pytest.approx(float(error), rel=1e-4)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_linear_part_reaches_the_least_squares_answer(transposed):
    """Oracle: for every row, float64 least squares on the inputs that its mask keeps."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(12) + 0.3 * torch.randn(12, 12, generator=generator)
    inputs = torch.randn(1, 200, 12, generator=generator) @ mixing
    wanted = inputs @ torch.randn(12, 5, generator=generator)
    mask = torch.rand(5, 12, generator=generator) < 0.6
    child = nn.Linear(12, 5, bias=False).requires_grad_(False)
    child.weight.mul_(mask)
    if transposed:  # as Conv1D stores it
        child.forward = lambda x: x @ child.weight
        child.weight = nn.Parameter(child.weight.T.contiguous(), requires_grad=False)
    kept = {"weight": mask.T if transposed else mask}
    samples = [Sample(Call((inputs,), {}), wanted)] * 2000
    result = tune(child, kept, samples)["weight"]
    weight = (result.T if transposed else result).double()
    best = torch.zeros(5, 12, dtype=torch.float64)
    for row, keeps in enumerate(mask):
        best[row, keeps] = torch.linalg.lstsq(inputs[0][:, keeps].double(), wanted[0, :, row].double()).solution
    torch.testing.assert_close(weight, best, rtol=0.01, atol=0.01)
    assert bool((weight[~mask] == 0).all())


def test_twice_the_same_bytes_and_a_summary(compress, tuned, tmp_path, caplog):
    """With activations on disk the second time."""
    with caplog.at_level("INFO", logger="mspc"):
        again = compress(tmp_path / "again", run={"spill": tmp_path / "spill"})
    assert content(again.path) == content(tuned.path)
    parts = again.manifest["reconstruction"]
    before, after = (sum(part[f"error_{when}"] for part in parts) / 4 for when in ("before", "after"))
    count = sum(part["tuned"] for part in parts)
    assert f"Reconstruction: {count} of 4 parts are nearer to the dense model on validation text" in caplog.text
    assert f"mean relative error {before:.4f} before and {after:.4f} after, " in caplog.text


def test_a_resumed_run_ends_with_the_same_bytes(compress, tuned, tmp_path, monkeypatch):
    """Cut off while the second block is tuned. Oracle: the undisturbed run."""
    original = solve_blocks.reconstruct

    def cut_off(model: object, index: int, *args: Any) -> Iterator[Any]:
        if index == 1:
            raise KeyboardInterrupt
        return original(model, index, *args)

    monkeypatch.setattr(solve_blocks, "reconstruct", cut_off)
    with pytest.raises(KeyboardInterrupt):
        compress(tmp_path / "out")
    monkeypatch.setattr(solve_blocks, "reconstruct", original)
    assert not (tmp_path / "out" / "mspc.json").exists()
    compress(tmp_path / "out", run={"resume": True})
    assert content(tmp_path / "out") == content(tuned.path)


def test_what_gains_nothing_keeps_its_weights(compress, tmp_path, monkeypatch, caplog):
    """Steps that are far too long. Oracle: steps of no length, after which nothing is lower."""
    monkeypatch.setattr("mspc.pipeline.reconstruct.RATE", 0.0)
    still = compress(tmp_path / "still")
    monkeypatch.setattr("mspc.pipeline.reconstruct.RATE", 100.0)
    with caplog.at_level("INFO", logger="mspc"):
        wild = compress(tmp_path / "wild")
    assert "Reconstruction: 0 of 4 parts are nearer" in caplog.text
    for part in wild.manifest["reconstruction"]:
        assert not part["tuned"]
        assert part["error_after"] == part["error_before"]
    files = content(wild.path)
    assert {name: files[name] for name in files if name.startswith("matrices/")} == {
        name: data for name, data in content(still.path).items() if name.startswith("matrices/")
    }
    assert wild.manifest["matrices"] == still.manifest["matrices"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits_per_weight": 3.0}, r"a size budget, here 3 bits per weight, chooses bits\. Leave reconstruct out"),
        ({"target_size": "2GB"}, r"a size budget, here 2GB, chooses bits\."),
        ({}, r"a size budget, here 4\.25 bits per weight, chooses bits\. .* such as sparsity 0\.5\."),
        ({"reconstruct": -1}, r"reconstruct must be at least 0, not -1"),
        ({"sparsity": 0.5, "num_sequences": 1}, r"reconstruct needs num_sequences above 1"),
    ],
)
def test_what_cannot_be_tuned_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        mspc.Recipe(**{"reconstruct": 1} | values)


def test_a_plan_that_quantizes_is_refused(compress, untuned, tmp_path):
    plan = json.loads((untuned.path / "plan.json").read_text())
    plan["matrices"][1] |= {"bits": 4, "group_size": 32}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    options = {"plan": str(tmp_path / "plan.json"), "sparsity": None, "allocator": None}
    with pytest.raises(InputError, match=r"k_proj: the plan quantizes it to 4 bits, but reconstruct tunes "):
        compress(tmp_path / "out", **options)
