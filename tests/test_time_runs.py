"""Runs with a budget of time: what they choose, how they go on, and the timings that they measure."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import tiny
import torch
from test_cli import mspc_cli, refused
from test_resume import content
from test_time_budget import SIZES, invented, matrices, settings_of

import mspc
from mspc.bench.tables import predictions
from mspc.errors import InputError
from mspc.formats.targets import target_from_dict
from mspc.model.outline import outlined
from mspc.pipeline.in_time import time_budget_of, token_work
from mspc.pipeline.outer import planned_outer
from mspc.planning.allocation import choose_group_size
from mspc.planning.time_budget import TimeBudget
from mspc.planning.timings import Product, read_timings, write_timings
from mspc.planning.token_work import TokenWork
from mspc.progress import Silent
from mspc.recipe import Recipe
from mspc.runtime import product_times, stand_in
from mspc.storage.files import sha256_of
from mspc.storage.manifest import predicted_time
from mspc.types import Grid

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
