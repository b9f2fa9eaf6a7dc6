"""The sweep equals the textbook, and is exact in what it promises: counts, groups, grids, bits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import (
    Problem,
    code_product,
    damped,
    divides,
    few,
    is_n_of_m,
    loss,
    problem,
    run_obs,
    textbook_obs,
)
from torch import Tensor

from mspc.errors import InputError
from mspc.numerics import linalg
from mspc.published.criteria import CRITERIA
from mspc.solvers.obs import obs, sweep
from mspc.solvers.options import SolverOptions
from mspc.types import NM, GramStats, Grid, Target, Unstructured

ALL = sorted(CRITERIA)
PATTERNS = [Unstructured(0.3), Unstructured(0.5), Unstructured(0.8), NM(2, 4), NM(4, 8), NM(8, 16), NM(1, 4)]
SHAPES = [(16, 64), (24, 200), (17, 96)]


# The loss


@pytest.mark.parametrize("dead", [[], [5, 70, 71, 72]], ids=["live", "dead"])
@pytest.mark.parametrize(
    ("target", "options"),
    [
        (Target(Unstructured(0.5)), {}),
        (Target(Unstructured(0.9)), {"criterion": CRITERIA["wanda"], "damp": 0.1}),
        (Target(Unstructured(1.0)), {}),
        (Target(NM(2, 4)), {}),
        (Target(NM(4, 8), Grid(4, 64)), {}),
        (Target(Unstructured(0.0), Grid(3, 32)), {}),
        (Target(Unstructured(0.5), Grid(4, 128, symmetric=False)), {}),
        (Target(Unstructured(0.5), Grid(2, None)), {}),
        (Target(Unstructured(0.5)), {"activation_order": True}),
        (Target(Unstructured(0.5), Grid(3, 64)), {"activation_order": True}),
    ],
    ids=repr,
)
def test_loss_of_the_sweep_is_the_output_loss(target, options, dead):
    """Theorem: the squared errors add up to tr(dW H dW^T) with the damped H, computed here in float64."""
    case = problem(1, 24, 256, dead)
    result, swept = sweep(case.weight, case.stats, target, SolverOptions(**options), "q_proj")
    assert result.damp == options.get("damp", 0.01)
    expected = loss(result.weight - case.weight, damped(case.stats.gram, result.damp))
    assert swept == pytest.approx(expected, rel=1e-4)


# The textbook


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_obs_equals_the_textbook(pattern, shape):
    """Oracle: one column at a time, H inverted anew for each, in float64."""
    num_columns = shape[1] if divides(pattern, shape[1]) else 208
    case = problem(4, shape[0], num_columns)
    result = run_obs(case, pattern)
    weight, mask = textbook_obs(case.weight, damped(case.stats.gram, 0.01), pattern)
    assert torch.equal(result.mask, mask)
    torch.testing.assert_close(result.weight.double(), weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("criterion", ALL)
@pytest.mark.parametrize("pattern", [Unstructured(0.6), NM(2, 4)], ids=repr)
def test_obs_equals_the_textbook_with_every_criterion(criterion, pattern):
    case = problem(5, 15, 152)
    result = run_obs(case, pattern, criterion=criterion, damp=0.02)
    weight, mask = textbook_obs(case.weight, damped(case.stats.gram, 0.02), pattern, criterion)
    assert torch.equal(result.mask, mask)
    torch.testing.assert_close(result.weight.double(), weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pattern", [Unstructured(0.0), Unstructured(0.5), NM(2, 4)], ids=repr)
@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(3, 64, symmetric=False), Grid(4, None)], ids=repr)
def test_obs_with_grid_equals_the_textbook_on_the_same_scales(pattern, grid):
    """Oracle: the textbook, which rounds every column to the nearest code of the scales that the sweep chose."""
    case = problem(6, 16, 192)
    result = run_obs(case, Target(pattern, grid))
    assert result.codes is not None
    scales, zeros = result.codes.scales.double(), result.codes.zeros.double()
    size = 192 // scales.shape[1]

    def rounded(column: torch.Tensor, j: int) -> torch.Tensor:
        scale, zero = scales[:, j // size], zeros[:, j // size]
        return ((column / scale + zero).round().clamp(0, 2**grid.bits - 1) - zero) * scale

    weight, mask = textbook_obs(case.weight, damped(case.stats.gram, 0.01), pattern, rounded=rounded)
    assert torch.equal(result.mask, mask)
    assert torch.equal(result.weight.double(), weight)


# Counts and groups


@few
@given(
    st.integers(1, 12),
    st.sampled_from([1, 7, 64, 128, 129, 200, 256, 300]),
    st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)),
    st.sampled_from(ALL),
    st.booleans(),
    st.sets(st.integers(0, 299), max_size=60),
)
def test_counts_are_exact_and_dead_inputs_go_first(num_rows, num_columns, sparsity, criterion, activation_order, dead):
    """By counting: the total is exact and no live weight is pruned while a whole dead input's worth is kept."""
    dead = sorted(j for j in dead if j < num_columns)
    case = problem(num_rows, num_rows, num_columns, dead)
    result = run_obs(case, Unstructured(sparsity), criterion=criterion, activation_order=activation_order)
    count = round(num_rows * num_columns * sparsity)
    assert int((~result.mask).sum()) == count
    assert torch.equal(result.weight != 0, result.mask)
    is_dead = torch.zeros(num_columns, dtype=torch.bool)
    is_dead[dead] = True
    assert int((~result.mask[:, is_dead]).sum()) == min(count, num_rows * len(dead))


@pytest.mark.parametrize("activation_order", [False, True])
def test_pieces_of_a_matrix_share_one_factor(activation_order, monkeypatch):
    """Oracle: the sweep of the whole matrix."""
    case, options = problem(0, 24, 16), SolverOptions(activation_order=activation_order)
    mask, target = torch.rand(24, 16) > 0.5, Target(Unstructured(0.5))
    whole, made = obs(case.weight, case.stats, target, options, "q", mask), list[Tensor]()
    factored = linalg.upper_inverse_factor
    monkeypatch.setattr(linalg, "upper_inverse_factor", lambda matrix: made.append(matrix) or factored(matrix))
    monkeypatch.setattr("mspc.threads.ROWS", 8)
    stats = GramStats(case.stats.gram, case.stats.num_tokens)
    torch.testing.assert_close(obs(case.weight, stats, target, options, "q", mask).weight, whole.weight)
    assert len(made) == 1


def test_dead_inputs_are_independent_of_all_others():
    """Oracle: the problem without them; pruning them costs no live weight anything."""
    dead = [0, 3, 50, 99]
    live = [j for j in range(100) if j not in dead]
    case = problem(8, 16, 100, dead)
    smaller = Problem(case.weight[:, live], case.inputs[live], GramStats(case.stats.gram[live][:, live], 400))
    pruned = 16 * len(dead) + 16 * 48
    result, expected = run_obs(case, Unstructured(pruned / 1600)), run_obs(smaller, Unstructured(0.5))
    assert torch.equal(result.mask[:, live], expected.mask)
    torch.testing.assert_close(result.weight[:, live], expected.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", [None, Grid(4, 16), Grid(4, None, symmetric=False)], ids=repr)
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), NM(8, 16), NM(1, 4), NM(16, 16), NM(3, 4)], ids=repr)
def test_groups_of_n_of_m_are_full_and_dead_inputs_lose(pattern, grid):
    """By counting every group; an input that is dead is kept only where fewer than N live ones are left."""
    dead = [1, 34, 35, 180]
    case = problem(9, 16, 208, dead)
    result = run_obs(case, Target(pattern, grid))
    assert is_n_of_m(result.mask, pattern)
    assert bool((result.weight[~result.mask] == 0).all())
    if grid is None:
        assert torch.equal(result.weight != 0, result.mask)
    if pattern.of - 2 >= pattern.keep:
        assert not bool(result.mask[:, dead].any())


# Symmetries, bits and what is left alone


@pytest.mark.parametrize(
    ("target", "options"),
    [
        (Target(Unstructured(0.5)), {}),
        (Target(NM(2, 4), Grid(4, 32)), {"criterion": "ria"}),
        (Target(Unstructured(0.5), Grid(4, None)), {"activation_order": True}),
    ],
    ids=repr,
)
def test_same_bits_every_time_and_inputs_left_alone(target, options):
    case = problem(13, 24, 224, dead=[9])
    weight, gram = case.weight.clone(), case.stats.gram.clone()
    first, second = run_obs(case, target, **options), run_obs(case, target, **options)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.mask, second.mask)
    assert torch.equal(case.weight, weight)
    assert torch.equal(case.stats.gram, gram)
    assert first.weight.is_contiguous()
    assert first.mask.is_contiguous()


def test_result_shares_no_memory_with_the_weight():
    """By writing into the result where nothing needed changing."""
    case = problem(14, 1, 64)
    before = case.weight.clone()
    run_obs(case, Unstructured(0.0)).weight.zero_()
    assert torch.equal(case.weight, before)


def test_half_precision_weights_give_their_float32_values():
    """Oracle: the same weights, cast first."""
    case = problem(15)
    half = case.weight.bfloat16()
    results = [run_obs(Problem(w, case.inputs, case.stats), NM(2, 4)) for w in (half, half.float())]
    assert results[0].weight.dtype == torch.float32
    assert torch.equal(results[0].weight, results[1].weight)


# Refusals


@pytest.mark.parametrize(
    ("target", "options", "match"),
    [
        (Target(NM(2, 4)), {"activation_order": True}, "activation order .* 2:4"),
        (Target(NM(3, 6)), {}, "divide 128, not 3:6"),
        (Target(NM(8, 16)), {}, "8:16 .*divisible by 16, got 24"),
        (Target(Unstructured(0.5), Grid(4, 16)), {}, "group size 16 does not divide its 24"),
    ],
    ids=repr,
)
def test_what_cannot_be_done_is_refused_by_name(target, options, match):
    with pytest.raises(InputError, match=rf"layers\.1\.q_proj.*{match}"):
        obs(torch.ones(2, 24), GramStats(torch.eye(24), 9), target, SolverOptions(**options), "layers.1.q_proj")


@pytest.mark.parametrize("of", [8, 16])
def test_grid_groups_smaller_than_those_of_the_pattern(of):
    """By counting: scales for 4 columns and 4:8 or 8:16 have nothing to do with each other."""
    case = problem(24, 8, 64)
    result = run_obs(case, Target(NM(of // 2, of), Grid(4, 4)))
    assert is_n_of_m(result.mask, NM(of // 2, of))
    assert result.codes is not None
    assert torch.equal(result.weight.double(), code_product(result.codes))
