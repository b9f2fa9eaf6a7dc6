"""Masks against sorting by hand, all subsets of a group, and counting."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import best_n_of_m, drop_lowest, few

from mspc import threads
from mspc.errors import InputError
from mspc.numerics import masking
from mspc.numerics.masking import check_divides, num_pruned, prune_lowest, prune_lowest_per_row, prune_n_of_m, spread
from mspc.types import NM, Unstructured

SPARSITIES = [0.0, 0.001, 0.25, 0.5, 0.61, 0.999, 1.0]
PATTERNS = [NM(2, 4), NM(1, 4), NM(4, 8), NM(2, 8), NM(4, 4), NM(1, 1)]


def scores(seed: int, num_rows: int, num_columns: int) -> torch.Tensor:
    """Integers with many ties and about half of them zero."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-5, 6, (num_rows, num_columns), generator=generator).clamp(min=0).float()


@st.composite
def scores_and_counts(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    num_rows, num_columns = draw(st.integers(1, 9)), draw(st.integers(1, 17))
    return scores(draw(st.integers(0, 99)), num_rows, num_columns), draw(st.integers(0, num_rows * num_columns))


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_num_pruned_is_the_nearest_integer(sparsity):
    for numel in (1, 7, 64, 12345, 4096 * 11008):
        assert abs(num_pruned(numel, sparsity) - numel * sparsity) <= 0.5


@few
@given(scores_and_counts())
def test_lowest_equals_sorting_by_hand(case):
    score, count = case
    assert torch.equal(prune_lowest(score, count), drop_lowest(score, count))


@few
@given(scores_and_counts())
def test_lowest_per_row_equals_sorting_each_row_by_hand(case):
    score, count = case
    mask = prune_lowest_per_row(score, count)
    counts = (~mask).sum(1)
    assert int(counts.sum()) == count
    assert int(counts.max() - counts.min()) <= 1
    for row, kept, row_count in zip(score, mask, counts.tolist(), strict=True):
        assert torch.equal(kept, drop_lowest(row, row_count))


@few
@given(st.sampled_from(PATTERNS), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_n_of_m_equals_the_best_of_all_subsets(pattern, num_rows, num_groups, seed):
    score = scores(seed, num_rows, num_groups * pattern.of)
    assert torch.equal(prune_n_of_m(score, pattern), best_n_of_m(score, pattern))


def test_pattern_that_does_not_divide_names_matrix_pattern_and_size():
    with pytest.raises(InputError, match=r"layers\.3\.q_proj.* 8:16 .*divisible by 16, got 200.*--skip"):
        check_divides(NM(8, 16), 200, "layers.3.q_proj")
    with pytest.raises(InputError, match="2:4 needs in features divisible by 4, got 6"):
        prune_n_of_m(torch.ones(2, 6), NM(2, 4))
    check_divides(NM(8, 16), 208, "fits")
    check_divides(Unstructured(0.5), 7, "fits everything")


@few
@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=12), st.floats(0, 1))
def test_spread_is_exact_within_capacity_and_within_one_of_proportional(capacities, share):
    total = sum(capacities)
    count = round(total * share)
    parts = spread(count, capacities)
    assert sum(parts) == count
    for part, capacity in zip(parts, capacities, strict=True):
        assert 0 <= part <= capacity
        assert abs(part * total - count * capacity) <= total


@pytest.mark.parametrize("share", [0.0, 1e-5, 0.3, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["normal", "ties", "sorted", "periodic", "infinite"])
@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]
)
def test_the_threshold_of_many_values_is_exact(device, kind, share):
    """Also where a sample of them misleads. Oracle: a sort."""
    values = torch.randn(700, 811, generator=torch.Generator().manual_seed(0))
    if kind == "ties":
        values = values.round()
    elif kind == "sorted":
        values = values.flatten().sort().values.view_as(values)
    elif kind == "periodic":  # all that the sample sees is zero
        values.view(-1)[:: values.numel() // masking.SAMPLE | 1] = 0
    elif kind == "infinite":
        values[values > 1] = torch.inf
    k = max(1, round(share * values.numel()))
    expected = values.flatten().sort().values[k - 1]
    with threads.using(2, torch.device("cpu")):
        assert masking.kth_lowest(values.to(device), k) == expected
