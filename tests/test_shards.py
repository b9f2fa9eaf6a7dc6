"""Layers of a server made of compressed matrices: which pieces a process holds, and checks while they are loaded.

Oracle: the product with the rows and columns of the dense weights, in float64. vLLM itself is in test_vllm.py.
"""

import sys
from collections.abc import Sequence

import pytest
import torch
from test_cutting import stored_of
from test_formats import compressed
from torch import Tensor

from mspc.errors import InputError
from mspc.formats.cutting import Range
from mspc.runtime.joined import ConcatenatedLinear
from mspc.runtime.linear import SparseLinear
from mspc.serving.shards import WEIGHT, Loading, Place, Shard, stacked
from mspc.types import NM, CompressedLinear, Grid, Pattern, Unstructured
from mspc.vllm import register

SHAPE = (32, 128)
DENSE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
MATRICES = [
    compressed(NM(2, 4), Grid(4, 64), SHAPE), compressed(Unstructured(0.3), Grid(3, 32), SHAPE),
    compressed(NM(2, 4), Grid(4, 64), SHAPE),
]  # fmt: skip
CPU = torch.device("cpu")


def loading_of(matrices: Sequence[CompressedLinear], rows: Range, columns: Range) -> Loading:
    """A layer of some matrices and a dense one, and one piece of each."""
    places = (Place(rows, columns),)
    shards = {i: Shard(f"m{i}", stored_of(m, torch.float32)[1], places) for i, m in enumerate(matrices)}
    return Loading(shards | {"dense": Shard("d", None, places)}, torch.float32, CPU)


def fill(loading: Loading, matrices: Sequence[CompressedLinear]) -> None:
    """Tensors in an order in which no matrix is whole before all are nearly."""
    loading.add("dense", WEIGHT, DENSE)
    tensors = [(i, *pair) for i, m in enumerate(matrices) for pair in stored_of(m, torch.float32)[0].items()]
    for i, part, tensor in sorted(tensors, key=lambda row: row[1]):
        loading.add(i, part, tensor)


@pytest.mark.parametrize("columns", [(0, 128), (64, 128)])
@pytest.mark.parametrize("rows", [(0, 32), (8, 16)])
def test_a_layer_multiplies_by_its_pieces_of_all_matrices(rows, columns):
    loading = loading_of(MATRICES, rows, columns)
    fill(loading, MATRICES)
    x = torch.randn(2, 3, columns[1] - columns[0], generator=torch.Generator().manual_seed(1))
    weights = [*(m.weight for m in MATRICES), DENSE]
    expected = [x.double() @ w[slice(*rows), slice(*columns)].double().T for w in weights]
    with torch.no_grad():
        found = loading.whole()(x)
    torch.testing.assert_close(found.double(), torch.cat(expected, -1), rtol=1e-3, atol=1e-2)


def test_matrices_of_one_kind_become_one_product():
    shards = {i: Shard("m", stored_of(MATRICES[0], torch.float32)[1], (Place((0, 32), (0, 128)),)) for i in "qkv"}
    loading = Loading(shards, torch.float32, CPU)
    for i in "qkv":
        for part, tensor in stored_of(MATRICES[0], torch.float32)[0].items():
            loading.add(i, part, tensor)
    assert isinstance(loading.whole(), SparseLinear)
    assert loading.whole().matrix.shape == (96, 128)


def test_pieces_of_one_matrix_are_held_one_below_the_other():
    """As q, k and v of one process where the file has them as one matrix."""
    stored, description = stored_of(MATRICES[1], torch.float32)
    places = tuple(Place(rows, (0, 128)) for rows in stacked([16, 8, 8], 1, 2))
    assert [place.rows for place in places] == [(8, 16), (20, 24), (28, 32)]
    loading = Loading({None: Shard("m", description, places)}, torch.float32, CPU)
    for part, tensor in stored.items():
        loading.add(None, part, tensor)
    assert isinstance(loading.whole(), ConcatenatedLinear)
    with torch.no_grad():
        found = loading.whole()(torch.eye(128)).T
    expected = torch.cat([MATRICES[1].weight[slice(*place.rows)] for place in places])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_rows_that_lie_side_by_side_are_one_piece():
    assert stacked([4, 2], 0, 1) == [(0, 6)]
    assert stacked([4, 2], 1, 2) == [(2, 4), (5, 6)]


def test_what_is_kept_is_no_view_of_the_file():
    loading = loading_of([MATRICES[1]], (0, 32), (0, 128))
    stored = stored_of(MATRICES[1], torch.float32)[0]
    for part, tensor in stored.items():
        loading.add(0, part, tensor)
    loading.add("dense", WEIGHT, DENSE.clone())
    with torch.no_grad():
        before = loading.whole()(torch.ones(1, 128))
        for tensor in stored.values():
            tensor.zero_()
        assert torch.equal(loading.whole()(torch.ones(1, 128)), before)


def spoiled(part: str, pattern: Pattern) -> Tensor:
    tensor = stored_of(compressed(pattern, Grid(3, 32), SHAPE), torch.float32)[0][part].clone()
    tensor.view(torch.uint8)[-1] ^= 0xFF
    return tensor


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("scales", torch.full((32, 4), torch.nan).half(), "m0: its scales contain NaN"),
        ("codes", torch.zeros(3, dtype=torch.uint8), "m0: its codes are"),
        ("mask", spoiled("mask", Unstructured(0.3)), "m0: its row_offsets do not count"),
    ],
)
def test_a_damaged_matrix_is_named(part, tensor, message):
    loading = loading_of([MATRICES[1]], (0, 32), (0, 128))
    loading.add("dense", WEIGHT, DENSE)
    stored = stored_of(MATRICES[1], torch.float32)[0] | {part: tensor}
    *most, last = stored.items()
    for name, other in most:
        loading.add(0, name, other)
    with pytest.raises(InputError, match=message):
        loading.add(0, *last)


def test_what_is_missing_is_named():
    loading = loading_of(MATRICES[:1], (0, 32), (0, 128))
    with pytest.raises(InputError, match=r"m0: its indices are missing\. Export or download"):
        loading.whole()
    for part, tensor in stored_of(MATRICES[0], torch.float32)[0].items():
        loading.add(0, part, tensor)
    with pytest.raises(InputError, match="d: its weight is missing"):
        loading.whole()


def test_what_does_not_belong_there_is_refused():
    loading = loading_of(MATRICES[:1], (0, 32), (0, 128))
    with pytest.raises(InputError, match="d: its codes do not belong there, or are there twice"):
        loading.add("dense", "codes", DENSE)
    with pytest.raises(InputError, match=r"shard \(0, 1\) of a layer that has 0, 'dense', which mspc does not know"):
        loading.add((0, 1), "codes", DENSE)
    dense = Loading({None: Shard("d", None, (Place((0, 32), (0, 128)),))}, torch.float32, CPU)
    with pytest.raises(InputError, match=r"d: its weight is \(32, 4\), which the model cannot use"):
        dense.add(None, WEIGHT, DENSE[:, :4])


def test_a_layer_is_loaded_once():
    loading = loading_of(MATRICES[:1], (0, 32), (0, 128))
    fill(loading, MATRICES[:1])
    with pytest.raises(InputError, match="m0, d: new weights cannot be loaded into a compressed layer"):
        loading.add("dense", WEIGHT, DENSE)


def test_a_vllm_without_what_is_needed_still_serves_other_models(monkeypatch, caplog):
    """vLLM calls the entry point for every model, and an error there would stop it."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    register()
    assert "Sparse exports of mspc cannot be served: this version of vLLM does not have what mspc needs" in caplog.text
