"""Ranks: any number that may share a run ends with the bytes of one, and what fails on one ends all.

The ranks are processes with gloo, started by `--ranks`. What goes wrong on one of them is arranged by a
`sitecustomize.py` on their path.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial, reduce
from itertools import chain
from pathlib import Path

import pytest
import torch
from test_cli import refused
from test_resume import content
from torch import Tensor
from typer.testing import CliRunner

import mspc
from mspc import ranks, threads
from mspc.cli.main import app
from mspc.errors import InputError
from mspc.passes.own_work import own_work
from mspc.passes.together import Visit
from mspc.pipeline.sharing import check_ranks
from mspc.ranks import World
from mspc.types import GramStats, Matrix, flatten

ROOT = Path(__file__).parents[1]
OPTIONS = ("--num-sequences", 16, "--sequence-length", 32)
RECIPES = {
    "default": ("--sparsity", 0.5),
    "obs": ("--sparsity", 0.5, "--effort", "fast", "--solver", "obs", "--allocator", "uniform"),
    "codes": ("--pattern", "2:4", "--bits", 4, "--group-size", 32),
    "budget": ("--bits-per-weight", 3.25, "--group-size", 32),
    "sensitivity": ("--sparsity", 0.5, "--effort", "fast", "--allocator", "trace-rank", "--sensitivity", "gram"),
}

BREAK = """
import os, signal
if os.environ.get("RANK") == "1":
    from mspc.errors import ActivationError
    from mspc.passes import blocks
    from mspc.pipeline import solve_blocks
    original, calls = solve_blocks.solve_together, []
    def breaking(*args):
        calls.append(1)
        if len(calls) == 9:  # in the second block
            {action}
        return original(*args)
    solve_blocks.solve_together = breaking
"""
RAISE = 'raise ActivationError("one rank is broken. Repair it.")'
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture
def told(llama: Path, calibration: Path) -> Callable[..., list[str]]:
    """The arguments of `compress`."""

    def arguments(out: Path, *options: object, model: Path = llama) -> list[str]:
        given = ["compress", model, "--out", out, "--calibration", calibration, *OPTIONS, *options]
        return [str(argument) for argument in given]

    return arguments


@pytest.fixture
def shared(told: Callable[..., list[str]], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `mspc compress` in a process of its own; `site` is code that it and all ranks begin with."""

    def run(out: Path, *options: object, site: str = "", **given: Path) -> subprocess.CompletedProcess[str]:
        path = tmp_path / "site"
        path.mkdir(exist_ok=True)
        (path / "sitecustomize.py").write_text(site)
        return subprocess.run(
            [sys.executable, "-m", "mspc", *told(out, *options, **given)],
            capture_output=True, text=True, timeout=600, check=False,
            env=os.environ | {"PYTHONPATH": f"{path}:{ROOT}", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    return run


@pytest.fixture
def alone(told: Callable[..., list[str]]) -> Callable[..., str]:
    """Run `mspc compress` in this process; its messages."""

    def run(out: Path, *options: object, **given: Path) -> str:
        result = CliRunner().invoke(app, told(out, *options, **given))
        assert result.exit_code == 0, result.stderr
        return result.stderr

    return run


def said(process: subprocess.CompletedProcess[str]) -> str:
    """The one message of a command that failed."""
    (message,) = (line for line in process.stderr.splitlines() if line.startswith("Error: "))
    assert "Traceback" not in process.stderr
    return message


@pytest.mark.slow
@pytest.mark.parametrize("signalled", [os.kill, os.killpg], ids=["launcher", "all"])
def test_an_interrupt_is_said_once(signalled, told, tmp_path):
    """Oracle: one message and the exit code of a shell, whoever gets the signal."""
    command = [sys.executable, "-m", "mspc", *told(tmp_path / "out", "--sparsity", 0.5, "--ranks", 2)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "Gradients" in line)
        signalled(process.pid, signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert rest.count("Interrupted.") == 1
    assert "Traceback" not in rest


@pytest.mark.parametrize(
    ("recipe", "numbers"),
    [("default", (2,)), *(pytest.param(name, (2, 4), marks=pytest.mark.slow) for name in RECIPES)],
)
def test_any_number_of_ranks_ends_with_the_same_bytes(recipe, numbers, alone, shared, tmp_path):
    """Oracle: one process. Messages come from the first rank alone."""
    alone(tmp_path / "1", *RECIPES[recipe])
    for number in numbers:
        done = shared(tmp_path / str(number), *RECIPES[recipe], "--ranks", number)
        assert done.returncode == 0, done.stderr
        assert content(tmp_path / str(number)) == content(tmp_path / "1")
        assert done.stderr.count("Compressing: done") == done.stderr.count("Cost: ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 4])
def test_experts_are_shared(number, folder_of, alone, shared, tmp_path):
    """Oracle: one process. Experts that see few tokens have some of their layer's."""
    model = folder_of("mixtral")
    alone(tmp_path / "1", "--sparsity", 0.5, model=model)
    done = shared(tmp_path / str(number), "--sparsity", 0.5, "--ranks", number, model=model)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / str(number)) == content(tmp_path / "1")


def evaluated(*options: object) -> subprocess.CompletedProcess[str]:
    """Run `mspc eval` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "mspc", "eval", *map(str, options)],
        capture_output=True, text=True, timeout=600, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_windows_of_a_test_text_are_shared(llama, folder_of, calibration):
    """Oracle: one process. Seven windows are four and three."""
    options = (
        llama,
        "--text",
        calibration,
        "--sequence-length",
        24,
        "--max-windows",
        7,
        "--against",
        folder_of("qwen2"),
    )
    options = (*options, "--json", "--threads", 1)
    alone = CliRunner().invoke(app, ["eval", *map(str, options)])
    together = evaluated(*options, "--ranks", 2)
    assert (alone.exit_code, together.returncode) == (0, 0), alone.stderr + together.stderr
    assert alone.stderr.count("Perplexity: done") == together.stderr.count("Perplexity: done") == 1
    expected, found = json.loads(alone.stdout), json.loads(together.stdout)
    assert found.keys() == expected.keys()
    assert (found["windows"], found["tokens"]) == (7, 7 * 23)
    for name in ("perplexity", "divergence", "perplexity_interval", "divergence_interval", "reference_perplexity"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name


def test_ranks_cannot_share_fewer_windows(llama, calibration):
    done = evaluated(llama, "--text", calibration, "--max-windows", 1, "--ranks", 2)
    assert done.returncode == 2
    assert "2 ranks cannot share 1 windows" in said(done)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--inputs", "int8", "--ranks", 2), "ranks cannot share that"),
        (("--tasks", "arc_easy", "--ranks", 2), "--ranks has no effect with --tasks"),
        (("--ranks", 3), "3 ranks cannot share a run"),
    ],
)
def test_evaluations_that_ranks_cannot_share(options, message, llama, calibration, monkeypatch):
    monkeypatch.setattr("mspc.cli.launching._launch", lambda _: pytest.fail("started"))
    assert message in refused("eval", llama, "--text", calibration, *options)


COLLECTIVES = """
import torch
from functools import partial
from mspc import ranks

ranks.start()
last, me = ranks.size() - 1, ranks.rank()
generator = torch.Generator().manual_seed(0)
values = torch.randn(19, 7, 5, generator=generator) * torch.exp(8 * torch.rand(7, 5, generator=generator))
own = [i for chunk in ranks.own_chunks() for i in ranks.chunks(19)[chunk]]

def total():
    summed = ranks.TextSum(partial(torch.zeros, 7, 5))
    for chunk in ranks.own_chunks():
        for i in ranks.chunks(19)[chunk]:
            summed.of(chunk).add_(values[i])
    return summed.total()

shared = total()
with ranks.alone():
    assert torch.equal(shared, total())
assert ranks.count(len(own)) == 19
assert ranks.gathered(own) == list(range(19))
assert ranks.of_each(me) == list(range(ranks.size()))
tensors = {"b": torch.ones(2, 3) > 0, "h": torch.full((2,), 0.1, dtype=torch.bfloat16), "e": torch.empty(0, 3)}
value, found = ranks.from_rank(last, [1.5, None] if me == last else None, tensors if me == last else None)
assert value == [1.5, None]
assert all(torch.equal(found[k], t) and found[k].dtype == t.dtype for k, t in tensors.items())
assert ranks.every(True) and not ranks.every(me != last)
assert ranks.by_first(lambda: [me, ranks.size()]) == [0, 1]
with ranks.together():
    pieces, edges = ranks.share_of(35)
rows = torch.full((35,), -1.0)
rows[pieces.start : pieces.stop] = me
ranks.share(rows, edges)
assert rows.tolist() == sorted(rows.tolist()) and set(rows.tolist()) == set(range(ranks.size()))
print("all is as it should be")
ranks.stop()
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 8, 16])
def test_collectives_move_bytes_and_sums_have_one_order(number, tmp_path):
    """Oracle: the same sum made by one rank, and what each rank gave."""
    (tmp_path / "collectives.py").write_text(COLLECTIVES)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(number), "collectives.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all is as it should be") == number


@pytest.mark.slow
def test_rows_of_a_product_are_shared(alone, shared, monkeypatch, tmp_path):
    """Oracle: one process that multiplies the same pieces of rows. Tiny matrices are one piece otherwise."""
    monkeypatch.setattr(threads, "LEAST_ROWS", {"cpu": 8})
    alone(tmp_path / "1", *RECIPES["default"])
    mark = tmp_path / "shared"
    site = f"""import os
if "RANK" in os.environ:
    from mspc import ranks, threads
    threads.LEAST_ROWS = {{"cpu": 8}}
    share = ranks.share
    def marked(rows, edges):
        if rows.ndim > 1:  # a product; sums are flat
            open({str(mark)!r} + os.environ["RANK"], "w").close()
        return share(rows, edges)
    ranks.share = marked
"""
    done = shared(tmp_path / "2", *RECIPES["default"], "--ranks", 2, site=site)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "2") == content(tmp_path / "1")
    assert (tmp_path / "shared0").exists()
    assert (tmp_path / "shared1").exists()


def test_an_error_on_one_rank_ends_all_and_any_number_goes_on(alone, shared, tmp_path):
    """One message, its exit code, and a journal with whole blocks. Oracle of the rest: one process without an error."""
    recipe, out = RECIPES["obs"], tmp_path / "out"
    broken = shared(out, *recipe, "--ranks", 2, site=BREAK.format(action=RAISE))
    assert broken.returncode == 1
    assert said(broken) == "Error: one rank is broken. Repair it."
    lines = (out / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line).get("block") for line in lines[1:]] == [None, 0]
    assert "Resuming after 1 of 2 blocks." in alone(out, *recipe, "--resume")
    alone(tmp_path / "whole", *recipe)
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_another_number_goes_on(alone, shared, tmp_path):
    recipe, out = RECIPES["default"], tmp_path / "out"
    killed = shared(out, *recipe, "--ranks", 2, site=BREAK.format(action=KILL))
    assert killed.returncode == 1
    assert said(killed).startswith("Error: rank 1 was ended by SIGKILL.")
    resumed = shared(out, *recipe, "--resume", "--ranks", 4)
    assert resumed.returncode == 0, resumed.stderr
    alone(tmp_path / "whole", *recipe)
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "code", "expected"),
    [
        (1, "import mspc.version; mspc.version.__version__ = '0.0'", "has mspc 0.0"),
        (
            1,
            "from mspc.storage import checkpoint; checkpoint.sha256_of = lambda path: 'other'",
            "is not that of rank 0",
        ),
        (0, "from pathlib import Path; Path.touch = lambda path: None", "does not see what rank 0 writes"),
    ],
    ids=["versions", "files", "folder"],
)
def test_ranks_that_cannot_share_a_run_are_told_before_any_work(rank, code, expected, shared, tmp_path):
    """Other versions, other files of the model on another machine, and an output that only rank 0 sees."""
    site = f"""import os
if "RANK" in os.environ:
    os.environ |= {{"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}}  # each on a machine of its own
if os.environ.get("RANK") == "{rank}":
    {code}
"""
    refused = shared(tmp_path / "out", *RECIPES["obs"], "--ranks", 2, site=site)
    assert refused.returncode == 2
    assert expected in said(refused)
    assert not (tmp_path / "out" / "journal.jsonl").exists()


@pytest.mark.parametrize("number", [0, 3, 5, 6, 7, 12])
def test_numbers_that_do_not_divide_the_chunks_are_refused(number, llama, tmp_path):
    told = ["compress", str(llama), "--out", str(tmp_path / "out"), "--ranks", str(number)]
    result = CliRunner().invoke(app, told)
    assert result.exit_code == 2
    assert "Choose 1, 2, 4, 8 or a multiple of 8." in result.stderr
    assert not (tmp_path / "out").exists()


def test_numbers_that_divide_the_chunks_are_known():
    """Oracle: the words of the message."""
    for number in range(1, 65):
        if number in (1, 2, 4, 8) or number % 8 == 0:
            ranks.check(number)
        else:
            with pytest.raises(InputError):
                ranks.check(number)


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    monkeypatch.setattr(ranks, "_world", World(rank, size, 0, 1))


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 24])
@pytest.mark.parametrize("length", [1, 7, 8, 24, 129])
def test_every_sequence_is_in_one_chunk_and_the_chunks_of_ranks_are_in_a_row(size, length, monkeypatch):
    """Beyond 8 ranks, as many in a row have the same chunk."""
    of_ranks = []
    for rank in range(size):
        as_rank(monkeypatch, rank, size)
        of_ranks.append(list(ranks.own_chunks()))
        assert (rank in ranks._sources()) == (rank % max(size // 8, 1) == 0)
    assert list(chain.from_iterable(of_ranks[:: max(size // 8, 1)])) == list(range(8))
    assert all(of_ranks[rank] == of_ranks[rank - rank % max(size // 8, 1)] for rank in range(size))
    assert [i for chunk in ranks.chunks(length) for i in chunk] == list(range(length))
    assert max(map(len, ranks.chunks(length))) - min(map(len, ranks.chunks(length))) <= 1


@pytest.mark.parametrize("num_sequences", [8, 11, 5])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_sum_over_the_text_is_that_of_a_fixed_tree(num_sequences, size, monkeypatch):
    """Oracle: recursion over halves of the text, in floats whose sums depend on their order."""
    values = torch.randn(num_sequences, 3, 5, generator=torch.Generator().manual_seed(0)) * 1e4 ** torch.rand(3, 5)
    chunks = ranks.chunks(num_sequences)

    def tree(some: list[range]) -> Tensor | None:
        if len(some) > 1:
            halves = [half for half in (tree(some[: len(some) // 2]), tree(some[len(some) // 2 :])) if half is not None]
            return reduce(torch.add, halves) if halves else None
        return reduce(torch.add, values[some[0].start : some[0].stop]) if some[0] else None

    roots = []
    monkeypatch.setattr(ranks, "_total", lambda value: value)
    for rank in range(size):
        as_rank(monkeypatch, rank, size)
        summed = ranks.TextSum(partial(torch.zeros, 3, 5))
        for chunk in ranks.own_chunks():
            for sequence in chunks[chunk]:
                summed.of(chunk).add_(values[sequence])
            assert len(summed.waiting) <= 3
        roots.append(summed.total())
    while len(roots) > 1:
        roots = [one + other for one, other in zip(roots[::2], roots[1::2], strict=True)]
    assert torch.equal(roots[0], tree(chunks))


def test_alone_nothing_is_shared(monkeypatch):
    """No process group exists here, so a collective would fail."""
    as_rank(monkeypatch, 1, 4)
    with ranks.alone():
        assert (ranks.size(), list(ranks.own_chunks())) == (1, list(range(8)))
        assert (ranks.count(3), ranks.every(False), ranks.gathered([1.5]), ranks.owners([1.0, 2.0])) == (
            3, False, [1.5], [0, 0],
        )  # fmt: skip
        assert ranks.by_first(lambda: "done") == "done"
    assert ranks.size() == 4


def test_the_dearest_work_goes_to_whoever_has_least(monkeypatch):
    as_rank(monkeypatch, 0, 2)
    assert ranks.owners([1.0, 5.0, 3.0, 2.0]) == [0, 0, 1, 1]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("blocks", ["ddddd", "dedde", "eee"])
def test_every_matrix_is_the_work_of_one_rank(size, blocks, monkeypatch):
    """Dense blocks (d), and those with experts (e). Oracle: all matrices once, and blocks complete in order."""
    matrices = [
        [Matrix(f"{i}.{j}.weight", (4, 4), j if kind == "e" else None) for j in range(10)]
        for i, kind in enumerate(blocks)
    ]
    stats = GramStats(torch.empty(0), 0)

    class Walked:
        def __iter__(self):
            for i, of_block in enumerate(matrices):
                for matrix in of_block:
                    yield Visit(matrix, torch.zeros(4, 4), stats, i, matrix is of_block[-1])

    walked = Walked()
    walked.matrices = matrices
    seen, ends = [], []
    for rank in range(size):
        as_rank(monkeypatch, rank, size)
        work = list(own_work(walked))
        seen += [visit.matrix for few, _ in work for visit in few]
        ends.append([complete for _, complete in work])
    assert sorted(seen, key=str) == sorted(flatten(matrices), key=str)
    assert all(end == ends[0] for end in ends)
    assert list(chain.from_iterable(ends[0])) == list(range(len(blocks)))


def test_products_are_shared_only_where_all_ranks_do_the_same(monkeypatch):
    """Oracle: the halves of 5 pieces. Pieces of work that threads share are done apart."""
    as_rank(monkeypatch, 1, 2)
    assert ranks.share_of(5) == (range(5), [])
    with ranks.together():
        assert ranks.share_of(5) == (range(2, 5), [0, 2, 5])
        assert list(threads.run(ranks.share_of, [5, 5])) == [(range(5), [])] * 2
        assert list(threads.run(ranks.share_of, [5])) == [(range(2, 5), [0, 2, 5])]
    assert ranks.share_of(5) == (range(5), [])


def test_there_is_no_option_of_a_recipe_for_ranks():
    """The number of ranks is in no header, so that another one may go on."""
    assert "ranks" not in {field.name for field in fields(mspc.Recipe)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ms_per_token": 5.0}, "Make a file with `mspc timings` first"),
        ({"sparsity": 0.5, "reconstruct": 8}, "Leave it out, or use one rank"),
        ({"sparsity": 0.5, "device": "cuda:1"}, "Leave --device out"),
    ],
)
def test_what_ranks_cannot_share_is_refused(options, message, monkeypatch, tmp_path):
    monkeypatch.setattr(ranks, "size", lambda: 2)
    with pytest.raises(InputError, match=message):
        check_ranks(mspc.Recipe(**options).settings(), tmp_path, {})
