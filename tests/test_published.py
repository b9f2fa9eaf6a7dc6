"""Allocators by block and their measures, against the papers' formulas, loops over single weights, and numpy in float64
on weights and inputs that transformers gives."""

import math
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import few, problem

import mspc
from mspc.errors import InputError
from mspc.numerics.masking import num_pruned
from mspc.planning.allocation import allocate
from mspc.planning.exact_sparsity import exact_counts
from mspc.published.allocators import alpha_pruning, owl
from mspc.published.heavy_tail import spectrum, tail_exponent
from mspc.published.outliers import outlier_share
from mspc.recipe import Recipe
from mspc.settings import SPREADS
from mspc.text.tokens import calibration_tokens
from mspc.types import Matrix

BY_BLOCK = {"alpha": alpha_pruning, "owl": owl}
BLOCKS = [0, 0, 1, 1, 2, 2, 3, 3]
VALUES = [3.0, 5.0, 1.0, 1.0, 9.0, 0.5, 2.0, 8.0]  # means 4, 1, 4.75, 5
NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
NAMES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
@pytest.mark.parametrize("half", [0.0, 0.08, 0.2])
def test_owl_is_affine_in_the_outliers(half, sparsity):
    """Closed form: densities 2 half (D - min) / (max - min), moved to the mean 1 - sparsity."""
    shares = numpy.array([4.0, 1.0, 4.75, 5.0])
    density = 2 * half * (shares - 1) / (5 - 1)
    density += 1 - sparsity - density.mean()
    assert owl(VALUES, BLOCKS, sparsity, half) == pytest.approx(numpy.repeat(1 - density, 2))


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
@pytest.mark.parametrize("half", [0.0, 0.2, 0.3])
def test_alpha_pruning_is_affine_in_the_exponents_and_scaled(half, sparsity):
    """Closed form: 1 - half + 2 half (exponent - min) / (max - min), times what makes the mean the sparsity."""
    exponents = numpy.array([4.0, 1.0, 4.75, 5.0])
    factors = 1 - half + 2 * half * (exponents - 1) / (5 - 1)
    assert alpha_pruning(VALUES, BLOCKS, sparsity, half) == pytest.approx(
        numpy.repeat(sparsity * factors / factors.mean(), 2)
    )


def test_more_outliers_and_heavier_tails_are_denser():
    assert owl([0.01, 0.03], [0, 1], 0.5, 0.08) == pytest.approx([0.58, 0.42])
    assert alpha_pruning([2.0, 4.0], [0, 1], 0.5, 0.2) == pytest.approx([0.4, 0.6])


@pytest.mark.parametrize("name", BY_BLOCK)
def test_blocks_that_do_not_differ_get_the_budget(name):
    """One block, and blocks with equal values."""
    assert BY_BLOCK[name]([0.0, 0.0], [4, 4], 0.37, SPREADS[name]) == pytest.approx([0.37, 0.37])
    assert BY_BLOCK[name]([2.0, 2.0, 2.0], [0, 1, 1], 0.37, SPREADS[name]) == pytest.approx([0.37] * 3)


@few
@given(
    st.sampled_from(sorted(BY_BLOCK)),
    st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 100), st.integers(0, 4)), min_size=1, max_size=12),
    st.one_of(st.floats(0, 0.999), st.sampled_from([0.0, 0.5, 0.9])),
    st.sampled_from([0.0, 0.08, 0.5, 1.0]),
)
def test_counts_sum_to_the_budget_to_the_weight(name, rows, sparsity, alpha):
    """Oracle: adding. Blocks of any sizes and values."""
    numels, values, blocks = zip(*rows, strict=True)
    wished = BY_BLOCK[name](values, blocks, sparsity, alpha)
    counts = exact_counts(wished, numels, sparsity)
    assert sum(counts) == round(sparsity * sum(numels))
    assert all(0 <= count <= numel for count, numel in zip(counts, numels, strict=True))


@pytest.mark.parametrize("allocator", BY_BLOCK)
@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_a_plan_of_unequal_blocks_is_exact_and_flat_within_a_block(allocator, sparsity):
    """Oracle: counting. Blocks of 128, 512 and 96 weights; a block's sparsities differ by rounding only."""
    sizes = [[(8, 16)], [(8, 32), (16, 16)], [(4, 8), (8, 8)]]
    matrices = [[Matrix(f"{b}.{i}.weight", shape) for i, shape in enumerate(of)] for b, of in enumerate(sizes)]
    measured = {"0.0": 1.5, "1.0": 2.0, "1.1": 2.5, "2.0": 4.0, "2.1": 4.5}
    plan = allocate(Recipe(sparsity=sparsity, allocator=allocator).settings(), matrices, measured)
    pruned = [num_pruned(matrix.numel, matrix.target.pattern.sparsity) for matrix in plan]
    assert sum(pruned) == round(sparsity * (128 + 512 + 96))
    shares = [count / matrix.numel for count, matrix in zip(pruned, plan, strict=True)]
    assert abs(shares[1] - shares[2]) <= 1 / 256
    assert abs(shares[3] - shares[4]) <= 1 / 32 + 1 / 64
    assert max(shares) - min(shares) > 0.1


def test_the_allocator_decides_what_is_measured_and_its_alpha():
    for asked, measure, alpha in (
        ({"allocator": "owl"}, "outliers", 0.08),
        ({"allocator": "owl", "alpha": 0.0}, "outliers", 0.0),
        ({"allocator": "alpha"}, "exponents", 0.2),
        ({"allocator": "trace-rank", "sensitivity": "fisher"}, "fisher", 0.1),
        ({"allocator": "uniform"}, "hutchinson", None),
    ):
        settings = Recipe(sparsity=0.5, **asked).settings()
        assert (settings.measure, settings.alpha) == (measure, alpha)


# Outliers


def outliers_by_hand(weights: list[torch.Tensor], inputs: list[torch.Tensor]) -> float:
    """Weight by weight in Python: |w_ij| times the norm of input j (T, I), against 5 times the mean of them all."""
    scores = []
    for weight, read in zip(weights, inputs, strict=True):
        norms = [math.sqrt(sum(x * x for x in column)) for column in read.double().T.tolist()]
        scores += [abs(w) * norm for row in weight.double().tolist() for w, norm in zip(row, norms, strict=True)]
    return sum(score > 5 * sum(scores) / len(scores) for score in scores) / len(scores)


def test_outliers_are_above_five_times_the_mean_of_all_matrices():
    """Oracle: loops. The two matrices differ in size, so a mean of each alone would count others."""
    cases = [problem(1), problem(2, num_rows=40, num_columns=32)]
    weights = [cases[0].weight, 9 * cases[1].weight]
    share = outlier_share(weights, [case.stats.gram.diagonal() for case in cases])
    assert share == outliers_by_hand(weights, [case.inputs.T for case in cases])
    alone = [outlier_share([w], [case.stats.gram.diagonal()]) for w, case in zip(weights, cases, strict=True)]
    assert 0 < share != pytest.approx(numpy.average(alone, weights=[w.numel() for w in weights]))


def test_a_weight_at_the_threshold_is_no_outlier():
    """By hand: nine scores of 0 and a 1 have mean 0.1; without zeros all are equal."""
    weight = torch.tensor([[1.0] + [0.0] * 9])
    assert outlier_share([weight], [torch.ones(10)]) == 0.1
    assert outlier_share([weight], [torch.ones(10)], threshold=10.0) == 0
    assert outlier_share([torch.ones(2, 5)], [torch.ones(5)], threshold=1.0) == 0
    assert outlier_share([torch.zeros(2, 5)], [torch.ones(5)]) == 0


# Exponents


def exponent_by_numpy(eigenvalues: numpy.ndarray) -> float:
    """Hill's estimator at every eigenvalue in the window that the module names, and the one with the best fit."""
    counts, edges = numpy.histogram(numpy.log10(eigenvalues), 100)
    peak = 10 ** edges[counts.argmax()]
    found = []
    for i, least in enumerate(eigenvalues[:-1]):
        if math.log10(0.95 * peak) <= least <= 1.5 * peak:
            tail = eigenvalues[i:]
            exponent = 1 + len(tail) / numpy.log(tail / least).sum()
            empirical = numpy.arange(len(tail)) / len(tail)
            distance = numpy.abs(1 - (tail / least) ** (1 - exponent) - empirical).max()
            found.append((distance, i, exponent))
    return min(found)[2]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(48, 48), (40, 96), (96, 24)])
def test_exponents_are_hills_estimate(seed, shape):
    """Oracle: numpy's eigenvalues of W W^T or W^T W in float64, whichever has no zeros, and a loop."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) @ torch.diag(torch.randn(shape[1], generator=generator).exp())
    matrix = weight.double().numpy()
    eigenvalues = numpy.linalg.eigvalsh(matrix @ matrix.T if shape[0] <= shape[1] else matrix.T @ matrix)
    assert spectrum(weight).numpy() == pytest.approx(eigenvalues, rel=1e-3)
    assert tail_exponent(torch.from_numpy(eigenvalues)) == pytest.approx(exponent_by_numpy(eigenvalues), rel=1e-9)
    assert tail_exponent(spectrum(weight)) == pytest.approx(exponent_by_numpy(eigenvalues), rel=1e-3)


@pytest.mark.parametrize("exponent", [1.5, 2.0, 3.5])
def test_a_power_law_has_its_exponent(exponent):
    """Closed form: quantiles of the density (a - 1) x^-a from 1 on."""
    places = (numpy.arange(4000) + 0.5) / 4000
    quantiles = (1 - places) ** (-1 / (exponent - 1))
    assert tail_exponent(torch.from_numpy(quantiles)) == pytest.approx(exponent, rel=0.02)


@pytest.mark.parametrize("weight", [torch.zeros(4, 8), torch.eye(6), torch.ones(3, 5), torch.ones(1, 7)])
def test_where_there_is_no_tail_there_is_no_exponent(weight):
    """By definition: none, equal, or single eigenvalues. What is zero but for rounding is left out."""
    assert math.isnan(tail_exponent(spectrum(weight)))


# On a model


def weights_of(model, block: int) -> list[torch.Tensor]:
    return [model.get_submodule(f"model.layers.{block}.{name}").weight.detach() for name in NAMES]


def expected_outliers(folder: Path, ids: torch.Tensor) -> list[float]:
    model = tiny.reference(folder)
    inputs = [tiny.inputs_of(model, ids, [f"model.layers.{block}.{name}" for name in NAMES]) for block in (0, 1)]
    return [outliers_by_hand(weights_of(model, block), list(inputs[block].values())) for block in (0, 1)]


def recipe(calibration: Path, **changes) -> Recipe:
    values = {"num_sequences": 4, "sequence_length": tiny.LENGTH, "device": "cpu", "solver": "mask"}
    return Recipe(calibration=str(calibration), **values | {"sparsity": 0.5, "criterion": "magnitude"} | changes)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> Path:
    """A model whose second block has some very large weights, and so outliers."""
    model = tiny.make("llama")
    with torch.no_grad():
        for name in NAMES:
            model.get_submodule(f"model.layers.1.{name}").weight[::7, ::5] *= 8
    return tiny.save(model, tmp_path_factory.mktemp("uneven"))


def test_owl_on_a_model(uneven, calibration, tmp_path):
    """Oracle: hooks on the transformers model, and loops over all weights of a block."""
    asked = recipe(calibration, allocator="owl", sparsity=0.7)
    kept = tmp_path / "kept"
    artifact = mspc.compress(uneven, asked, out=tmp_path / "out", measurements=kept, progress=False)
    rows = artifact.manifest["matrices"]
    ids = calibration_tokens(tiny.byte_tokenizer(), str(calibration), 4, tiny.LENGTH, seed=0).ids
    expected = expected_outliers(uneven, ids)
    assert [row["sensitivity"] for row in rows] == pytest.approx([expected[0]] * 7 + [expected[1]] * 7, abs=1e-12)
    assert expected[1] > expected[0]
    sparsities = [row["sparsity"] for row in rows]
    assert sparsities == pytest.approx([0.78] * 7 + [0.62] * 7, abs=2e-3)
    assert artifact.manifest["sparsity"]["achieved"] == pytest.approx(0.7, abs=1e-4)
    assert artifact.manifest["settings"]["alpha"] == 0.08
    (file,) = kept.iterdir()
    before = file.stat().st_mtime_ns
    mspc.compress(uneven, replace(asked, sparsity=0.3), out=tmp_path / "b", measurements=kept, progress=False)
    assert [(path, path.stat().st_mtime_ns) for path in kept.iterdir()] == [(file, before)]
    mspc.compress(uneven, replace(asked, seed=1), out=tmp_path / "c", measurements=kept, progress=False)
    assert len(list(kept.iterdir())) == 2  # other text


def test_alpha_pruning_on_a_model(uneven, calibration, tmp_path):
    """Oracle: numpy on the weights that transformers loads. No text decides anything: other text finds them."""
    asked = recipe(calibration, allocator="alpha", sparsity=0.5)
    kept = tmp_path / "kept"
    artifact = mspc.compress(uneven, asked, out=tmp_path / "out", measurements=kept, progress=False)
    rows = artifact.manifest["matrices"]
    model = tiny.reference(uneven)
    exponents = [
        [exponent_by_numpy(numpy.sort(numpy.linalg.svd(w.double().numpy(), compute_uv=False) ** 2)) for w in weights]
        for weights in (weights_of(model, 0), weights_of(model, 1))
    ]
    assert [row["sensitivity"] for row in rows] == pytest.approx([*exponents[0], *exponents[1]], rel=1e-3)
    first, second = (numpy.mean(of_block) for of_block in exponents)
    expected = [0.6] * 7 + [0.4] * 7 if first > second else [0.4] * 7 + [0.6] * 7
    assert [row["sparsity"] for row in rows] == pytest.approx(expected, abs=2e-3)
    assert artifact.manifest["sparsity"]["achieved"] == 0.5
    assert artifact.manifest["settings"]["alpha"] == 0.2
    mspc.compress(uneven, replace(asked, seed=1), out=tmp_path / "b", measurements=kept, progress=False)
    assert len(list(kept.iterdir())) == 1


def test_a_matrix_without_a_tail_is_named(calibration, tmp_path):
    """Oracle: the name in the message; left dense, the others are compressed."""
    model = tiny.make("llama")
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight.zero_()
    source = tiny.save(model, tmp_path / "source")
    asked = recipe(calibration, allocator="alpha")
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj: its eigenvalues have no power law"):
        mspc.compress(source, asked, out=tmp_path / "out", progress=False)
    mspc.compress(source, replace(asked, skip=(r"1\.mlp\.up",)), out=tmp_path / "other", progress=False)


@pytest.mark.parametrize("allocator", ["owl", "alpha"])
def test_weights_that_are_stored_transposed(allocator, folder_of, calibration, tmp_path):
    """Oracle: the same loops and numpy on GPT-2, whose weights are (I, O)."""
    source = folder_of("gpt2")
    asked = recipe(calibration, allocator=allocator)
    rows = mspc.compress(source, asked, out=tmp_path / "out", progress=False).manifest["matrices"]
    model = tiny.reference(source)
    weights = [model.get_submodule(row["name"]).weight.detach().T for row in rows]
    if allocator == "owl":
        ids = calibration_tokens(tiny.byte_tokenizer(), str(calibration), 4, tiny.LENGTH, seed=0).ids
        inputs = list(tiny.inputs_of(model, ids, [row["name"] for row in rows]).values())
        shares = [outliers_by_hand(weights[first : first + 4], inputs[first : first + 4]) for first in (0, 4)]
        expected = [shares[0]] * 4 + [shares[1]] * 4
    else:
        values = [numpy.linalg.svd(weight.double().numpy(), compute_uv=False) for weight in weights]
        expected = [exponent_by_numpy(numpy.sort(of_matrix**2)) for of_matrix in values]
    assert [row["sensitivity"] for row in rows] == pytest.approx(expected, rel=1e-3)
