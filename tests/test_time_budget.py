"""Budgets in time: invented timings against sums and brute force by hand, and real ones against what a run needs."""

import json
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import pytest
import tiny
import torch
from test_cli import mspc_cli, refused
from test_resume import content

import mspc
from mspc.bench.tables import predictions
from mspc.errors import InputError
from mspc.formats.targets import target_from_dict
from mspc.model.outline import outlined
from mspc.pipeline.in_time import time_budget_of, token_work
from mspc.pipeline.outer import planned_outer
from mspc.planning.allocation import choose_group_size
from mspc.planning.curve import Curve
from mspc.planning.time_budget import TimeBudget
from mspc.planning.timings import Product, Timings, read_timings, write_timings
from mspc.planning.token_work import Sizes, TokenWork
from mspc.progress import Silent
from mspc.recipe import Recipe
from mspc.runtime import product_times, stand_in
from mspc.storage.files import sha256_of
from mspc.storage.manifest import predicted_time
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


# Runs


@pytest.fixture
def timings_file(tmp_path: Path) -> Path:
    write_timings(tmp_path / "serve.json", invented())
    return tmp_path / "serve.json"


def test_a_run_by_timings_meets_its_time_and_says_so(llama, calibration, timings_file, tmp_path, caplog):
    """Oracle: the sum over the manifest's matrices, by the timings as they are written here."""
    caplog.set_level("INFO", logger="mspc")
    # The matrices in 16 bits take 20 ms, head and rest 10.
    asked = {"ms_per_token": 17.0, "timings": str(timings_file), "head_bits": 16, "group_size": 32}
    artifact = tiny.compress(llama, tmp_path / "out", calibration, **asked)
    manifest, timings = artifact.manifest, invented()
    of_matrices = sum(
        timings.of_target(tuple(row["shape"]), target_from_dict(row), torch.float32) for row in manifest["matrices"]
    )
    said = manifest["time"]
    assert said["predicted_ms"] == pytest.approx(10.0 + of_matrices)
    assert 16.5 < said["predicted_ms"] <= 17.0
    assert (said["target_ms"], said["device"], said["batch"], said["context"]) == (17.0, "a CPU", 1, 128)
    assert "time" not in manifest["allocation"]
    assert len({(row["bits"], row["sparsity"]) for row in manifest["matrices"]}) > 1
    assert any(message.startswith("Time: 1") and "predicted" in message for message in caplog.messages)
    sparse = artifact.export("sparse", tmp_path / "sparse", progress=False)
    assert predicted_time(sparse) == predicted_time(artifact.path) == said
    again = tiny.compress(llama, tmp_path / "again", calibration, **asked)
    assert [row["sha256"] for row in again.manifest["matrices"]] == [row["sha256"] for row in manifest["matrices"]]


def test_what_cannot_be_reached_leaves_nothing_behind(llama, calibration, timings_file, tmp_path):
    out = tmp_path / "out"
    arguments = ("compress", llama, "--out", out, "--calibration", calibration, "--timings", timings_file)
    message = refused(*arguments, "--group-size", 32, "--ms-per-token", 1)
    assert "cannot be reached here: the fastest is" in message
    assert not out.exists()


def test_models_that_the_bench_does_not_run_are_refused(folder_of, calibration, timings_file, tmp_path):
    with pytest.raises(InputError, match="knows llama, mistral, qwen2, qwen3, and this is a gemma2 model. Give a size"):
        tiny.compress(folder_of("gemma2"), tmp_path / "out", calibration, speedup=2.0, timings=str(timings_file))


def test_a_forecast_knows_a_run_by_time(llama):
    found = mspc.forecast(llama, Recipe(speedup=2.0, group_size=32))
    assert found.seconds_by_stage["Timing products"] > 0
    assert "Timing products" not in mspc.forecast(llama, Recipe(bits=4, group_size=32)).seconds_by_stage


def test_the_work_of_a_token_counts_what_stays_dense(llama, folder_of):
    model = outlined(str(llama))
    chosen = model.matrices(["down_proj"])
    settings = choose_group_size(settings_of(speedup=2.0, head_bits=8), chosen)
    work = token_work(model, chosen, (), planned_outer(model, settings, ["head_bits"]))
    assert work.sizes == SIZES
    assert work.others == ((32, 64),) * 2
    assert work.by_size == Counter({(32, 32): 4, (16, 32): 4, (64, 32): 4, (32, 64): 2})
    assert (work.head, work.quantized_lookup) == (Grid(8, 32), False)
    assert token_work(outlined(str(folder_of("qwen3"))), chosen, (), ()).sizes.qk_norms


@pytest.mark.parametrize(
    ("asked", "begin"),
    [
        ({"speedup": 2.0}, "A budget in time may choose 16, 8, 4, 3 or 2 bits. model.layers.0.self_attn.q_proj: gguf"),
        ({"speedup": 2.0, "bits": 3}, "model.layers.0.self_attn.q_proj: gguf takes 4 or 8 bits"),
    ],
    ids=str,
)
def test_an_export_that_cannot_hold_the_bits_is_refused_by_its_kind_of_budget(
    asked, begin, llama, calibration, tmp_path, monkeypatch
):
    monkeypatch.setattr("mspc.api.known_or_measured", lambda *_: pytest.fail("timed"))
    with pytest.raises(InputError) as caught:
        tiny.compress(llama, tmp_path / "out", calibration, exports=["gguf"], group_size=32, **asked)
    assert str(caught.value).startswith(begin)


# Runs that go on, and runs that are repeated


@pytest.fixture
def by_time(calibration: Path) -> Recipe:
    """The matrices in 16 bits take 20 ms, head and rest 10."""
    asked = {"ms_per_token": 17.0, "head_bits": 16, "group_size": 32, "eval": False}
    return Recipe(calibration=str(calibration), num_sequences=4, sequence_length=32, **asked)


def run(model: Path, recipe: Recipe, out: Path, **options: bool) -> mspc.Artifact:
    return mspc.compress(model, recipe, out=out, progress=False, **options)


def cut_off(model: Path, recipe: Recipe, out: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends where it calls `step`."""
    with monkeypatch.context() as patch:
        patch.setattr(step, Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(model, recipe, out)


AFTER_PLAN = "mspc.pipeline.run.copy_rest"


def test_a_run_that_has_its_plan_needs_no_timings(llama, by_time, tmp_path, monkeypatch):
    """The machine becomes too slow meanwhile. Oracle: the bytes of the run that was not cut off."""
    measured = Mock(return_value=invented())
    monkeypatch.setattr("mspc.api.known_or_measured", measured)
    whole = content(run(llama, by_time, tmp_path / "whole").path)
    cut_off(llama, by_time, tmp_path / "cut", AFTER_PLAN, monkeypatch)
    cut_off(llama, by_time, tmp_path / "early", "mspc.planning.planner.Planner.plan", monkeypatch)
    assert measured.call_count == 3
    measured.return_value = invented(rest_ms=50.0)
    run(llama, by_time, tmp_path / "cut", resume=True)
    run(llama, by_time, tmp_path / "whole", resume=True)
    assert content(tmp_path / "cut") == content(tmp_path / "whole") == whole
    recovered = run(llama, replace(by_time, recover=1), tmp_path / "whole", resume=True)
    assert recovered.manifest["time"] == json.loads(whole["mspc.json"])["time"]
    assert measured.call_count == 3
    with pytest.raises(InputError, match="cannot be reached here"):
        run(llama, by_time, tmp_path / "early", resume=True)
    with pytest.raises(InputError, match="cannot be reached here"):
        run(llama, by_time, tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()
    measured.return_value = invented()
    run(llama, by_time, tmp_path / "early", resume=True)
    assert content(tmp_path / "early") == whole


def test_other_timings_are_another_run(llama, by_time, timings_file, tmp_path, monkeypatch):
    """Oracle: the bytes before, and a file that says the same by another name."""
    recipe = replace(by_time, timings=str(timings_file))
    whole = content(run(llama, recipe, tmp_path / "whole").path)
    assert json.loads(whole["mspc.json"])["timings"] == sha256_of(timings_file)
    cut_off(llama, recipe, tmp_path / "cut", AFTER_PLAN, monkeypatch)
    before = timings_file.read_bytes()
    write_timings(timings_file, invented(rest_ms=50.0))
    for name in ("whole", "cut"):
        with pytest.raises(InputError, match=r"differs from this one: timings was '[0-9a-f]{64}' and is '[0-9a-f]+'"):
            run(llama, recipe, tmp_path / name, resume=True)
    timings_file.unlink()
    with pytest.raises(InputError, match=r"do not exist .*Write them with `mspc timings`"):
        run(llama, recipe, tmp_path / "whole", resume=True)
    for name in ("whole", "cut"):  # by the copy that the folder has
        run(llama, Recipe.from_toml(tmp_path / name / "recipe.toml"), tmp_path / name, resume=True)
    timings_file.write_bytes(before)
    run(llama, recipe, tmp_path / "whole", resume=True)
    assert content(tmp_path / "whole") == whole
    resumed = content(tmp_path / "cut")
    assert [name for name in resumed | whole if resumed[name] != whole[name]] == ["mspc.json"]  # it has the recipe
    manifests = [json.loads(files["mspc.json"]) | {"recipe": None} for files in (resumed, whole)]
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("given", [True, False], ids=["given", "measured"])
def test_the_written_recipe_repeats_a_run_by_time_elsewhere(given, llama, by_time, timings_file, tmp_path, monkeypatch):
    """Oracle: the files of the first run, all but the manifest, which names the path of the timings."""
    monkeypatch.setattr("mspc.api.known_or_measured", lambda *_: invented())
    monkeypatch.chdir(tmp_path)
    first = run(llama, replace(by_time, timings="serve.json") if given else by_time, tmp_path / "first")
    whole = content(first.path)
    assert read_timings(first.path / "timings.json") == invented()
    assert not given or whole["timings.json"] == timings_file.read_bytes()
    timings_file.unlink()
    monkeypatch.setattr("mspc.api.known_or_measured", lambda *_: pytest.fail("timed"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = Recipe.from_toml(first.path / "recipe.toml")
    again = run(llama, recipe, tmp_path / "again")
    files = content(again.path)
    assert files.keys() == whole.keys()
    assert [name for name in files if files[name] != whole[name]] == ["mspc.json"]
    assert all(again.manifest[name] == first.manifest[name] for name in ("time", "matrices", "files", "allocation"))
    run(llama, recipe, first.path, resume=True)
    assert content(first.path) == whole


# Timing


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Few passes over few copies, and a cache of its own for what is timed; the library stays where it was built."""
    product_times.library()
    monkeypatch.setattr(product_times, "PASSES", 2)
    monkeypatch.setattr(product_times, "MOST_BYTES", 2**14)
    monkeypatch.setattr(product_times, "LEAST_BYTES", 2**12)
    monkeypatch.setattr(product_times, "cache_folder", lambda: tmp_path / "cache")


@pytest.mark.skipif(product_times.library() is None, reason="needs the products in C++")
def test_all_that_a_run_chooses_from_is_timed(llama, quick, monkeypatch):
    """Oracle: nothing is missing, and everything takes time; after the first time nothing is timed."""
    model = outlined(str(llama))
    chosen = model.matrices(())
    monkeypatch.setattr(TimeBudget, "check", lambda budget: None)
    for pattern in ("unstructured", "2:4", "N:16"):
        settings = choose_group_size(Recipe(speedup=2.0, pattern=pattern).settings(), chosen)
        known = product_times.known_or_measured
        budget = time_budget_of(settings, model, chosen, (), (), 1, known, Silent())
        monkeypatch.setattr(product_times, "measured", None)
        assert budget is not None
        assert all(ms > 0 for own in budget.options() for _, ms in own)
    assert all(ms > 0 for ms in (*budget.timings.products.values(), budget.timings.rest_ms))
    assert budget.baseline[1] > budget.timings.rest_ms
    assert budget.timings.sizes == SIZES


@pytest.mark.skipif(product_times.library() is None, reason="needs the products in C++")
def test_rows_that_are_left_out_count(monkeypatch):
    """Oracle: a clock by which a call takes 1 s, and 1 s more for every 16 rows."""
    seconds = [0.0]

    class Layer(torch.nn.Module):
        def __init__(self, shape):
            super().__init__()
            self.register_buffer("weight", torch.zeros(shape))

        def forward(self, x):
            seconds[0] += 1 + len(self.weight) / 16

    monkeypatch.setattr(product_times, "layer_of", lambda one, settings: Layer(one.shape))
    monkeypatch.setattr(product_times, "MOST_WEIGHTS", 128 * 32)
    monkeypatch.setattr(product_times, "MOST_BYTES", 2**15)
    work = TokenWork(SIZES, matrices((1024, 32)), (), None, False, torch.bfloat16)
    one = Product((1024, 32), "dense", "int4")
    # 128 rows take 9 s and the 16 of a start 2, so that 1024 rows take 2 + 8 * 7.
    assert product_times.seconds_of(one, work, settings_of(speedup=2.0), lambda: seconds[0]) == pytest.approx(58.0)
    small = replace(one, shape=(64, 32))
    assert product_times.seconds_of(small, work, settings_of(speedup=2.0), lambda: seconds[0]) == pytest.approx(5.0)


@pytest.mark.skipif(product_times.library() is None, reason="needs the products in C++")
@pytest.mark.parametrize("qk_norms", [False, True])
def test_the_rest_of_a_token_is_the_whole_minus_the_products(qk_norms):
    """Oracle: by hand, with a clock that counts its calls."""
    sizes = replace(SIZES, qk_norms=qk_norms)
    blocks = list(product_times._blocks(sizes, settings_of(speedup=2.0)))
    made = stand_in.StandIn(sizes, blocks)
    assert (made.step.shape, made.step.length) == ((1, sizes.hidden), 129)
    ticks = iter(range(1000))
    # A call of the clock is a second: one passes in the blocks, and two outside of them.
    assert made.seconds(lambda: float(next(ticks))) == (1.0, 2.0)
    ticks = iter(range(1000))
    of_products = 0.125
    found = stand_in.rest_seconds(sizes, blocks, of_products, lambda: float(next(ticks)))
    assert found == sizes.blocks * (1.0 / len(blocks) - of_products) + 2.0


@pytest.mark.skipif(product_times.library() is None, reason="needs the products in C++")
def test_the_command_writes_what_compress_reads(llama, quick, tmp_path):
    file = tmp_path / "serve.json"
    shown = mspc_cli("timings", llama, "--out", file, "--group-size", 32, "--threads", 1).stdout
    assert "50%+int4" in shown
    assert f"{file} written: " in shown
    found = read_timings(file)
    assert (found.threads, found.group_size, found.sizes) == (1, 32, SIZES)
    assert "cannot be written" in refused("timings", llama, "--out", tmp_path / "nowhere" / "t.json")


# The bench


def test_the_bench_says_what_came_out():
    """Oracle: by hand."""
    seconds = {"p10": 0.011, "median": 0.012, "p90": 0.013}
    step = {"batch": 1, "context": 128, "seconds": seconds, "processor_seconds": seconds}
    said = {"batch": 1, "context": 128, "predicted_ms": 12.5, "device": "a CPU", "threads": 1}
    row = {"name": "out", "format": "mixed", "random_weights": False, "predicted": said, "decode": [step]}
    result = {"device": {"name": "a CPU", "threads": 1}, "rows": [row, row | {"predicted": None}]}
    assert list(predictions(result)) == ["out (mixed): 12.5 ms a token predicted, 12 measured (-4%)."]
    step["seconds"] = {name: 2 * value for name, value in seconds.items()}
    (line,) = predictions(result)
    assert line.endswith("(-4%) by the time of the processor; 24 by the clock, because other processes ran.")
    step["processor_seconds"] = None
    (line,) = predictions(result | {"device": {"name": "another", "threads": 2}})
    assert (
        line == "out (mixed): 12.5 ms a token predicted, 24 measured (+92%). It was predicted for a CPU with 1 threads."
    )
    step["context"] = 64
    assert list(predictions(result)) == []
