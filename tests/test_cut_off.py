"""Failures: what was measured stays and is shown, in the bench and in benchmarks/gpu.py, and bugs are reported."""

import importlib
import json
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_cli import mspc_cli, refused

import mspc
from mspc.bench import plots
from mspc.bench import run as bench_run
from mspc.cli import main as cli
from mspc.errors import InputError
from mspc.pipeline import evaluation

BUGS = [
    KeyError("x"),
    ZeroDivisionError("division by zero"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    AssertionError(),
]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["mspc", *map(str, arguments)])
    cli.main()


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(evaluation, "load_config", fail)


@pytest.mark.parametrize("error", BUGS, ids=lambda error: type(error).__name__)
def test_a_bug_is_reported_with_what_to_attach(error, llama, monkeypatch, capsys, tmp_path):
    failing(monkeypatch, error)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "eval", llama, "--text", "a b.txt")
    assert ended.value.code == 1
    out, told = capsys.readouterr()
    (report,) = tmp_path.iterdir()
    assert out == ""
    assert "Traceback" not in told
    assert told.startswith(f"Error: {type(error).__name__}" if not isinstance(error, ValueError) else "Error: 'utf-8'")
    assert f"This is a bug of mspc, whatever the input was. Report it and attach {report}:" in told
    assert len(told.strip().splitlines()) == 1
    written = report.read_text()
    assert shlex.join(["mspc", "eval", str(llama), "--text", "a b.txt"]) in written
    assert f"torch {version('torch')}, transformers {version('transformers')}" in written
    assert "Traceback (most recent call last)" in written
    assert written.strip().splitlines()[-1].startswith(type(error).__name__)


def test_debug_keeps_the_traceback(llama, monkeypatch, tmp_path):
    failing(monkeypatch, KeyError("x"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(KeyError):
        call(monkeypatch, "eval", llama, "--debug")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory: 3")]
)
def test_lack_of_memory_is_no_bug(error, llama, monkeypatch, capsys):
    failing(monkeypatch, error)
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "eval", llama)
    assert ended.value.code == 1
    assert "Error: the memory was not enough" in capsys.readouterr().err


def test_an_infinite_perplexity_is_null_in_json(llama, calibration, monkeypatch):
    measured = evaluation.perplexity.Perplexity(float("inf"), 800.0, 31, 1, 32, float("nan"))
    monkeypatch.setattr("mspc.api.evaluate_folder", lambda *_: measured)
    found = json.loads(mspc_cli("eval", llama, "--json").stdout, parse_constant=lambda name: pytest.fail(name))
    assert (found["perplexity"], found["divergence"], found["nll"]) == (None, None, 800.0)
    assert "perplexity inf over 31 tokens" in mspc_cli("eval", llama).stdout


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two checkpoints whose matrices take groups of 128."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = tmp_path_factory.mktemp("bench")
    return [tiny.build(folder / name, "llama", seed=seed, **sizes) for seed, name in enumerate(("first", "second"))]


QUICK = ("--batch", "1", "--context", "8", "--prefill", "8", "--repeats", 1, "--device", "cpu", "--peers", "none")


@pytest.mark.parametrize("error", [InputError("is damaged"), RuntimeError("broken"), KeyboardInterrupt()])
def test_rows_that_were_measured_are_shown_when_a_later_path_fails(error, models, monkeypatch, tmp_path):
    perplexity_of = bench_run.perplexity_of

    def fail(candidate: Any, *rest: Any) -> Any:
        if candidate.name == str(models[1]):
            raise error
        return perplexity_of(candidate, *rest)

    monkeypatch.setattr(bench_run, "perplexity_of", fail)
    code = {InputError: 2, RuntimeError: 1, KeyboardInterrupt: 130}[type(error)]
    shown = mspc_cli("bench", *models, *QUICK, "--json", tmp_path / "rows.json", code=code)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [str(models[0]), "int4 (torch)", str(models[1])]
    assert [row["perplexity"] is None for row in rows] == [False, True, True]
    assert all(row["decode"] and row["prefill"] for row in rows)
    for table in ("sizes", "decoding", "prefill"):
        assert f"first: {table}" in shown.stdout
    assert shown.stdout.count("int4 (torch)") >= 3


@pytest.mark.parametrize(
    ("fault", "as_json", "place"),
    [("nowhere", False, 0), ("damaged", True, 1), ("nowhere", True, 2), ("damaged", False, 2)],
)
def test_eval_shows_the_paths_before_the_one_that_fails(fault, as_json, place, models, tmp_path):
    """Oracle: `mspc.evaluate` of each."""
    bad = tmp_path / "bad"
    if fault == "damaged":
        bad.mkdir()
        for path in models[0].iterdir():
            (bad / path.name).write_bytes(path.read_bytes()[: 900 if path.suffix == ".safetensors" else None])
    paths = [*models[:place], bad, *models[place:]]
    options = ["--max-windows", 2, "--sequence-length", 16, "--device", "cpu", *["--json"] * as_json]
    shown = mspc_cli("eval", *paths, *options, code=2)
    rights = [
        mspc.evaluate(path, max_windows=2, sequence_length=16, device="cpu", progress=False).perplexity
        for path in models[:place]
    ]
    if as_json:
        found = json.loads(shown.stdout)["models"]
        assert [(row["path"], row["perplexity"]) for row in found] == list(zip(map(str, models), rights, strict=False))
    else:
        assert [line.split()[1] for line in shown.stdout.splitlines()[2:]] == [f"{right:.4f}" for right in rights]
    assert str(bad) in shown.stderr
    assert len([line for line in shown.stderr.splitlines() if line.startswith("Error: ")]) == 1


def test_each_row_is_shown_when_it_is_known(models, monkeypatch, capsys):
    """On stderr, when its perplexity is known, before the next one begins; rows without one before that."""
    perplexity_of, seen = bench_run.perplexity_of, []

    def note(candidate: Any, *rest: Any) -> Any:
        seen.append(capsys.readouterr().err)
        return perplexity_of(candidate, *rest)

    monkeypatch.setattr(bench_run, "perplexity_of", note)
    with pytest.raises(SystemExit) as ended:
        cli.app([str(word) for word in ("bench", *models, *QUICK)])
    assert ended.value.code == 0
    seen.append(capsys.readouterr().err)
    names = [
        "first, int4 (torch): ",
        f"first, {models[0]} (dense): 32.000 bits/weight, ",
        f"first, {models[1]} (dense): ",
    ]
    assert len(seen) == 3
    for number, text in enumerate(seen):
        lines = text.splitlines()
        assert [any(line.startswith(name) for line in lines) for name in names] == [number == k for k in range(3)]
        assert any(
            line.startswith("  context 8, batch 1: ") and " tokens/s, x dense float32 " in line for line in lines
        )
        assert any(line.startswith("  prompt 8: ") for line in lines)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--max-windows", 3, "--sequence-length", 16], {"max_windows": 3, "sequence_length": 16}),
        (["--max-windows", 1], {"max_windows": 1}),
        (["--sequence-length", 32, "--bos", "no"], {"max_windows": 20, "sequence_length": 32, "bos": "no"}),
        ([], {"max_windows": 20}),
    ],
    ids=str,
)
def test_the_bench_measures_the_windows_that_eval_does(options, expected, models, tmp_path):
    """Oracle: `mspc.evaluate` with the same arguments."""
    shown = mspc_cli("bench", models[0], *QUICK, *options, "--json", tmp_path / "rows.json")
    result = json.loads((tmp_path / "rows.json").read_text())
    found = result["rows"][0]["perplexity"]
    assert found == mspc.evaluate(models[0], device="cpu", progress=False, **expected).perplexity
    assert result["configuration"]["perplexity"] == {
        "text": "builtin", "sequence_length": None, "bos": "auto", **expected,
    }  # fmt: skip
    assert f"{found:.3f}" in shown.stdout
    assert f"perplexity {found:.3f}" in shown.stderr


def test_the_bench_measures_no_perplexity_if_it_is_not_to(models, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_run, "evaluate", lambda *_, **__: pytest.fail("evaluated"))
    shown = mspc_cli("bench", *models, *QUICK, "--no-perplexity", "--json", tmp_path / "rows.json")
    result = json.loads((tmp_path / "rows.json").read_text())
    assert [row["perplexity"] for row in result["rows"]] == [None] * 3
    assert result["configuration"]["perplexity"] is None
    assert "erplexit" not in shown.stdout + shown.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-windows", 0], "--max-windows must be at least 1, not 0"),
        (["--max-windows", -3], "--max-windows must be at least 1, not -3"),
        (["--sequence-length", 1], "--sequence-length must be at least 2, not 1"),
        (["--sequence-length", 129], "A sequence length of 129 is longer than the model allows (128)"),
        (["--no-perplexity", "--max-windows", 3], "--max-windows 3 has no effect with --no-perplexity"),
        (["--no-perplexity", "--sequence-length", 16], "--sequence-length 16 has no effect with --no-perplexity"),
        (["--no-perplexity", "--bos", "no"], "--bos no has no effect with --no-perplexity"),
        (["--shapes", "from-model", "--max-windows", 3], "--max-windows 3 has no effect with --shapes from-model"),
    ],
    ids=str,
)
def test_windows_that_cannot_be_or_have_no_effect_are_refused(options, message, models, monkeypatch):
    monkeypatch.setattr(bench_run, "measure", lambda *_: pytest.fail("measured"))
    assert message in refused("bench", models[0], *QUICK, *options)


def test_nothing_is_shown_when_nothing_was_measured(models, monkeypatch):
    monkeypatch.setattr(bench_run, "measure", lambda *_: (_ for _ in ()).throw(InputError("is damaged")))
    assert mspc_cli("bench", *models, *QUICK, code=2).stdout == ""


@pytest.mark.parametrize("names", [1, 4, 12])
def test_the_legend_covers_no_point(names, tmp_path, monkeypatch):
    """Oracle: the boxes of legends and axes in pixels."""
    rows = [row(f"out/some/long/path/number-{number}", number) for number in range(names)]
    result = {
        "rows": [row("dense", 0) | {"baseline": "bf16"}, *rows], "date": "2026-01-01", "label": "CPU",
        "device": {"name": "a device"}, "configuration": {"baseline": "bf16", "dtype": "float32"},
    }  # fmt: skip
    figures = []
    monkeypatch.setattr(plots, "write_atomically", lambda path, write: write(tmp_path / "plot.png"))
    from matplotlib.figure import Figure

    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (figures.append(figure), save(figure, *a, **k)))
    plots.plot(result, tmp_path / "plot.png")
    (figure,) = figures
    assert len(figure.axes) == 2
    for axis in figure.axes:
        box, legend = axis.get_window_extent(), axis.get_legend().get_window_extent()
        assert box.x1 <= legend.x0 + 1 or legend.y1 <= box.y0
        assert figure.bbox.x0 - 1 <= legend.x0 < legend.x1 <= figure.bbox.x1 + 1
        for line in axis.lines:
            points = axis.transData.transform(np.column_stack(line.get_data()).astype(float))
            assert not any(legend.contains(*point) for point in points)
        assert box.width > 100


def row(name: str, number: int) -> dict[str, Any]:
    steps = [
        {
            "batch": batch,
            "context": 8,
            "speedup": {"bf16": 1 + number / 3 + batch},
            "tokens_per_second": {"median": 5.0},
        }
        for batch in (1, 2, 4)
    ]
    return {
        "name": name, "model": "m", "format": "2:4", "random_weights": False, "baseline": None, "decode": steps,
        "perplexity": 9.0 + number,
    }  # fmt: skip


def test_an_interrupted_measurement_says_what_is_done_and_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    gpu = importlib.import_module("gpu")

    def units(slot: Any) -> Any:
        yield "first", lambda: {"rows": [{"a": 1.0}]}
        yield "second", interrupted
        yield "third", lambda: {"rows": [{"a": 2.0}]}

    def interrupted() -> Any:
        raise KeyboardInterrupt

    for part in ("kernels", "layers"):
        monkeypatch.setitem(gpu.PARTS, part, units)
    monkeypatch.setattr("sys.argv", ["gpu.py", "--dry-run", "--results", str(tmp_path), "--parts", "kernels", "layers"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 130
    told = capsys.readouterr().out
    (file,) = tmp_path.glob("kernels*.json")
    assert f"kernels: 1 units in {file}, 2 left, next second" in told
    assert "layers: nothing, 3 left, next first" in told
    assert "The same command goes on there." in told
    monkeypatch.setattr(gpu, "PARTS", {part: lambda slot: list(units(slot))[::2] for part in ("kernels", "layers")})
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 0
    assert set(json.loads(file.read_text())["units"]) == {"first", "third"}
