"""The command line: errors before any work, and what compress, eval, inspect and export print. Exit codes."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from test_cli import FAST, GOAL_FLAGS, mspc_cli, only_json, refused
from typer.testing import CliRunner

import mspc
from mspc.cli.main import app
from mspc.errors import InputError
from mspc.pipeline import run as pipeline
from mspc.planning.measurements import Measurements


@pytest.fixture(scope="module")
def compress(llama: Path, calibration: Path) -> Callable[..., list[object]]:
    """The arguments of a quick run, for half zeros unless others are a goal."""

    def arguments(out: Path, *more: object) -> list[object]:
        goal = () if {*more} & GOAL_FLAGS else ("--sparsity", 0.5)
        return ["compress", llama, "--out", out, "--calibration", calibration, *FAST, *goal, *more]

    return arguments


@pytest.fixture(scope="module")
def artifact(compress: Callable[..., list[object]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "out"
    mspc_cli(*compress(out, "--sparsity", 0.3, "--bits", 4, "--group-size", 16, "--asymmetric"))
    return out


def manifest_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "mspc.json").read_text())


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--effort", "bets"), "Unknown effort 'bets': did you mean 'best'?"),
        (("--propagation", 2), "propagation must lie in [0, 1], not 2"),
        (("--iterations", 0), "iterations must be at least 1, not 0"),
        (("--solver", "obz"), "Unknown solver 'obz': did you mean 'obs'?"),
        (("--criterion", "wando"), "Unknown criterion 'wando': did you mean 'wanda'?"),
        (("--allocator", "trace_rank"), "Unknown allocator 'trace_rank': did you mean 'trace-rank'?"),
        (("--sensitivity", "hutchins"), "Unknown sensitivity 'hutchins': did you mean 'hutchinson'?"),
        (("--sparsity", 50), "sparsity must lie in [0, 1), not 50"),
        (("--bits-per-weight", 0), "bits_per_weight must lie in (0, 32], not 0"),
        (
            ("--bits-per-weight", 3, "--allocator", "uniform"),
            "bits_per_weight 3.0 needs the allocator auto or curves, not uniform. Choose one of the two, or ask for",
        ),
        (
            ("--allocator", "search", "--num-sequences", 93, "--sequence-length", 32),
            "The allocator search needs validation text, and none is left. Give more",
        ),
        (("--reconstruct", 9, "--bits", 4), "reconstruct tunes weights that are not quantized, and bits is 4. Leave"),
        (
            ("--target-size", "small"),
            "such as 800MB or 2.2GB (powers of 1000) or 2GiB (of 1024), not 'small'",
        ),
        (("--target-size", "1GB", "--bits-per-weight", 3), "are both a budget. Give one of them"),
        (("--target-size", "1GB", "--bits", 4), "target_size and bits 4 exclude each other"),
        (("--bits-per-weight", 3, "--sparsity", 0.5), "bits_per_weight and sparsity 0.5 exclude each other"),
        (
            ("--bits-per-weight", 3, "--allocator", "curves", "--group-size", 128),
            "q_proj: group size 128 does not divide its 32 in features",
        ),
        (("--sequence-length", 129), "A sequence length of 129 is longer than the model allows (128); lower it."),
        (("--pattern", "3:5"), "model.layers.0.self_attn.q_proj: the pattern 3:5 needs in features divisible by 5"),
        (("--bits", 4, "--group-size", 128), "model.layers.0.self_attn.q_proj: group size 128 does not divide its 32"),
        (("--pattern", "2:4", "--activation-order", "--solver", "obs"), "activation order reorders columns"),
        (("--skip", ""), "Nothing is left to compress"),
        (
            ("--only", "up_proj", "--skip", "proj"),
            "Nothing is left to compress: --skip matches every matrix of every block ",
        ),
        (("--only", "lm_head"), "--only lm_head matches no matrix of a block, such as model.layers.0.self"),
        (("--only", "q_proj", "--only", "layernorm"), "--only layernorm matches no matrix of a block"),
        (("--only", r"layers\.2\."), r"--only layers\.2\. matches no matrix of a block"),
        (("--target-size", "1GB"), "target_size is 1GB, and the weights have 151 KB as they are. Ask for less."),
        (("--target-size", "1KiB"), "target_size 1KiB cannot be reached. The smallest is "),
        (("--skip", "lm_head"), "--skip lm_head matches no matrix of a block, such as model.layers.0.self"),
        (("--calibration", "nowhere.txt"), "Text 'nowhere.txt' does not exist (looked for /"),
        (("--plan", "nowhere.json"), "Plan nowhere.json does not exist"),
        (("--recipe", "nowhere.toml"), "Recipe nowhere.toml cannot be read"),
        (("--num-sequences", 10_000), "Too little text"),
        (("--device", "warp"), "Device 'warp' cannot be used"),
        (("--resume", "--overwrite"), "--resume and --overwrite exclude each other"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(options, message, compress, tmp_path, monkeypatch):
    for measure in ("sensitivities", "fisher_factors", "loss_curves"):
        monkeypatch.setattr(Measurements, measure, lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(pipeline, "solve_blocks", lambda *args, **kwargs: pytest.fail("solved"))
    assert message in refused(*compress(tmp_path / "out", *options))
    assert not (tmp_path / "out").exists()


def test_inputs_that_are_none(tmp_path, artifact, llama, monkeypatch):
    told = refused("compress", "no/model", "--out", tmp_path / "out")
    assert f"is no folder here ({Path('no/model').absolute()}) and could not be fetched" in told
    assert "is not a folder" in refused("compress", tmp_path / "model", "--out", tmp_path / "out")
    monkeypatch.chdir(llama.parent)
    assert f"{llama.name}a; did you mean {llama.name}?) and" in refused("eval", llama.name + "a")
    export = mspc.export(artifact, "sparse", tmp_path / "sparse", verify=False, progress=False)
    assert "is an export; give the artifact" in refused("inspect", export)
    config = json.loads((export / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (export / "config.json").write_text(json.dumps(config))
    assert "quantized already by its config.json (quant_method 'gptq')" in refused("eval", export)
    for file in export.glob("*.safetensors"):  # as in an onnx export
        file.unlink()
    del config["quantization_config"]
    (export / "config.json").write_text(json.dumps(config))
    assert "holds no .safetensors files; give a Hugging Face checkpoint, an artifact, or an" in refused("eval", export)
    assert "has no config.json, so it holds no model" in refused("eval", tmp_path)
    assert "is an mspc artifact already" in refused("compress", artifact, "--out", tmp_path / "out")
    assert "is not an mspc artifact: it has no mspc.json" in refused("inspect", llama)
    assert "is not an mspc artifact" in refused("export", llama, "dense", "--out", tmp_path / "out")
    assert "Unknown format 'densee': did you mean 'dense'?" in refused("export", artifact, "densee", "--out", tmp_path)
    assert "is the artifact itself" in refused("export", artifact, "dense", "--out", artifact, "--overwrite")
    assert "Unknown dtype 'float15'" in refused("eval", llama, "--dtype", "float15")
    for length in (1, 0, -3):
        assert "sequence_length must be at least 2" in refused("eval", llama, "--sequence-length", length)
    assert "max_windows must be at least 1" in refused("eval", llama, "--max-windows", 0)
    assert "longer than the model allows (128)" in refused("eval", llama, "--sequence-length", 129)
    assert "is not empty and was not exported" in refused("export", artifact, "dense", "--out", artifact.parent)


def test_wrong_usage_exits_2():
    for arguments in (["compres"], ["compress", "model"], ["compress", "m", "--out", "o", "--sparcity", "1"], ["eval"]):
        result = mspc_cli(*arguments, code=2)
        assert "Traceback" not in result.stderr
        assert result.stdout == ""


def test_what_the_input_cannot_be_blamed_for_exits_1(compress, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = mspc_cli(*compress(tmp_path / "out"), code=1)
    assert result.stderr.splitlines()[-1].startswith("Error: Cannot write ")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("verb", "of"),
    [("eval", "mspc.api.evaluate"), ("verify", "exporters.verification.verify")],
)
def test_an_interruption_promises_only_what_is_kept(verb, of, llama, monkeypatch):
    """`compress` has its own test, with what --resume then does."""

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(of, interrupted, raising=False)
    assert mspc_cli(verb, llama, code=130).stderr == "\nInterrupted.\n"


def test_debug_raises_the_error_itself(tmp_path):
    assert refused("inspect", tmp_path).count("\n") == 1
    result = CliRunner().invoke(app, ["inspect", str(tmp_path), "--debug"])
    assert isinstance(result.exception, InputError)


def test_the_version_is_that_of_the_package():
    shown = subprocess.run([sys.executable, "-m", "mspc", "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout == f"{mspc.__version__}\n"


# Results


def test_compress_prints_the_manifest_and_nothing_else(compress, tmp_path):
    result = mspc_cli(*compress(tmp_path / "out", "--json"))
    assert only_json(result) == manifest_of(tmp_path / "out")
    assert "Compressing: done" in result.stderr


def test_compress_says_what_it_made(compress, tmp_path):
    result = mspc_cli(*compress(tmp_path / "out", "--sparsity", 0.25))
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert re.search(r"out: 14 matrices, sparsity 25\.00%, 25\.000 bits per weight", last)


def test_compress_says_when_the_pattern_allows_nothing_nearer(compress, tmp_path):
    result = mspc_cli(*compress(tmp_path / "out", "--pattern", "N:16", "--sparsity", 0.98))
    assert "sparsity 93.75%" in result.stderr
    assert "Requested: 98.00%; the pattern allows nothing nearer (-4.25%)." in result.stderr


@pytest.mark.parametrize(
    ("arguments", "note"),
    [
        (("--sparsity", 0), "Note: the plan prunes and quantizes nothing."),
        (("--skip", "v_proj"), None),
        ((), None),
    ],
)
def test_notes_are_for_what_was_not_asked_for(arguments, note, compress, tmp_path):
    result = mspc_cli(*compress(tmp_path / "out", *arguments))
    notes = [line for line in result.stderr.splitlines() if line.startswith("Note: ") and "vocab_size" not in line]
    assert notes == [] if note is None else notes[0].startswith(note)


@pytest.mark.parametrize("windows", [3, None])
def test_eval_prints_one_object(windows, llama, artifact, test_text):
    """Oracle: cross entropy of transformers' own forward pass."""
    most = () if windows is None else ("--max-windows", windows)
    for folder in (llama, artifact):
        result = mspc_cli("eval", folder, "--text", test_text, "--sequence-length", tiny.LENGTH, "--json", *most)
        values = only_json(result)
        plain = ["perplexity", "nll", "tokens", "windows", "sequence_length"]
        assert list(values) == [*plain, "perplexity_interval", "text"]
        assert values["text"] == str(test_text)
        assert values["windows"] == (windows or 20)
        assert values["sequence_length"] == tiny.LENGTH
        assert values["tokens"] == values["windows"] * (tiny.LENGTH - 1)
        assert values["perplexity"] == math.exp(values["nll"])
        if folder == llama:
            ids = torch.tensor(tiny.byte_tokenizer()(test_text.read_text())["input_ids"]).view(-1, tiny.LENGTH)
            with torch.no_grad():
                expected = tiny.losses(tiny.reference(llama), ids[: values["windows"]]).double().mean()
            assert values["nll"] == pytest.approx(float(expected), rel=1e-5)


def test_eval_in_words(llama, test_text):
    result = mspc_cli("eval", llama, "--text", test_text, "--sequence-length", 32, "--max-windows", 2)
    interval, number = r"\(\d+\.\d{4} to \d+\.\d{4}\)", r"\d+\.\d{4}"
    assert re.fullmatch(
        rf"perplexity {number} {interval} over 62 tokens, 2 windows of 32 of {test_text}\n", result.stdout
    )


def test_eval_against_another_model_gives_both_perplexities_and_intervals(llama, artifact, test_text):
    """Oracle: each model evaluated alone; transformers' losses of every window."""
    asked = ("--text", test_text, "--sequence-length", tiny.LENGTH)
    both = only_json(mspc_cli("eval", artifact, "--against", llama, *asked, "--json"))
    dense, alone = (only_json(mspc_cli("eval", path, *asked, "--json")) for path in (llama, artifact))
    for name in ("perplexity", "perplexity_interval"):
        assert both[name] == alone[name]
        assert both[f"reference_{name}"] == pytest.approx(dense[name], rel=1e-6)
    ids = torch.tensor(tiny.byte_tokenizer()(test_text.read_text())["input_ids"]).view(-1, tiny.LENGTH)
    with torch.no_grad():
        of_windows = tiny.losses(tiny.reference(llama), ids).double().mean(1)
    half = 2.09302 * of_windows.std() / 20**0.5  # the quantile of 19 degrees, by the tables
    expected = [math.exp(of_windows.mean() - half), math.exp(of_windows.mean() + half)]
    assert dense["perplexity_interval"] == pytest.approx(expected, rel=1e-4)
    low, high = both["divergence_interval"]
    assert 0 < low < both["divergence"] < high
    shown = mspc_cli("eval", artifact, "--against", llama, *asked).stdout
    for name in ("perplexity", "reference_perplexity"):
        low, high = both[f"{name}_interval"]
        assert f"{both[name]:.4f} ({low:.4f} to {high:.4f})" in shown
    assert f"; {llama}: " in shown
    assert f"windows of 32 of {test_text}" in shown


def test_eval_of_several_paths_is_a_table(llama, artifact, test_text, tmp_path):
    """Oracle: the evaluation of each path. What was measured is shown when a later path fails."""
    asked = ("--text", test_text, "--sequence-length", tiny.LENGTH, "--against", llama)
    shown = mspc_cli("eval", llama, artifact, *asked).stdout
    found = {path: mspc.evaluate(path, test_text, sequence_length=32, against=llama) for path in (llama, artifact)}
    rows = [line for line in shown.splitlines() if line.startswith("/")]
    assert f"20 windows of 32 of {test_text}, 95% intervals" in shown
    assert [line.split()[0] for line in rows] == [str(path) for path in (llama, llama, artifact)]
    assert "(reference)" in rows[0]
    assert f"{found[llama].perplexity:.4f} (" in rows[0]
    assert f"{found[artifact].divergence:.5f} (" in rows[2]
    models = only_json(mspc_cli("eval", llama, artifact, *asked, "--json"))["models"]
    assert [(model["path"], model["perplexity"]) for model in models] == [
        (str(path), result.perplexity) for path, result in found.items()
    ]
    failed = mspc_cli("eval", llama, tmp_path, *asked, code=2)
    assert f"{found[llama].perplexity:.4f}" in failed.stdout
    assert "Error: " in failed.stderr


def test_paths_with_other_windows_say_so_and_equal_paths_each_have_a_row(llama, test_text, tmp_path):
    short = tiny.build(tmp_path / "short", "llama", max_position_embeddings=64)
    rows = mspc_cli("eval", llama, short, llama, "--text", test_text).stdout.splitlines()
    assert rows[0].strip() == f"5 windows of 128 of {test_text}, 95% intervals"
    assert [line.split()[0] for line in rows[2:]] == [str(llama), str(short), str(llama)]
    assert [f"(on 10 windows of 64 of {test_text})" in line for line in rows[2:]] == [False, True, False]


def test_compress_says_what_it_cost(compress, tmp_path, monkeypatch):
    """Oracle: the manifest. A random model guesses, and is badly hurt by 95% zeros."""
    monkeypatch.setenv("MSPC_CPU_ISA", "torch")  # where compressed layers are slow
    result = mspc_cli(*compress(tmp_path / "out", "--sparsity", 0.95))
    found = manifest_of(tmp_path / "out")["evaluation"]
    lines = result.stderr.splitlines()
    assert [line.split(":")[0] for line in lines[-6:-1]] == ["Cost", "Size", "Seconds", "Warning", "Speed"]
    assert f"KL from the dense model {found['divergence']['mean']:.3f} (" in lines[-6]
    assert "the model is badly hurt" in lines[-3]
    assert "less --sparsity than 0.95" in lines[-3]
    assert any(line.startswith("Warning: the dense model is close to guessing") for line in lines)
    assert "Cost: perplexity" in mspc_cli("inspect", tmp_path / "out").stdout
    without = mspc_cli(*compress(tmp_path / "without", "--no-eval"))
    assert "Cost:" not in without.stderr
    assert "Size: " in without.stderr
    assert mspc.Recipe.from_toml(tmp_path / "without" / "recipe.toml").eval is False


def test_inspect_prints_the_manifest(artifact):
    assert only_json(mspc_cli("inspect", artifact, "--json")) == manifest_of(artifact)


def test_inspect_shows_every_matrix(artifact):
    shown = mspc_cli("inspect", artifact).stdout
    for row in manifest_of(artifact)["matrices"]:
        (line,) = (line.split() for line in shown.splitlines() if line.startswith(row["name"] + " "))
        assert line[1] == "x".join(map(str, row["shape"]))
        assert line[2:5] == ["unstructured", f"{row['sparsity']:.2%}", "4"]
    assert "14 matrices, sparsity 30.00%" in shown


def test_export_is_loaded_by_transformers(artifact, tmp_path):
    """Oracle: the zeros that the manifest counts, in the weights as transformers loads them."""
    out = tmp_path / "dense"
    assert "dense written." in mspc_cli("export", artifact, "dense", "--out", out).stderr
    weights = tiny.reference(out).state_dict()
    for row in manifest_of(artifact)["matrices"]:
        assert int((weights[row["parameter"]] == 0).sum()) == row["zeros"]
    assert "holds an older export" in refused("export", artifact, "dense", "--out", out)
    mspc_cli("export", artifact, "dense", "--out", out, "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize(
    "files",
    [
        {"thesis.tex": "all of it"},
        {"config.json": "{}"},
        {"config.json": "not json"},
        {"config.json": '{"mspc": {}}', "mspc.json": "{}"},  # the artifact of a model that was once exported
    ],
    ids=str,
)
def test_export_replaces_only_exports(files, artifact, tmp_path):
    (tmp_path / "out").mkdir()
    for name, content in files.items():
        (tmp_path / "out" / name).write_text(content)
    message = refused("export", artifact, "dense", "--out", tmp_path / "out", "--overwrite")
    assert "is not empty and was not exported by mspc" in message
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == files


@pytest.mark.parametrize("name", ["../evil.safetensors", "/tmp/evil.safetensors", "a/../../evil.safetensors"])
@pytest.mark.parametrize("where", ["shards", "matrices"])
def test_a_manifest_that_points_elsewhere_is_refused(where, name, artifact, tmp_path):
    manifest = manifest_of(artifact)
    if where == "shards":
        manifest["source"]["shards"] = {name: manifest["source"]["shards"]["model.safetensors"]}
    else:
        manifest["matrices"][0]["file"] = name
    (tmp_path / "mspc.json").write_text(json.dumps(manifest))
    message = refused("export", tmp_path, "dense", "--out", tmp_path / "dense")
    assert "points outside its folder" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read"), ("[]", "cannot be read"), ("{}", "cannot be read"), ('{"format_version": 3}', "upgrade")],
)
def test_manifests_that_cannot_be_read(content, message, tmp_path):
    (tmp_path / "mspc.json").write_text(content)
    assert message in refused("inspect", tmp_path)


@pytest.mark.parametrize(
    ("options", "measured"),
    [
        (("--allocator", "trace-rank", "--sensitivity", "gram"), {"Sensitivity": "sensitivity"}),
        (("--allocator", "curves"), {"Gradients": "fisher", "Loss curves": "curves"}),
    ],
    ids=["sensitivity", "curves"],
)
def test_kept_measurements_serve_another_budget_and_are_told(options, measured, compress, tmp_path):
    asked = (*options, "--measurements", tmp_path / "kept")
    first = mspc_cli(*compress(tmp_path / "first", *asked))
    second = mspc_cli(*compress(tmp_path / "second", *asked, "--sparsity", 0.3))
    for name, file in measured.items():
        assert re.search(rf"^{name}.*: done", first.stderr, re.MULTILINE)
        (kept,) = (tmp_path / "kept").glob(f"{file}-*")
        assert f"{name}: taken from {kept}." in second.stderr
        assert not re.search(rf"^{name}.*: done", second.stderr, re.MULTILINE)
    assert not (tmp_path / "first" / "measurements").exists()


def test_resume_of_another_run_exits_2_and_of_a_finished_one_0(compress, artifact, tmp_path):
    out = tmp_path / "out"
    mspc_cli(*compress(out))
    assert "settings.sparsity was 0.5 and is 0.6" in refused(*compress(out, "--sparsity", 0.6, "--resume"))
    assert "holds a finished artifact. Choose another --out, or replace it with --overwrite" in refused(*compress(out))
    assert "is complete already" in mspc_cli(*compress(out, "--resume")).stderr
