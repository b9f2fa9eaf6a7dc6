"""Threads: the default number, pieces of work, and artifacts that do not depend on the number."""

import dataclasses
import gc
import importlib
import json
import platform
import subprocess
import sys
import threading
import time
import weakref
from functools import partial

import pytest
import tiny
import torch
from typer.testing import CliRunner

import mspc
from mspc import cgroups, memory, threads
from mspc.cli.main import app
from mspc.errors import InputError, SingularGramError
from mspc.numerics.linalg import precise_matmul
from mspc.solvers import STEPS
from mspc.threads import fitting

CPU = torch.device("cpu")


def cgroup(monkeypatch, tmp_path, lines, files):
    """A fake /proc/self/cgroup with these lines, and a fake /sys/fs/cgroup with these files."""
    (tmp_path / "self").write_text("".join(f"{line}\n" for line in lines))
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(cgroups, "OF_PROCESS", tmp_path / "self")
    monkeypatch.setattr(cgroups, "CGROUP", tmp_path / "cgroup")


@pytest.mark.parametrize(
    ("lines", "files", "cores"),
    [
        ([], {}, 8),
        (["0::/"], {"cpu.max": "max 100000\n"}, 8),
        (["0::/"], {"cpu.max": "200000 100000\n"}, 2),
        (["0::/"], {"cpu.max": "250000 100000\n"}, 3),
        (["0::/"], {"cpu.max": "5000 100000\n"}, 1),
        (["0::/a/b"], {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
        (["0::/of/the/host"], {"cpu.max": "400000 100000\n"}, 4),
        (["0::/"], {"cpu.max": "1600000 100000\n"}, 8),
        (["0::/"], {"cpu.max": "broken\n"}, 8),
        (["1:cpu:/"], {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        (["1:cpu:/x"], {"cpu/x/cpu.cfs_quota_us": "150000\n", "cpu/x/cpu.cfs_period_us": "50000\n"}, 3),
        (
            ["4:cpu,cpuacct:/x", "0::/"],
            {"cpu,cpuacct/cpu.cfs_quota_us": "100000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
            1,
        ),
    ],
)
def test_available_cores(monkeypatch, tmp_path, lines, files, cores):
    """Oracle: quotas by hand, of eight cores that the affinity allows."""
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(8)))
    cgroup(monkeypatch, tmp_path, lines, files)
    assert threads.available() == cores


@pytest.mark.parametrize(
    ("lines", "files", "free"),
    [
        ([], {}, 1000),
        (["0::/"], {"memory.max": "max\n", "memory.current": "900\n"}, 1000),
        (["0::/"], {"memory.max": "800\n", "memory.current": "300\n"}, 500),
        (["0::/"], {"memory.max": "300\n", "memory.current": "800\n"}, 0),
        (["0::/"], {"memory.max": "9000\n", "memory.current": "300\n"}, 1000),
        (["0::/a/b"], {"a/memory.max": "800\n", "a/memory.current": "100\n"}, 700),
        (
            ["0::/"],
            {
                "memory.max": "800\n",
                "memory.current": "700\n",
                "memory.stat": "anon 300\nfile 400\ninactive_file 150\nactive_file 250\n",
            },
            500,
        ),
        (
            ["9:memory:/x", "0::/"],
            {
                "memory/x/memory.limit_in_bytes": "800\n",
                "memory/x/memory.usage_in_bytes": "700\n",
                "memory/x/memory.stat": "inactive_file 1\ntotal_inactive_file 20\ntotal_active_file 30\n",
            },
            150,
        ),
    ],
)
def test_free_memory(monkeypatch, tmp_path, lines, files, free):
    """Oracle: limits by hand, of 1000 bytes that are free in the machine."""
    monkeypatch.setattr(memory, "_of_machine", lambda: 1000)
    cgroup(monkeypatch, tmp_path, lines, files)
    assert memory.free_memory(CPU) == free


def test_default_count(monkeypatch, tmp_path):
    cgroup(monkeypatch, tmp_path, [], {})
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 3, 5})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert threads.count() == 3
    assert threads.count(5) == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "6")  # torch has read it
    assert threads.count() == 6
    assert threads.count(1) == 1


@pytest.mark.parametrize("asked", [0, -1, 1.5, "2", True])
def test_bad_counts_are_refused(llama, tmp_path, asked):
    with pytest.raises(InputError, match="threads must be a whole number, at least 1"):
        mspc.compress(llama, out=tmp_path / "out", threads=asked, progress=False)
    with pytest.raises(InputError, match="threads must be a whole number, at least 1"):
        mspc.evaluate(llama, torch.zeros(1, 8, dtype=torch.int64), threads=asked, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["compress", "eval", "bench"])
@pytest.mark.parametrize("asked", ["0", "-3", "two"])
def test_command_line_refuses_bad_counts(llama, tmp_path, verb, asked):
    out = ["--out", str(tmp_path / "out")] if verb == "compress" else []
    result = CliRunner().invoke(app, [verb, str(llama), "--threads", asked, *out])
    assert result.exit_code == 2
    assert "threads" in result.output
    assert not (tmp_path / "out").exists()


def test_run_keeps_the_order_and_uses_the_threads():
    seen, both = set(), threading.Barrier(3, timeout=20)

    def square(number):
        seen.add((threading.get_ident(), torch.get_num_threads()))
        if number < 3:
            both.wait()  # passes only if three threads are in here at once
        return number * number

    with threads.using(3, CPU) as count:
        assert list(threads.run(square, range(20))) == [n * n for n in range(20)]
    assert count == 3
    assert len({ident for ident, _ in seen}) == 3
    assert {of_torch for _, of_torch in seen} == {1}


def test_run_inside_run():
    """Every thread is busy with an item that needs `run` itself: nothing waits for a thread that is not free."""
    with threads.using(2, CPU):
        found = threads.run(lambda a: sum(threads.run(lambda b: a * b, range(50))), range(8))
        assert list(found) == [a * 1225 for a in range(8)]


def test_run_keeps_nothing_alive_while_other_threads_are_busy():
    """Oracle: weak references to what a function refers to, to its items and to its results, after the run."""
    busy, over = threading.Event(), threading.Event()

    def wait() -> bool:
        busy.set()
        return over.wait(60)

    def multiply() -> list[weakref.ref[torch.Tensor]]:
        weight, inputs = torch.ones(4, 4), [torch.ones(4), torch.ones(4)]
        results = list(threads.run(lambda each: weight @ each, inputs))
        return [weakref.ref(tensor) for tensor in (weight, *inputs, *results)]

    def work() -> list[bool]:
        assert busy.wait(60)
        references = multiply()
        gc.collect()
        alive = [reference() is not None for reference in references]
        over.set()
        return alive

    with threads.using(2, torch.device("cpu")):
        waited, alive = threads.run(lambda call: call(), [wait, work])
    assert waited
    assert alive == [False] * 5


ARENAS = """
import ctypes, threading
from mspc import memory

memory.share()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fdopen.restype = ctypes.c_void_p
libc.free.argtypes = libc.fflush.argtypes = [ctypes.c_void_p]
libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
threads = [threading.Thread(target=lambda: libc.free(libc.malloc(4000))) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
stream = libc.fdopen(1, b"w")
libc.malloc_info(0, stream)
libc.fflush(stream)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_new_threads_share_memory():
    """Oracle: glibc's own list of its arenas, which has three or more without `share`."""
    found = subprocess.run([sys.executable, "-c", ARENAS], capture_output=True, text=True, check=True).stdout
    assert found.count("<heap nr=") == 1


def test_error_of_the_first_item_that_fails():
    def work(number):
        time.sleep(0.05 * (number == 1))
        if number in (1, 2):
            raise ValueError(str(number))
        return number

    with threads.using(3, CPU), pytest.raises(ValueError, match="1"):
        list(threads.run(work, range(50)))


def test_modes_of_torch_are_those_of_the_caller():
    def modes(_):
        time.sleep(0.01)
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    with threads.using(3, CPU):
        with torch.no_grad():
            assert set(threads.run(modes, range(6))) == {(False, False)}
        with torch.inference_mode():
            assert set(threads.run(modes, range(6))) == {(False, True)}
        assert set(threads.run(modes, range(6))) == {(True, False)}


@pytest.mark.parametrize("hooked", [False, True])
def test_operations_of_a_model_with_hooks_have_all_threads(hooked, one_block):
    """Its windows are evaluated one by one."""
    model, seen = tiny.reference(one_block), set()

    def forward(function, *args, **kwargs):
        seen.add((threading.get_ident() if hooked else 0, torch.get_num_threads()))
        return function(*args, **kwargs)

    model.lm_head.forward = partial(forward, model.lm_head.forward)
    if hooked:
        model.register_forward_hook(lambda *_: None)
    before = torch.get_num_threads()
    mspc.evaluate(model, tiny.ids(6), threads=3, progress=False)
    assert seen == {(threading.get_ident(), 3) if hooked else (0, 1)}
    assert torch.get_num_threads() == before


def autocast(_):
    time.sleep(0.01)
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")


@pytest.mark.parametrize(("precise", "found"), [(True, False), (False, torch.float16)])
def test_autocast_is_that_of_the_caller_or_off(precise, found):
    with torch.autocast("cpu", torch.float16):
        with threads.using(3, CPU, precise=precise):
            assert set(threads.run(autocast, range(6))) == {found}
            assert autocast(0) == found
        assert autocast(0) == torch.float16


def test_precise_products_in_threads_leave_the_setting_as_it_was():
    """Without an order, the last thread to end would restore what the first one had set."""
    ends = {0: threading.Event(), 1: threading.Event()}

    def work(number):
        with precise_matmul():
            ends[number].set()
            assert ends[1 - number].wait(20)  # both are inside
            time.sleep(0.05 * number)
        return torch.get_float32_matmul_precision()

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with threads.using(2, CPU):
            assert list(threads.run(work, range(2))) == ["highest", "highest"]
        assert torch.get_float32_matmul_precision() == "medium"
        with threads.using(2, CPU, precise=False):
            assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("against", [False, True])
def test_memory_of_a_reference_counts(monkeypatch, one_block, against):
    """There is room for the logits of two windows, or of one with a reference: 6 copies each, and half is used."""
    monkeypatch.setattr(threads, "free_memory", lambda _: 2 * 2 * 6 * 4 * tiny.LENGTH * tiny.VOCABULARY)
    sizes = []
    monkeypatch.setattr(threads, "fitting", lambda size: sizes.append(fitting(size)) or sizes[-1])
    model = tiny.reference(one_block)
    given = {"against": tiny.reference(one_block)} if against else {}
    mspc.evaluate(model, tiny.ids(6), threads=4, progress=False, **given)
    assert sizes == [1 if against else 2]


def test_autocast_changes_no_perplexity_with_the_number(one_block, test_text):
    """A folder has the one without autocast, as its parts are computed in the dtype that was asked for."""
    model, of_model, of_folder = tiny.reference(one_block), set(), set()
    plain = mspc.evaluate(one_block, str(test_text), sequence_length=tiny.LENGTH, threads=1, progress=False)
    for count in (1, 3):
        given = {"sequence_length": tiny.LENGTH, "threads": count, "progress": False}
        with torch.autocast("cpu", torch.bfloat16):
            of_folder.add(mspc.evaluate(one_block, str(test_text), **given).nll)
            ids = tiny.ids(6)
            of_model.add(mspc.evaluate(model, ids, **given).nll)
    assert of_folder == {plain.nll}
    assert len(of_model) == 1
    assert of_model != {mspc.evaluate(model, tiny.ids(6), progress=False).nll}


def test_threads_of_torch_are_given_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threads.using(4, CPU):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with threads.using(4, torch.device("meta")):  # stands for a GPU: there nothing changes
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_products_in_pieces(monkeypatch):
    """Oracle: float64."""
    monkeypatch.setattr(threads, "ROWS", 8)
    a, b = torch.randn(30, 16), torch.randn(16, 5)
    with threads.using(2, CPU):
        found = threads.matmul(a, b)
    torch.testing.assert_close(found.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


RECIPES = {
    "budget": {"bits_per_weight": 4.5, "group_size": 32},
    "kfac": {"sparsity": 0.5, "allocator": "auto"},
    "fast": {"sparsity": 0.5, "effort": "fast"},
    "obs": {"sparsity": 0.5, "bits": 4, "solver": "obs", "group_size": 32, "allocator": "trace-rank"},
}


@pytest.fixture(scope="module")
def one_block(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("model") / "llama", "llama", num_hidden_layers=1)


@pytest.mark.parametrize("name", RECIPES)
def test_artifacts_do_not_depend_on_the_number(monkeypatch, one_block, calibration, tmp_path, name):
    """Small pieces and batches, so that there is work for all threads. Oracle: one thread."""
    monkeypatch.setattr("mspc.passes.blocks.TOKENS_PER_BATCH", 32)
    monkeypatch.setattr(threads, "ROWS", 16)
    recipe = mspc.Recipe(calibration=str(calibration), num_sequences=4, sequence_length=tiny.LENGTH, **RECIPES[name])
    found, perplexities = [], []
    for count in (1, 2, 4):
        out = tmp_path / str(count)
        artifact = mspc.compress(one_block, recipe, out=out, threads=count, progress=False)
        assert artifact.manifest["threads"] == count
        files = sorted(path.relative_to(out) for path in out.rglob("*") if path.suffix == ".safetensors")
        found.append({str(file): (out / file).read_bytes() for file in (*files, "plan.json", "recipe.toml")})
        of_run = ("seconds", "seconds_by_stage", "peak_memory_bytes", "threads")
        manifest = {key: value for key, value in artifact.manifest.items() if key not in of_run}
        found[-1]["manifest"] = json.dumps(manifest).encode()
        perplexities.append(dataclasses.asdict(mspc.evaluate(out, str(calibration), threads=count, progress=False)))
    assert len(found[0]) > 3
    assert found[1] == found[0]
    assert found[2] == found[0]
    assert perplexities[0] == perplexities[1] == perplexities[2]


@pytest.mark.parametrize(
    ("recipe", "functions"),
    [
        ({"sparsity": 0.5}, ("curve_measurement.curve_of", "validation.approximate_weights")),
        (
            {"sparsity": 0.5, "allocator": "search", "search_minutes": 0.001},
            ("search.predictions", "search.SOLVERS.kfac"),
        ),
    ],
)
def test_planning_takes_no_more_memory_than_there_is(monkeypatch, one_block, calibration, tmp_path, recipe, functions):
    """Without free memory, each function is called once at a time."""
    working, most = dict.fromkeys(functions, 0), dict.fromkeys(functions, 0)

    def counted(name, function):
        def call(*args, **kwargs):
            working[name] += 1
            most[name] = max(most[name], working[name])
            time.sleep(0.01)
            try:
                return function(*args, **kwargs)
            finally:
                working[name] -= 1

        return call

    for name in functions:
        module, function, *key = name.split(".")
        holder = getattr(importlib.import_module(f"mspc.planning.{module}"), function)
        if key:
            monkeypatch.setitem(holder, *key, counted(name, holder[key[0]]))
        else:
            monkeypatch.setattr(f"mspc.planning.{name}", counted(name, holder))
    monkeypatch.setattr(threads, "free_memory", lambda _: 0)
    recipe = mspc.Recipe(calibration=str(calibration), num_sequences=4, sequence_length=tiny.LENGTH, **recipe)
    mspc.compress(one_block, recipe, out=tmp_path / "out", threads=3, progress=False)
    assert most == dict.fromkeys(functions, 1)


def test_a_run_goes_on_with_another_number(llama, calibration, tmp_path):
    """Oracle: the run that was not cut off."""
    recipe = mspc.Recipe(
        sparsity=0.5, effort="fast", calibration=str(calibration), num_sequences=4, sequence_length=tiny.LENGTH
    )
    whole = mspc.compress(llama, recipe, out=tmp_path / "whole", threads=1, progress=False)
    with pytest.raises(mspc.Stopped):
        mspc.compress(
            llama, recipe, out=tmp_path / "cut", threads=1, progress=lambda event: event.stage != "Compressing"
        )
    rest = mspc.compress(llama, recipe, out=tmp_path / "cut", threads=2, resume=True, progress=False)
    assert rest.manifest["files"] == whole.manifest["files"]
    assert rest.manifest["threads"] == 2


def test_matrices_with_one_input_are_solved_together(monkeypatch, one_block, calibration, tmp_path):
    """Oracle: the layers of a Llama. Each waits for all others of its group, so alone none would be solved."""
    groups = {"q_proj": 3, "k_proj": 3, "v_proj": 3, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 1}
    barriers = {number: threading.Barrier(number) for number in (1, 2, 3)}
    solve = STEPS["admm"]

    def waiting(weight, stats, target, options, name, mask=None):
        barriers[groups[name.rpartition(".")[2]]].wait(timeout=60)
        return solve(weight, stats, target, options, name, mask)

    monkeypatch.setitem(STEPS, "admm", waiting)
    recipe = mspc.Recipe(
        sparsity=0.5, solver="admm", allocator="uniform", calibration=str(calibration), num_sequences=4,
        sequence_length=tiny.LENGTH, eval=False,
    )  # fmt: skip
    found = mspc.compress(one_block, recipe, out=tmp_path / "out", threads=3, progress=False)
    assert [name.rpartition(".")[2] for name in (row["name"] for row in found.manifest["matrices"])] == list(groups)


@pytest.mark.parametrize("number", [1, 3])
def test_the_error_of_a_matrix_that_is_solved_with_others_is_its_own(
    monkeypatch, one_block, calibration, tmp_path, number
):
    """Oracle: the error with one thread."""
    solve = STEPS["admm"]

    def failing(weight, stats, target, options, name, mask=None):
        if name.endswith("k_proj"):
            raise SingularGramError(f"{name}: cannot be factored.")
        return solve(weight, stats, target, options, name, mask)

    monkeypatch.setitem(STEPS, "admm", failing)
    recipe = mspc.Recipe(
        sparsity=0.5, solver="admm", allocator="uniform", calibration=str(calibration), num_sequences=4,
        sequence_length=tiny.LENGTH, eval=False,
    )  # fmt: skip
    with pytest.raises(SingularGramError, match=r"model\.layers\.0\.self_attn\.k_proj: cannot be factored"):
        mspc.compress(one_block, recipe, out=tmp_path / "out", threads=number, progress=False)
