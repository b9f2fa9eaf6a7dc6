"""Kept sensitivities: measured again exactly when something changes that they depend on (counted in a fake)."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mspc.errors import InputError
from mspc.planning import measurements
from mspc.planning.measurements import sensitivities
from mspc.planning.sensitivity import RunningMean
from mspc.progress import Silent
from mspc.recipe import Recipe
from mspc.types import Matrix

MATRICES = [[Matrix("0.q.weight", (4, 8)), Matrix("0.k.weight", (4, 8))], [Matrix("1.q.weight", (4, 8))]]
IDENTITY = {"source": {"model.safetensors": "12"}, "calibration": "34"}
RECIPE = Recipe()


@pytest.fixture
def measured(monkeypatch):
    """How often something was measured; the n-th time, every matrix gets n and a third."""
    calls = []

    def measure(model, ids, matrices, *rest):
        calls.append(ids)
        means = {matrix.name: RunningMean() for of_block in matrices for matrix in of_block}
        for mean in means.values():
            mean.add(len(calls) + 1 / 3)
        return means

    monkeypatch.setattr(measurements, "by_gram", measure)
    monkeypatch.setattr(measurements, "by_gradients", measure)
    monkeypatch.setattr(measurements, "by_outliers", measure)
    monkeypatch.setattr(measurements, "by_exponents", lambda model, matrices, reporter: measure(model, (), matrices))
    return calls


def get(folder, recipe=RECIPE, *, identity=IDENTITY, matrices=MATRICES, dtype=torch.float32):
    ids = torch.zeros(4, 8, dtype=torch.int64)
    return sensitivities(
        SimpleNamespace(dtype=dtype, device=torch.device("cpu")), ids, matrices, recipe, identity, folder, Silent()
    )


def test_they_come_back_exactly_and_are_not_measured_again(measured, tmp_path):
    first = get(tmp_path / "new" / "folder")
    assert first == dict.fromkeys(("0.q", "0.k", "1.q"), 4 / 3)
    assert get(tmp_path / "new" / "folder") == first
    assert len(measured) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"sparsity": 0.7}, {"pattern": "N:16"}, {"bits": 4}, {"alpha": 0.2}, {"allocator": "layer-trace-rank"},
        {"criterion": "obs"}, {"damp": 0.1}, {"solver": "mask"}, {"activation_order": True},
    ],
    ids=str,
)  # fmt: skip
def test_another_budget_or_method_finds_them(change, measured, tmp_path):
    get(tmp_path)
    get(tmp_path, replace(RECIPE, **change))
    assert len(measured) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"sensitivity": "gram"}, {"sensitivity": "fisher"}, {"sensitivity_sequences": 2}, {"sensitivity_probes": 2},
        {"seed": 1},
    ],
    ids=str,
)  # fmt: skip
def test_another_measurement_is_another(change, measured, tmp_path):
    assert get(tmp_path) != get(tmp_path, replace(RECIPE, **change))
    assert len(list(tmp_path.iterdir())) == len(measured) == 2


def test_another_model_text_or_precision_is_another(measured, tmp_path):
    get(tmp_path)
    get(tmp_path, identity=IDENTITY | {"source": {"model.safetensors": "13"}})
    get(tmp_path, identity=IDENTITY | {"calibration": "35"})
    get(tmp_path, dtype=torch.bfloat16)
    get(tmp_path, matrices=MATRICES[:1])
    assert len(list(tmp_path.iterdir())) == len(measured) == 5


def test_without_a_folder_nothing_is_kept(measured):
    assert get(None) != get(None)


def test_gradients_see_so_many_sequences_and_grams_see_all(measured, tmp_path):
    get(None, replace(RECIPE, sensitivity_sequences=3))
    get(None, replace(RECIPE, sensitivity_sequences=3, sensitivity="gram"))
    assert [len(ids) for ids in measured] == [3, 4]


@pytest.mark.parametrize("content", ["", "[]", '{"matrices": {"a": {}}}'])
def test_a_damaged_measurement_is_named(content, measured, tmp_path):
    """Oracle: the file in the message, and nothing measured in silence."""
    get(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(content)
    with pytest.raises(InputError, match=file.name):
        get(tmp_path)


def test_grams_depend_on_no_probe(measured, tmp_path):
    """By definition: the gram sensitivity draws nothing, so seed and probes do not make another measurement."""
    get(tmp_path, replace(RECIPE, sensitivity="gram"))
    get(tmp_path, replace(RECIPE, sensitivity="gram", seed=7, sensitivity_probes=2, sensitivity_sequences=3))
    assert len(measured) == 1


@pytest.mark.parametrize("allocator", ["owl", "alpha"])
def test_allocators_with_a_measure_of_their_own_depend_on_no_other(allocator, measured, tmp_path):
    """By definition: what `--sensitivity` and its options say, and the half-width, is nothing to them."""
    recipe = replace(RECIPE, allocator=allocator)
    get(tmp_path, recipe)
    get(tmp_path, replace(recipe, sensitivity="fisher", sensitivity_sequences=3, seed=7, alpha=0.3, sparsity=0.7))
    assert len(measured) == 1
    get(tmp_path)
    get(tmp_path, recipe, dtype=torch.bfloat16)
    get(tmp_path, recipe, matrices=MATRICES[:1])
    get(tmp_path, recipe, identity=IDENTITY | {"source": {"model.safetensors": "13"}})
    assert len(list(tmp_path.iterdir())) == len(measured) == 5


@pytest.mark.parametrize(("allocator", "times"), [("owl", 2), ("alpha", 1)])
def test_outliers_depend_on_the_text_and_exponents_do_not(allocator, times, measured, tmp_path):
    """By definition: a spectrum is that of a weight alone."""
    recipe = replace(RECIPE, allocator=allocator)
    get(tmp_path, recipe)
    get(tmp_path, recipe, identity=IDENTITY | {"calibration": "35"})
    assert len(measured) == times


def test_another_threshold_is_another_measurement(measured, monkeypatch, tmp_path):
    recipe = replace(RECIPE, allocator="owl")
    get(tmp_path, recipe)
    monkeypatch.setattr(measurements, "OUTLIER", 6.0)
    get(tmp_path, recipe)
    assert len(measured) == 2
