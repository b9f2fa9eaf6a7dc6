"""Kept measurements: made again exactly when something changes that they depend on (counted in a fake)."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch

from mspc.errors import InputError
from mspc.model.open import open_model
from mspc.passes.walk import DenseWalk
from mspc.planning import measurements
from mspc.planning.measurements import Measurements
from mspc.planning.sensitivity import RunningMean
from mspc.progress import Silent
from mspc.recipe import Recipe
from mspc.types import Matrix

MATRICES = [[Matrix("0.q.weight", (4, 8)), Matrix("0.k.weight", (4, 8))], [Matrix("1.q.weight", (4, 8))]]
IDENTITY = {"source": {"model.safetensors": "12"}, "calibration": "34"}
SETTINGS = Recipe(sparsity=0.5).settings()


@pytest.fixture
def measured(monkeypatch):
    """The token ids of each measurement. The n-th measurement gives every matrix n + 1/3."""
    calls = []

    def measure(model, ids, matrices, *_):
        calls.append(ids)
        return {matrix.name: RunningMean(len(calls) + 1 / 3) for in_block in matrices for matrix in in_block}

    monkeypatch.setattr(measurements, "by_gram", measure)
    monkeypatch.setattr(measurements, "by_gradients", measure)
    monkeypatch.setattr(measurements, "by_outliers", measure)
    monkeypatch.setattr(measurements, "by_exponents", lambda model, matrices, progress: measure(model, (), matrices))
    return calls


def get(folder, settings=SETTINGS, *, identity=IDENTITY, matrices=MATRICES, dtype=torch.float32):
    model, ids = SimpleNamespace(dtype=dtype, device=torch.device("cpu")), torch.zeros(4, 8, dtype=torch.int64)
    return Measurements(model, ids, matrices, settings, identity, folder, Silent()).sensitivities()


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
    get(tmp_path, replace(SETTINGS, **change))
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
    assert get(tmp_path) != get(tmp_path, replace(SETTINGS, **change))
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


def test_gradients_see_some_sequences_and_grams_see_all(measured, tmp_path):
    get(None, replace(SETTINGS, sensitivity_sequences=3))
    get(None, replace(SETTINGS, sensitivity_sequences=3, sensitivity="gram"))
    assert [len(ids) for ids in measured] == [3, 4]


def test_damaged_files_are_named(llama, tmp_path):
    """Oracle: the file in the message."""
    model, ids = open_model(llama, device=torch.device("cpu")), tiny.ids(2)
    settings = replace(SETTINGS, sensitivity="gram")
    kept = Measurements(model, ids, model.matrices((r"layers\.0",)), settings, IDENTITY, tmp_path, Silent())
    fisher = kept.fisher_factors()
    for measure in (
        kept.sensitivities, kept.fisher_factors, lambda: kept.loss_curves(DenseWalk(model, ids, kept.matrices), fisher)
    ):  # fmt: skip
        before = set(tmp_path.glob("*.json"))
        measure()
        (file,) = set(tmp_path.glob("*.json")) - before or tmp_path.glob("*.safetensors")
        for content in ("", "[]", "{", '{"a": 1}', '{"matrices": {"a": {}}}', '{"a": {"losses": [1]}}'):
            file.write_text(content)
            with pytest.raises(InputError, match=f"{file.name}.* Delete it to measure again"):
                measure()


def test_grams_depend_on_no_probe(measured, tmp_path):
    """By definition: the gram sensitivity draws nothing, so seed and probes do not make another measurement."""
    get(tmp_path, replace(SETTINGS, sensitivity="gram"))
    get(tmp_path, replace(SETTINGS, sensitivity="gram", seed=7, sensitivity_probes=2, sensitivity_sequences=3))
    assert len(measured) == 1


@pytest.mark.parametrize("allocator", ["owl", "alpha"])
def test_allocators_with_a_measure_of_their_own_depend_on_no_other(allocator, measured, tmp_path):
    """By definition: `sensitivity`, its options and `alpha` do not change what owl and alpha measure."""
    own = replace(SETTINGS, allocator=allocator)
    get(tmp_path, own)
    get(tmp_path, replace(own, sensitivity="fisher", sensitivity_sequences=3, seed=7, alpha=0.3, sparsity=0.7))
    assert len(measured) == 1
    get(tmp_path)
    get(tmp_path, own, dtype=torch.bfloat16)
    get(tmp_path, own, matrices=MATRICES[:1])
    get(tmp_path, own, identity=IDENTITY | {"source": {"model.safetensors": "13"}})
    assert len(list(tmp_path.iterdir())) == len(measured) == 5


@pytest.mark.parametrize(("allocator", "times"), [("owl", 2), ("alpha", 1)])
def test_outliers_depend_on_the_text_and_exponents_do_not(allocator, times, measured, tmp_path):
    """By definition: a spectrum is that of a weight alone."""
    own = replace(SETTINGS, allocator=allocator)
    get(tmp_path, own)
    get(tmp_path, own, identity=IDENTITY | {"calibration": "35"})
    assert len(measured) == times


def test_another_threshold_is_another_measurement(measured, monkeypatch, tmp_path):
    own = replace(SETTINGS, allocator="owl")
    get(tmp_path, own)
    monkeypatch.setattr(measurements, "OUTLIER", 6.0)
    get(tmp_path, own)
    assert len(measured) == 2
