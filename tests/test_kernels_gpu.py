"""The Triton kernels on a device: float64, the plain branch of the same kernels, CUDA graphs and torch.compile."""

import pytest
import torch
from kernel_cases import BF16, CASES, DENSE, Case, assert_product, inputs

from mspc.kernels import dispatch, fp8, launch
from mspc.types import NM, Grid

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
LARGE = [
    Case("codes", DENSE, Grid(4, 128), (2048, 4096), BF16),
    Case("sparse24", NM(2, 4), Grid(4, 128), (2048, 4096), BF16),
    Case("sparse24", NM(2, 4), None, (1024, 2048), BF16),
    Case("nm", NM(5, 16), None, (1024, 2048), BF16),
    Case("codes", DENSE, Grid(8, 128), (2048, 4096), BF16),
    Case("codes", DENSE, Grid(3, 128), (2048, 4096), BF16),
    Case("bitmap", NM(8, 16), Grid(4, 128), (1024, 2048), BF16),
]


def on_device(case: Case) -> dict[str, torch.Tensor]:
    arranged = case.kernel.arrange(case.stored(), case.description)
    return {part: tensor.cuda() for part, tensor in arranged.items()}


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_product_and_expansion(case):
    arranged = on_device(case)
    for num_tokens in (1, 3, 8):
        x = inputs(case, num_tokens)
        assert_product(case.kernel.matmul(x.cuda(), arranged, case.description), x, case)
    out = torch.full(case.shape, 7.0, dtype=case.dtype, device="cuda")
    case.kernel.expand(arranged, case.description, out)
    assert torch.equal(out.cpu(), case.weight().to(case.dtype))


@pytest.mark.parametrize("case", [case for case in [*CASES, *LARGE] if case.kernel_name != "nm"], ids=str)
def test_assembly_is_the_plain_branch_bit_for_bit(case, monkeypatch):
    arranged, x = on_device(case), inputs(case, 5).cuda()
    with_assembly = case.kernel.matmul(x, arranged, case.description)
    monkeypatch.setattr(launch, "has_ptx", lambda: False)
    assert torch.equal(case.kernel.matmul(x, arranged, case.description), with_assembly)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second CUDA device")
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_on_a_device_that_is_not_the_current_one(case):
    arranged = {part: tensor.to("cuda:1") for part, tensor in on_device(case).items()}
    x, out = inputs(case, 3), torch.empty(case.shape, dtype=case.dtype, device="cuda:1")
    assert_product(case.kernel.matmul(x.to("cuda:1"), arranged, case.description), x, case)
    case.kernel.expand(arranged, case.description, out)
    assert torch.equal(out.cpu(), case.weight().to(case.dtype))


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_in_a_graph_and_compiled(case):
    arranged, x = on_device(case), inputs(case, 4).cuda()
    rows = dispatch.schedule(arranged, case.description, case.dtype)
    expected = dispatch.matmul(x, arranged, case.description, rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = dispatch.matmul(x, arranged, case.description, rows)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)
    compiled = torch.compile(lambda x: dispatch.matmul(x, arranged, case.description, rows), fullgraph=True)
    assert torch.equal(compiled(x), expected)


@pytest.mark.parametrize("case", [LARGE[2], Case("codes", DENSE, Grid(4, 64, False), (1024, 2048), BF16)], ids=str)
def test_methods_agree(case):
    """Libraries may round sums of parts to bfloat16, and tinygemm rounds scales to it: some 2^-9 each."""
    arranged = dispatch.with_copies(on_device(case), case.description, BF16)
    x = inputs(case, 64)
    expected = x.double() @ case.weight().double().T
    methods = {method for method, copies in dispatch.COPIES.items() if set(copies) <= arranged.keys()}
    assert methods == {"tinygemm"} if case.grid else methods <= {"cusparselt"}
    for method in {"expanded", *methods}:
        algorithm = dispatch.cusparselt.search(x.cuda(), arranged["cusparselt"]) if method == "cusparselt" else 0
        y = dispatch.METHODS[method](x.cuda(), arranged, case.description, algorithm)
        assert (y.cpu().double() - expected).norm() < 2**-7 * expected.norm(), method


@pytest.mark.parametrize("case", LARGE[1:3], ids=str)
@pytest.mark.parametrize("num_tokens", [33, 64, 300])
def test_e4m3_is_the_twin(case, num_tokens):
    """Sparse tensor cores keep fewer bits of sums than float32 has, so the bound is one of the whole product."""
    if reason := fp8.missing(torch.device("cuda")):
        pytest.skip(reason)
    arranged = dispatch.with_copies(on_device(case), case.description, BF16, ("fp8",))
    rows = dispatch.schedule(arranged, case.description, BF16)
    x = inputs(case, num_tokens).cuda()
    y = dispatch.matmul(x, arranged, case.description, rows)
    expected = fp8.twin(x.float(), case.weight().bfloat16().float().cuda())
    assert y.shape == expected.shape
    assert float((y.float() - expected).norm() / expected.norm()) < 2**-6
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = dispatch.matmul(x, arranged, case.description, rows)
    again.zero_()
    graph.replay()
    assert torch.equal(again, y)
