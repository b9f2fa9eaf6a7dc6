"""The inverse factor against float64 inverses, the damping ladder rung by rung, the output error against its inputs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import damped, few, problem

from mspc.errors import ActivationError, SingularGramError
from mspc.numerics.linalg import (
    add_gram,
    add_product,
    in_two_parts,
    inverse_factor,
    output_error,
    precise_matmul,
    regularized,
    symmetrize,
)
from mspc.types import GramStats


def stats(rows: list[list[float]], num_tokens: int = 7) -> GramStats:
    return GramStats(torch.tensor(rows), num_tokens)


@few
@given(
    st.integers(0, 99), st.integers(1, 48), st.sampled_from([0.001, 0.01, 0.1]), st.sets(st.integers(0, 47), max_size=5)
)
def test_inverse_factor_is_upper_and_squares_to_the_float64_inverse(seed, num_columns, damp, dead):
    dead = sorted(j for j in dead if j < num_columns)
    case = problem(seed, num_columns=num_columns, dead=dead)
    before = case.stats.gram.clone()
    result = inverse_factor(case.stats, damp, "q_proj")
    hessian = damped(before, damp)
    expected = torch.linalg.inv(hessian)
    factor = result.factor.double()
    assert result.factor.dtype == torch.float32
    assert torch.equal(factor, factor.triu())
    assert bool((factor.diagonal() > 0).all())
    norm = expected.diagonal().sqrt()
    assert float(((factor.T @ factor - expected).abs() / torch.outer(norm, norm)).max()) < 1e-4
    torch.testing.assert_close(result.inverse_diagonal.double(), expected.diagonal(), rtol=1e-4, atol=0)
    torch.testing.assert_close(result.diagonal.double(), hessian.diagonal(), rtol=1e-5, atol=0)
    assert result.dead.nonzero().flatten().tolist() == dead
    assert (result.damp, result.precision) == (damp, torch.float32)
    assert torch.equal(case.stats.gram, before)


def test_regularized_by_hand():
    """mean of the live diagonal (2, 6) = 4; damp 0.5 adds 2; the dead input gets 4 + 2."""
    gram = torch.tensor([[2.0, 0, 1], [0, 0, 0], [1, 0, 6]])
    matrix, dead = regularized(gram, 0.5)
    assert matrix.tolist() == [[4, 0, 1], [0, 6, 0], [1, 0, 8]]
    assert dead.tolist() == [False, True, False]
    assert gram.tolist() == [[2, 0, 1], [0, 0, 0], [1, 0, 6]]


@pytest.mark.parametrize(
    ("gram", "damp", "rung", "precision"),
    [
        ([[2.0, 1.0], [1.0, 2.0]], 0.01, 0.01, torch.float32),
        # eigenvalue -0.05: damp 0.01 leaves it negative, 0.1 does not
        ([[1.0, 1.05], [1.05, 1.0]], 0.01, 0.1, torch.float32),
        # rank 1: 1 + 1e-8 is 1 in float32 and not in float64
        ([[1.0, 1.0], [1.0, 1.0]], 1e-9, 1e-8, torch.float64),
    ],
)
def test_ladder_stops_at_the_first_rung_with_a_positive_eigenvalue(gram, damp, rung, precision):
    """Oracle: the eigenvalues of [[a, b], [b, a]] are a - b and a + b."""
    result = inverse_factor(stats(gram), damp, "q_proj")
    assert result.damp == pytest.approx(rung, rel=1e-12)
    assert result.precision == precision
    product = result.factor.double().T @ result.factor.double()
    torch.testing.assert_close(product, torch.linalg.inv(damped(torch.tensor(gram), rung)), rtol=1e-5, atol=0)


def test_indefinite_gram_is_refused_with_layer_size_tokens_and_damp():
    gram = stats([[1.0, 5.0, 0.0], [5.0, 1.0, 0.0], [0.0, 0.0, 1.0]], num_tokens=321)
    with pytest.raises(SingularGramError, match=r"layers\.7\.up_proj.* 3 inputs over 321 tokens.*damp 0\.1 .*--damp"):
        inverse_factor(gram, 0.01, "layers.7.up_proj")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_gram_that_is_not_finite_is_refused_with_its_layer(bad):
    with pytest.raises(ActivationError, match=r"layers\.7\.up_proj.*NaN or infinity.* 321 tokens"):
        inverse_factor(stats([[1.0, bad], [bad, 1.0]], num_tokens=321), 0.01, "layers.7.up_proj")


@few
@given(st.integers(0, 99), st.floats(0.001, 2))
def test_output_error_equals_the_float64_outputs(seed, size):
    case = problem(seed, num_rows=9, num_columns=20)
    noise = size * torch.randn(9, 20, generator=torch.Generator().manual_seed(seed))
    inputs = case.inputs.double()
    gram = inputs @ inputs.T
    other = case.weight + noise
    outputs, other_outputs = case.weight.double() @ inputs, other.double() @ inputs
    expected = float((outputs - other_outputs).square().sum() / outputs.square().sum())
    assert output_error(case.weight, other, gram) == pytest.approx(expected, rel=1e-5)
    assert output_error(case.weight, other, case.stats.gram) == pytest.approx(expected, rel=1e-3)


def test_output_error_of_nothing_and_of_everything():
    """By definition: no change is 0, a zero matrix is 1, and a zero reference is not a division by zero."""
    case = problem(1)
    zero = torch.zeros_like(case.weight)
    assert output_error(case.weight, case.weight, case.stats.gram) == 0
    assert output_error(case.weight, zero, case.stats.gram) == 1
    assert output_error(zero, zero, case.stats.gram) == 0


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_precise_matmul_restores_the_setting_even_after_an_exception(setting):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        with precise_matmul():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == setting
        with pytest.raises(KeyError), precise_matmul():
            raise KeyError
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)


def rounded_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """To 10 bits behind the first: half of the last one is added, and the others are cut off."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tf32_holds_every_number_of_16_bits(dtype):
    """Oracle: all 65,536 of them."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype).float()
    finite = numbers[numbers.isfinite()]
    if dtype == torch.bfloat16:
        finite = finite[finite.abs() >= torch.finfo(torch.float32).tiny]  # subnormal ones, below 1e-38, may be 0
    assert len(finite) > 60_000
    assert torch.equal(rounded_to_tf32(finite), finite)


def test_two_parts_in_tf32_are_float32_to_19_bits():
    numbers = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * torch.logspace(-12, 12, 4096)
    high, low = in_two_parts(numbers)
    assert torch.equal(high + low, numbers)
    found = rounded_to_tf32(high).double() + rounded_to_tf32(low).double()
    assert float(((found - numbers.double()) / numbers.double()).abs().max()) <= 2**-19


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_of_products_against_float64(dtype, device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(700, 300, generator=generator).to(dtype)
    drift = torch.randn(700, 300, generator=generator) * 0.1
    gram, shift = torch.zeros(300, 300, device=device), torch.zeros(300, 300, device=device)
    with precise_matmul():
        for some in (slice(0, 256), slice(256, 700)):
            add_gram(gram, x[some].to(device))
            add_product(shift, drift[some].to(device), x[some].to(device))
        assert torch.get_float32_matmul_precision() == "highest"
    expected = x.double().T @ x.double()
    assert float((symmetrize(gram).cpu() - expected).abs().max() / expected.diagonal().max()) < 1e-5
    expected = drift.double().T @ x.double()
    assert float((shift.cpu() - expected).abs().max() / expected.abs().max()) < 1e-5
