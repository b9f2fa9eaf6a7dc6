"""benchmarks/gpu.py, without a GPU: its parts, what it predicts, and how it goes on."""

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_bench import small_ceilings  # noqa: F401  a fixture

from mspc.bench.models import SHAPES

DOCS = Path(__file__).parents[1] / "docs" / "benchmark.md"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, whose parts do not measure the CPU for long."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    module = importlib.import_module("gpu")
    module.gpu_parts = importlib.import_module("gpu_parts")
    return module


def test_what_is_predicted_is_what_the_documentation_says(gpu):
    """Oracle: the table of docs/benchmark.md, which is rounded."""
    rows = re.findall(r"^\| ([^|]+) \| ([\d. to]+) \| [^|]+ \| ([\d. to]+) \|", DOCS.read_text(), re.MULTILINE)
    assert len(rows) == 12
    for name, *of_shapes in rows:
        for shape, milliseconds in zip(("8b", "1b"), of_shapes, strict=True):
            greatest, *least = (float(number) / 1e3 for number in milliseconds.split(" to "))
            found = gpu.gpu_parts.predicted(SHAPES[shape], {"bf16": "dense"}.get(name, name), 4.3e12)
            assert found[1] == pytest.approx(greatest, rel=0.04)
            assert found[0] == pytest.approx(least[0] if least else greatest, rel=0.06)


def run_gpu(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["gpu.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    return stopped.value.code


def test_every_part_runs_and_goes_on_where_it_was_cut_off(gpu, tmp_path, monkeypatch, capsys):
    assert run_gpu(gpu, monkeypatch, "--dry-run", "--results", tmp_path) == 0
    assert {path.name.partition("_")[0] for path in tmp_path.glob("*.md")} == set(gpu.PARTS)
    results = {path.stem.partition("_")[0]: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert all(result["finished"] and result["configuration"]["dry_run"] for result in results.values())
    assert {path.name.partition("_")[0] for path in tmp_path.glob("*.png")} == {"decode-1b", "decode-8b", "layers"}
    assert [unit["bench"]["name"] for unit in results["decode-1b"]["units"].values()][:2] == ["dense", "int4 (torch)"]
    assert "no gain" in next(tmp_path.glob("decode-1b*.md")).read_text()
    (path,) = tmp_path.glob("layers*.json")
    cut = results["layers"]
    kept = dict(list(cut["units"].items())[:2])
    path.write_text(json.dumps(cut | {"units": kept, "finished": False}))
    capsys.readouterr()
    assert run_gpu(gpu, monkeypatch, "--dry-run", "--results", tmp_path) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" s")]
    assert [line.partition(":")[0] for line in told] == ["layers, tiny gate_up", "layers, tiny down"]
    after = json.loads(path.read_text())["units"]
    assert {name: after[name] for name in kept} == kept


def test_what_fails_does_not_stop_the_rest(gpu, tmp_path, monkeypatch, capsys):
    def units(slot):
        yield "bad", lambda: 1 / 0
        yield "wrong", lambda: {"rows": [{"right": False}], "wrong": True}
        yield "good", lambda: {"rows": [{"a": 1.0, "b": "x|y"}]}

    def broken(result, path):
        raise ModuleNotFoundError("No module named 'matplotlib'")

    monkeypatch.setattr(gpu, "draw", broken)
    monkeypatch.setitem(gpu.PARTS, "kernels", units)
    asked = ("--dry-run", "--results", tmp_path, "--parts", "kernels")
    assert run_gpu(gpu, monkeypatch, *asked) == 1
    shown = capsys.readouterr().out
    assert "FAILED kernels, bad: ZeroDivisionError: division by zero" in shown
    assert "FAILED kernels, wrong: wrong results" in shown
    assert "FAILED kernels, its figure: ModuleNotFoundError: No module named 'matplotlib'" in shown
    (path,) = tmp_path.glob("*.json")
    assert set(json.loads(path.read_text())["units"]) == {"bad", "wrong", "good"}
    assert "| x\\|y |" in next(tmp_path.glob("*.md")).read_text()
    monkeypatch.setattr(gpu, "draw", lambda result, path: None)
    assert run_gpu(gpu, monkeypatch, *asked, "--minutes", -1) == 0
    assert "kernels: out of time before bad; the same command goes on there" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "There is no CUDA device here" in run_gpu(gpu, monkeypatch)
