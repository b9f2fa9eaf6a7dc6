"""Budgets in time: invented timings against sums and brute force by hand, and real ones against what a run needs."""

import json
from dataclasses import replace
from itertools import product

import pytest
import torch

from mspc.errors import InputError
from mspc.planning.curve import Curve
from mspc.planning.time_budget import TimeBudget
from mspc.planning.timings import Product, Timings, read_timings, write_timings
from mspc.planning.token_work import Sizes, TokenWork
from mspc.recipe import Recipe
from mspc.types import NM, Grid, Matrix, PlannedMatrix, Target, Unstructured

SIZES = Sizes(32, 64, 2, 4, 2, 8, 260, qk_norms=False)
"""Those of the family llama of `tiny`."""
SHAPES = ((32, 32), (16, 32), (64, 32), (32, 64))
HEAD = (260, 32)
DENSE = Unstructured(0.0)


def invented(**changes: object) -> Timings:
    """Round figures: a matrix of n weights takes n / 1024 ms in 16 bits, half of it in codes of 4 bits, and so on."""
    products: dict[Product, float] = {}
    for shape in SHAPES:
        size = shape[0] * shape[1] / 1024
        for numbers, share in {
            "float32": 1.5,
            "bfloat16": 1.0,
            "int8": 0.75,
            "int4": 0.5,
            "int3": 0.4,
            "int2": 0.3,
        }.items():
            products[Product(shape, "dense", numbers)] = size * share
            products[Product(shape, "2:4", numbers)] = size * share * 0.75
            for sparsity, left in ((0.25, 1.0), (0.5, 0.8), (0.75, 0.5)):
                products[Product(shape, "mask", numbers, sparsity)] = size * share * left
        products |= {Product(shape, "torch", "float32"): 4 * size, Product(shape, "torch", "bfloat16"): 2 * size}
    heads = {"float32": 3.0, "bfloat16": 2.5, "int8": 1.5, "int4": 1.0}
    products |= {Product(HEAD, "dense", numbers): ms for numbers, ms in heads.items()}
    products |= {Product(HEAD, "torch", "float32"): 8.0, Product(HEAD, "torch", "bfloat16"): 4.0}
    values = {"device": "a CPU", "threads": 1, "kernels": "mspc", "date": "2026-11-30", "group_size": 32}
    values |= {"symmetric": True, "sizes": SIZES, "rest_ms": 2.0, "lookup_ms": 0.25, "products": products}
    return Timings(**values | changes)


def settings_of(**asked: object):
    given = asked if asked.get("bits") == 16 else {"group_size": 32, **asked}
    return replace(Recipe(**given).settings(), group_size=32)


def budget_of(matrices: tuple[Matrix, ...], *, head: Grid | None = None, others=(), **asked: object) -> TimeBudget:
    work = TokenWork(SIZES, matrices, tuple(others), head, head is not None, torch.bfloat16)
    return TimeBudget(settings_of(**asked), work, invented())


def matrices(*shapes: tuple[int, int]) -> tuple[Matrix, ...]:
    return tuple(Matrix(f"{i}.weight", shape) for i, shape in enumerate(shapes))


# The table


def test_a_file_holds_all_of_the_timings(tmp_path):
    for timings in (invented(), invented(group_size=None)):
        write_timings(tmp_path / "t.json", timings)
        assert read_timings(tmp_path / "t.json") == timings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("rest_ms"), r"cannot be read \(KeyError\('rest_ms'\)\)"),
        (lambda values: values.update(rest_ms=-1), "cannot be read"),
        (lambda values: values["products"][0].update(ms=float("nan")), "cannot be read"),
        (lambda values: values["products"][0].update(kind="other"), "cannot be read .*kind 'other'"),
        (lambda values: values["products"][0].update(shape=[3]), "cannot be read"),
        (lambda values: values["sizes"].pop("hidden"), "cannot be read"),
        (lambda values: values.update(format_version=1), "have format 1, and this mspc reads 2"),
    ],
    ids=["no rest", "below 0", "no number", "kind", "shape", "sizes", "format"],
)
def test_a_file_that_is_damaged_is_refused(change, message, tmp_path):
    path = tmp_path / "t.json"
    write_timings(path, invented())
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=message):
        read_timings(path)
    path.write_text("[]")
    with pytest.raises(InputError, match="cannot be read"):
        read_timings(path)
    with pytest.raises(InputError, match=r"do not exist .*Write them with `mspc timings`"):
        read_timings(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("target", "ms"),
    [
        (Target(DENSE), 1.0),
        (Target(DENSE, Grid(3, 32)), 0.4),
        (Target(NM(2, 4), Grid(4, 32)), 0.375),
        (Target(NM(8, 16), Grid(4, 32)), 0.4),  # a bitmap of 50%
        (Target(Unstructured(0.5)), 0.8),
        (Target(Unstructured(0.375), Grid(4, 32)), 0.45),  # halfway between 0.5 and 0.4
        (Target(Unstructured(0.7), Grid(8, 32)), 0.75 * 0.56),
        (Target(Unstructured(0.01)), 1.0),  # the nearest that was timed
        (Target(Unstructured(0.96)), 0.5),
    ],
    ids=str,
)
def test_times_between_sparsities_are_interpolated(target, ms):
    """Oracle: by hand."""
    assert invented().of_target((32, 32), target, torch.bfloat16) == pytest.approx(ms)


def test_a_product_that_is_missing_is_named():
    with pytest.raises(InputError, match=r"no dense product of 8x32 with int4\. Make them for this model with"):
        invented().of_target((8, 32), Target(DENSE, Grid(4, 32)), torch.bfloat16)
    with pytest.raises(InputError, match="no mask product of 8x32 with float16"):
        invented().of_target((8, 32), Target(Unstructured(0.5)), torch.float16)
    with pytest.raises(InputError, match="no torch product of 8x32 with float32"):
        invented().of_torch((8, 32), torch.float32)


# Predictions and plans


def test_a_prediction_is_a_sum_of_entries():
    """Oracle: by hand: the rest, the head, the dense layer as values in C++, and two matrices."""
    both = matrices((32, 32), (64, 32))
    budget = budget_of(both, others=[(16, 32)], speedup=2.0)
    plan = [
        PlannedMatrix("0", (32, 32), Target(Unstructured(0.75), Grid(4, 32))),
        PlannedMatrix("1", (64, 32), Target(NM(2, 4), Grid(3, 32))),
    ]
    assert budget.fixed_ms == 2.0 + 8.0 + 0.5
    assert budget.ms_of(plan) == pytest.approx(10.5 + 0.25 + 2 * 0.4 * 0.75)
    # torch: 2 + 4 + 2 * (1 + 2 + 0.5); mspc: 2 + 2.5 + (1 + 2 + 0.5)
    assert budget.baseline == ("mspc", 8.0)
    assert budget.target_ms == 4.0
    said = budget.to_dict(plan)
    assert (said["predicted_ms"], said["head_ms"], said["rest_ms"]) == (budget.ms_of(plan), 8.0, 2.5)
    assert said["speedup"] == pytest.approx(8.0 / budget.ms_of(plan))
    quantized = budget_of(both, head=Grid(8, 32), ms_per_token=5.0)
    assert (quantized.fixed_ms, quantized.target_ms) == (2.0 + 0.25 + 1.5, 5.0)


def loss_curve(size: float) -> Curve:
    sparsities = (0.25, 0.5, 0.75, 1.0)
    more = {bits: ((0.0, size / 4**bits), (1.0, size / 4**bits)) for bits in (8, 4, 3, 2)}
    return Curve(sparsities, tuple(size * s**2 for s in sparsities), more)


@pytest.mark.parametrize("asked", [{"pattern": "2:4"}, {"pattern": "2:4", "bits": 4}, {"sparsity": 0}], ids=str)
@pytest.mark.parametrize("ms", [10.5, 10.875, 11.25, 12.5])
def test_a_plan_has_the_lowest_loss_of_all_within_the_time(asked, ms):
    """Oracle: every choice of an option for each of three matrices, with times by hand that 1/16 ms divides."""
    three = matrices((32, 32), (16, 32), (16, 32))
    curves = {one.name: loss_curve(size) for one, size in zip(three, (1.0, 3.0, 0.2), strict=True)}
    budget = budget_of(three, ms_per_token=ms, **asked)
    patterns = [DENSE] if asked.get("sparsity") == 0 else [DENSE, NM(2, 4)]
    grids = [Grid(4, 32)] if "bits" in asked else [None, *(Grid(bits, 32) for bits in (8, 4, 3, 2))]
    targets = [Target(pattern, grid) for pattern in patterns for grid in grids]
    share = {None: 1.0, 8: 0.75, 4: 0.5, 3: 0.4, 2: 0.3}

    def ms_of(target: Target, one: Matrix) -> float:
        return one.numel / 1024 * share[target.bits] * (0.75 if target.pattern == NM(2, 4) else 1.0)

    def loss(choice: tuple[Target, ...]) -> float:
        pairs = zip(choice, three, strict=True)
        return sum(curves[one.name].at(target.pattern.sparsity, target.bits) for target, one in pairs)

    within = [
        choice
        for choice in product(targets, repeat=3)
        if 10.0 + sum(ms_of(target, one) for target, one in zip(choice, three, strict=True)) <= ms + 1e-9
    ]
    if not within:
        with pytest.raises(InputError, match="cannot be reached here"):
            budget.check()
        return
    plan = budget.allocate(curves)
    assert budget.ms_of(plan) <= ms + 1e-9
    best = min(map(loss, within))
    assert loss(tuple(matrix.target for matrix in plan)) == pytest.approx(best, rel=1e-6)
    assert sum(matrix.sensitivity or 0.0 for matrix in plan) == pytest.approx(best, rel=1e-6)


def test_a_sensitive_matrix_stays_while_the_other_pays():
    """Oracle: by hand. Of 2 ms in 16 bits 1.5 are left: 0.5 for int4 in the one that hardly matters."""
    two = matrices((32, 32), (32, 32))
    curves = {"0": loss_curve(100.0), "1": loss_curve(0.001)}
    plan = budget_of(two, ms_per_token=11.5, sparsity=0).allocate(curves)
    assert [matrix.target.bits for matrix in plan] == [None, 4]


def test_a_time_that_only_the_fastest_meets_to_a_rounding_error_has_a_plan():
    """Oracle: 10 ms, and half of 0.3 of 2 bits. The gap is small against 10.15, not against 0.15."""
    one = matrices((32, 32))
    budget = budget_of(one, ms_per_token=10.15 * (1 - 5e-10))
    budget.check()
    (chosen,) = budget.allocate({one[0].name: loss_curve(1.0)})
    assert (chosen.target.bits, chosen.target.pattern.sparsity >= 0.75) == (2, True)
    assert budget.ms_of([chosen]) == pytest.approx(10.15)


# Refusals


def test_a_time_that_cannot_be_reached_names_the_fastest_and_the_remedy():
    """Oracle: 2 ms of the rest, 8 of the head, and 0.3 of 2 bits at 75% or more, which are half."""
    one = matrices((32, 32))
    with pytest.raises(
        InputError,
        match=r"ms_per_token 5 cannot be reached here: the fastest is 10\.2 ms a token \(0\.54 times the speed of "
        r"bfloat16 with mspc\)\. The head \(8 ms\), attention and all else that is not compressed take 10 ms of it\. "
        r"Ask for ms_per_token 10\.2, or add head_bits 4, which saves about 7 ms\.",
    ):
        budget_of(one, ms_per_token=5.0).check()
    budget_of(one, ms_per_token=10.2).check()
    with pytest.raises(InputError, match=r"speedup 3 over 5\.5 ms cannot .* Ask for speedup 0\.54 or less, or add"):
        budget_of(one, speedup=3.0).check()
    budget_of(one, speedup=0.54).check()
    with pytest.raises(InputError, match=r"the fastest is 3\.4 ms .* Ask for ms_per_token 3\.4\.$"):
        budget_of(one, ms_per_token=1.0, head=Grid(4, 32)).check()


def test_a_time_that_is_no_limit_is_refused():
    with pytest.raises(InputError, match=r"ms_per_token 11 is 11 ms a token, and the model takes 11 as it is"):
        budget_of(matrices((32, 32)), ms_per_token=11.0).check()
    budget_of(matrices((32, 32)), ms_per_token=11.0, bits=4).check()


def test_timings_of_something_else_are_refused():
    one = budget_of(matrices((32, 32)), ms_per_token=10.5)
    other = invented(sizes=replace(SIZES, vocabulary=300))
    with pytest.raises(InputError, match=r"are of another model: .*vocabulary=300.* Write them for this one"):
        replace(one, timings=other).check()
    with pytest.raises(InputError, match=r"groups of 64 and symmetric True, and the run has 32 and True"):
        replace(one, timings=invented(group_size=64)).check()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ms_per_token": 0.0}, "ms_per_token must be a number above 0, not 0"),
        ({"speedup": float("nan")}, "speedup must be a number above 0, not nan"),
        ({"speedup": 2.0, "ms_per_token": 3.0}, "ms_per_token and speedup are both a budget. Give one of them"),
        ({"speedup": 2.0, "bits_per_weight": 3.0}, "bits_per_weight and speedup are both a budget"),
        ({"speedup": 2.0, "target_size": "1GB"}, "target_size and speedup are both a budget"),
        ({"speedup": 2.0, "sparsity": 0.5}, "speedup and sparsity 0.5 exclude each other: .* or choose 0 to let it"),
        ({"speedup": 2.0, "plan": "p"}, "speedup and plan p exclude each other"),
        ({"speedup": 2.0, "keep_zeros": True}, "keep_zeros and speedup 2.0 exclude each other"),
        ({"speedup": 2.0, "pattern": "2:4", "sparsity": 0.0}, "pattern 2:4 has no effect with sparsity 0"),
        ({"speedup": 2.0, "pattern": "2:4", "sparsity": 0.5}, "speedup and sparsity 0.5 exclude each other"),
        ({"speedup": 2.0, "bits": 4, "sparsity": 0.0}, "has nothing to choose"),
        ({"speedup": 2.0, "bits": 16, "pattern": "4:4"}, "has nothing to choose"),
        ({"speedup": 2.0, "bits": 16, "group_size": 64}, "group_size 64 has no effect with bits 16"),
        ({"speedup": 2.0, "allocator": "owl"}, "speedup 2.0 needs the allocator auto or curves, not owl"),
        ({"speedup": 2.0, "reconstruct": 5}, "a budget of time chooses bits. Leave reconstruct out"),
        ({"timings": "t.json"}, "timings t.json has no effect with ms_per_token None and speedup None"),
        ({"timings": "t.json", "sparsity": 0.5}, "timings t.json has no effect"),
    ],
    ids=str,
)
def test_options_that_contradict_a_time_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        Recipe(**values)


@pytest.mark.parametrize(
    ("asked", "bits", "sparsities"),
    [
        ({}, {None, 8, 4, 3, 2}, 32),
        ({"bits": 4}, {4}, 32),
        ({"bits": 16}, {None}, 32),
        ({"sparsity": 0}, {None, 8, 4, 3, 2}, 1),
        ({"pattern": "2:4"}, {None, 8, 4, 3, 2}, 2),
        ({"pattern": "2:4", "bits": 3}, {3}, 2),
        ({"pattern": "N:16"}, {None, 8, 4, 3, 2}, 16),
    ],
    ids=str,
)
def test_bits_and_patterns_narrow_what_it_chooses_from(asked, bits, sparsities):
    (options,) = budget_of(matrices((32, 32)), speedup=2.0, **asked).options()
    assert {target.bits for target, _ in options} == bits
    assert len({target.pattern for target, _ in options}) == sparsities
