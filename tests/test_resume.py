"""Nothing solved is lost: a run killed anywhere and resumed ends with the bytes of an undisturbed one (the oracle)."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mspc
from mspc.errors import ActivationError, InputError, StorageError
from mspc.pipeline import run as pipeline
from mspc.pipeline import solve_blocks
from mspc.solvers import SOLVERS
from mspc.solvers.obs import Sweep
from mspc.storage import files
from mspc.types import CompressedLinear, Target

TIMINGS = ("seconds", "seconds_by_stage", "peak_memory_bytes")


@pytest.fixture(scope="module")
def recipe(calibration: Path) -> mspc.Recipe:
    options = {"bits": 4, "group_size": 32, "allocator": "trace-rank", "sensitivity": "gram"}
    return on_text(str(calibration), **options)


def on_text(calibration: str, **values: object) -> mspc.Recipe:
    return mspc.Recipe(calibration=calibration, num_sequences=4, sequence_length=32, eval=False, **values)


@pytest.fixture(scope="module")
def undisturbed(llama: Path, recipe: mspc.Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run(llama, recipe, out)
    return content(out)


def run(model: Path, recipe: mspc.Recipe, out: Path, **options: bool) -> mspc.Artifact:
    return mspc.compress(model, recipe, out=out, progress=False, **options)


def content(folder: Path) -> dict[str, bytes]:
    """Every file, the manifest without what a clock or the operating system decides."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    manifest = json.loads(files["mspc.json"])
    for name in TIMINGS:
        assert manifest.pop(name)
    return files | {"mspc.json": json.dumps(manifest).encode()}


def killed_at(call: int, owner: object, name: str, action: Callable[[], object]) -> bool:
    """Do `action` in a child that kills itself at the `call`-th call of `owner.name`; whether it came to that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads that a fork leaves behind
        child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
        return os.WIFSIGNALED(status)
    original, calls = getattr(owner, name), 0

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, counted)
    code = 1
    try:
        action()
        code = 0
    finally:
        os._exit(code)


@pytest.mark.parametrize("step", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_a_flush_to_disk_and_resumed_is_bitwise_the_undisturbed_run(
    llama, recipe, undisturbed, tmp_path, step
):
    """Every durable step flushes: each file before its rename, the folder after it, every line of the journal."""
    flush = 1
    while True:
        out = tmp_path / f"out{flush}"
        if not killed_at(flush, os, "fsync", lambda out=out: run(llama, recipe, out)):
            break
        run(llama, recipe, out, resume=True)
        assert content(out) == undisturbed, f"killed at flush {flush}"
        flush += step
    assert flush > 16  # no run was killed too late


def test_blocks_without_matrices_do_not_confuse_a_resumed_run(llama, recipe, tmp_path):
    """With the first block left dense, the first commit is that of the second."""
    skipping = mspc.Recipe(**recipe.to_dict() | {"skip": ["layers.0."]})
    run(llama, skipping, tmp_path / "undisturbed")
    out = tmp_path / "out"
    assert killed_at(1, pipeline, "write_json", lambda: run(llama, skipping, out))  # all is solved, no manifest yet
    run(llama, skipping, out, resume=True)
    assert content(out) == content(tmp_path / "undisturbed")


def test_a_plan_that_was_changed_meanwhile_is_not_obeyed(llama, recipe, undisturbed, tmp_path):
    out = tmp_path / "out"
    assert killed_at(1, pipeline, "write_json", lambda: run(llama, recipe, out))
    plan = out / "plan.json"
    plan.write_text(plan.read_text().replace('"bits": 4', '"bits": 8'))
    run(llama, recipe, out, resume=True)
    assert content(out) == undisturbed


def test_a_resumed_run_solves_no_block_again(llama, recipe, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert killed_at(2, solve_blocks, "write_tensors", lambda: run(llama, recipe, out))  # the first is committed
    solved = []
    original = Sweep.__post_init__
    monkeypatch.setattr(Sweep, "__post_init__", lambda self: (solved.append(self.name), original(self))[1])
    run(llama, recipe, out, resume=True)
    assert solved
    assert all(".layers.1." in name for name in solved)


def at_second_block(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Do `action` whenever the solver begins a matrix of the second block."""
    original = Sweep.__post_init__

    def begin(sweep: Sweep) -> None:
        if ".layers.1." in sweep.name:
            action()
        original(sweep)

    monkeypatch.setattr(Sweep, "__post_init__", begin)


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_block_is_written_while_the_next_is_solved(llama, recipe, undisturbed, tmp_path, monkeypatch, interrupted):
    """The first file waits for the second block, and what is being written when an interrupt comes is committed."""
    second, waits, original = threading.Event(), [], solve_blocks.write_tensors

    def slow(*args: Any) -> None:
        waits.append(second.wait(timeout=20))
        time.sleep(0.2)
        original(*args)

    def begin() -> None:
        second.set()
        if interrupted:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(solve_blocks, "write_tensors", slow)
        at_second_block(patched, begin)
        with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
            run(llama, recipe, tmp_path)
    assert waits == [True] * (1 if interrupted else 2)
    if interrupted:
        assert '"block": 0' in (tmp_path / "journal.jsonl").read_text()
        run(llama, recipe, tmp_path, resume=True)
    assert content(tmp_path) == undisturbed


@pytest.mark.parametrize("block", [0, 1])
def test_a_full_disk_while_a_block_is_written_ends_the_run(block, llama, recipe, undisturbed, tmp_path, monkeypatch):
    """The error of the writing thread is raised by the run, which can be resumed."""
    original = files.save_file

    def full(tensors: dict[str, Any], path: Path, **options: Any) -> None:
        if f"{block:05d}" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(files, "save_file", full)
        with pytest.raises(StorageError, match=rf"Cannot write .*0000{block}.*No space left.*--resume"):
            run(llama, recipe, tmp_path)
    assert (tmp_path / "journal.jsonl").read_text().count('"block": ') == block
    run(llama, recipe, tmp_path, resume=True)
    assert content(tmp_path) == undisturbed


def test_weights_that_overflow_are_an_error_that_names_the_matrix(llama, recipe, tmp_path, monkeypatch):
    def infinite(wanted: Tensor, stats: object, target: Target, options: object, name: str) -> CompressedLinear:
        return CompressedLinear(wanted / 0, torch.ones_like(wanted, dtype=torch.bool), target)

    monkeypatch.setitem(SOLVERS, "mask", infinite)
    dense = {"bits": 16, "sparsity": 0.0, "solver": "mask", "allocator": "uniform"}
    with pytest.raises(ActivationError, match=r"q_proj: its weights overflow torch\.float32 .*--damp"):
        run(llama, on_text(recipe.calibration, **dense), tmp_path)


@pytest.mark.parametrize("made", [False, True])
def test_resume_of_nothing_starts_fresh(llama, recipe, undisturbed, tmp_path, made):
    out = tmp_path / "out"
    if made:
        out.mkdir()
    run(llama, recipe, out, resume=True)
    assert content(out) == undisturbed


@pytest.mark.parametrize("finished", [False, True])
def test_resume_names_what_differs(llama, folder_of, recipe, test_text, tmp_path, finished):
    out = tmp_path / "out"
    if finished:
        run(llama, recipe, out)
    else:
        assert killed_at(300, Sweep, "settle_column", lambda: run(llama, recipe, out))
    with pytest.raises(InputError, match=r"settings\.sparsity was 0\.5 and is 0\.6"):
        run(llama, mspc.Recipe(**recipe.to_dict() | {"sparsity": 0.6}), out, resume=True)
    with pytest.raises(InputError, match=r"calibration\.sha256 was"):
        run(llama, mspc.Recipe(**recipe.to_dict() | {"calibration": str(test_text)}), out, resume=True)
    with pytest.raises(InputError, match=r"source\.sha256\.model\.safetensors was"):
        run(folder_of("qwen2"), recipe, out, resume=True)


def test_the_written_recipe_reproduces_every_byte(llama, recipe, undisturbed, tmp_path):
    (tmp_path / "recipe.toml").write_bytes(undisturbed["recipe.toml"])
    run(llama, mspc.Recipe.from_toml(tmp_path / "recipe.toml"), tmp_path / "out")
    assert content(tmp_path / "out") == undisturbed


def test_the_written_plan_gives_the_same_matrices(llama, recipe, undisturbed, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_bytes(undisturbed["plan.json"])
    run(llama, on_text(recipe.calibration, plan=str(plan)), tmp_path / "out")
    files = content(tmp_path / "out")
    same = [name for name in files if name.startswith(("matrices/", "unchanged/"))]
    assert len(same) == 3
    assert all(files[name] == undisturbed[name] for name in same)


def test_kept_measurements_are_used_and_change_no_byte(llama, recipe, undisturbed, tmp_path, monkeypatch):
    kept = tmp_path / "measurements"
    mspc.compress(llama, recipe, out=tmp_path / "first", measurements=kept, progress=False)
    monkeypatch.setattr("mspc.planning.measurements.by_gram", lambda *args: pytest.fail("measured again"))
    mspc.compress(llama, recipe, out=tmp_path / "second", measurements=kept, progress=False)
    assert content(tmp_path / "second") == undisturbed


def test_an_interrupt_exits_130_with_a_hint_and_can_be_resumed(llama, recipe, undisturbed, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "recipe.toml").write_bytes(undisturbed["recipe.toml"])
    options = ["--out", str(out), "--recipe", str(tmp_path / "recipe.toml")]
    # A sweep that takes its time, so that the interrupt comes while it works.
    # The signal is ignored in the background jobs of a shell, and children inherit that.
    slow = "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler); "
    slow += "from mspc.solvers.obs import Sweep; settle = Sweep.settle_block; "
    slow += "Sweep.settle_block = lambda *a: (time.sleep(0.5), settle(*a))[1]; from mspc.cli.main import main; main()"
    command = [sys.executable, "-c", slow, "compress", str(llama), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while not (out / "plan.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 130, message
    assert "--resume" in message
    assert "Traceback" not in message
    run(llama, recipe, out, resume=True)
    assert content(out) == undisturbed
