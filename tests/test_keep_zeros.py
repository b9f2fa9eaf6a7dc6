"""`--keep-zeros`: the zeros of a checkpoint are its masks. Patterns and masks against counting, runs against files."""

import json
import logging
from dataclasses import replace
from itertools import product

import oracles
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import mspc
from mspc.numerics.linalg import output_error
from mspc.numerics.quant import dequantize
from mspc.numerics.zeros import mask_of, recognized
from mspc.solvers import SOLVERS, SolverOptions
from mspc.storage.artifact import read_matrix
from mspc.storage.manifest import MatrixEntry
from mspc.types import NM, Grid, Target, Unstructured

MASKED = {"q_proj": NM(2, 4), "k_proj": NM(4, 8), "v_proj": NM(5, 16), "o_proj": 0.625, "gate_proj": 0.005}
"""Zeros of the matrices of each block, at random places; the others have none."""


def random_mask(shape, pattern, seed=0):
    """Bool, True = kept: N of M at random, or a share of zeros, exact."""
    score = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    if isinstance(pattern, NM):
        rank = score.view(len(score), -1, pattern.of).argsort(2).argsort(2)
        return (rank < pattern.keep).view(shape)
    return (score.flatten().argsort().argsort() >= round(score.numel() * pattern)).view(shape)


def counts(mask, of):
    """The set of the numbers of kept weights of a group, counted one by one."""
    return {sum(row[start : start + of]) for row in mask.tolist() for start in range(0, len(row), of)}


@pytest.mark.parametrize(
    "pattern", [NM(2, 4), NM(1, 4), NM(3, 4), NM(4, 8), NM(3, 8), NM(8, 16), NM(5, 16), NM(13, 16)], ids=str
)
@pytest.mark.parametrize("accidental", [0.0, 0.1])
def test_patterns_are_recognized(pattern, accidental):
    """With kept weights that are zero, too: a tenth of them, as after rounding to few bits."""
    nonzero = random_mask((96, 64), pattern) & random_mask((96, 64), accidental, seed=1)
    assert recognized(nonzero) == pattern


@pytest.mark.parametrize(
    ("shape", "sparsity"), list(product([(8, 16), (48, 64), (40, 36)], [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98]))
)
def test_zeros_at_random_places_are_in_no_pattern(shape, sparsity):
    """At 98% no group of 4 has more than 2 nonzero weights, which is chance."""
    for seed in range(5):
        assert recognized(random_mask(shape, sparsity, seed)) is None


def test_some_masks_are_in_no_pattern():
    rows = torch.arange(32)[:, None].expand(32, 32)
    assert recognized(rows % 2 == 0) is None  # whole rows
    assert recognized(torch.ones(32, 32, dtype=torch.bool)) is None
    assert recognized(torch.zeros(32, 32, dtype=torch.bool)) is None
    assert recognized(random_mask((32, 48), NM(3, 12))) is None  # not one of those that are tried


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_hold_every_nonzero_weight(dtype):
    """Oracle: the weights that are not zero; where a pattern keeps more, counts of every group."""
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[~random_mask((24, 32), 0.4)] = 0
    zeros = int((weight == 0).sum())
    assert torch.equal(mask_of(weight, Unstructured(zeros / weight.numel())), weight != 0)
    weight = torch.where(random_mask((24, 32), NM(2, 4)), torch.ones(24, 32).to(dtype), -0.0)
    weight[3] = 0
    mask = mask_of(weight, NM(2, 4))
    assert counts(mask, 4) == {2}
    assert not bool((weight != 0)[~mask].any())


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(5, 16), Unstructured(0.625)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_obey_a_given_mask(solver, pattern):
    """Weights outside are zero although the wanted ones are not; the error is at most that of plain rounding."""
    case = oracles.problem(3)
    stats = replace(case.stats, output_fisher=torch.eye(24)[None])
    mask = random_mask(case.weight.shape, pattern if isinstance(pattern, NM) else pattern.sparsity)
    for grid in (Grid(4, 16), Grid(3, 16, symmetric=False)):
        target, options = Target(pattern, grid), SolverOptions()
        found = SOLVERS[solver](case.weight, stats, target, options, "q", mask)
        assert torch.equal(found.mask, mask)
        assert not bool(found.weight[~mask].any())
        assert torch.equal(found.weight, dequantize(found.codes))
        assert bool((found.codes.values == found.codes.zeros.repeat_interleave(16, 1))[~mask].all())
        plain = SOLVERS["mask"](case.weight, case.stats, target, options, "q", mask)
        errors = [output_error(case.weight, one.weight, case.stats.gram) for one in (found, plain)]
        assert errors[0] <= errors[1] * (1 if solver == "mask" else 0.9)


@pytest.mark.parametrize("solver", ["admm", "kfac"])
def test_kept_weights_are_the_best_on_a_given_mask(solver):
    """Oracle: the normal equations of every row, which conjugate gradients come near."""
    case = oracles.problem(4)
    mask = random_mask(case.weight.shape, NM(2, 4))
    found = SOLVERS[solver](case.weight, case.stats, Target(NM(2, 4)), SolverOptions(), "q", mask)
    best = oracles.least_squares(case.weight, mask, oracles.damped(case.stats.gram, 0.01))
    losses = [oracles.loss(case.weight - w, case.stats.gram) for w in (found.weight, best, case.weight * mask)]
    assert losses[0] < 1.02 * losses[1]
    assert losses[0] < 0.6 * losses[2]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A tiny llama in bfloat16 with the zeros of `MASKED`. In each 2:4 matrix, one kept weight is zero too."""
    folder = tiny.build(tmp_path_factory.mktemp("pruned") / "model", "llama", dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        if pattern := MASKED.get(name.split(".")[-2]):
            weight[~random_mask(weight.shape, pattern, seed=len(name))] = 0
        if "q_proj" in name:
            weight[0, int(weight[0].nonzero()[0])] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def matrices(artifact):
    """`(last part of the name, entry, matrix)` of each."""
    rows = json.loads((artifact.path / "mspc.json").read_text())["matrices"]
    entries = [MatrixEntry.from_row(row, "") for row in rows]
    return [(entry.name.split(".")[-1], entry, read_matrix(artifact.path, entry)) for entry in entries]


def compress(model, out, calibration, **recipe):
    return tiny.compress(model, out, calibration, keep_zeros=True, **recipe)


def test_without_bits_a_model_is_stored_as_it_is(pruned, calibration, tmp_path, caplog):
    """Oracle: the files. The mask is what is not zero, each matrix in its own pattern; no gradient is measured."""
    with caplog.at_level(logging.INFO, "mspc"):
        artifact = compress(pruned, tmp_path / "out", calibration)
    source = load_file(pruned / "model.safetensors")
    for leaf, entry, matrix in matrices(artifact):
        weight = source[entry.source_key]
        assert torch.equal(matrix.weight, weight)
        assert entry.output_error == 0
        if isinstance(pattern := MASKED.get(leaf), NM):
            assert entry.target == Target(pattern)
            assert counts(matrix.mask, pattern.of) == {pattern.keep}
        elif leaf == "o_proj":
            assert entry.target == Target(Unstructured(0.625))
            assert torch.equal(matrix.mask, weight != 0)
        else:
            assert entry.target == Target(Unstructured(0.0))
    manifest = artifact.manifest
    assert "Measuring gradients" not in manifest["seconds_by_stage"]
    assert manifest["sparsity"]["achieved"] == manifest["sparsity"]["requested"] > 0
    said = caplog.text
    assert "Masks: 2 2:4, 2 4:8, 2 5:16, 2 unstructured." in said
    assert "2 matrices, such as model.layers.0.mlp.gate_proj, have less than 1% zeros and get no mask. Their 20" in said
    assert "2 weights that the patterns keep are zero by accident" in said
    exported = artifact.export("dense", tmp_path / "dense", progress=False, verify=False)
    assert all(torch.equal(tensor, source[name]) for name, tensor in tiny.tensors(exported).items())


@pytest.mark.parametrize("effort", ["fast", "default"])
def test_with_bits_zeros_stay_zero(effort, pruned, calibration, tmp_path):
    """Oracle: the zeros of the files; of accidental zeros, only those that their pattern does not keep."""
    artifact = compress(pruned, tmp_path / "out", calibration, bits=3, group_size=16, effort=effort)
    source = load_file(pruned / "model.safetensors")
    for leaf, entry, matrix in matrices(artifact):
        weight = source[entry.source_key]
        assert entry.target.grid == Grid(3, 16)
        if leaf in ("k_proj", "v_proj", "o_proj"):
            assert torch.equal(matrix.mask, weight != 0)
        elif leaf == "q_proj":
            assert int((matrix.mask != (weight != 0)).sum()) == 1
        else:
            assert bool(matrix.mask.all())
        assert not bool(matrix.weight[~matrix.mask].any())
        assert entry.output_error > 0


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("llama", {"pattern": "N:16", "sparsity": 0.6}),
        ("llama", {"sparsity": 0.5}),
        ("gpt2", {"pattern": "2:4"}),  # stored transposed
        ("gpt2", {"sparsity": 0.5}),
    ],
    ids=str,
)
def test_a_dense_export_comes_back(family, recipe, artifact_of, calibration, tmp_path):
    """Oracle: the artifact that was exported. Its tensors come back byte for byte."""
    first = artifact_of(family, bits=16, **recipe)
    exported = first.export("dense", tmp_path / "dense", progress=False, verify=False)
    again = compress(exported, tmp_path / "again", calibration)
    files = [sorted((one.path / "matrices").glob("*")) for one in (first, again)]
    assert len(files[0]) == 2
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]


def test_patterns_of_rounded_weights_come_back(artifact_of, calibration, tmp_path):
    """A dense export of 4-bit codes, where some kept weights are zero."""
    first = artifact_of("llama", pattern="2:4")
    exported = first.export("dense", tmp_path / "dense", progress=False, verify=False)
    again = compress(exported, tmp_path / "again", calibration, bits=4, group_size=32)
    assert any(row["zeros"] > row["pruned"] for row in first.manifest["matrices"])
    for one, other in zip(first.manifest["matrices"], again.manifest["matrices"], strict=True):
        assert all(one[key] == other[key] for key in ("pattern", "bits", "pruned"))


def test_what_is_asked_may_say_the_same(artifact_of, calibration, tmp_path):
    exported = artifact_of("llama", bits=16, pattern="2:4").export(
        "dense", tmp_path / "dense", progress=False, verify=False
    )
    same = [compress(exported, tmp_path / str(i), calibration, **more) for i, more in enumerate(
        [{}, {"pattern": "2:4"}, {"sparsity": 0.5}, {"pattern": "2:4", "sparsity": 0.5}]
    )]  # fmt: skip
    assert len({json.dumps(artifact.manifest["files"]) for artifact in same}) == 1


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"sparsity": 0.5}, r"sparsity 0\.5 was asked for, but keep_zeros finds 0\.\d{4} in the checkpoint"),
        ({"pattern": "2:4"}, r"layers\.0\.self_attn\.k_proj: pattern 2:4 was asked for, but its zeros \(50\.00% of"),
        ({"pattern": "N:16"}, r"layers\.0\.self_attn\..*_proj: pattern N:16 was asked for, but its zeros"),
        ({"only": ("up_proj", "gate_proj")}, "no matrix of the checkpoint has 1% zeros"),
    ],
)  # fmt: skip
def test_what_contradicts_the_zeros_is_refused(recipe, message, pruned, calibration, tmp_path):
    with pytest.raises(mspc.InputError, match=message):
        compress(pruned, tmp_path / "out", calibration, **recipe)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_cut_off_goes_on(pruned, calibration, tmp_path):
    """Oracle: the run that was not."""
    whole = compress(pruned, tmp_path / "whole", calibration, bits=4, group_size=16)
    recipe = mspc.Recipe(**whole.manifest["recipe"])
    assert recipe.keep_zeros
    options = {"out": tmp_path / "cut", "progress": lambda event: event.matrix != "model.layers.0.mlp.down_proj"}
    with pytest.raises(mspc.Stopped):
        mspc.compress(pruned, recipe, **options)
    again = mspc.compress(pruned, replace(recipe), **options | {"progress": False, "resume": True})
    assert again.manifest["files"] == whole.manifest["files"]


@pytest.mark.parametrize("solver", ["kfac", "obs", "mask"])
def test_matrices_that_are_stored_transposed_are_rounded_on_their_zeros(solver, artifact_of, calibration, tmp_path):
    """Oracle: the masks of the artifact that was exported; no kept weight of it is zero."""
    first = artifact_of("gpt2", bits=16, pattern="2:4")
    exported = first.export("dense", tmp_path / "dense", progress=False, verify=False)
    again = compress(exported, tmp_path / "again", calibration, bits=4, group_size=32, solver=solver)
    for (_, _, one), (_, entry, other) in zip(matrices(first), matrices(again), strict=True):
        assert entry.target == Target(NM(2, 4), Grid(4, 32))
        assert torch.equal(one.mask, other.mask)
        assert not bool(other.weight[~other.mask].any())
