"""The Triton kernels on a device: float64, the plain branch of the same kernels, CUDA graphs and torch.compile."""

import pytest
import torch
from kernel_cases import BF16, CASES, DENSE, Case, assert_product, inputs

from mspc.kernels import cusparselt, dispatch, launch
from mspc.kernels.timings import Choice
from mspc.runtime.linear import SparseLinear
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
    repacked = case.repacked()
    return {part: tensor.cuda() for part, tensor in repacked.items()}


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_product_and_expansion(case):
    repacked = on_device(case)
    for num_tokens in (1, 3, 8):
        x = inputs(case, num_tokens)
        assert_product(case.product(x.cuda(), repacked), x, case)
    out = torch.full(case.shape, 7.0, dtype=case.dtype, device="cuda")
    case.kernel.expand(repacked, case.matrix, out)
    assert torch.equal(out.cpu(), case.weight().to(case.dtype))


@pytest.mark.parametrize("case", [case for case in [*CASES, *LARGE] if case.kernel_name != "nm"], ids=str)
def test_assembly_is_the_plain_branch_bit_for_bit(case, monkeypatch):
    repacked, x = on_device(case), inputs(case, 5).cuda()
    with_assembly = case.product(x, repacked)
    monkeypatch.setattr(launch, "has_ptx", lambda: False)
    assert torch.equal(case.product(x, repacked), with_assembly)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second CUDA device")
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_on_a_device_that_is_not_the_current_one(case):
    repacked = {part: tensor.to("cuda:1") for part, tensor in on_device(case).items()}
    x, out = inputs(case, 3), torch.empty(case.shape, dtype=case.dtype, device="cuda:1")
    assert_product(case.product(x.to("cuda:1"), repacked), x, case)
    case.kernel.expand(repacked, case.matrix, out)
    assert torch.equal(out.cpu(), case.weight().to(case.dtype))


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_in_a_graph_and_compiled(case):
    repacked, x = on_device(case), inputs(case, 4).cuda()
    choices = dispatch.schedule(case.kernel, repacked, case.matrix, case.dtype)

    def product(x):
        return dispatch.matmul(x, case.kernel, repacked, case.matrix, choices)

    expected = product(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = product(x)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)
    compiled = torch.compile(product, fullgraph=True)
    assert torch.equal(compiled(x), expected)


@pytest.mark.parametrize("case", [LARGE[2], LARGE[0]], ids=str)
def test_methods_agree(case):
    """cuSPARSELt may round partial sums to bfloat16: a few 2^-9."""
    repacked, x = on_device(case), inputs(case, 64).cuda()
    copy = dispatch.copy_for_cusparselt(case.kernel, repacked, case.matrix, BF16)
    choices = [Choice(64, "expanded", 0)]
    if copy is not None:
        repacked[dispatch.COPY] = copy
        choices.append(Choice(64, "cusparselt", cusparselt.search(x, copy)))
    expected = x.cpu().double() @ case.weight().double().T
    for choice in choices:
        y = dispatch.multiply(choice, x, case.kernel, repacked, case.matrix)
        assert (y.cpu().double() - expected).norm() < 2**-7 * expected.norm(), choice


def test_a_layer_with_a_copy_is_measured_once_and_computes_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    case = LARGE[2]
    layer = SparseLinear.of(case.stored(), case.matrix).cuda()
    layer.use_cusparselt(measured=True)
    written = (tmp_path / "mspc" / "kernels.json").read_bytes()
    again = layer.schedule
    layer.use_cusparselt(measured=True)
    assert (tmp_path / "mspc" / "kernels.json").read_bytes() == written
    assert layer.schedule == again
    assert (layer.copied_bytes() > 0) == (cusparselt.missing(torch.device("cuda")) is None)
    x = inputs(case, 2048).cuda()
    expected = x.cpu().double() @ case.weight().double().T
    assert (layer(x).cpu().double() - expected).norm() < 2**-7 * expected.norm()
