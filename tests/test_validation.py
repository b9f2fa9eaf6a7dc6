"""Validating plans: divergences against plain transformers models with the same weights, and what is made of them."""

import json

import pytest
import tiny
import torch
from torch import Tensor

import mspc
from mspc.errors import InputError
from mspc.model.hub import load_tokenizer
from mspc.model.open import open_model
from mspc.passes.blocks import batches_of
from mspc.passes.walk import DenseWalk, walk
from mspc.planning import planner as planning
from mspc.planning.allocation import allocate, candidates, planned_sparsity
from mspc.planning.curve import Curve
from mspc.planning.curve_measurement import SPARSITIES
from mspc.planning.measurements import Measurements
from mspc.planning.validation import validate_plans
from mspc.progress import Silent
from mspc.recipe import Recipe
from mspc.solvers.admm import error_path
from mspc.solvers.quadratic import quadratic
from mspc.text.tokens import calibration_tokens
from mspc.types import BITS, Grid, Matrix, PlannedMatrix, Target, Unstructured

CPU = torch.device("cpu")
NAMES = {"0.q": (8, 16), "0.up": (24, 16), "1.q": (8, 16), "1.up": (24, 16)}
MODEL = [[Matrix(f"{name}.weight", NAMES[name]) for name in NAMES if name.startswith(block)] for block in "01"]


def divergence(dense: torch.nn.Module, other: torch.nn.Module, ids: Tensor) -> float:
    """Mean KL by torch, in float64."""
    with torch.no_grad():
        logs = [torch.log_softmax(m(input_ids=ids, use_cache=False).logits.double(), -1) for m in (dense, other)]
    return float(torch.nn.functional.kl_div(logs[1], logs[0], log_target=True, reduction="sum")) / ids.numel()


def curves_like(sizes: list[float]) -> dict[str, Curve]:
    """size * s^3, and quantization that costs more with fewer bits."""
    return {
        name: Curve(
            SPARSITIES,
            tuple(size * s**3 for s in SPARSITIES),
            {bits: ((0.0, size * 4.0**-bits), (0.6, size * 4.0**-bits)) for bits in BITS},
        )
        for name, size in zip(NAMES, sizes, strict=True)
    }


def test_divergences_are_those_of_models_with_the_approximate_weights(llama):
    """Oracle: transformers with the weights replaced, one plan each; the second skips block 0."""
    model, ids, validation = open_model(llama, device=CPU), tiny.ids(4), tiny.ids(3, seed=1)
    recipe = Recipe(sparsity=0.5).settings()
    for skip in ((), ("layers.0",)):
        matrices = model.matrices(skip)
        flat = [matrix for of_block in matrices for matrix in of_block]
        fisher = Measurements(model, ids, matrices, recipe, {}, None, Silent()).fisher_factors()
        plans = {
            name: [PlannedMatrix(m.name, m.shape, Target(Unstructured(sparsity), Grid(4, 16))) for m in flat]
            for name, sparsity in (("dense", 0.0), ("half", 0.5))
        }
        tried = validate_plans(DenseWalk(model, ids, matrices), validation, fisher, plans, recipe.damp, Silent())
        dense, pruned = tiny.reference(llama), tiny.reference(llama)
        for visit in walk(model, batches_of(model, ids), matrices):
            form = quadratic(visit.weight, visit.stats, fisher[visit.matrix.name], recipe.damp, "q")
            weight, _ = next(error_path(form, [Unstructured(0.5)]))
            pruned.get_parameter(visit.matrix.parameter).copy_(weight)
        assert tried["dense"] == pytest.approx(0.0, abs=1e-6)  # nothing is quantized
        assert tried["half"] == pytest.approx(divergence(dense, pruned, validation), rel=1e-3)
        assert tried["half"] > 1e-3


@pytest.mark.parametrize("sparsity", [0.3, 0.55])
def test_candidates_have_one_size_and_come_from_uniform_and_curves(sparsity):
    recipe, curves = Recipe(sparsity=sparsity).settings(), curves_like([4.0, 2.0, 1.0, 0.5])
    plans = candidates(recipe, MODEL, curves)
    assert next(iter(plans)) == "curves"
    assert plans["curves"] == allocate(Recipe(sparsity=sparsity, allocator="curves").settings(), MODEL, {}, curves)
    total = sum(m.numel for m in plans["curves"])
    for plan in plans.values():
        assert sum(round(m.target.pattern.sparsity * m.numel) for m in plan) == round(sparsity * total)
    for i, matrix in enumerate(plans["curves"]):
        whole, less = (plans[name][i].target.pattern.sparsity - sparsity for name in ("curves", "curves x0.75"))
        assert less == pytest.approx(0.75 * whole, abs=1 / matrix.numel + 1e-2)


def test_hopeless_and_equal_plans_are_not_validated():
    recipe = Recipe(sparsity=0.5).settings()
    steep = candidates(recipe, MODEL, curves_like([1e6, 1.0, 1e3, 1.0]))
    assert list(steep) == ["curves"]  # a quarter of the way back to uniform costs more than twice as much
    alike = candidates(recipe, MODEL, curves_like([8.0, 24.0, 8.0, 24.0]))  # each weight is worth the same
    assert list(alike) == ["curves"]
    assert planned_sparsity(alike["curves"]) == pytest.approx(0.5)


@pytest.mark.parametrize("best", ["curves", "curves x0.75"])
def test_the_plan_that_did_best_is_used_and_recorded(best, llama, calibration, tmp_path, monkeypatch):
    seen = {}

    def tried(dense, validation, fisher, plans, options, progress):
        seen.update(validation=validation, plans=plans)
        return {name: float(name != best) for name in plans}

    monkeypatch.setattr(planning, "validate_plans", tried)
    recipe = Recipe(sparsity=0.5, calibration=str(calibration), num_sequences=8, sequence_length=tiny.LENGTH)
    artifact = mspc.compress(llama, recipe, out=tmp_path / "out", progress=False)
    assert artifact.manifest["allocation"]["chosen"] == best
    assert artifact.manifest["allocation"]["tried"][best] == 0
    rows = json.loads((tmp_path / "out" / "plan.json").read_text())["matrices"]
    assert [row["sparsity"] for row in rows] == [m.target.pattern.sparsity for m in seen["plans"][best]]
    tokens = calibration_tokens(load_tokenizer(llama), str(calibration), 9, tiny.LENGTH, 0).ids
    assert torch.equal(seen["validation"], tokens[8:])  # not among those that calibrate
    first = calibration_tokens(load_tokenizer(llama), str(calibration), 8, tiny.LENGTH, 0)
    assert torch.equal(first.ids, tokens[:8])
    assert artifact.manifest["calibration"]["sha256"] == first.sha256


def test_without_validation_text_the_lowest_predicted_loss_decides_and_a_note_says_so(
    llama, calibration, tmp_path, caplog
):
    recipe = Recipe(
        sparsity=0.5, calibration=str(calibration), num_sequences=93, sequence_length=tiny.LENGTH
    )  # of 3000 tokens
    with caplog.at_level("INFO", "mspc"):
        artifact = mspc.compress(llama, recipe, out=tmp_path / "out", progress=False)
    assert artifact.manifest["allocation"] == {"chosen": "curves", "tried": {}}
    assert "too little text to validate plans" in caplog.text


def test_divergence_of_an_evaluation(llama, calibration, tmp_path):
    """Oracle: both models whole in transformers."""
    other = tiny.build(tmp_path / "other", "llama", seed=3)
    result = mspc.evaluate(other, str(calibration), sequence_length=tiny.LENGTH, against=llama, progress=False)
    ids = torch.tensor(load_tokenizer(llama)(calibration.read_text())["input_ids"])
    windows = ids[: result.windows * tiny.LENGTH].view(-1, tiny.LENGTH)
    expected = divergence(tiny.reference(llama), tiny.reference(other), windows)
    assert result.divergence == pytest.approx(expected, rel=1e-4)
    same = mspc.evaluate(llama, str(calibration), sequence_length=tiny.LENGTH, against=llama, progress=False)
    assert same.divergence == 0
    assert mspc.evaluate(llama, str(calibration), sequence_length=tiny.LENGTH, progress=False).divergence is None
    deeper = tiny.build(tmp_path / "deeper", "llama", num_hidden_layers=3)
    with pytest.raises(InputError, match="differ in blocks or vocabulary"):
        mspc.evaluate(deeper, str(calibration), sequence_length=tiny.LENGTH, against=llama, progress=False)
