"""Which method is taken: guessed, measured with a clock that the test sets, and read back from the cache.

Nothing here needs a GPU; what the libraries compute is stood in for. Oracle of the values: float64.
"""

import json
import sys

import pytest
import torch
from kernel_cases import BF16, CASES, DENSE, ONE_OF_EACH, Case, assert_product, inputs

from mspc.kernels import cusparselt, dispatch, timings, tinygemm
from mspc.kernels.dispatch import ANY_NUMBER, matmul, measure, schedule, with_copies
from mspc.kernels.timings import Row
from mspc.types import NM, Grid

SPARSE = Case("sparse24", NM(2, 4), None, (32, 256), BF16)
INT4 = Case("codes", DENSE, Grid(4, 64, False), (32, 256), BF16)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(timings, "device_key", lambda device: "a GPU")


@pytest.fixture
def libraries(monkeypatch):
    """cuSPARSELt as dense products: a compressed weight is the weight, and the algorithm is checked to be 7."""

    def sparse_mm(weight, x, *, transpose_result, alg_id):
        assert transpose_result
        assert alg_id == 7
        assert x.shape[1] % 8 == 0
        return (weight.float() @ x.float()).T.to(x.dtype)

    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: weight)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", sparse_mm)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", lambda weight, x, transpose_result: 7)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(cusparselt, "missing", lambda device: None)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)


@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_any_number_of_tokens(case):
    arranged = case.kernel.arrange(case.stored(), case.description)
    rows = schedule(arranged, case.description, case.dtype)
    for num_tokens in (1, 8, 9, 40):
        x = inputs(case, num_tokens)
        y = matmul(x, arranged, case.description, rows)
        if num_tokens <= case.kernel.MAX_TOKENS:
            assert_product(y, x, case)
        else:
            expected = torch.nn.functional.linear(x, case.weight().to(case.dtype))
            assert torch.equal(y, expected)
    assert matmul(inputs(case, 0), arranged, case.description, rows).shape == (0, case.shape[0])


class OnDevice(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda")


def methods(case: Case, *copies: str, on_device: bool = False) -> list[str]:
    arranged = case.kernel.arrange(case.stored(), case.description)
    first = next(iter(arranged))
    if on_device:
        arranged[first] = arranged[first].as_subclass(OnDevice)
    arranged |= {part: torch.empty(0) for method in copies for part in dispatch.COPIES[method]}
    rows = schedule(arranged, case.description, BF16)
    return [next(row.method for row in rows if n <= row.up_to) for n in (1, 8, 9, 32, 33, 1023, 1024, 10**6)]


def test_unmeasured(monkeypatch):
    monkeypatch.setattr(cusparselt, "algorithms", lambda shape, device: ((64, 1), (4096, 2)))
    assert methods(INT4) == ["fused"] * 4 + ["expanded"] * 4
    assert methods(INT4, "tinygemm") == ["fused"] * 4 + ["expanded"] * 4
    assert methods(SPARSE) == ["fused"] * 4 + ["expanded"] * 4
    assert methods(SPARSE, "cusparselt") == ["fused"] * 4 + ["cusparselt"] * 4
    assert methods(Case("nm", NM(8, 16), None, (32, 256), BF16)) == ["fused"] * 2 + ["expanded"] * 6


def test_measured_is_taken_and_remembered(libraries, tmp_path):
    """The clock makes expansion cost 5, cuSPARSELt 8 - tokens / 64, and the fused kernel 1 a token."""
    arranged = with_copies(SPARSE.kernel.arrange(SPARSE.stored(), SPARSE.description), SPARSE.description, BF16)
    assert torch.equal(arranged["cusparselt"], SPARSE.weight())

    def clock(call):
        assert call().shape == (len(call.args[0]), 32)
        num_tokens, method = len(call.args[0]), call.func.__name__
        return {"_expanded": 5, "_cusparselt": 8 - num_tokens / 64, "_fused": num_tokens}[method]

    rows = measure(arranged, SPARSE.description, BF16, clock)
    assert rows == [Row(4, "fused", 0), Row(128, "expanded", 0), Row(ANY_NUMBER, "cusparselt", 7)]
    assert timings.read("a GPU", timings.matrix_key(SPARSE.description, BF16)) == rows
    assert json.loads((tmp_path / "mspc" / "kernels.json").read_text())["a GPU"]["2:4 32x256 bfloat16"]
    assert methods(SPARSE, "cusparselt", on_device=True) == ["fused"] + ["expanded"] * 4 + ["cusparselt"] * 3
    assert methods(SPARSE, on_device=True) == ["fused"] + ["expanded"] * 7  # without the copy
    assert methods(SPARSE) == ["fused"] * 4 + ["expanded"] * 4  # not on that device
    assert methods(INT4, on_device=True) == ["fused"] * 4 + ["expanded"] * 4  # another matrix
    x = inputs(SPARSE, 300)
    assert_product(matmul(x, arranged, SPARSE.description, tuple(rows)), x, SPARSE)


def test_no_kernel_is_given_more_tokens_than_it_takes():
    rows = [Row(2 * SPARSE.kernel.MAX_TOKENS, "fused", 0), Row(ANY_NUMBER, "expanded", 0)]
    timings.write("a GPU", timings.matrix_key(SPARSE.description, BF16), rows)
    assert methods(SPARSE, on_device=True) == ["fused"] * 4 + ["expanded"] * 4  # 33 tokens are the first for the other


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_traced_as_one_graph(case, monkeypatch):
    """torch.compile with fullgraph raises where it would have to leave the graph."""
    arranged = case.kernel.arrange(case.stored(), case.description)
    rows = schedule(arranged, case.description, case.dtype)
    monkeypatch.setattr(sys.modules[case.kernel.__name__], "launches", lambda tensor: True)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(str(graph.graph))
        return lambda *args: [torch.empty(0)]

    for num_tokens in (4, 100):
        compiled = torch.compile(lambda x: matmul(x, arranged, case.description, rows), fullgraph=True, backend=backend)
        compiled(inputs(case, num_tokens))
    assert f"mspc.{case.kernel_name}_matmul" in graphs[0]
    assert f"mspc.{case.kernel_name}_expand" in graphs[1]


def test_a_spoiled_cache_is_an_empty_one(tmp_path):
    timings.write("a GPU", "m", [Row(8, "fused", 0)])
    timings.write("a GPU", "n", [Row(9, "expanded", 0)])
    assert timings.read("a GPU", "m") == [Row(8, "fused", 0)]
    assert timings.read("another", "m") is None
    for spoiled in ("{", "[]", '{"a GPU": 3}', '{"a GPU": {"m": [[1, 2]]}}', '{"a GPU": {"m": [["x", "fused", 0]]}}'):
        (tmp_path / "mspc" / "kernels.json").write_text(spoiled)
        assert timings.read("a GPU", "m") is None
    (tmp_path / "mspc" / "kernels.json").write_text("{")
    timings.write("a GPU", "m", [Row(8, "fused", 0)])
    assert timings.read("a GPU", "m") == [Row(8, "fused", 0)]


def test_no_library_without_a_device():
    assert cusparselt.missing(torch.device("cpu")) == "cpu is no CUDA device"
    assert not tinygemm.usable(INT4.description, BF16)
    arranged = INT4.kernel.arrange(INT4.stored(), INT4.description)
    assert with_copies(arranged, INT4.description, BF16).keys() == arranged.keys()


def test_what_the_libraries_take(libraries):
    assert cusparselt.fits(SPARSE.description, BF16)
    assert not cusparselt.fits(SPARSE.description, torch.float16)
    assert not cusparselt.fits(Case("sparse24", NM(2, 4), None, (24, 256), BF16).description, BF16)
    assert not cusparselt.fits(Case("sparse24", NM(2, 4), Grid(4, 64), (32, 256), BF16).description, BF16)
    assert tinygemm.usable(INT4.description, BF16)
    assert not tinygemm.usable(Case("codes", DENSE, Grid(4, None), (32, 256), BF16).description, BF16)
    assert not tinygemm.usable(Case("codes", DENSE, Grid(4, 64), (36, 256), BF16).description, BF16)


def test_codes_and_scales_for_tinygemm(monkeypatch):
    """Oracle: torch's kernel for CPUs, which takes the same scales and another order of the codes."""
    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", lambda pairs, inner: pairs)
    pairs, scales = tinygemm.pack(INT4.stored(), INT4.description, torch.device("cpu"))
    codes = torch.stack([pairs >> 4, pairs & 15], -1).view(INT4.shape).int()
    x = inputs(INT4, 3)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    y = torch._weight_int4pack_mm_for_cpu(x, packed, 64, scales)
    expected = x.double() @ INT4.weight().double().T
    assert float((y - expected).abs().max() / expected.abs().max()) < 2**-7
