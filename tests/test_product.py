"""`mspc::product`: the operator by which every compressed matrix is multiplied.

Oracles: `torch.library.opcheck` for what it declares; the layer in eager mode for compiled ones, also where guards are
dropped, as engines that serve models do; float64 for gradients.
"""

import pytest
import tiny
import torch
from kernel_cases import BF16, DENSE, HALF, ONE_OF_EACH, stored
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import mspc
from mspc.errors import MspcError
from mspc.formats.description import StoredMatrix
from mspc.kernels import product
from mspc.kernels.cpu import library
from mspc.runtime.linear import SparseLinear, prepare
from mspc.types import NM, Grid

SHAPE = (40, 128)
MATRICES = [
    StoredMatrix(SHAPE, DENSE, Grid(3, 64, False), BF16),
    StoredMatrix(SHAPE, HALF, Grid(4, 32), BF16),
    StoredMatrix(SHAPE, HALF, None, BF16),
    StoredMatrix(SHAPE, NM(2, 4), Grid(4, 64), BF16),
    StoredMatrix(SHAPE, NM(8, 16), None, torch.float16, transposed=True),
]


@pytest.fixture(autouse=True)
def compiling(monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # set where GPTQModel is verified


def layer_of(matrix: StoredMatrix, device: str | None) -> SparseLinear:
    """A layer as it is stored, or prepared for a kernel of a type of device; the reference computes for cuda."""
    layer = SparseLinear.of(stored(matrix), matrix)
    if device is not None:
        layer.prepare(torch.float32 if device == "cpu" else matrix.dtype, device)
        if layer.kernel_name is None:
            pytest.skip("there is no C++ compiler")
    return layer


def all_layers() -> list[object]:
    layers = [pytest.param(matrix, on, id=f"{matrix}-{on}") for matrix in MATRICES for on in (None, "cpu")]
    return layers + [pytest.param(case.matrix, "cuda", id=f"{case}-cuda") for case in ONE_OF_EACH]


def inputs(num_tokens: int, layer: SparseLinear) -> Tensor:
    dtype = layer.prepared_for or torch.float32
    return torch.randn(num_tokens, layer.in_features, generator=torch.Generator().manual_seed(num_tokens)).to(dtype)


@pytest.mark.parametrize(("matrix", "device"), all_layers())
def test_the_operator_is_as_it_is_declared(matrix, device):
    layer = layer_of(matrix, device)
    tensors, x = list(layer.buffers()), inputs(3, layer)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(torch.ops.mspc.product.default, (x, tensors, layer.subject), test_utils=tests)
    opcheck(torch.ops.mspc.weight.default, (tensors, layer.subject), test_utils=tests)
    subject = product.parsed(layer.subject)
    assert subject.text() == layer.subject
    assert (subject.matrix.shape, subject.matrix.target) == (matrix.shape, matrix.target)


@pytest.mark.parametrize(("matrix", "device"), [(MATRICES[3], None), (MATRICES[1], "cpu"), (MATRICES[2], "cpu")])
def test_gradients_are_those_of_the_dense_weight_traced_or_not(matrix, device):
    layer = layer_of(matrix, device)
    x = inputs(6, layer).view(2, 3, -1).requires_grad_()
    opcheck(torch.ops.mspc.product.default, (x, list(layer.buffers()), layer.subject))
    (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    y = layer(x).detach().double()
    torch.testing.assert_close(found.double(), 2 * y @ layer.weight.double().view(SHAPE), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("matrix", "device"), all_layers())
def test_traced_at_one_length_without_guards_it_is_right_at_any_other(matrix, device):
    """As vLLM compiles: one graph, for a number of tokens that is dynamic, and no guards. One of 0 to 4096 tokens."""
    layer, graphs = layer_of(matrix, device), []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(
        layer, fullgraph=True, backend=backend, options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    )
    for num_tokens in (4096, 1, 8, 33, 0):
        x = inputs(num_tokens, layer)
        if num_tokens == 4096:
            torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad():
            assert torch.equal(compiled(x), layer(x))
    assert len(graphs) == 1
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert called == ["mspc.product.default"]


@pytest.mark.parametrize("recipe", [{"pattern": "2:4", "bits": 4, "group_size": 16}, {"sparsity": 0.6}], ids=str)
def test_a_loaded_model_is_compiled_whole_and_writes_the_same(recipe, artifact_of):
    """Lengths are dynamic: one graph for a first token, and one for all other lengths."""
    model = mspc.load(artifact_of("qwen2", solver="mask", **recipe).path, "cpu")
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for length in (12, 1, 8, 33):
        ids = tiny.ids(2).repeat(1, 4)[:, :length]
        with torch.no_grad():
            found, expected = (one(ids, use_cache=False).logits for one in (compiled, model))
        assert torch.equal(found.argmax(-1), expected.argmax(-1))
        torch.testing.assert_close(found, expected)
    assert len(graphs) <= 2
    layers = sum(isinstance(layer, SparseLinear) for layer in model.modules())
    for graph in graphs:
        assert sum(str(node.target) == "mspc.product.default" for node in graph.graph.nodes) == layers


def test_modes_see_the_operator_and_nothing_inside_it():
    layer = layer_of(MATRICES[0], None)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = layer(mode.from_tensor(torch.empty(5, 2, 128)))
    assert isinstance(y, torch._subclasses.FakeTensor)
    assert y.shape == (5, 2, 40)
    exported = torch.export.export(layer, (torch.randn(3, 128),))
    assert [str(node.target) for node in exported.graph.nodes if node.op == "call_function"] == ["mspc.product.default"]


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(MspcError, match=r"Inputs are \(1, 129\), and a matrix of \(40, 128\) cannot take them"):
        layer_of(MATRICES[0], None)(torch.randn(1, 129))


def test_what_a_layer_is_changes_with_its_buffers():
    """Oracle: products before; the text names the tensors that are there."""
    if not library.available():
        pytest.skip("there is no C++ compiler")
    layer, x = layer_of(MATRICES[3], None), torch.randn(2, 128)
    with torch.no_grad():
        before = layer(x)
        for on_cpu in (True, False):
            layer.unprepare()
            prepare(layer, torch.float32, on_cpu)
            assert product.parsed(layer.subject).parts == tuple(name for name, _ in layer.named_buffers())
            torch.testing.assert_close(layer(x), before, rtol=0, atol=2e-2 * float(before.abs().max()))
            of_other_inputs = layer(x.bfloat16()).float()
            torch.testing.assert_close(of_other_inputs, before, rtol=0, atol=3e-2 * float(before.abs().max()))
