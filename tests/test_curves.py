"""Loss curves and their allocation against brute force, and the measured curves against explicit losses."""

import json
import math
import random
import weakref
from dataclasses import replace
from itertools import product

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import damped, few, problem

import mspc
from mspc.errors import InputError
from mspc.formats.layout import num_bytes
from mspc.formats.targets import target_from_dict
from mspc.model.open import open_model
from mspc.numerics.masking import num_pruned
from mspc.passes.blocks import batches_of
from mspc.passes.walk import DenseWalk, walk
from mspc.planning.allocation import allocate, allocate_bytes, check_bytes
from mspc.planning.curve import Curve, read_curves, write_curves
from mspc.planning.curve_estimate import estimated_curve
from mspc.planning.curve_measurement import SPARSITIES, curve_of, patterns_of
from mspc.planning.knapsack import cheapest, cheapest_sparsities
from mspc.planning.measurements import Measurements
from mspc.planning.solver_options import solver_options
from mspc.progress import Silent
from mspc.recipe import Recipe
from mspc.solvers.admm import error_path
from mspc.solvers.quadratic import OUTPUT_DAMP, damped_outputs
from mspc.types import NM, GramStats, Grid, Matrix, PlannedMatrix, Target, Unstructured

NAMES = {"0.q": (8, 16), "0.up": (24, 16), "1.q": (8, 16), "1.up": (24, 16)}
SPARSITY_LEVELS = [Unstructured(s) for s in (0.1, 0.5, 0.9)]
N_OF_16 = [NM(keep, 16) for keep in (14, 8, 2)]
MODEL = [[Matrix(f"{name}.weight", shape) for name, shape in NAMES.items()]]


def curve(size: float, power: float = 2.0) -> Curve:
    """size * s^power at the sparsities that are measured."""
    return Curve(SPARSITIES, tuple(size * s**power for s in SPARSITIES))


@few
@given(st.integers(0, 10**6))
def test_the_cheapest_choice_is_that_of_brute_force(seed):
    draw = random.Random(seed)
    options = [
        [(draw.randint(1, 6) * draw.choice([4, 8]), draw.random()) for _ in range(draw.randint(1, 4))]
        for _ in range(draw.randint(1, 5))
    ]
    budget = draw.randint(sum(min(c for c, _ in o) for o in options), 200)
    picked = cheapest(options, budget)
    assert sum(o[i][0] for o, i in zip(options, picked, strict=True)) <= budget
    best = min(
        sum(loss for _, loss in choice) for choice in product(*options) if sum(cost for cost, _ in choice) <= budget
    )
    assert sum(o[i][1] for o, i in zip(options, picked, strict=True)) == pytest.approx(best)


def test_costs_without_a_common_divisor_stay_within_the_budget():
    """Oracle: brute force with a budget that is 0.1% smaller."""
    draw = random.Random(0)
    options = [[(draw.uniform(1e6, 9e6), draw.random()) for _ in range(5)] for _ in range(6)]
    budget = 24e6
    picked = cheapest(options, budget)
    assert sum(o[i][0] for o, i in zip(options, picked, strict=True)) <= budget
    smaller = [c for c in product(*options) if sum(cost for cost, _ in c) <= 0.999 * budget]
    assert sum(o[i][1] for o, i in zip(options, picked, strict=True)) <= min(sum(x for _, x in c) for c in smaller)


def test_a_budget_below_the_cheapest_is_an_error():
    with pytest.raises(ValueError, match="fits the budget"):
        cheapest([[(2, 0.0)], [(3, 0.0)]], 4)


def test_between_levels_the_logarithm_is_straight():
    one = Curve((0.2, 0.4, 1.0), (1.0, 8.0, 512.0))
    assert one.at(0) == 0
    assert one.at(0.1) == pytest.approx(1 / 8)  # the power law through the first two: 3
    assert [one.at(0.2), one.at(0.4), one.at(1)] == pytest.approx([1, 8, 512])
    assert one.at(0.3) == pytest.approx(math.sqrt(8))
    assert one.at(0.7) == pytest.approx(64)


def test_equal_curves_share_equally_and_steep_ones_stay_dense():
    numels = [128, 384, 128, 384]
    even = cheapest_sparsities([curve(1.0)] * 4, [128] * 4, 0.5)
    assert even == pytest.approx([0.5] * 4)
    # 1/2 c s^2 under a mean of s: s is proportional to n / c, so one of equal size and ten times the loss has a tenth.
    first, second = cheapest_sparsities([curve(1.0), curve(10.0)], [128, 128], 0.4)
    assert first / second == pytest.approx(10, rel=0.25)
    assert sum(
        n * s for n, s in zip(numels, cheapest_sparsities([curve(c) for c in (1, 2, 3, 4)], numels, 0.6), strict=True)
    ) >= (0.6 * sum(numels) - 1e-6)


@pytest.mark.parametrize("pattern", ["unstructured", "N:16"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.75])
def test_a_plan_by_curves_meets_the_budget(pattern, sparsity):
    curves = {name: curve(10.0**i) for i, name in enumerate(NAMES)}
    recipe = Recipe(sparsity=sparsity, pattern=pattern, allocator="curves").settings()
    plan = allocate(recipe, MODEL, {}, curves)
    total = sum(matrix.numel for matrix in plan)
    if pattern == "N:16":
        kept = sum(m.target.pattern.keep * m.numel for m in plan)
        assert abs(kept - 16 * (1 - sparsity) * total) <= 64
    else:
        assert sum(num_pruned(m.numel, m.target.pattern.sparsity) for m in plan) == round(sparsity * total)
    shares = {m.name: m.target.pattern.sparsity for m in plan}
    assert shares["0.q"] >= shares["1.q"]
    assert shares["0.up"] >= shares["1.up"]
    for m in plan:
        assert m.sensitivity == pytest.approx(curves[m.name].at(m.target.pattern.sparsity))


@pytest.mark.parametrize("solver", ["kfac", "obs"])
def test_measured_curves_rise_and_predict_removal_exactly(solver, llama):
    """Oracle: 1/2 tr(S W H W^T) / tokens in float64, which removing a whole matrix costs, from the walk's Gram."""
    model, ids = open_model(llama, device=torch.device("cpu")), tiny.ids(4)
    matrices = model.matrices(())
    measurements = Measurements(
        model, ids, matrices, Recipe(sparsity=0.5, solver=solver).settings(), {}, None, Silent()
    )
    fisher = measurements.fisher_factors()
    curves = measurements.loss_curves(DenseWalk(model, ids, matrices), fisher)
    for visit in walk(model, batches_of(model, ids), matrices):
        found = curves[visit.matrix.name]
        assert found.sparsities == SPARSITIES
        assert list(found.losses) == sorted(found.losses)
        assert found.losses[0] < 0.5 * found.losses[-1]
        weight = visit.weight.double()
        outputs = torch.block_diag(*damped_outputs(fisher[visit.matrix.name]).double())
        expected = float((outputs @ weight @ visit.stats.gram.double() * weight).sum()) / 2 / visit.stats.num_tokens
        assert found.losses[-1] == pytest.approx(expected, rel=0.05)  # the Gram is damped too


def test_curves_come_back_exactly(tmp_path):
    curves, file = {"a": curve(1 / 3), "b": curve(1e-9)}, tmp_path / "curves.json"
    write_curves(file, curves)
    assert read_curves(file) == curves
    assert json.loads(file.read_text())["a"]["sparsities"] == list(SPARSITIES)


def test_an_allocation_without_curves_is_uniform():
    plan = allocate(Recipe(sparsity=0.5, allocator="curves").settings(), MODEL, {})
    assert {m.target.pattern.sparsity for m in plan} == {0.5}


BUDGETED = {
    name: Curve(
        SPARSITIES,
        tuple(10.0**i * s**2 for s in SPARSITIES),
        {b: ((0.0, 10.0**i * 4.0**-b), (0.6, 8.0**i * 4.0**-b)) for b in (8, 4, 3, 2)},
    )
    for i, name in enumerate(NAMES)
}


def predicted(plan: list[PlannedMatrix]) -> float:
    return sum(BUDGETED[m.name].at(m.target.pattern.sparsity, m.target.bits) for m in plan)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "N:16"])
@pytest.mark.parametrize("bits", [3.0, 3.125, 4.0, 5.5, 17.0])
def test_a_budget_is_kept_and_no_uniform_setting_of_that_size_is_predicted_to_be_better(pattern, bits):
    """Oracle: every uniform setting of pattern and bits, with its size as `layout.pack` makes it."""
    recipe = Recipe(pattern=pattern, bits_per_weight=bits, group_size=16).settings()
    total = sum(math.prod(shape) for shape in NAMES.values())
    plan = allocate_bytes(recipe, MODEL, BUDGETED, int(bits * total / 8), torch.bfloat16)
    size = sum(num_bytes(m.shape, m.target, torch.bfloat16) for m in plan)
    assert size <= bits * total / 8
    patterns = {"unstructured": [Unstructured(k / 8) for k in range(8)], "2:4": [Unstructured(0), NM(2, 4)]}
    mixed = [NM(k, 16) for k in range(1, 17)]
    settings = [
        Target(p, None if b == 16 else Grid(b, 16)) for p in patterns.get(pattern, mixed) for b in (16, 8, 4, 3, 2)
    ]
    tried = 0
    for target in settings:
        uniform = [replace(m, target=target) for m in plan]
        if sum(num_bytes(m.shape, target, torch.bfloat16) for m in uniform) <= bits * total / 8:
            assert predicted(plan) <= predicted(uniform) * (1 + 1e-9)
            tried += 1
    assert tried > 0
    if bits == 17.0:
        assert predicted(plan) == 0


def test_a_budget_that_is_too_small_names_the_smallest():
    with pytest.raises(InputError, match=r"is 0\.625 bits .* pattern unstructured allows is 1\.500\. Ask for"):
        check_bytes(Recipe(bits_per_weight=0.5, group_size=16).settings(), MODEL, 80, torch.bfloat16)


@pytest.mark.parametrize("budget", ["bits_per_weight", "target_size"])
def test_a_model_of_a_given_size(budget, llama, calibration, tmp_path):
    """Oracle: the bits that the manifest adds up from the stored files, and the bytes of the sparse export."""
    whole = (llama / "model.safetensors").stat().st_size
    asked = {"bits_per_weight": 4.5} if budget == "bits_per_weight" else {"target_size": f"{0.7 * whole / 1e3:.3f}kB"}
    recipe = Recipe(**asked, group_size=16, calibration=str(calibration), num_sequences=8, sequence_length=tiny.LENGTH)
    artifact = mspc.compress(llama, recipe, out=tmp_path / "out", progress=False)
    rows = artifact.manifest["matrices"]
    assert artifact.manifest["sparsity"]["requested"] == pytest.approx(artifact.manifest["sparsity"]["achieved"])
    assert len({(row["bits"], row["sparsity"]) for row in rows}) > 1
    assert all(row["bytes"] == num_bytes(tuple(row["shape"]), target_from_dict(row), torch.float32) for row in rows)
    if budget == "bits_per_weight":
        assert 4.2 < artifact.manifest["bits_per_weight"] <= 4.5
    else:
        sparse = artifact.export("sparse", tmp_path / "sparse", progress=False)
        assert 0.6 * whole < (sparse / "model.safetensors").stat().st_size <= 0.7 * whole


def test_costs_without_a_divisor_leave_no_room_for_a_better_option(monkeypatch):
    """Oracle: every single exchange; and the budget of the cheapest options alone, which real shapes have at 2:4."""
    monkeypatch.setattr("mspc.planning.knapsack.SUMS", 16)
    draw = random.Random(1)
    options = [[(draw.uniform(1e6, 9e6), draw.random()) for _ in range(5)] for _ in range(6)]
    least = sum(min(cost for cost, _ in of) for of in options)
    assert cheapest(options, least) == [min(range(5), key=lambda i: of[i][0]) for of in options]
    for more in (1e5, 3e6, 1e7):
        picked = cheapest(options, least + more)
        cost = sum(of[i][0] for of, i in zip(options, picked, strict=True))
        assert cost <= least + more
        for of, now in zip(options, picked, strict=True):
            assert not [1 for c, loss in of if loss < of[now][1] and cost + c - of[now][0] <= least + more]


@pytest.mark.parametrize("allocator", ["curves", "auto", "uniform"])
def test_more_zeros_than_n_of_16_has_are_the_nearest(allocator):
    curves = {name: curve(10.0**i) for i, name in enumerate(NAMES)}
    recipe = Recipe(sparsity=0.96, pattern="N:16", allocator=allocator).settings()
    assert {m.target.pattern for m in allocate(recipe, MODEL, {}, curves)} == {NM(1, 16)}


@pytest.mark.parametrize("solver", ["kfac", "obs"])
def test_inputs_that_never_were_cost_nothing(solver):
    """Oracle: the curve of the matrix without them; at sparsities that the dead ones alone can give it is zero."""
    case, recipe = problem(0, 16, 32), Recipe(solver=solver, bits_per_weight=4.0, group_size=16).settings()
    outputs = torch.eye(16)[None]
    gram = torch.zeros(64, 64)
    gram[::2, ::2] = case.stats.gram
    weight = torch.ones(16, 64)
    weight[:, ::2] = case.weight
    stats = GramStats(gram, case.stats.num_tokens, output_fisher=outputs)
    found = curve_of(weight, stats, recipe, solver_options(recipe), "fc2")
    alone = curve_of(case.weight, replace(case.stats, output_fisher=outputs), recipe, solver_options(recipe), "fc2")
    assert found.at(0.45) < 1e-6 * alone.losses[-1]
    assert found.losses[-1] == pytest.approx(alone.losses[-1], rel=1e-3)
    assert found.quantization[4][0][1] < 2 * alone.quantization[4][0][1]


@pytest.mark.parametrize(("budget", "most"), [({"sparsity": 0.5}, 1), ({"bits_per_weight": 4.0, "group_size": 16}, 4)])
def test_weights_of_a_curve_that_are_needed_no_more_are_dropped(budget, most, monkeypatch):
    """One at a time; under a budget those that are quantized, and the one that is measured."""
    case, recipe = problem(0, 16, 32), Recipe(**budget).settings()
    made, alive = list[weakref.ref](), list[int]()

    def followed(*args):
        for result, loss in error_path(*args):
            made.append(weakref.ref(result))
            alive.append(sum(ref() is not None for ref in made))
            yield result, loss
            del result

    monkeypatch.setattr("mspc.planning.curve_measurement.error_path", followed)
    curve_of(case.weight, replace(case.stats, output_fisher=torch.eye(16)[None]), recipe, solver_options(recipe), "q")
    assert len(alive) == len(SPARSITIES)
    assert max(alive) <= most + 1  # error_path has the last one while it makes the next


def test_a_matrix_that_nothing_depends_on_costs_nothing():
    case, recipe = problem(0, 16, 32), Recipe(sparsity=0.5).settings()
    stats = replace(case.stats, output_fisher=torch.zeros(1, 16, 16))
    assert set(curve_of(case.weight, stats, recipe, solver_options(recipe), "o_proj").losses) == {0.0}


def test_where_the_sampled_outputs_do_not_matter_all_are_measured():
    """Oracle: the loss of removing the half that matters, from its own curve."""
    recipe, fisher = Recipe(sparsity=0.5).settings(), torch.stack([torch.eye(8), torch.zeros(8, 8)] * 2)
    case = problem(0, 32, 16)
    weight = case.weight.clone()
    weight[8:16] = weight[24:] = 0
    options = solver_options(recipe)
    found = curve_of(weight, replace(case.stats, output_fisher=fisher), recipe, options, "q")
    assert found.losses[-1] > 0


@pytest.mark.parametrize("patterns", [SPARSITY_LEVELS, N_OF_16], ids=["unstructured", "N:16"])
def test_estimated_curves_cost_the_cheapest_weights(patterns):
    """Oracle: in float64, w^2 S_oo H_ii / sqrt(inverse of the scaled H)_ii of every weight, sorted."""
    case = problem(0, 8, 32, dead=[3])
    outputs = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)).double()
    outputs = outputs @ outputs.T
    found = estimated_curve(case.weight, replace(case.stats, output_fisher=outputs.float()[None]), patterns, 0.01, "q")
    gram = damped(case.stats.gram, 0.01)
    scale = gram.diagonal().sqrt()
    inverse = torch.linalg.inv(gram / scale / scale[:, None])
    importance = outputs.diagonal() + OUTPUT_DAMP * outputs.diagonal().mean()
    costs = case.weight.double() ** 2 * importance[:, None] * gram.diagonal() / inverse.diagonal().sqrt()
    costs[:, 3] = 0
    for pattern, loss in zip(patterns, found.losses, strict=True):
        of_groups = costs.view(-1, pattern.of if isinstance(pattern, NM) else costs.numel())
        count = (
            of_groups.shape[1] - pattern.keep
            if isinstance(pattern, NM)
            else num_pruned(costs.numel(), pattern.sparsity)
        )
        cheapest_first = of_groups.sort(1).values[:, :count]
        assert loss == pytest.approx(float(cheapest_first.sum()) / (2 * case.stats.num_tokens), rel=1e-4)


def test_estimates_rank_matrices_as_their_measured_curves_do():
    """Oracle: measured curves of matrices whose outputs matter 1, 4 and 16 times as much."""
    recipe = Recipe(sparsity=0.5).settings()
    cases = [replace(problem(i, 16, 32).stats, output_fisher=4.0**i * torch.eye(16)[None]) for i in range(3)]
    for sparsity in (0.3, 0.5, 0.7):
        measured = [
            curve_of(problem(i, 16, 32).weight, stats, recipe, solver_options(recipe), "q").at(sparsity)
            for i, stats in enumerate(cases)
        ]
        estimated = [
            estimated_curve(problem(i, 16, 32).weight, stats, patterns_of(recipe), 0.01, "q").at(sparsity)
            for i, stats in enumerate(cases)
        ]
        assert all(0.3 < a / b < 3 for a, b in zip(estimated, measured, strict=True)), (estimated, measured)
