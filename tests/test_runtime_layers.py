"""Sparse layers: their products against the weight of the solver in float64, and what they make on the way."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import few
from test_formats import DTYPES, GRIDS, PATTERNS, SHAPE, compressed
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mspc.formats import layout
from mspc.formats.decoding import decode_rows
from mspc.formats.description import StoredMatrix
from mspc.kernels import product, reference
from mspc.runtime.linear import SparseLinear
from mspc.types import NM, CompressedLinear, Grid, Unstructured


def layer_of(matrix: CompressedLinear, dtype: torch.dtype = torch.float32, bias: bool = False) -> SparseLinear:
    """A layer as it is after loading."""
    num_out, num_in = matrix.mask.shape
    description = StoredMatrix((num_out, num_in), matrix.target.pattern, matrix.target.grid, dtype)
    layer = SparseLinear(description, nn.Parameter(torch.arange(num_out) / 7) if bias else None)
    stored = layout.with_offsets(layout.pack(matrix, dtype), description, "m")
    layer.load_state_dict(stored | ({"bias": layer.bias.detach()} if bias else {}), assign=True)
    layer.check("m")
    return layer


class Watch(TorchDispatchMode):
    """Notes every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.made += [part for part in torch.utils._pytree.tree_leaves(result) if isinstance(part, Tensor)]
        return result


@pytest.mark.parametrize("grid", [None, *GRIDS], ids=repr)
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_a_layer_multiplies_by_the_weight_of_the_solver(pattern, grid, monkeypatch):
    """Strips of three rows, so that kept weights that are one stream over all rows are entered in the middle."""
    monkeypatch.setattr(reference, "STRIP", 3 * SHAPE[1])
    matrix = compressed(pattern, grid)
    layer = layer_of(matrix, bias=True)
    assert torch.equal(layer.weight, matrix.weight)
    x = torch.randn(2, 3, SHAPE[1], generator=torch.Generator().manual_seed(1))
    expected = x.double() @ matrix.weight.double().T + layer.bias.double()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected.float())
        assert layer(x[0, 0]).shape == (SHAPE[0],)


@few
@given(
    st.integers(1, 9), st.integers(1, 5), st.sampled_from([None, 2, 3, 4, 8]), st.booleans(), st.floats(0, 1), st.data()
)
def test_any_rows_can_be_decoded_on_their_own(num_rows, num_groups, bits, symmetric, sparsity, data):
    """Oracle: the same rows of the whole weight."""
    grid = None if bits is None else Grid(bits, 7, symmetric)
    matrix = compressed(Unstructured(sparsity), grid, (num_rows, 7 * num_groups))
    layer = layer_of(matrix)
    first = data.draw(st.integers(0, num_rows - 1))
    last = data.draw(st.integers(first + 1, num_rows))
    assert torch.equal(decode_rows(layer.stored(), layer.matrix, first, last), matrix.weight[first:last])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4), Unstructured(0.0)], ids=repr)
def test_stored_dtypes_survive_a_cast_of_the_model(pattern, dtype):
    layer = layer_of(compressed(pattern, None), dtype, bias=True)
    before = {part: tensor.clone() for part, tensor in layer.stored().items()}
    moved = layer.to(torch.bfloat16)
    assert moved.bias.dtype == torch.bfloat16
    assert all(torch.equal(before[part], tensor) for part, tensor in moved.stored().items())
    assert all(before[part].dtype == tensor.dtype for part, tensor in moved.stored().items())
    assert moved(torch.zeros(1, SHAPE[1], dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_infinities_and_nan_stay_where_they_are():
    matrix = compressed(Unstructured(0.5))
    first, second = matrix.mask.nonzero()[[0, -1]].tolist()
    matrix.weight[*first], matrix.weight[*second] = torch.inf, torch.nan
    torch.testing.assert_close(layer_of(matrix).weight, matrix.weight, rtol=0, atol=0, equal_nan=True)


COMPUTED = [(pattern, grid) for pattern in PATTERNS for grid in (None, Grid(3, 48, False), Grid(4, None))]


@pytest.mark.parametrize(("pattern", "grid"), COMPUTED, ids=repr)
def test_nothing_is_read_on_the_host_and_nothing_leaves_the_device(pattern, grid):
    """Oracle: meta tensors, which have no values to read; what is made of them must be on meta again."""
    layer = SparseLinear(StoredMatrix(SHAPE, pattern, grid, torch.bfloat16))
    with torch.no_grad(), Watch() as watch:
        y = layer(torch.empty(4, SHAPE[1], device="meta", dtype=torch.bfloat16))
    assert y.shape == (4, SHAPE[0])
    assert all(tensor.is_meta for tensor in watch.made)


@pytest.mark.parametrize(("pattern", "grid"), [(Unstructured(0.5), Grid(3, 48)), (NM(5, 16), None)], ids=repr)
def test_the_forward_pass_is_one_graph(pattern, grid):
    layer = layer_of(compressed(pattern, grid))
    x = torch.randn(4, SHAPE[1])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("grid", [None, Grid(4, 48)], ids=repr)
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=repr)
def test_what_is_made_on_the_way_is_no_larger_than_a_strip(pattern, grid, monkeypatch):
    monkeypatch.setattr(reference, "STRIP", 2 * 96)
    layer = layer_of(compressed(pattern, grid, (64, 96)))
    with torch.no_grad(), Watch() as watch:  # which would see the operator, and nothing inside it
        product._product(torch.randn(1, 96), list(layer.buffers()), layer.subject)
    stored = {tensor.untyped_storage().data_ptr() for tensor in layer.stored().values()}
    made = [tensor for tensor in watch.made if tensor.untyped_storage().data_ptr() not in stored]
    tables = 4 * 4096  # of fields, one for every 12-bit word
    assert max(tensor.numel() for tensor in made) <= max(2 * 96, tables)
