"""Allocators against the paper's formula, exact counting, and brute force over all roundings of a few matrices."""

from dataclasses import replace
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import few

from mspc.errors import InputError
from mspc.numerics.masking import num_pruned
from mspc.planning.allocation import allocate, check_plan, choose_group_size, planned_sparsity
from mspc.planning.exact_sparsity import exact_counts, exact_keeps, shifted
from mspc.published.allocators import ALLOCATORS, layer_trace_rank, trace_rank
from mspc.recipe import Recipe
from mspc.settings import SPREADS, Settings
from mspc.types import NM, Grid, Matrix, Unstructured

ALPHAS = [0.0, 0.05, 0.1, 0.5]


def matrix(name: str, num_out: int = 8, num_in: int = 16) -> Matrix:
    return Matrix(f"{name}.weight", (num_out, num_in))


MODEL = [[matrix("0.q"), matrix("0.k", 4), matrix("0.up", 24)], [matrix("1.q"), matrix("1.k", 4), matrix("1.up", 24)]]
SENSITIVITIES = {"0.q": 3.0, "0.k": 40.0, "0.up": 0.1, "1.q": 1.0, "1.k": 20.0, "1.up": 0.5}


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_trace_rank_is_algorithm_1_of_the_paper(sparsity, alpha):
    """The paper sorts ascending and builds densities 1 - p - alpha + 2 alpha i / (n - 1) from the first to the last."""
    values = [5.0, 0.1, 3.0, 2.0, 100.0]
    densities = [1 - sparsity - alpha + 2 * alpha * i / (len(values) - 1) for i in range(len(values))]
    by_value = dict(zip(sorted(values), densities, strict=True))
    got = trace_rank(values, range(5), sparsity, alpha)
    assert got == pytest.approx([1 - by_value[value] for value in values], abs=1e-12)
    ranks = [3, 0, 2, 1, 4]
    assert got == pytest.approx([sparsity + alpha - 2 * alpha * rank / 4 for rank in ranks], abs=1e-12)
    assert sum(got) / 5 == pytest.approx(sparsity)


def test_the_most_sensitive_matrix_stays_densest():
    wished = trace_rank([0.1, 7.0, 3.0], [0, 0, 0], 0.5, 0.1)
    assert wished[0] > wished[2] > wished[1]
    assert wished == pytest.approx([0.6, 0.4, 0.5])


def test_equal_sensitivities_rank_in_their_order():
    assert trace_rank([1.0, 1.0, 0.0], [0, 0, 0], 0.5, 0.1) == pytest.approx([0.5, 0.4, 0.6])


def test_one_matrix_gets_the_budget():
    assert trace_rank([3.0], [0], 0.37, 0.1) == [0.37]
    assert layer_trace_rank([3.0, 1.0], [4, 4], 0.37, 0.1) == [0.37, 0.37]


def test_layer_trace_rank_ranks_the_sums_of_layers():
    """Layer 1 holds the most sensitive matrix, layer 0 the larger sum: it is the denser one."""
    wished = layer_trace_rank([5.0, 5.0, 9.0, 0.1, 1.0, 1.0], [0, 0, 1, 1, 2, 2], 0.5, 0.1)
    assert wished == pytest.approx([0.4, 0.4, 0.5, 0.5, 0.6, 0.6])


def test_layers_may_come_in_any_order():
    assert layer_trace_rank([5.0, 1.0, 5.0], [7, 2, 7], 0.5, 0.1) == pytest.approx([0.4, 0.6, 0.4])


def test_uniform_gives_all_the_same_whatever_their_sensitivity():
    assert ALLOCATORS["uniform"]([1.0, 9.0, 3.0], [0, 0, 1], 0.3, 0.1) == [0.3] * 3


sizes = st.lists(st.integers(1, 5000), min_size=1, max_size=12)
sparsities = st.one_of(st.floats(0, 0.999), st.sampled_from([0.0, 0.5, 0.9, 0.99]))


@few
@given(sizes, st.data(), sparsities, st.sampled_from(ALPHAS))
def test_counts_sum_to_the_budget_to_the_weight(numels, data, sparsity, alpha):
    wished = trace_rank(data.draw(some_sensitivities(len(numels))), numels, sparsity, alpha)
    counts = exact_counts(wished, numels, sparsity)
    assert sum(counts) == round(sparsity * sum(numels))
    assert all(0 <= count <= numel for count, numel in zip(counts, numels, strict=True))


@few
@given(sizes, st.data(), sparsities, st.sampled_from(ALPHAS))
def test_the_order_of_wishes_survives_the_budget(numels, data, sparsity, alpha):
    """Within one weight: what was to be sparser is sparser, or as sparse."""
    wished = trace_rank(data.draw(some_sensitivities(len(numels))), numels, sparsity, alpha)
    counts = exact_counts(wished, numels, sparsity)
    by_wish = sorted(range(len(numels)), key=lambda i: wished[i])
    for low, high in pairwise(by_wish):
        assert (counts[low] - 1) / numels[low] <= (counts[high] + 1) / numels[high]


def some_sensitivities(count):
    return st.lists(st.floats(0, 1e6), min_size=count, max_size=count)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.999])
def test_equal_wishes_are_all_granted_as_they_are(sparsity):
    assert exact_counts([0.2] * 3, [1000, 2000, 3000], sparsity) == [sparsity * n for n in (1000, 2000, 3000)]


def test_the_largest_remainders_get_the_missing_weights():
    """Shares 1.2 and 1.6 of a budget of 3."""
    assert exact_counts([0.5, 0.5], [3, 4], 0.4) == [1, 2]


def test_the_shift_keeps_differences_where_nothing_is_clipped():
    assert shifted([0.6, 0.5, 0.4], [100, 100, 800], 0.5) == pytest.approx([0.67, 0.57, 0.47])


def test_what_is_clipped_is_taken_up_by_the_others():
    """0.9 of 200 is 180: the first cannot give more than its 100, so the second gives 80."""
    assert shifted([1.3, 0.5], [100, 100], 0.9) == pytest.approx([1.0, 0.8])
    assert shifted([0.5, -0.5], [100, 100], 0.1) == pytest.approx([0.2, 0.0])
    assert shifted([0.6, 0.5], [100, 100], 0.7, highest=0.7) == pytest.approx([0.7, 0.7])


@few
@given(
    st.lists(st.tuples(st.sampled_from([3, 5, 16, 64]), st.floats(0, 1e3)), min_size=1, max_size=6),
    st.floats(0, 0.99),
    st.sampled_from(ALPHAS),
)
def test_keeps_are_the_nearest_that_rounding_up_or_down_can_reach(matrices, sparsity, alpha):
    """Oracle: all 2^n choices of the whole number below or above each share."""
    numels = [16 * numel for numel, _ in matrices]
    wished = trace_rank([value for _, value in matrices], numels, sparsity, alpha)
    keeps = exact_keeps(wished, numels, sparsity, 16)
    assert all(1 <= keep <= 16 for keep in keeps)
    shares = [(1 - s) * 16 for s in shifted(wished, numels, sparsity, highest=15 / 16)]
    assert all(abs(keep - share) < 1 + 1e-6 for keep, share in zip(keeps, shares, strict=True))
    choices = product(*({max(int(share + 1e-9), 1), min(max(int(share + 1e-9), 1) + 1, 16)} for share in shares))
    wanted = (1 - sparsity) * 16 * sum(numels)

    def miss(kept):
        return abs(sum(n * keep for n, keep in zip(numels, kept, strict=True)) - wanted)

    assert miss(keeps) == pytest.approx(min(map(miss, choices)), abs=1e-6)


def test_among_equal_sizes_the_largest_remainders_are_rounded_up():
    """Shares 7.36, 8.0 and 8.64 of 16 need one more than their floors 7, 8 and 8."""
    assert exact_keeps([0.54, 0.5, 0.46], [64, 64, 64], 0.5, 16) == [7, 8, 9]


def test_among_choices_of_one_total_the_largest_remainders_win():
    """Shares 8.3, 8.3 and 8.9; the two small matrices together are as large as the third."""
    assert exact_keeps([0.48125, 0.48125, 0.44375], [16, 16, 32], 0.4625, 16) == [8, 8, 9]


def test_among_totals_equally_near_the_largest_remainders_win():
    """Shares 8 and 8.75, 24 too few in all: 16 and 32 are as near."""
    assert exact_keeps([0.5, 0.453125], [16, 32], 0.46875, 16) == [8, 9]


def test_matrices_of_one_size_are_exchanged_for_those_of_another():
    """Both shares are 8.48, 61.4 too few in all: the large one adds 96, which is too many, the small one only 32."""
    assert exact_keeps([0.5, 0.5], [96, 32], 0.47, 16) == [8, 9]


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.75, 0.9375])
def test_whole_n_are_kept_as_they_are(sparsity):
    assert exact_keeps([0.3] * 3, [64, 128, 320], sparsity, 16) == [round(16 * (1 - sparsity))] * 3


def test_no_matrix_goes_below_one_of_sixteen():
    assert exact_keeps([0.99] * 2, [64, 128], 0.99, 16) == [1, 1]


def settings(**asked) -> Settings:
    return Recipe(**{} if "pattern" in asked else {"sparsity": 0.5}, **asked).settings()


def test_every_allocator_that_ranks_needs_a_measurement():
    assert set(SPREADS) == {"trace-rank", "layer-trace-rank", "owl", "alpha"} == set(ALLOCATORS) - {"uniform"}
    for allocator, needs in (("trace-rank", Settings.needs_sensitivity), ("curves", Settings.needs_curves)):
        assert needs.fget(settings(allocator=allocator))
        assert needs.fget(settings(allocator=allocator, pattern="N:16"))
        for changes in ({"allocator": "uniform"}, {"pattern": "2:4"}, {"sparsity": 0.0}, {"plan": "plan.json"}):
            assert not needs.fget(replace(settings(allocator=allocator), **changes))


@pytest.mark.parametrize("allocator", sorted(ALLOCATORS))
@pytest.mark.parametrize("sparsity", [0.0, 0.123, 0.5, 0.95])
def test_a_plan_prunes_exactly_the_budget(allocator, sparsity):
    asked = replace(settings(allocator=allocator, bits=4, group_size=16), sparsity=sparsity)
    plan = allocate(asked, MODEL, SENSITIVITIES)
    total = sum(matrix.numel for matrix in plan)
    assert sum(num_pruned(matrix.numel, matrix.target.pattern.sparsity) for matrix in plan) == round(sparsity * total)
    assert planned_sparsity(plan) == pytest.approx(sparsity, abs=0.5 / total)
    assert [matrix.name for matrix in plan] == list(SENSITIVITIES)
    assert [matrix.sensitivity for matrix in plan] == list(SENSITIVITIES.values())
    assert {matrix.target.grid for matrix in plan} == {Grid(4, 16, True)}


def test_a_layer_is_one_sparsity_within_a_weight():
    plan = allocate(settings(allocator="layer-trace-rank"), MODEL, SENSITIVITIES)
    for layer in (plan[:3], plan[3:]):
        shares = [matrix.target.pattern.sparsity for matrix in layer]
        assert max(shares) - min(shares) < 1 / 64 + 1e-9
    assert plan[0].target.pattern.sparsity < plan[3].target.pattern.sparsity  # layer 0 is the more sensitive one


def test_patterns_of_a_recipe():
    assert {m.target.pattern for m in allocate(settings(pattern="2:4"), MODEL, {})} == {NM(2, 4)}
    ranked = allocate(settings(pattern="N:16", allocator="trace-rank"), MODEL, SENSITIVITIES)
    mixed = [m.target.pattern for m in ranked]
    assert {pattern.of for pattern in mixed} == {16}
    assert len({pattern.keep for pattern in mixed}) > 1
    assert mixed[1].keep > mixed[2].keep  # 0.k is far more sensitive than 0.up
    numels = [m.numel for of_block in MODEL for m in of_block]
    assert sum(n * p.keep for n, p in zip(numels, mixed, strict=True)) == 8 * sum(numels)
    assert {type(m.target.pattern) for m in allocate(settings(), MODEL, SENSITIVITIES)} == {Unstructured}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"pattern": "3:5"}, r"0\.q: the pattern 3:5 needs in features divisible by 5, got 16"),
        ({"bits": 4, "group_size": 12}, r"0\.q: group size 12 does not divide its 16 in features"),
    ],
)
def test_what_does_not_divide_is_named(asked, message):
    with pytest.raises(InputError, match=message):
        check_plan(allocate(settings(**asked), MODEL, {}))


def test_what_divides_passes():
    check_plan(allocate(settings(pattern="4:8", bits=4, group_size="row"), MODEL, {}))


def test_counts_are_exact_at_the_size_of_a_large_model():
    """Oracle: the sum of whole numbers, where shares near 4e7 of 10 billion weights leave few digits for fractions."""
    numels = [4096 * 4096, 4096 * 11008, 11008 * 4095] * 32
    counts = exact_counts([0.4 + 0.2 * i / 95 for i in range(96)], numels, 0.5)
    assert sum(counts) == round(sum(numels) / 2)


@few
@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 4)), min_size=1, max_size=20), sparsities)
def test_layer_trace_rank_is_trace_rank_of_the_sums(rows, sparsity):
    """Oracle: the rank of a layer counted pair by pair, ties by number of the layer."""
    blocks = [block for _, block in rows]
    sums = {layer: sum((value for value, block in rows if block == layer), 0.0) for layer in set(blocks)}
    wished = layer_trace_rank([value for value, _ in rows], blocks, sparsity, 0.1)
    for block, got in zip(blocks, wished, strict=True):
        rank = sum((sums[other], other) < (sums[block], block) for other in sums)
        assert got == pytest.approx(sparsity + 0.1 - 0.2 * rank / (len(sums) - 1) if len(sums) > 1 else sparsity)


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ((256, 512), {256: 128, 512: 128}),
        ((576, 1536), {576: 64, 1536: 64}),
        ((96, 128), {96: 32, 128: 32}),
        ((576, 72, 1536), {576: 64, 72: None, 1536: 64}),
        ((72, 40), {72: None, 40: None}),
    ],
)
@pytest.mark.parametrize("asked", [{"bits": 4}, {"bits_per_weight": 4.0}], ids=str)
def test_one_group_size_for_the_model_is_the_largest_that_divides(asked, inputs, expected, caplog):
    """By hand. None: one scale per row, with a note."""
    matrices = [[matrix(f"0.{num}", 8, num) for num in inputs]]
    with caplog.at_level("INFO", "mspc"):
        settings = choose_group_size(Recipe(**asked).settings(), matrices)
    assert {num: settings.grid_for(num, 4).group_size for num in inputs} == expected
    assert ("one scale per row" in caplog.text) == (None in expected.values())


def test_a_group_size_that_was_asked_for_is_not_changed():
    settings = Recipe(bits=4, group_size=32).settings()
    assert choose_group_size(settings, MODEL) == settings
