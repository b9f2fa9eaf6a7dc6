"""Stored bits against golden bytes written out by hand, exact round trips, and the sizes that the layout promises."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import few
from safetensors.torch import load, save

from mspc.errors import InputError
from mspc.formats.bits import pack_bits, unpack_bits
from mspc.formats.layout import as_stored, digest, pack, unpack
from mspc.numerics.masking import num_pruned, prune_lowest, prune_n_of_m
from mspc.numerics.quant import dequantize, round_to_nearest
from mspc.solvers import SolverOptions
from mspc.solvers.obs import obs
from mspc.types import NM, Codes, CompressedLinear, GramStats, Grid, Pattern, Target, Unstructured

PATTERNS = [
    *(Unstructured(sparsity) for sparsity in (0.0, 0.5, 0.61, 1.0)),
    *(NM(2, 4), NM(4, 8), NM(5, 16), NM(16, 16), NM(1, 4), NM(3, 6), NM(1, 1)),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRIDS = [Grid(bits, size, symmetric) for bits in (2, 3, 4, 8) for size in (48, None) for symmetric in (True, False)]
SHAPE = (10, 96)


def compressed(pattern: Pattern, grid: Grid | None = None, shape: tuple[int, int] = SHAPE) -> CompressedLinear:
    """The result of a solver: random weights, pruned by magnitude, rounded to nearest."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if isinstance(pattern, NM):
        mask = prune_n_of_m(weight.abs(), pattern)
    else:
        mask = prune_lowest(weight.abs(), num_pruned(weight.numel(), pattern.sparsity))
    codes = None if grid is None else round_to_nearest(weight, mask, torch.ones(shape[1]), grid, "m")
    kept = weight * mask if codes is None else dequantize(codes)
    return CompressedLinear(kept, mask, Target(pattern, grid), codes)


def stored_bits(tensors: dict[str, torch.Tensor]) -> int:
    return 8 * sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(
    ("bits", "values", "golden"),
    [
        (1, [1, 0, 0, 0, 0, 0, 1, 1, 1], [0b11000001, 0b00000001]),
        (2, [1, 2, 3, 0, 2], [0b00_11_10_01, 0b10]),
        (3, [1, 2, 7, 4, 5], [0b11_010_001, 0b0_101_100_1]),  # 7 lies across the bytes
        (4, [1, 15, 8], [0xF1, 0x08]),
        (8, [0, 255, 7], [0, 255, 7]),
    ],
)
def test_golden_bytes(bits, values, golden):
    packed = pack_bits(torch.tensor(values, dtype=torch.uint8), bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == golden
    assert unpack_bits(packed, bits, len(values)).tolist() == values


@few
@given(st.integers(1, 8), st.data())
def test_bits_equal_one_big_integer_and_come_back(bits, data):
    """Oracle: the values as digits of one Python integer, low digits first."""
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))
    packed = pack_bits(torch.tensor(values, dtype=torch.uint8), bits)
    number = sum(value << (bits * place) for place, value in enumerate(values))
    assert bytes(packed.tolist()) == number.to_bytes(-(-len(values) * bits // 8), "little")
    assert unpack_bits(packed, bits, len(values)).tolist() == values


def test_any_shape_is_packed_in_row_major_order():
    values = torch.arange(12, dtype=torch.uint8).view(3, 4)
    assert torch.equal(pack_bits(values, 4), pack_bits(values.flatten(), 4))
    assert torch.equal(pack_bits(values.T, 4), pack_bits(values.T.contiguous().flatten(), 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_kept_weights_come_back_exactly(pattern, dtype):
    matrix = compressed(pattern)
    back = unpack(load(save(pack(matrix, dtype))), SHAPE, matrix.target, dtype)
    assert back.weight.dtype == dtype
    assert torch.equal(back.weight, matrix.weight.to(dtype))
    assert torch.equal(back.mask, matrix.mask)
    assert back.codes is None


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_codes_come_back_exactly(pattern, grid):
    matrix = compressed(pattern, grid)
    back = unpack(load(save(pack(matrix, torch.float32))), SHAPE, matrix.target, torch.float32)
    assert torch.equal(back.weight, matrix.weight)
    assert torch.equal(back.mask, matrix.mask)
    for part in ("values", "scales", "zeros"):
        assert torch.equal(getattr(back.codes, part), getattr(matrix.codes, part)), part


def test_zeros_among_the_kept_weights_stay_kept():
    """A mask is what the solver decided, not where zeros happen to be."""
    matrix = compressed(NM(2, 4))
    matrix.weight[matrix.mask] = 0
    assert torch.equal(unpack(pack(matrix, torch.float16), SHAPE, matrix.target, torch.float16).mask, matrix.mask)


@pytest.mark.parametrize("of", [128, 256])
def test_places_in_the_largest_groups_come_back(of):
    matrix = compressed(NM(3, of), shape=(6, 512))
    back = unpack(pack(matrix, torch.float32), (6, 512), matrix.target, torch.float32)
    assert torch.equal(back.weight, matrix.weight)


@pytest.mark.parametrize(
    ("pattern", "grid", "dtype", "expected"),
    [
        (NM(2, 4), Grid(4, 128), torch.bfloat16, 2 + 1 + 0.125),
        (Unstructured(0.5), Grid(4, 128), torch.bfloat16, 1 + 2 + 0.125),
        (Unstructured(0.0), Grid(4, 128), torch.bfloat16, 4 + 0.125),
        (Unstructured(0.0), Grid(4, 128, False), torch.bfloat16, 4 + 0.125 + 4 / 128),
        (Unstructured(0.0), Grid(3, 128), torch.bfloat16, 3 + 0.125),
        (Unstructured(0.5), Grid(8, 64), torch.float32, 1 + 4 + 0.25),
        (NM(2, 4), None, torch.bfloat16, 8 + 1),
        (NM(5, 16), None, torch.float16, 5 + 5 * 4 / 16),
        (NM(16, 16), None, torch.float16, 16),
        (Unstructured(0.75), None, torch.float32, 1 + 8),
        (Unstructured(0.0), None, torch.float32, 32),
        (NM(2, 4), Grid(4, None), torch.bfloat16, 2 + 1 + 16 / 256),
    ],
)
def test_bits_per_weight_are_what_the_layout_says(pattern, grid, dtype, expected):
    """Oracle: the arithmetic of the layout. 64 x 256 weights leave nothing to pad."""
    tensors = pack(compressed(pattern, grid, (64, 256)), dtype)
    assert stored_bits(tensors) / (64 * 256) == expected


@pytest.mark.parametrize("grid", [None, Grid(3, 32, False)], ids=repr)
@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.0), NM(2, 4), NM(5, 16)], ids=repr)
def test_tensors_of_another_shape_dtype_or_order_are_refused(pattern, grid):
    matrix = compressed(pattern, grid)
    tensors = pack(matrix, torch.float32)
    for part, tensor in tensors.items():
        spoiled = [tensor[:-1], tensor.flatten()[None], tensor[..., :-1]]
        spoiled += [] if part == "values" else [tensor.to(torch.int32)]
        if part == "indices":
            spoiled.append(tensor.flip(0).bitwise_not())
        for wrong in spoiled:
            with pytest.raises(InputError, match=rf"m: its {part} are"):
                unpack(tensors | {part: wrong}, SHAPE, matrix.target, torch.float32, "m")
        rest = {name: other for name, other in tensors.items() if name != part}
        with pytest.raises(InputError, match=f"m: its {part} are missing"):
            unpack(rest, SHAPE, matrix.target, torch.float32, "m")


@pytest.mark.parametrize("grid", [None, Grid(3, 32, False), Grid(4, None)], ids=repr)
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4), NM(5, 16)], ids=repr)
def test_what_the_sweep_returns_comes_back_bit_for_bit(pattern, grid):
    """Oracle: the result of `obs` itself, whose tensors were transposed and so may have odd strides."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(16, 64, generator=generator), torch.randn(128, 64, generator=generator)
    matrix = obs(weight, GramStats(inputs.T @ inputs, 128), Target(pattern, grid), SolverOptions(), "m")
    back = unpack(load(save(pack(matrix, torch.float32))), (16, 64), matrix.target, torch.float32)
    assert torch.equal(back.weight.view(torch.int32), matrix.weight.view(torch.int32))
    assert torch.equal(back.mask, matrix.mask)
    if grid is not None:
        for part in ("values", "scales", "zeros"):
            assert torch.equal(getattr(back.codes, part), getattr(matrix.codes, part)), part


def test_two_of_four_by_hand():
    """One row written out: places 1, 3 and 0, 2 are kept, codes 9, 7 and 15, 8 about the middle 8, scale 0.5."""
    codes = Codes(
        torch.tensor([[8, 9, 8, 7, 15, 8, 8, 8]], dtype=torch.uint8),
        torch.tensor([[0.5]]).half(),
        torch.tensor([[8]], dtype=torch.uint8),
    )
    weight, mask = torch.tensor([[0, 0.5, 0, -0.5, 3.5, 0, 0, 0]]), torch.tensor([[0, 1, 0, 1, 1, 0, 1, 0]]).bool()
    target = Target(NM(2, 4), Grid(4, None))
    tensors = pack(CompressedLinear(weight, mask, target, codes), torch.float32)
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "codes": [[0x79, 0x8F]],
        "scales": [[0.5]],
        "indices": [[0b10_00_11_01]],
    }
    assert torch.equal(unpack(tensors, (1, 8), target, torch.float32).weight, weight)


def spoiled(matrix: CompressedLinear) -> CompressedLinear:
    """The same target with weights and scales that overflow, pruned values other than zero, and odd strides."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.where(matrix.mask, 1e4 * matrix.weight, torch.tensor([[-0.0, torch.inf, torch.nan]]).repeat(1, 32))
    weight[::3] = torch.finfo(torch.float32).max
    codes = matrix.codes
    if codes is not None and matrix.target.grid is not None:
        highest = 2**matrix.target.grid.bits
        noise = torch.randint(0, highest, codes.values.shape, generator=generator, dtype=torch.uint8)
        values = torch.where(matrix.mask, codes.values, noise)
        codes = Codes(values.T.contiguous().T, torch.full_like(codes.scales, 6e4), codes.zeros.T.contiguous().T)
    return replace(matrix, weight=weight.T.contiguous().T, mask=matrix.mask.T.contiguous().T, codes=codes)


def assert_same_bits(one: torch.Tensor, other: torch.Tensor) -> None:
    assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
    assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_as_stored_is_bit_for_bit_what_is_unpacked(pattern, dtype):
    """Oracle: unpack(pack(.)), with and without codes; one shape is larger than what is rounded at a time."""
    matrices = [compressed(pattern, grid) for grid in (None, *GRIDS)]
    matrices += [spoiled(matrix) for matrix in matrices]
    matrices += [compressed(pattern, grid, (3000, 96)) for grid in (None, Grid(3, 48, False))]
    for matrix in matrices:
        rounded = as_stored(matrix, dtype)
        back = unpack(pack(matrix, dtype), matrix.mask.shape, matrix.target, dtype)
        assert_same_bits(rounded.weight, back.weight)
        assert_same_bits(rounded.mask, back.mask)
        assert digest(rounded) == digest(back)
        assert (rounded.codes is None) == (back.codes is None)
        if rounded.codes is not None and back.codes is not None:
            for part in ("values", "scales", "zeros"):
                assert_same_bits(getattr(rounded.codes, part), getattr(back.codes, part))
