"""Matrices that are rounded as one batch, such as experts: each has the bytes that it has alone.

Oracle: the solver of one matrix, whose own oracles are in test_admm.py, test_kfac.py and test_two_sided.py.
"""

from dataclasses import replace

import pytest
import torch
from oracles import problem
from test_kfac import fisher

from mspc.errors import InputError
from mspc.solvers import SOLVERS, STEPS, SolverOptions, rounding
from mspc.solvers.rounding import together
from mspc.types import NM, GramStats, Grid, Target, Unstructured

EXPERTS = 5
TARGETS = [
    Target(Unstructured(0.5), Grid(4, 32)),
    Target(Unstructured(0.3), Grid(3, 32, symmetric=False)),
    Target(NM(2, 4), Grid(4, 32)),
    Target(Unstructured(0.0), Grid(2, 16)),
    Target(Unstructured(0.5)),
]


def experts(rows, columns, zero_inputs=True):
    """Weights and statistics of experts of one shape; one of them has inputs that are always zero."""
    cases = []
    for seed in range(EXPERTS):
        case = problem(seed, rows, columns)
        gram = case.stats.gram.clone()
        if seed == 1 and zero_inputs:
            gram[3], gram[:, 3] = 0.0, 0.0
        cases.append((case.weight, replace(case.stats, gram=gram, output_fisher=fisher(seed, 2, rows // 2))))
    return cases


def solved(solver, cases, targets, options):
    """The results of all cases together, and of each alone, with statistics of its own."""

    def arguments():
        for number, ((weight, stats), target) in enumerate(zip(cases, targets, strict=True)):
            own = GramStats(stats.gram, stats.num_tokens, output_fisher=stats.output_fisher)
            yield weight, own, target, options, f"expert {number}"

    alone = [SOLVERS[solver](*some) for some in arguments()]
    return together([STEPS[solver](*some) for some in arguments()]), alone


def check_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.mask, other.mask)
        assert (one.target, one.damp, one.precision) == (other.target, other.damp, other.precision)
        assert (one.codes is None) == (other.codes is None)
        if one.codes is not None and other.codes is not None:
            for name in ("values", "scales", "zeros"):
                assert torch.equal(getattr(one.codes, name), getattr(other.codes, name))


@pytest.fixture
def batches(monkeypatch):
    """The numbers of matrices that are rounded as one batch."""
    sizes, own = [], rounding.sweep_together

    def counted(weights, *more):
        sizes.append(len(weights))
        return own(weights, *more)

    monkeypatch.setattr(rounding, "sweep_together", counted)
    return sizes


@pytest.mark.parametrize("solver", STEPS)
@pytest.mark.parametrize("target", TARGETS, ids=repr)
@pytest.mark.parametrize("shape", [(64, 64), (192, 192), (512, 32), (40, 160), (6, 32)], ids=repr)
def test_a_batch_has_the_bytes_of_each_matrix_alone(solver, target, shape, batches):
    found, alone = solved(solver, experts(*shape), [target] * EXPERTS, SolverOptions())
    check_equal(found, alone)
    parts = min(8, shape[0] // 2) if solver == "kfac" else 1
    together = target.grid is not None and shape[0] % parts == 0 and shape[0] // parts % 64 == 0
    assert batches == [EXPERTS] * (parts if together else 0)


def test_other_bits_patterns_and_lengths_are_batches_of_their_own(batches):
    """Experts of a plan differ in sparsity, which does not matter, and in bits, which does."""
    targets = [Target(Unstructured(0.1 * number), Grid(bits, 32)) for number, bits in enumerate((4, 4, 3, 4, 4))]
    found, alone = solved("fisher", experts(64, 64), targets, SolverOptions())
    check_equal(found, alone)
    assert batches == [4]


@pytest.mark.parametrize(
    ("target", "options"),
    [
        (
            Target(Unstructured(0.5), Grid(4, 96)),
            SolverOptions(),
        ),  # longer than what a sweep settles at once
        (Target(Unstructured(0.5), Grid(4, 32)), SolverOptions(activation_order=True)),
    ],
    ids=["straddles", "activation order"],
)
def test_groups_that_are_fitted_before_a_sweep_are_rounded_alone(target, options, batches):
    found, alone = solved("fisher", experts(64, 192), [target] * EXPERTS, options)
    check_equal(found, alone)
    assert batches == []


def test_an_error_names_its_matrix():
    """Oracle: the error of one matrix alone."""
    cases = experts(16, 64)
    targets = [*[TARGETS[0]] * 3, Target(Unstructured(0.5), Grid(4, 48)), TARGETS[0]]
    with pytest.raises(InputError, match="expert 3: group size 48 does not divide its 64 in features"):
        solved("admm", cases, targets, SolverOptions())
