"""The Fisher-weighted solver against dense Kronecker products in float64, all supports of a small matrix, and ALPS."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from oracles import Problem, code_product, damped, loss, problem
from torch import Tensor

from mspc.errors import InputError
from mspc.solvers import SolverOptions
from mspc.solvers.admm import admm, error_path, kfac
from mspc.solvers.error_compensation import compensated
from mspc.solvers.inner import Steps, inner
from mspc.solvers.quadratic import OUTPUT_DAMP, quadratic, refine
from mspc.types import NM, CompressedLinear, GramStats, Grid, Pattern, Target, Unstructured

PATTERNS = [Unstructured(0.5), Unstructured(0.8), NM(2, 4), NM(5, 16)]


def fisher(seed: int, num_blocks: int, size: int) -> Tensor:
    """Second moments (K, B, B) of correlated gradients of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(num_blocks, size, 3 * size, generator=generator)
    mixing *= torch.randn(num_blocks, size, 1, generator=generator).exp()
    mixing[:, :, : size // 2] += 2 * mixing[:, :1, : size // 2]
    return mixing @ mixing.mT / (3 * size)


def whole(blocks: Tensor) -> Tensor:
    """The damped output factor (O, O) in float64, as the docstrings say it."""
    factor = torch.block_diag(*blocks.double())
    return factor + OUTPUT_DAMP * factor.diagonal().mean() * torch.eye(len(factor), dtype=torch.float64)


def solve(case: Problem, output_fisher: Tensor, target: Target | Pattern) -> CompressedLinear:
    target = target if isinstance(target, Target) else Target(target)
    return kfac(case.weight, replace(case.stats, output_fisher=output_fisher), target, SolverOptions(), "q")


def model_loss(difference: Tensor, outputs: Tensor, gram: Tensor) -> float:
    """tr(S E H E^T)."""
    error = difference.double()
    return float((outputs @ error @ gram.double() * error).sum())


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_the_form_is_the_kronecker_product(num_blocks):
    """Oracle: the dense matrix S x H of 12 * 8 weights."""
    case, blocks = problem(0, 12, 8), fisher(1, num_blocks, 12 // num_blocks)
    form = quadratic(case.weight, case.stats, blocks, 0.01, "q")
    dense = torch.kron(whole(blocks), damped(case.stats.gram, 0.01))
    scale = (dense.diagonal().sqrt()).view(12, 8)
    dense = dense / scale.flatten()[:, None] / scale.flatten()
    torch.testing.assert_close(form.target.double(), case.weight * scale, rtol=1e-4, atol=1e-5)
    values = torch.randn(12, 8, generator=torch.Generator().manual_seed(2))
    flat = values.double().flatten()
    torch.testing.assert_close(form.apply(values).double().flatten(), dense @ flat, rtol=1e-3, atol=1e-4)
    error = flat - form.target.double().flatten()
    assert form.loss(values) == pytest.approx(float(error @ dense @ error), rel=1e-4)
    torch.testing.assert_close(form.weight(form.target), case.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_blocks", [1, 3])
@pytest.mark.parametrize("rho", [0.1, 1.0])
def test_steps_descend_to_the_exact_solution(num_blocks, rho):
    """Oracle: the dense (S x H + rho)^-1 in float64, and its quadratic function, which no step may raise."""
    case, blocks = problem(0, 12, 8), fisher(1, num_blocks, 12 // num_blocks)
    form = quadratic(case.weight, case.stats, blocks, 0.01, "q")
    dense = torch.kron(whole(blocks), damped(case.stats.gram, 0.01))
    scale = dense.diagonal().sqrt()
    dense = dense / scale[:, None] / scale + rho * torch.eye(96, dtype=torch.float64)
    values = torch.randn(12, 8, generator=torch.Generator().manual_seed(2))
    exact = torch.linalg.solve(dense, values.double().flatten())

    def excess(found: Tensor) -> float:
        error = found.double().flatten() - exact
        return float(error @ dense @ error)

    step = inner(form, form.apply(form.target))
    excesses = [excess(form.target), *(excess(step(values, rho)) for _ in range(60))]
    rounding = 1e-8 * excesses[0]
    assert all(later <= former + rounding for former, later in pairwise(excesses))
    assert excesses[1] < 0.5 * excesses[0]  # one step is most of the way
    torch.testing.assert_close(step(values, rho).double().flatten(), exact, rtol=1e-3, atol=1e-3)


def test_a_step_moves_with_what_changes():
    """Oracle: the dense solution of the last right side. What came before is no more than a start."""
    case, blocks = problem(1, 12, 8), fisher(2, 3, 4)
    form = quadratic(case.weight, case.stats, blocks, 0.01, "q")
    dense = torch.kron(whole(blocks), damped(case.stats.gram, 0.01))
    scale = dense.diagonal().sqrt()
    dense = dense / scale[:, None] / scale
    step, generator = inner(form, form.apply(form.target)), torch.Generator().manual_seed(3)
    for rho in (0.1, 0.3, 0.9):
        values = torch.randn(12, 8, generator=generator)
        for _ in range(60):
            found = step(values, rho)
        exact = torch.linalg.solve(dense + rho * torch.eye(96, dtype=torch.float64), values.double().flatten())
        torch.testing.assert_close(found.double().flatten(), exact, rtol=1e-3, atol=1e-3)


def test_steps_know_what_they_did():
    """Oracle: S X G of the X returned, in float64, after many steps on a Gram of strongly correlated inputs."""
    blocks = fisher(2, 2, 32)
    generator = torch.Generator().manual_seed(4)
    common = 5 * torch.randn(4096, 1, generator=generator)
    inputs = common + torch.randn(4096, 256, generator=generator)
    stats = GramStats(inputs.T @ inputs, len(inputs))
    form = quadratic(torch.randn(64, 256, generator=generator), stats, blocks, 0.01, "q")
    assert float(torch.linalg.eigvalsh(form.inputs.gram)[-1]) > 200
    wanted = form.apply(form.target)
    step = Steps(form, wanted)
    for number in range(60):
        found = step(wanted * torch.rand(64, 256, generator=generator), 0.1 * 1.05**number)
    outputs = torch.block_diag(*form.outputs.double())
    exact = outputs @ found.double() @ form.inputs.gram.double()
    recorded = torch.block_diag(*step.vectors.double()) @ step.image.double()
    assert float((recorded - exact).norm() / exact.norm()) < 1e-3


@pytest.mark.parametrize("kept", [0.2, 0.9])
def test_conjugate_gradients_know_their_loss(kept):
    """Oracle: tr(S E H E^T) of what they found, by products."""
    case, blocks = problem(3, 16, 32), fisher(4, 2, 8)
    for form in (quadratic(case.weight, case.stats, outputs, 0.01, "q") for outputs in (blocks, None)):
        mask = torch.rand(16, 32, generator=torch.Generator().manual_seed(5)) < kept
        values, loss = refine(form, mask, form.target * mask, 3)
        assert float(loss) == pytest.approx(form.loss(values), rel=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("seed", [0, 1])
def test_one_step_finds_a_support_as_good_as_the_exact_solution(pattern, seed, monkeypatch):
    """Oracle: the same search with the dense (S x H + rho)^-1 in float64 in place of every step."""
    case, blocks = problem(seed, 16, 32), fisher(seed, 2, 8)
    outputs, gram = whole(blocks), damped(case.stats.gram, 0.01)
    dense = torch.kron(outputs, gram)
    scale = dense.diagonal().sqrt()
    values, vectors = torch.linalg.eigh(dense / scale[:, None] / scale)

    def exact(*_: object) -> Callable[[Tensor, float], Tensor]:
        def solved(wanted: Tensor, rho: float) -> Tensor:
            return (vectors @ (vectors.T @ wanted.double().flatten() / (values + rho))).float().view_as(wanted)

        return solved

    by_steps = solve(case, blocks, pattern)
    monkeypatch.setattr(importlib.import_module("mspc.solvers.admm"), "inner", exact)
    by_solutions = solve(case, blocks, pattern)
    of_steps, of_solutions = (
        model_loss(found.weight - case.weight, outputs, gram) for found in (by_steps, by_solutions)
    )
    assert of_steps < 1.05 * of_solutions


def test_one_factor_of_the_gram_serves_all(monkeypatch):
    """By counting: matrices with one input, every rho and every pattern factor their Gram once, and by Cholesky.

    LAPACK has no eigenvectors of a matrix of more than 32,766 columns, so only output factors may be decomposed.
    """
    case = problem(0, 16, 32)
    factored, decomposed = list[torch.Size](), list[torch.Size]()
    cholesky, eigh = torch.linalg.cholesky_ex, torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda a: factored.append(a.shape) or cholesky(a))
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: decomposed.append(a.shape) or eigh(a))
    for seed in range(3):
        solve(case, fisher(seed, 2, 8), Unstructured(0.5))
        stats = replace(case.stats, output_fisher=fisher(seed, 2, 8))
        form = quadratic(case.weight, stats, stats.output_fisher, 0.01, "q")
        list(error_path(form, [Unstructured(0.3), NM(2, 4)]))
    assert factored == [torch.Size([32, 32])]
    assert set(decomposed) == {torch.Size([2, 8, 8])}


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_loss_of_the_model_is_less_than_with_alps(pattern, seed):
    case, blocks = problem(seed, 32, 64), fisher(seed, 2, 16)
    found = solve(case, blocks, pattern)
    plain = admm(case.weight, case.stats, Target(pattern), SolverOptions(), "q")
    outputs, gram = whole(blocks), damped(case.stats.gram, 0.01)
    assert model_loss(found.weight - case.weight, outputs, gram) < 0.97 * model_loss(
        plain.weight - case.weight, outputs, gram
    )
    assert int((~found.mask).sum()) == round(pattern.sparsity * case.weight.numel())
    assert not found.weight[~found.mask].any()


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_weights_are_nearly_the_best_on_their_support(pattern):
    """Oracle: the normal equations of the dense Kronecker product."""
    case, blocks = problem(3, 8, 16), fisher(4, 2, 4)
    found = solve(case, blocks, pattern)
    dense = torch.kron(whole(blocks), damped(case.stats.gram, 0.01))
    kept, weight = found.mask.flatten(), case.weight.double().flatten()
    best = torch.zeros_like(weight)
    best[kept] = torch.linalg.solve(dense[kept][:, kept], dense[kept] @ weight)

    def of(values: Tensor) -> float:
        return float((values - weight) @ dense @ (values - weight))

    assert of(best) <= of(found.weight.double().flatten()) <= 1.05 * of(best)


def test_near_the_best_of_all_supports():
    """Oracle: the best weights on each of the 924 supports of a matrix of 3 x 4."""
    ranks = []
    for seed in range(6):
        case, blocks = problem(seed, 3, 4), fisher(seed, 1, 3)
        dense = torch.kron(whole(blocks), damped(case.stats.gram, 0.01))
        weight, losses = case.weight.double().flatten(), []
        for kept in combinations(range(12), 6):
            places = list(kept)
            gone = torch.tensor([i for i in range(12) if i not in kept])
            # What is left of the loss when the kept weights are the best: the Schur complement of their part.
            inside = dense[places][:, places]
            cross = dense[gone][:, places]
            rest = dense[gone][:, gone] - cross @ torch.linalg.solve(inside, cross.T)
            losses.append(float(weight[gone] @ rest @ weight[gone]))
        found = solve(case, blocks, Unstructured(0.5))
        error = found.weight.double().flatten() - weight
        ranks.append(sum(other * 1.02 < float(error @ dense @ error) for other in losses))
    assert sorted(ranks)[3] <= 5
    assert max(ranks) <= 60


def test_equal_and_independent_outputs_are_alps():
    """Oracle: `admm`, which has S = 1, and solves every iteration exactly."""
    case = problem(5, 16, 32)
    for pattern in PATTERNS:
        found = solve(case, torch.eye(8).expand(2, 8, 8), pattern)
        plain = admm(case.weight, case.stats, Target(pattern), SolverOptions(), "q")
        assert float((found.mask == plain.mask).float().mean()) > 0.95
        gram = damped(case.stats.gram, 0.01)
        assert loss(found.weight - case.weight, gram) == pytest.approx(loss(plain.weight - case.weight, gram), rel=0.05)


def test_a_matrix_that_nothing_depends_on():
    case = problem(6, 16, 32)
    found = solve(case, torch.zeros(2, 8, 8), NM(2, 4))
    assert bool(found.weight.isfinite().all())
    assert (found.mask.view(16, 8, 4).sum(-1) == 2).all()


def test_outputs_that_do_not_matter_go_first():
    case, blocks = problem(7, 16, 32), torch.eye(16)[None].clone()
    blocks[0, :8] *= 1e-8
    found = solve(case, blocks, Unstructured(0.5))
    pruned = (~found.mask).sum(1)
    assert int(pruned[:8].sum()) > 1.5 * int(pruned[8:].sum())


def test_rounding_obeys_the_support():
    case = problem(8, 16, 64)
    found = solve(case, fisher(8, 1, 16), Target(Unstructured(0.5), Grid(4, 32)))
    assert torch.equal(found.mask, solve(case, fisher(8, 1, 16), Unstructured(0.5)).mask)
    assert torch.equal(found.weight.double(), code_product(found.codes))


def test_without_a_fisher_factor_it_says_so():
    case = problem(9, 8, 16)
    with pytest.raises(InputError, match=r"q_proj: the kfac solver needs the Fisher factor"):
        kfac(case.weight, case.stats, Target(NM(2, 4)), SolverOptions(), "q_proj")


@pytest.mark.parametrize("kind", ["unstructured", "n:m"])
def test_the_path_gives_its_own_losses_and_they_rise(kind):
    """Oracle: the form in float64. The solver at the end of the path may be better, but not by much."""
    case, blocks = problem(10, 32, 64), fisher(10, 2, 16)
    patterns = (
        [Unstructured(s) for s in (0.2, 0.5, 0.8, 1.0)] if kind == "unstructured" else [NM(k, 16) for k in (12, 8, 3)]
    )
    stats = replace(case.stats, output_fisher=blocks)
    outputs, gram = whole(blocks), damped(case.stats.gram, 0.01)
    losses, form = [], quadratic(case.weight, stats, blocks, 0.01, "q")
    for pattern, (weight, of_path) in zip(patterns, error_path(form, patterns), strict=True):
        assert float((weight == 0).float().mean()) == pytest.approx(pattern.sparsity, abs=1e-3)
        assert of_path == pytest.approx(model_loss(weight - case.weight, outputs, gram), rel=1e-3)
        solved = solve(case, blocks, pattern).weight
        assert of_path < 2 * model_loss(solved - case.weight, outputs, gram)
        losses.append(of_path)
    assert losses == sorted(losses)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_compensation_is_the_least_squares_answer_to_the_dense_outputs(share):
    """Oracle: float64 least squares of W Z on X, with the damping on the difference."""
    case = problem(11, 12, 24)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(case.inputs.shape, generator=generator) * case.inputs.std(1, keepdim=True)
    dense_inputs = case.inputs + 0.3 * noise
    shift = (dense_inputs - case.inputs) @ case.inputs.T
    stats = GramStats(case.stats.gram, case.stats.num_tokens, shift)
    x, z, w = case.inputs.double(), dense_inputs.double(), case.weight.double()
    step = w @ (z - x) @ x.T @ torch.linalg.inv(damped(case.stats.gram, 1e-6))
    found, damp = compensated(case.weight, stats, share, 1e-6, "q")
    assert damp == 1e-6
    torch.testing.assert_close(found.double(), w + share * step, rtol=1e-2, atol=1e-3)
    if share == 1:
        exact = torch.linalg.lstsq(x.T, (w @ z).T).solution.T
        least, reached = ((w @ z - solution @ x).square().sum() for solution in (exact, found.double()))
        assert float(least) <= float(reached) < 1.01 * float(least)
        assert float(reached) < 0.9 * float((w @ z - w @ x).square().sum())


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(5, 16), Unstructured(0.5)], ids=repr)
def test_a_weight_that_is_stored_transposed_is_solved_alike(pattern):
    """Oracle: the same weight in rows; GPT-2 stores (I, O)."""
    case = problem(14, 16, 32)
    view = replace(case, weight=case.weight.T.contiguous().T)
    found, expected = (solve(of, fisher(0, 1, 16), pattern) for of in (view, case))
    assert torch.equal(found.mask, expected.mask)
    torch.testing.assert_close(found.weight, expected.weight)
