"""The forecast of a run against models built in memory, runs that were made, and the folders that they wrote."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import typer
from test_cli import RECIPE_FLAGS, mspc_cli, only_json
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

import mspc
from mspc.cli.main import app
from mspc.errors import InputError
from mspc.model import gguf_file
from mspc.model.outline import outlined
from mspc.numerics.linalg import output_error
from mspc.passes.inputs import by_name, shared_inputs
from mspc.pipeline import announcing, demand, forecasting, rates
from mspc.pipeline.forecasting import Forecast, span
from mspc.pipeline.solver_work import MatrixWork
from mspc.pipeline.stage_work import REST, stages_of
from mspc.pipeline.workload import Work, Workload
from mspc.planning.curve_measurement import curve_of, patterns_of
from mspc.settings import has_goal
from mspc.solvers import SOLVERS, SolverOptions
from mspc.solvers.error_compensation import compensated
from mspc.storage.artifact import MATRICES, UNCHANGED
from mspc.storage.sizes import bytes_in
from mspc.types import GramStats, Target, Unstructured

HALF, INF = mspc.Recipe(sparsity=0.5), float("inf")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache folder without rates."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def config_alone(family: str, folder: Path, **changes: object) -> Path:
    """A folder with the config.json of a family and nothing else."""
    folder.mkdir()
    AutoConfig.for_model(family, **tiny.CONFIGS[family] | changes).save_pretrained(folder)
    return folder


# Shapes


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_matrices_are_those_of_the_model(family, tmp_path):
    """Oracle: the linear layers in the blocks of the model that transformers builds."""
    found = mspc.forecast(config_alone(family, tmp_path / "model"), HALF)
    model = tiny.make(family)
    layers = [
        module.weight
        for name, module in model.named_modules()
        if name.startswith(tiny.blocks_name(family) + ".")
        and (isinstance(module, nn.Linear) or "Conv1D" in repr(type(module)))
    ]
    assert (found.matrices, found.weights) == (len(layers), sum(weight.numel() for weight in layers))
    assert found.source_bytes == sum(parameter.nbytes for parameter in model.parameters())
    assert found.blocks == tiny.CONFIGS[family]["num_hidden_layers"]


@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "gpt2", "gpt_neox"])
def test_matrices_with_one_input_are_found_without_weights(family, tmp_path):
    """Oracle: the table of what each family multiplies by, in the order of execution."""
    model = outlined(str(config_alone(family, tmp_path / "model")))
    matrices = model.matrices(())
    for index, groups in enumerate(shared_inputs(model, matrices)):
        names = {tuple(model.name_in_block(index, one).removesuffix(".weight") for one in group) for group in groups}
        assert names == set(tiny.GROUPS[family])


def test_names_tell_inputs_that_are_the_same(tmp_path):
    """Oracle: the same table."""
    model = outlined(str(config_alone("llama", tmp_path / "model")))
    groups = by_name(model.matrices(())[0])
    assert [tuple(one.name.partition("layers.0.")[2] for one in group) for group in groups] == list(
        tiny.GROUPS["llama"]
    )


def test_weights_change_nothing_that_config_json_says(folder_of, tmp_path):
    """Oracle: the same folder without its weights, which makes the output smaller by no byte either."""
    folder = folder_of("llama")
    shutil.copytree(folder, tmp_path / "alone", ignore=shutil.ignore_patterns("*.safetensors"))
    whole, alone = (mspc.forecast(path, HALF).to_dict() for path in (folder, tmp_path / "alone"))
    carried = demand.carried_bytes(folder)
    for found in (whole, alone):
        del found["model"], found["output_bytes"], found["disk_need"]
    assert carried > 0
    assert whole == alone


def test_of_a_hub_id_only_the_config_is_downloaded(folder_of, tmp_path, monkeypatch):
    """Oracle: the patterns that the client of the hub is given."""
    asked = []

    def download(model: str, **options: object) -> str:
        asked.append((model, options))
        return str(config_alone("llama", tmp_path / "snapshot"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert mspc.forecast("owner/name", HALF).blocks == 2
    assert asked == [("owner/name", {"allow_patterns": ["mspc.json", "config.json"]})]


def test_a_gguf_file_is_forecast_by_its_header(tmp_path):
    """Oracle: the checkpoint that the file was made from."""
    folder = tiny.build(tmp_path / "model", "llama", hidden_size=64)
    header = gguf_file.Header(
        {
            "general.architecture": "llama", "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
            "llama.embedding_length": 64, "llama.feed_forward_length": 64, "llama.block_count": 2,
            "llama.context_length": 128, "llama.attention.layer_norm_rms_epsilon": 1e-6,
        },
        {"token_embd.weight": (260, 64), "output.weight": (260, 64), "blk.0.attn_q.weight": (64, 64)},
        {"token_embd.weight": "F32", "output.weight": "F32", "blk.0.attn_q.weight": "F32"},
        None,
    )  # fmt: skip
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_file, "_read_header", lambda path: header)
        found = mspc.forecast(file, HALF)
    expected = mspc.forecast(folder, HALF)
    assert found.seconds_by_stage == pytest.approx(expected.seconds_by_stage)
    assert (found.matrices, found.source_bytes) == (expected.matrices, expected.source_bytes)
    assert not (tmp_path / "mspc").exists()


# Against runs


@pytest.mark.parametrize(
    "options",
    [
        {"effort": "fast"},
        {},
        {"pattern": "2:4", "bits": 4, "group_size": 16},
        {"bits_per_weight": 4.0, "group_size": 16},
        {"solver": "obs", "allocator": "uniform", "eval": True},
        {"allocator": "trace-rank", "sensitivity": "gram", "solver": "admm"},
        {"recover": 2},
    ],
    ids=str,
)
def test_stages_and_sizes_are_those_of_the_run(options, llama, calibration, tmp_path):
    """Oracles: the stages in the manifest of the run, and the files that it wrote."""
    asked = {"calibration": str(calibration), "num_sequences": 4, "sequence_length": 32, "eval": False} | options
    recipe = mspc.Recipe(**(asked if has_goal(asked) else {"sparsity": 0.5} | asked))
    found = mspc.forecast(llama, recipe, device="cpu")
    artifact = mspc.compress(llama, recipe, out=tmp_path / "out", progress=False)
    assert [title for title in found.seconds_by_stage if title != REST] == list(artifact.manifest["seconds_by_stage"])
    assert all(seconds > 0 for seconds in found.seconds_by_stage.values())
    assert found.output_bytes == pytest.approx(bytes_in(tmp_path / "out"), rel=0.1)
    weights = sum(bytes_in(tmp_path / "out" / name) for name in (MATRICES, UNCHANGED))
    model = outlined(str(llama))
    plan = mspc.Recipe(plan=str(tmp_path / "out" / "plan.json"))
    exact = forecasting.assumed_plan(plan.settings(), model.matrices(()))
    others = (demand.MANIFEST_BYTES + demand.PLAN_BYTES) * len(exact) + demand.OTHER_BYTES + demand.carried_bytes(llama)
    assert demand.artifact_bytes(model, model.matrices(()), exact) - others == weights


def test_more_of_everything_takes_longer(llama):
    """Oracle: work grows with tokens, iterations and plans, and shrinks with threads."""
    base = mspc.Recipe(sparsity=0.5, num_sequences=64)

    def seconds(threads: int = 1, **changes: object) -> float:
        return mspc.forecast(llama, replace(base, **changes), threads=threads).seconds

    assert seconds(num_sequences=128) > seconds()
    assert seconds(effort="best") > seconds() > seconds(effort="fast")
    assert seconds(solver="admm", allocator="uniform") < seconds()
    assert seconds(threads=2) < seconds()


# The work, counted


OUTPUTS, INPUTS, TOKENS = 1024, 256, 500


def products_of(function: Callable[[], object]) -> int:
    """Floating point operations of the products in a call, as torch counts them."""

    def added(self: object, a: tuple[int, int], b: tuple[int, int], *_: object, **__: object) -> int:
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added}) as counter:
        function()
    return counter.get_total_flops()


def products_counted(count: Callable[[MatrixWork], None]) -> float:
    work = Work()
    count(MatrixWork(work, (OUTPUTS, INPUTS)))
    return sum(amount for (kind, _), amount in work.amounts.items() if kind in ("product", "double"))


@pytest.fixture
def problem() -> tuple[torch.Tensor, GramStats]:
    """A weight and statistics whose search does not end early."""
    generator = torch.Generator().manual_seed(0)
    weight, x, shift = (torch.randn(n, INPUTS, generator=generator) for n in (OUTPUTS, TOKENS, INPUTS))
    gradients = torch.randn(OUTPUTS // 256, 256, 300, generator=generator)
    return weight, GramStats(x.T @ x, TOKENS, shift, gradients @ gradients.mT / 300)


@pytest.mark.parametrize("solver", ["kfac", "fisher"])
@pytest.mark.parametrize(
    "goal", [{"sparsity": 0.5}, {"sparsity": 0.5, "bits": 4}, {"sparsity": 0.0, "bits": 4}], ids=str
)
def test_products_of_a_solver_are_those_that_it_makes(solver, goal, problem):
    """Oracle: torch's counter of operations. Sweeps of 256 columns update a half of what long ones do."""
    weight, stats = problem
    settings = replace(mspc.Recipe(solver=solver, **goal).settings(), iterations=6)
    target = Target(Unstructured(goal["sparsity"]), settings.grid_for(INPUTS))
    options = SolverOptions(iterations=6)
    made = products_of(lambda: SOLVERS[solver](weight, stats, target, options, "the matrix"))
    counted = products_counted(lambda matrix: matrix.searched(target, settings, solver == "kfac"))
    assert counted == pytest.approx(made, rel=0.02)


@pytest.mark.parametrize(
    "options", [{"sparsity": 0.5}, {"bits_per_weight": 3.0}, {"sparsity": 0.5, "solver": "admm"}], ids=str
)
def test_products_of_a_curve_are_those_that_it_makes(options, problem):
    """Oracle: torch's counter of operations."""
    weight, stats = problem
    settings = mspc.Recipe(**{"allocator": "curves"} | options).settings()
    made = products_of(lambda: curve_of(weight, stats, settings, SolverOptions(), "the matrix"))
    counted = products_counted(lambda matrix: matrix.curve(patterns_of(settings), settings))
    assert counted == pytest.approx(made, rel=0.03)


def test_products_of_compensation_and_error_are_those_that_are_made(problem):
    """Oracle: torch's counter of operations."""
    weight, stats = problem
    made = products_of(lambda: compensated(weight, stats, 1.0, 0.01, "the matrix"))
    assert products_counted(MatrixWork.compensated) == made
    made = products_of(lambda: output_error(weight, weight / 2, stats.gram))
    assert products_counted(lambda matrix: matrix.judged_and_stored(codes=False, num_bytes=0)) == made


# Ranks


def test_ranks_share_the_text_and_the_blocks(llama):
    """Oracle: the table of docs/scale.md, with products alone: a rank has 1 / N of the text, and whole blocks."""
    products = rates.Rates("here", 1, "today", True, dict.fromkeys(rates.CPU, INF) | {"product": 1e9}, exchange=INF)
    found = {}
    for ranks in (1, 2, 4, 8, 16):
        model, settings = outlined(str(llama)), replace(HALF.settings(), sequence_length=64, dtype="float32")
        matrices = model.matrices(())
        settings = forecasting.choose_group_size(settings, matrices)
        load = Workload(
            model, matrices, shared_inputs(model, matrices), settings, forecasting.assumed_plan(settings, matrices),
            torch.device("cpu"), torch.float32, ranks=ranks,
        )  # fmt: skip
        found[ranks] = {title: work.seconds(products) for title, work in stages_of(load).items()}
    for ranks in (2, 4, 8):
        assert found[ranks]["Gradients"] == pytest.approx(found[1]["Gradients"] / ranks, rel=1e-3)
        assert found[ranks]["Evaluating"] == found[1]["Evaluating"]
        assert found[ranks]["Loss curves"] < found[ranks // 2]["Loss curves"]
    assert found[16]["Gradients"] == found[8]["Gradients"]  # there are 8 chunks of text


def test_ranks_share_the_rows_of_a_large_matrix(problem):
    """Oracle: 768 rows a rank at least, by hand: 2 of them share 2047 rows, and nobody the decompositions."""
    alone, shared = (Work(), Work())
    for work, ranks in ((alone, 1), (shared, 2)):
        matrix = MatrixWork(work, (2047, 64), ranks=ranks)
        matrix.products(3)
        matrix.factors(1)
    product = sum(amount for (kind, _), amount in alone.amounts.items() if kind == "product")
    assert product == 3 * 2 * 2047 * 64 * 64
    assert sum(amount for (kind, _), amount in shared.amounts.items() if kind == "product") == product / 2
    assert shared.amounts["factor", 1] == alone.amounts["factor", 1] == 64**3
    assert shared.amounts["exchange", 1] == 3 * 4 * 2047 * 64


def test_a_rank_needs_less_memory_and_has_its_part_of_it(llama, monkeypatch):
    """Oracle: suspended passes are of the rank's own text, and the machine's memory is divided."""
    recipe = mspc.Recipe(sparsity=0.5, num_sequences=4096, sequence_length=128)
    monkeypatch.setattr(forecasting, "peak_memory", lambda: 0)
    need = [mspc.forecast(llama, recipe, device="cpu", ranks=ranks).demand.host_need for ranks in (1, 2)]
    assert need[1] < need[0]
    monkeypatch.setattr(forecasting, "free_memory", lambda device: need[1] + need[1] // 2)
    assert mspc.forecast(llama, recipe, device="cpu", ranks=1).problems == ()
    assert len(mspc.forecast(llama, recipe, device="cpu", ranks=2).problems) == 1


def test_every_rank_of_a_machine_spills_to_its_disk(llama):
    """Oracle: with --spill each rank has its own states and sums of gradients there, and without it none."""
    need = {
        (ranks, spill): mspc.forecast(llama, HALF, device="cpu", ranks=ranks, spill=spill).demand.disk_need
        for ranks in (1, 2)
        for spill in (None, "spill")
    }
    assert need[1, None] == need[2, None] < need[1, "spill"] < need[2, "spill"]


def test_a_number_of_ranks_that_cannot_be_is_refused(llama):
    with pytest.raises(InputError, match="3 ranks cannot share a run"):
        mspc.forecast(llama, HALF, ranks=3)


# What does not fit


def test_a_run_that_does_not_fit_is_refused_with_what_would(llama, calibration, tmp_path, monkeypatch):
    """Oracle: the forecast's own figure, from which 10% may be missing and no more."""
    recipe = mspc.Recipe(sparsity=0.5, calibration=str(calibration), num_sequences=4, sequence_length=32, eval=False)
    need = mspc.forecast(llama, recipe, device="cpu").demand.host_need
    monkeypatch.setattr(forecasting, "peak_memory", lambda: 0)
    monkeypatch.setattr(announcing, "WORTH_A_LINE", 10**9)

    def run(name: str, free: float, **options: object) -> mspc.Artifact:
        monkeypatch.setattr(forecasting, "free_memory", lambda device: int(free))
        return mspc.compress(llama, recipe, out=tmp_path / name, progress=False, **options)

    with pytest.raises(InputError, match=r"needs about .* of memory, and .* are free\. .* --force starts it"):
        run("refused", need / 1.12)
    assert not (tmp_path / "refused").exists()
    run("enough", need / 1.08)
    run("forced", need / 2, force=True)


def test_a_disk_too_small_is_a_problem(llama, tmp_path, monkeypatch):
    """Oracle: the size of the output, to the byte."""
    size = mspc.forecast(llama, HALF, device="cpu").output_bytes
    for free, problems in ((size, 0), (size - 1, 1)):
        monkeypatch.setattr(demand, "free_disk", lambda out, free=free: free)
        assert len(mspc.forecast(llama, HALF, device="cpu", out=tmp_path / "a" / "b").to_dict()["problems"]) == problems


def test_the_remedy_fits(llama, monkeypatch):
    """Oracle: a second forecast with the options that the first names."""
    recipe = mspc.Recipe(sparsity=0.5, num_sequences=30_000, sequence_length=128)
    monkeypatch.setattr(forecasting, "peak_memory", lambda: 0)
    whole = mspc.forecast(llama, recipe, device="cpu")
    spilled = mspc.forecast(llama, recipe, device="cpu", spill="spill")
    assert spilled.demand.host_need < whole.demand.host_need / 1.1
    free = spilled.demand.host_need
    monkeypatch.setattr(forecasting, "free_memory", lambda device: free)
    (problem,) = mspc.forecast(llama, recipe, device="cpu").problems
    assert "It fits with --spill DIR" in problem
    assert mspc.forecast(llama, recipe, device="cpu", spill="spill").problems == ()


def test_a_gram_too_wide_for_lapack_is_no_problem(tmp_path):
    """LAPACK's eigenvectors end at 32,766 inputs, and the solver needs none of a Gram."""
    wide = config_alone("llama", tmp_path / "wide", intermediate_size=32_768)
    recipe = mspc.Recipe(sparsity=0.5, num_sequences=2)
    assert not any("inputs" in problem for problem in mspc.forecast(wide, recipe, device="cpu").problems)
    assert mspc.forecast(wide, recipe, device="h200").problems == ()


@pytest.mark.parametrize("device", ["h200", "a100"])
def test_a_gpu_need_not_be_there(device, llama):
    found = mspc.forecast(llama, HALF, device=device)
    assert not found.rates.measured
    assert "not measured here" in found.line()
    assert found.demand.device_need > 0


@pytest.mark.parametrize("device", ["h200", "a100"])
def test_threads_of_the_cpu_share_no_work_of_a_gpu(device, llama):
    """Oracle: `threads.using`, which changes nothing there."""
    one, many = (mspc.forecast(llama, HALF, device=device, threads=number) for number in (1, 64))
    assert (one.seconds, one.demand) == (many.seconds, many.demand)


def test_what_is_no_model_to_compress_is_refused(artifact_of, llama, tmp_path):
    with pytest.raises(InputError, match="compressed already"):
        mspc.forecast(artifact_of("llama").path)
    with pytest.raises(InputError, match=r"has no config\.json, so it holds no model"):
        mspc.forecast(tmp_path)
    with pytest.raises(InputError, match="--only nothing matches no matrix"):
        mspc.forecast(llama, mspc.Recipe(sparsity=0.5, only=("nothing",)))
    with pytest.raises(InputError, match="only a device of this machine can be measured"):
        mspc.forecast(llama, device="h200", calibrated=True)


# Rates


def test_measured_rates_are_kept_by_device_and_threads(llama, monkeypatch):
    """Oracle: the file itself; a damaged one counts as none."""
    monkeypatch.setattr(rates, "SIZE", 64)
    monkeypatch.setattr(rates, "ROWS", 128)
    cpu = torch.device("cpu")
    assert not rates.known(cpu, 1).measured
    measured = rates.calibrate(cpu, 1)
    assert rates.known(cpu, 1) == measured
    assert all(rate > 0 for rate in measured.by_kind.values())
    assert set(measured.by_kind) == set(rates.CPU) == set(rates.H200) == set(rates.A100)
    assert not rates.known(cpu, 2).measured
    found = mspc.forecast(llama, HALF, device="cpu", threads=1)
    assert (found.rates, "measured here on" in found.line()) == (measured, True)
    (file,) = (Path(rates.cache_folder()) / "rates").iterdir()
    for damaged in ("{", "[]", "{}", json.dumps({"version": rates.VERSION, "by_kind": {}})):
        file.write_text(damaged)
        assert not rates.known(cpu, 1).measured


def test_seconds_of_work_that_threads_share():
    """Oracle: by hand. The second of two threads adds 80%."""
    two = replace(rates.table("cpu", 2), by_kind=dict.fromkeys(rates.CPU, 10.0))
    assert two.seconds("product", 30) == 3
    assert two.seconds("product", 36, ways=2) == pytest.approx(2)
    assert two.seconds("product", 36, ways=100) == pytest.approx(2)
    assert two.seconds("seconds", 36, ways=2) == 36


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (3, 8.2, "3 to 8.2 seconds"),
        (80, 99, "80 to 99 seconds"),
        (80, 300, "80 seconds to 5 minutes"),
        (600, 8000, "10 minutes to 2.2 hours"),
        (4e5, 9e5, "4.6 to 10 days"),
        (90.0, 90.2, "90 seconds"),
    ],
)
def test_spans(low, high, words):
    """Oracle: by hand."""
    assert span(low, high) == words


# The command line


def test_plan_takes_the_options_of_compress():
    """Oracle: the options of compress, without those that say how a run goes on or where its parts are."""
    commands = typer.main.get_command(app).commands
    flags = {verb: {flag for option in commands[verb].params for flag in option.opts} for verb in ("compress", "plan")}
    own = {"model", "--out", "--recipe", "--spill", "--threads", "--json", "--debug"}
    assert flags["plan"] == RECIPE_FLAGS | own | {"--calibrate", "--ranks"}
    assert flags["plan"] - flags["compress"] == {"--calibrate"}


def test_plan_prints_what_the_function_returns(llama, tmp_path):
    """Oracle: the function."""
    arguments = ["plan", llama, "--sparsity", 0.5, "--device", "cpu", "--threads", 1, "--num-sequences", 4]
    found = only_json(mspc_cli(*arguments, "--out", tmp_path / "out", "--json"))
    expected = mspc.forecast(
        llama, mspc.Recipe(sparsity=0.5, num_sequences=4), device="cpu", threads=1, out=tmp_path / "out"
    ).to_dict()
    assert {**found, "disk_free": 0} == {**json.loads(json.dumps(expected)), "disk_free": 0}
    shown = mspc_cli(*arguments).stdout
    assert all(title in shown for title in found["seconds_by_stage"])
    assert "not measured here" in shown
    assert not (tmp_path / "out").exists()


def test_a_long_run_begins_with_its_forecast(llama, calibration, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(announcing, "WORTH_A_LINE", 0.0)
    caplog.set_level("INFO", logger="mspc")
    tiny.compress(llama, tmp_path / "out", calibration)
    (line,) = [message for message in caplog.messages if message.startswith("Forecast: ")]
    assert "of memory, an output of" in line
    assert isinstance(mspc.forecast(llama, HALF), Forecast)
