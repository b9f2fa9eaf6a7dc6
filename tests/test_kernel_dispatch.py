"""Choice of a method by the number of tokens: guessed, measured with a clock that the test sets, and cached.

Nothing here needs a GPU. Oracle of the values: float64.
"""

import pytest
import torch
from kernel_cases import BF16, CASES, ONE_OF_EACH, Case, assert_product, inputs

from mspc.kernels import cusparselt, dispatch, timings
from mspc.kernels.dispatch import ANY_NUMBER, COPY, Choice, matmul, measure, schedule, usable
from mspc.types import NM, Grid

SPARSE = Case("sparse24", NM(2, 4), None, (32, 256), BF16)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_any_number_of_tokens(case):
    repacked = case.repacked()
    choices = schedule(case.kernel, repacked, case.matrix, case.dtype)
    for num_tokens in (1, 8, 9, 40):
        x = inputs(case, num_tokens)
        y = matmul(x, case.kernel, repacked, case.matrix, choices)
        if num_tokens <= case.kernel.MAX_TOKENS:
            assert_product(y, x, case)
        else:
            assert torch.equal(y, torch.nn.functional.linear(x, case.weight().to(case.dtype)))
    assert matmul(inputs(case, 0), case.kernel, repacked, case.matrix, choices).shape == (0, case.shape[0])


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_by_default_the_kernel_multiplies_as_many_tokens_as_it_takes(case):
    choices = schedule(case.kernel, case.repacked(), case.matrix, case.dtype)
    assert choices == (Choice(case.kernel.MAX_TOKENS, "fused", 0), Choice(ANY_NUMBER, "expanded", 0))


def test_the_fastest_method_is_measured():
    """The clock makes expansion cost 5, and the kernel 1 a token."""

    def clock(call):
        choice, x, *_ = call.args
        assert_product(call(), x, SPARSE)
        return 5 if choice.method == "expanded" else len(x)

    choices = measure(SPARSE.kernel, SPARSE.repacked(), SPARSE.matrix, BF16, clock)
    assert choices == [Choice(4, "fused", 0), Choice(ANY_NUMBER, "expanded", 0)]


def test_cached_choices_are_limited_to_the_layer():
    cached = [Choice(64, "fused", 0), Choice(512, "expanded", 0), Choice(ANY_NUMBER, "cusparselt", 7)]
    last = Choice(ANY_NUMBER, "expanded", 0)
    limited = Choice(SPARSE.kernel.MAX_TOKENS, "fused", 0)
    assert usable(cached, SPARSE.kernel, {}) == (limited, cached[1], last)
    assert usable(cached, SPARSE.kernel, {COPY: torch.empty(0)}) == (limited, *cached[1:], last)


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_traced_as_one_graph(case, monkeypatch):
    """torch.compile with fullgraph raises where it would have to leave the graph."""
    repacked = case.repacked()
    choices = schedule(case.kernel, repacked, case.matrix, case.dtype)
    monkeypatch.setattr(dispatch, "launches", lambda tensor: True)
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # set where GPTQModel is verified
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(str(graph.graph))
        return lambda *args: [torch.empty(0)]

    for num_tokens in (4, 100):
        compiled = torch.compile(
            lambda x: matmul(x, case.kernel, repacked, case.matrix, choices), fullgraph=True, backend=backend
        )
        compiled(inputs(case, num_tokens))
    assert f"mspc.{case.kernel_name}_matmul" in graphs[0]
    assert f"mspc.{case.kernel_name}_expand" in graphs[1]


def test_a_damaged_cache_is_an_empty_one(tmp_path):
    timings.write("a GPU", "m", [Choice(8, "fused", 0)])
    timings.write("a GPU", "n", [Choice(9, "expanded", 0)])
    assert timings.read("a GPU", "m") == [Choice(8, "fused", 0)]
    assert timings.read("another", "m") is None
    for damaged in ("{", "[]", '{"a GPU": 3}', '{"a GPU": {"m": [[1, 2]]}}', '{"a GPU": {"m": [["x", "fused", 0]]}}'):
        (tmp_path / "mspc" / "kernels.json").write_text(damaged)
        assert timings.read("a GPU", "m") is None
    (tmp_path / "mspc" / "kernels.json").write_text("{")
    timings.write("a GPU", "m", [Choice(8, "fused", 0)])
    assert timings.read("a GPU", "m") == [Choice(8, "fused", 0)]


def test_matrices_and_devices_that_cusparselt_takes():
    assert cusparselt.missing(CPU) == "cpu is no CUDA device"
    assert dispatch.copy_for_cusparselt(SPARSE.kernel, SPARSE.repacked(), SPARSE.matrix, BF16) is None
    assert cusparselt.fits(SPARSE.matrix, BF16)
    assert not cusparselt.fits(SPARSE.matrix, torch.float16)
    assert not cusparselt.fits(Case("sparse24", NM(2, 4), None, (24, 256), BF16).matrix, BF16)
    assert not cusparselt.fits(Case("sparse24", NM(2, 4), Grid(4, 64), (32, 256), BF16).matrix, BF16)
