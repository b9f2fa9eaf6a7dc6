"""Pieces of stored matrices, as tensor parallelism needs them.

Oracle: the slice of the dense weight, of the mask and of the codes, bit for bit; and the checks that loading makes.
"""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import few
from test_formats import DTYPES, GRIDS, PATTERNS, SHAPE, compressed

from mspc.errors import InputError
from mspc.formats import layout
from mspc.formats.cutting import Range, cut
from mspc.formats.decoding import check_indices
from mspc.formats.description import StoredMatrix, check_types, types_of
from mspc.kernels import ON_CPU, kernel_for
from mspc.types import NM, CompressedLinear, Grid, Unstructured


def stored_of(matrix: CompressedLinear, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], StoredMatrix]:
    num_rows, num_columns = matrix.mask.shape
    description = StoredMatrix((num_rows, num_columns), matrix.target.pattern, matrix.target.grid, dtype)
    return layout.with_offsets(layout.pack(matrix, dtype), description, "m"), description


def check(matrix: CompressedLinear, rows: Range, columns: Range, dtype: torch.dtype = torch.float32) -> StoredMatrix:
    stored, description = stored_of(matrix, dtype)
    tensors, piece = cut(stored, description, rows, columns)
    assert piece.shape == (rows[1] - rows[0], columns[1] - columns[0])
    assert types_of(tensors) == piece.tensors()
    check_types(types_of(tensors), piece)
    check_indices(tensors, piece)
    found, expected = layout.decode(tensors, piece, "m"), layout.decode(stored, description, "m")
    place = slice(*rows), slice(*columns)
    assert torch.equal(found.weight, expected.weight[place])
    assert torch.equal(found.mask, expected.mask[place])
    if found.codes is not None:
        assert torch.equal(found.codes.values, expected.codes.values[place])
    again = layout.with_offsets(layout.pack(found, dtype), piece, "m")  # the bits after the last value too
    assert all(torch.equal(again[part], tensor) for part, tensor in tensors.items())
    return piece


@pytest.mark.parametrize("grid", [None, *GRIDS], ids=repr)
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_a_piece_has_the_weights_of_its_place(pattern, grid):
    """Halves and thirds: of 10 rows and 96 columns in groups of 48 and of 1 to 16."""
    matrix = compressed(pattern, grid)
    everything = (0, SHAPE[0]), (0, SHAPE[1])
    for rows, columns in product(
        [everything[0], (0, 5), (5, 10), (3, 4)], [everything[1], (0, 48), (48, 96), (32, 64)]
    ):
        piece = check(matrix, rows, columns)
        if not isinstance(pattern, NM) or 32 % pattern.of == 0:
            assert isinstance(piece.pattern, type(pattern))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4), Unstructured(0.0)], ids=repr)
def test_values_of_every_dtype(pattern, dtype):
    check(compressed(pattern), (2, 7), (8, 72), dtype)


@few
@given(st.data(), st.sampled_from([None, 2, 3, 4, 8]), st.booleans(), st.floats(0, 1))
def test_any_piece(data, bits, symmetric, sparsity):
    grid = None if bits is None else Grid(bits, 12, symmetric)
    pattern = data.draw(st.sampled_from([Unstructured(sparsity), NM(2, 4), NM(1, 3), NM(2, 2)]))
    first_row, first_column = data.draw(st.integers(0, 8)), data.draw(st.integers(0, 35))
    rows = first_row, data.draw(st.integers(first_row + 1, 9))
    columns = first_column, data.draw(st.integers(first_column + 1, 36))
    check(compressed(pattern, grid, (9, 36)), rows, columns)


def test_groups_that_columns_divide_become_smaller_and_others_stay():
    matrix = compressed(NM(2, 4), Grid(4, 48))
    assert check(matrix, (0, 10), (0, 48)).grid == Grid(4, 48)
    assert check(matrix, (0, 10), (0, 32)).grid == Grid(4, 16)
    assert check(compressed(NM(2, 4), Grid(4, None)), (0, 10), (4, 52)).grid == Grid(4, None)


def test_a_pattern_that_columns_divide_becomes_a_mask():
    assert check(compressed(NM(5, 16)), (0, 10), (0, 48)).pattern == NM(5, 16)
    assert isinstance(check(compressed(NM(5, 16)), (0, 10), (0, 40)).pattern, Unstructured)


def test_pieces_that_keep_all_or_nothing():
    matrix = compressed(Unstructured(0.5), Grid(3, 48))
    matrix.mask[:5], matrix.mask[5:] = True, False
    assert not check(matrix, (0, 5), (0, 96)).has_mask
    assert check(matrix, (5, 10), (0, 48)).num_kept == 0


@pytest.mark.parametrize("grid", [None, Grid(4, 128), Grid(3, None, False)], ids=repr)
@pytest.mark.parametrize("pattern", [Unstructured(0.4), Unstructured(0.0), NM(2, 4), NM(5, 16)], ids=repr)
def test_the_products_of_pieces_add_up(pattern, grid):
    """Oracle: the product with the whole weight in float64; C++ reads the pieces where it can be built."""
    matrix = compressed(pattern, grid, (48, 512))
    stored, description = stored_of(matrix, torch.float32)
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(1))
    expected = x.double() @ matrix.weight.double().T
    found = torch.zeros(3, 48)
    for rows, columns in product([(0, 24), (24, 48)], [(0, 256), (256, 512)]):
        tensors, piece = cut(stored, description, rows, columns)
        name = kernel_for(piece, torch.float32, "cpu")
        if name is None:
            pytest.skip("there is no C++ compiler")
        kernel = ON_CPU[name]
        of_columns = x[:, slice(*columns)].contiguous()
        found[:, slice(*rows)] += kernel.matmul(of_columns, kernel.repack(tensors, piece), piece)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize(("rows", "columns"), [((0, 0), (0, 96)), ((0, 11), (0, 96)), ((0, 10), (-1, 4))])
def test_impossible_pieces_are_refused(rows, columns):
    stored, description = stored_of(compressed(NM(2, 4)), torch.float32)
    with pytest.raises(InputError, match=r"m: rows .* and columns .* are no piece of \(10, 96\)"):
        cut(stored, description, rows, columns, "m")
