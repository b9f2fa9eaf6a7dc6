"""The search for a plan: against brute force over all plans, and against the runs and divergences that it foresees."""

import json
import random
from itertools import product

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import few
from typer.testing import CliRunner

import mspc
from mspc.cli.main import app
from mspc.errors import InputError
from mspc.model.hub import load_tokenizer
from mspc.model.open import open_model
from mspc.passes.perplexity import measure
from mspc.planning import search as searching
from mspc.planning.allocation import cheapest_levels, planned_levels
from mspc.planning.curve import Curve
from mspc.planning.curve_measurement import SPARSITIES
from mspc.planning.evolution import Space, evolve
from mspc.planning.measurements import Measurements
from mspc.planning.plan_file import write_plan
from mspc.planning.search import SearchResult, dense_predictions, judge_of, make_weights, search
from mspc.progress import Silent
from mspc.recipe import Recipe
from mspc.text.tokens import calibration_tokens
from mspc.types import Matrix, PlannedMatrix, flatten

CPU = torch.device("cpu")
SHORT = {
    "num_sequences": 8,
    "sequence_length": tiny.LENGTH,
    "sparsity": 0.5,
    "allocator": "search",
    "search_minutes": 0.02,
    "iterations": 4,
}
TWO = (r"layers\.0", "mlp", "[kv]_proj")
"""Skips all but two matrices, q and o of the last block."""


def counting_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that advances one second per call, so that a search is the same every time."""
    seconds = iter(range(10**6))
    monkeypatch.setattr(searching.time, "monotonic", lambda: float(next(seconds)))


def divergence_of(artifact: mspc.Artifact, model, validation: torch.Tensor) -> float:
    *_, result = measure(open_model(artifact.path, device=CPU), validation, model)
    return result.divergence


class Tiny:
    """A model and what a search of it needs."""

    def __init__(self, folder, skip=(), **recipe) -> None:
        self.recipe = Recipe(skip=skip, **SHORT | recipe).settings()
        self.model, self.validation = open_model(folder, device=CPU), tiny.ids(3, seed=1)
        self.flat = flatten(self.model.matrices(skip))
        self.use(tiny.ids(8))

    def use(self, ids) -> None:
        """Measure and solve on these ids (N, T)."""
        matrices = self.model.matrices(self.recipe.skip)
        self.measurements = Measurements(self.model, ids, matrices, self.recipe, {}, None, Silent())
        self.fisher = self.measurements.fisher_factors()

    def weights(self, plan, window):
        return make_weights(self.measurements, self.fisher, plan, window, lambda name: False)

    def divergence(self, plan) -> float:
        """The divergence of a plan in a walk of its own."""
        dense, weights = dense_predictions(self.model, self.validation), self.weights(plan, 0)
        with torch.no_grad(), self.model.whole():
            return judge_of(self.model, self.validation, dense, self.flat, weights)(plan, range(len(self.validation)))

    def search(self, start) -> SearchResult:
        return search(self.measurements, self.validation, self.fisher, start)


# Evolution


@few
@given(st.lists(st.sampled_from([1, 2, 6, 7]), min_size=1, max_size=8), st.data())
def test_switched_plans_keep_ranges_and_budget(sizes, data):
    """Oracle: the sum. And nothing is pruned that could be kept."""
    levels = tuple(data.draw(st.integers(0, 16)) for _ in sizes)
    ranges = [range(max(level - 2, 0), min(level + 2, 16) + 1) for level in levels]
    spare = data.draw(st.integers(0, 3))
    space = Space(sizes, ranges, sum(s * level for s, level in zip(sizes, levels, strict=True)) - spare)
    plan = space.switched(levels, random.Random(data.draw(st.integers(0, 99))))
    assert all(level in allowed for level, allowed in zip(plan, ranges, strict=True))
    over = space.excess(plan)
    assert over >= 0
    if plan != levels:
        assert all(size > over for size, level, r in zip(sizes, plan, ranges, strict=True) if level - 1 in r)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_evolution_finds_the_best_plan(seed):
    """Oracle: all plans. Costs are convex, with some that two matrices share."""
    rng = random.Random(seed)
    sizes, ranges = [1, 2, 2, 6, 6], [range(5)] * 5
    costs, pairs = [rng.random() for _ in sizes], [rng.random() / 4 for _ in sizes]

    def judge(plan, sequences):
        alone = sum(s * c * level**2 for s, c, level in zip(sizes, costs, plan, strict=True))
        return alone + sum(p * a * b for p, a, b in zip(pairs, plan, plan[1:], strict=False))

    space = Space(sizes, ranges, 34)
    best = min((p for p in product(*ranges) if space.excess(p) >= 0), key=lambda p: judge(p, ()))
    history = [found for found, _ in zip(evolve((2,) * 5, judge, space, 4, random.Random(0)), range(60), strict=False)]
    assert history[-1] == (best, judge(best, ()))
    values = [value for _, value in history]
    assert values == sorted(values, reverse=True)
    assert values[0] == judge((2,) * 5, ())
    again = evolve((2,) * 5, judge, space, 4, random.Random(0))
    assert [next(again) for _ in history] == history


def test_evolution_judges_on_all_sequences_in_the_end():
    """A plan that is better on some sequences only replaces no parent. Known plans are never judged."""
    asked = []

    def judge(plan, sequences):
        asked.append((plan, len(sequences)))
        return 0.0 if plan == (8, 8) or len(sequences) < 16 else 1.0

    space = Space([4, 4], [range(6, 11)] * 2, 64)
    states = evolve((8, 8), judge, space, 16, random.Random(0), known=[(7, 9)])
    assert [next(states) for _ in range(5)] == [((8, 8), 0.0)] * 5
    assert {plan for plan, _ in asked} == {(8, 8), (6, 10), (9, 7), (10, 6)}
    assert {number for _, number in asked} == {1, 4, 16}


def test_evolution_ends_where_nothing_can_be_switched():
    assert list(evolve((3,), lambda plan, _: 1.0, Space([5], [range(1, 6)], 15), 2, random.Random(0))) == [((3,), 1.0)]


# Levels


@few
@given(st.lists(st.floats(0.1, 10), min_size=3, max_size=3), st.sampled_from([0.0, 0.3, 0.5, 0.97]))
def test_the_first_plan_is_the_cheapest_in_sixteenths(costs, sparsity):
    """Oracle: all plans of three matrices."""
    sizes, recipe = (1, 2, 1), Recipe(sparsity=sparsity).settings()
    matrices = [[Matrix(f"{i}.weight", (16 * size, 16)) for i, size in enumerate(sizes)]]
    of_flat = [Curve(SPARSITIES, tuple(cost * s**2 for s in SPARSITIES)) for cost in costs]
    curves = {matrix.name: curve for matrix, curve in zip(matrices[0], of_flat, strict=True)}
    losses = [[curve.at(level / 16) for level in range(17)] for curve in of_flat]

    def loss(plan):
        return sum(of[level] for of, level in zip(losses, plan, strict=True))

    enough = [p for p in product(range(17), repeat=3) if p[0] + 2 * p[1] + p[2] >= sparsity * 64]
    levels = cheapest_levels(recipe, matrices, curves)
    assert levels in enough
    assert loss(levels) == pytest.approx(min(map(loss, enough)))
    plan = planned_levels(recipe, matrices, levels, curves)
    assert sum(round(m.target.pattern.sparsity * m.numel) for m in plan) == round(sparsity * 1024)


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("llama", {"pattern": "N:16"}),
        ("llama", {"bits": 4, "group_size": 16}),
        ("llama", {"solver": "admm", "propagation": 0.0}),
    ],
)
def test_levels_are_what_the_run_itself_makes(family, recipe, folder_of, calibration, tmp_path):
    """Oracle: the artifact of a run by the same plan, and its divergence by `mspc.passes.perplexity`."""
    folder = folder_of(family)
    case = Tiny(folder, **recipe)
    model, plan = case.model, tuple(random.Random(0).choices(range(4, 12), k=len(case.flat)))
    case.use(calibration_tokens(load_tokenizer(folder), str(calibration), 8, tiny.LENGTH, 0).ids)
    targets = [searching.target_of(case.recipe, level, m.shape[1]) for level, m in zip(plan, case.flat, strict=True)]
    rows = [PlannedMatrix(m.name, m.shape, t) for m, t in zip(case.flat, targets, strict=True)]
    write_plan(tmp_path / "plan.json", rows)
    values = SHORT | {"plan": str(tmp_path / "plan.json"), "calibration": str(calibration)} | recipe
    for decided in ("sparsity", "pattern", "allocator", "search_minutes", "bits", "group_size"):
        values.pop(decided, None)
    artifact = mspc.compress(folder, Recipe(**values), out=tmp_path / "out", progress=False)
    assert artifact.manifest["allocation"] == {"chosen": None, "tried": {}}  # a given plan leaves nothing to search
    pruned = open_model(artifact.path, device=CPU)
    for matrix, weights in zip(case.flat, case.weights(plan, 1), strict=True):
        own = plan[case.flat.index(matrix)]
        assert list(weights) == [own - 1, own, own + 1]
        assert torch.equal(weights[own], matrix.read(pruned.read_parameter(matrix.parameter)))
    assert case.divergence(plan) == pytest.approx(divergence_of(artifact, model, case.validation), rel=1e-4)


def test_a_judge_puts_back_what_it_installed(llama):
    case = Tiny(llama, skip=TWO)
    weights, dense = case.weights((8, 8), 1), dense_predictions(case.model, case.validation)
    with torch.no_grad(), case.model.whole():
        judge = judge_of(case.model, case.validation, dense, case.flat, weights)
        first, other, again = (judge(plan, [0, 2]) for plan in ((8, 8), (9, 7), (8, 8)))
        each = [judge((8, 8), [n]) for n in (0, 2)]
    assert first == again != other
    assert first == pytest.approx(sum(each) / 2)


# The search


def test_search_finds_the_best_plan_of_two_matrices(llama, monkeypatch):
    """Oracle: every plan, each in a walk of its own. Weights depend on the walk, so plans within 2% are as good."""
    counting_clock(monkeypatch)
    case = Tiny(llama, skip=TWO, search_minutes=1.0)
    assert len(case.flat) == 2
    reached = {(level, 16 - level): case.divergence((level, 16 - level)) for level in range(2, 15)}
    start = max(reached, key=lambda plan: reached[plan])
    found = case.search(start)
    assert reached[found.levels] < 1.02 * min(reached.values())
    assert found.divergence == pytest.approx(reached[found.levels])
    assert found.first == pytest.approx(reached[start])


def test_search_is_the_same_again_and_never_worse(llama, monkeypatch):
    results = []
    for _ in range(2):
        counting_clock(monkeypatch)
        case = Tiny(llama, skip=(r"layers\.0",), search_minutes=0.7)
        results.append(case.search((8,) * len(case.flat)))
    assert results[0] == results[1]
    assert results[0].divergence < results[0].first
    assert results[0].divergence == pytest.approx(case.divergence(results[0].levels))
    assert results[0].generations > searching.GENERATIONS


def test_time_that_is_up_at_once_leaves_the_first_plan(llama, monkeypatch):
    counting_clock(monkeypatch)
    case = Tiny(llama, search_minutes=1 / 60)
    found = case.search((8,) * len(case.flat))
    assert (found.levels, found.generations, found.divergence) == ((8,) * len(case.flat), 0, found.first)


@pytest.mark.parametrize("pattern", ["unstructured", "N:16"])
def test_a_run_by_search_has_its_budget_and_its_plan_makes_it_again(pattern, llama, calibration, tmp_path):
    """Oracles: the counts, the files of the run by --plan, and the divergence on the validation text."""
    outs = tmp_path / "out", tmp_path / "again"
    given = ["--sparsity", 0.5, "--pattern", pattern, "--calibration", calibration, "--num-sequences", 8]
    given += ["--sequence-length", tiny.LENGTH, "--iterations", 4, "--allocator", "search", "--search-minutes", 0.03]
    again = ["--recipe", outs[0] / "recipe.toml", "--plan", outs[0] / "plan.json"]
    for out, more in zip(outs, (given, again), strict=True):
        result = CliRunner().invoke(app, [str(a) for a in ["compress", llama, "--out", out, *more]])
        assert result.exit_code == 0, result.stderr
    manifest, again = (json.loads((out / "mspc.json").read_text()) for out in outs)
    allocation = manifest["allocation"]
    assert allocation["chosen"] == "search"
    assert set(allocation) == {"chosen", "tried", "generations", "minutes"}
    assert allocation["tried"]["search"] <= allocation["tried"]["curves"]
    assert allocation["generations"] >= 0 < allocation["minutes"]
    rows = manifest["matrices"]
    assert sum(row["pruned"] for row in rows) == sum(row["shape"][0] * row["shape"][1] for row in rows) // 2
    assert again["files"] == manifest["files"]
    assert again["matrices"] == rows
    validation = calibration_tokens(load_tokenizer(llama), str(calibration), 9, tiny.LENGTH, 0).ids[8:]
    reached = divergence_of(mspc.Artifact(outs[0]), open_model(llama, device=CPU), validation)
    assert reached == pytest.approx(allocation["tried"]["search"], rel=1e-3)


def test_memory_that_is_short_is_said_before_any_work(llama, calibration, tmp_path, monkeypatch):
    """Oracle: the model's parameters, five levels of its matrices, and the predictions for one sequence, by hand."""
    monkeypatch.setattr(Measurements, "fisher_factors", lambda *_: pytest.fail("measured"))
    model = tiny.reference(llama)
    numel = sum(p.numel() for name, p in model.named_parameters() if name.endswith("proj.weight"))
    numbers = (2 * searching.WINDOW + 1) * numel + sum(p.numel() for p in model.parameters())
    need = 4 * (numbers + tiny.LENGTH * tiny.VOCABULARY)
    recipe = Recipe(calibration=str(calibration), **SHORT)
    monkeypatch.setattr(searching, "free_memory", lambda device: need - 1)
    with pytest.raises(InputError, match=r"holds the whole model.* on cpu, .*Use --allocator auto"):
        mspc.compress(llama, recipe, out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(searching, "free_memory", lambda device: need)
    streamed = open_model(llama, device=CPU)
    searching.check_memory(streamed, tiny.ids(1), streamed.matrices(()))
