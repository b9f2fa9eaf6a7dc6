"""The reverse walk against autograd on the whole transformers model: gradients, Hessian products, and their mean."""

import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

from mspc import threads
from mspc.errors import ActivationError, InputError
from mspc.model.open import open_model
from mspc.model.streamed import StreamedModel
from mspc.passes.gradients import (
    TYPICAL,
    Measure,
    OutputFisher,
    SquaredGradient,
    _second_moment,
    _typical,
    fisher_block_size,
    reverse_walk,
)
from mspc.published.hutchinson import HessianTrace
from mspc.types import Matrix

CPU = torch.device("cpu")


@dataclass
class Case:
    """A model walked through block by block, and the same one whole, both in one precision and eager attention."""

    model: StreamedModel
    matrices: list[list[Matrix]]
    whole: PreTrainedModel

    def __post_init__(self) -> None:
        """`weights` are the parameters of all matrices in the whole model."""
        self.weights = [self.whole.get_parameter(matrix.parameter).requires_grad_(True) for matrix in self.flat]

    @property
    def flat(self) -> list[Matrix]:
        return [matrix for of_block in self.matrices for matrix in of_block]

    def samples(self, ids: Tensor, measure: Measure, first: int = 0) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {matrix.name: [] for matrix in self.flat}
        for sample in reverse_walk(self.model, ids, self.matrices, measure, first):
            found[sample.matrix.name].append(float(sample.value))
        return found


def opened(folder: Path, dtype: str = "float32", skip: tuple[str, ...] = ("experts",)) -> Case:
    model = open_model(folder, device=CPU, dtype=dtype, eager=True)
    return Case(model, model.matrices(skip), tiny.reference(folder, getattr(torch, dtype)))


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "mixtral"])
def test_fisher_factor_equals_autograd(family, folder_of):
    """Oracle: gradients at the outputs of each module of the whole model, by autograd, in float64.

    The first token of a sequence does not count, and the longest fifth of the gradients is shortened.
    """
    case, ids = opened(folder_of(family)), tiny.ids(2)
    outputs: dict[str, Tensor] = {}
    handles = [
        case.whole.get_submodule(matrix.name).register_forward_hook(
            lambda _, args, output, name=matrix.name: outputs.__setitem__(name, output)
        )
        for matrix in case.flat
    ]
    loss = tiny.losses(case.whole, ids).sum()
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(loss, [outputs[matrix.name] for matrix in case.flat])
    measure = OutputFisher()
    found = {sample.matrix.name: sample.value for sample in reverse_walk(case.model, ids, case.matrices, measure)}
    for matrix, gradient in zip(case.flat, gradients, strict=True):
        g = gradient[:, 1:].flatten(0, -2).double()
        norms = g.square().sum(1).sqrt()
        some = sorted(norms[norms > 0].tolist())
        longest = some[round(TYPICAL * len(some)) - 1]
        shortened = g * (longest / norms).clamp(max=1)[:, None]
        expected = shortened.T @ shortened / len(g) * norms.square().sum() / shortened.square().sum()
        size, blocks = fisher_block_size(matrix.shape[0]), found[matrix.name]
        assert blocks.shape == (matrix.shape[0] // size, size, size)
        for k, block in enumerate(blocks):
            part = slice(k * size, (k + 1) * size)
            tolerance = 1e-5 * float(expected.diagonal().max())
            torch.testing.assert_close(block.double(), expected[part, part], rtol=1e-3, atol=tolerance)


def test_fisher_factors_do_not_vanish_in_float16(llama):
    """Oracle: float32; the gradient of a mean over thousands of tokens would be below what float16 has."""
    ids = tiny.ids(16)
    found = {}
    for dtype in ("float16", "float32"):
        model = open_model(llama, device=torch.device("cpu"), dtype=dtype)
        matrices = model.matrices(())
        for sample in reverse_walk(model, ids, matrices, OutputFisher()):
            found.setdefault(sample.matrix.name, []).append(float(sample.value.diagonal(dim1=-2, dim2=-1).sum()))
    for half, full in found.values():
        assert half == pytest.approx(full, rel=0.03)


@pytest.mark.parametrize(("outputs", "size"), [(1, 1), (256, 256), (896, 224), (257, 1), (14336, 256), (48, 48)])
def test_fisher_blocks_divide_the_outputs(outputs, size):
    assert fisher_block_size(outputs) == size


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "mixtral"])
def test_squared_gradient_equals_autograd(family, folder_of):
    """Oracle: autograd on the whole model, one sequence at a time."""
    case, ids = opened(folder_of(family)), tiny.ids(2)
    samples = case.samples(ids, SquaredGradient())
    for i, sequence in enumerate(ids):
        gradients = torch.autograd.grad(tiny.losses(case.whole, sequence[None]).mean(), case.weights)
        for matrix, gradient in zip(case.flat, gradients, strict=True):
            expected = float(gradient.double().square().mean())
            assert samples[matrix.name][i] == pytest.approx(expected, rel=1e-4), matrix.name


def hessian_products(case: Case, sequence: Tensor, directions: list[Tensor]) -> tuple[Tensor, ...]:
    """H z for all matrices at once, by differentiating the gradient's product with z."""
    gradients = torch.autograd.grad(tiny.losses(case.whole, sequence[None]).mean(), case.weights, create_graph=True)
    along = sum((gradient * z).sum() for gradient, z in zip(gradients, directions, strict=True))
    return torch.autograd.grad(along, case.weights)


class Recording(HessianTrace):
    """Notes the signs that it draws: one tensor per matrix, in the order of the calls."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.drawn: list[dict[str, Tensor]] = []

    def signs(self, run):
        signs = super().signs(run)
        self.drawn.append(signs)
        return signs


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "mixtral"])
def test_hessian_sample_equals_double_backward(family, folder_of):
    """Oracle: z * (H z) by double backward through the whole model, with the signs that the walk drew."""
    case, ids = opened(folder_of(family), "float64"), tiny.ids(1)
    measure = Recording(seed=3)
    samples = case.samples(ids, measure)
    forward, backward = measure.drawn[: len(case.matrices)], measure.drawn[len(case.matrices) :]
    assert all(
        torch.equal(again[name], z)
        for first, again in zip(forward, reversed(backward), strict=True)
        for name, z in first.items()
    )
    signs = {
        matrix.name: forward[index][matrix.parameter.removeprefix(case.model.block_name(index) + ".")]
        for index, of_block in enumerate(case.matrices)
        for matrix in of_block
    }
    assert all(bool((z.abs() == 1).all()) for z in signs.values())
    drawn = [z.flatten()[:128].tolist() for z in signs.values()]
    assert len(set(map(tuple, drawn))) == len(drawn)  # signs that matrices or blocks share would not average out
    products = hessian_products(case, ids[0], list(signs.values()))
    scale = max(float((z * product).mean().abs()) for z, product in zip(signs.values(), products, strict=True))
    for matrix, product in zip(case.flat, products, strict=True):
        expected = float((signs[matrix.name] * product).mean())
        assert samples[matrix.name] == [pytest.approx(expected, rel=1e-4, abs=1e-6 * scale)], matrix.name


@pytest.mark.parametrize("measure", [SquaredGradient(), HessianTrace(seed=1)], ids=["gradient", "hessian"])
def test_rounds_do_not_change_the_samples(measure, llama):
    """Oracle: all sequences in one round."""
    case, ids = opened(llama), tiny.ids(3)
    together = case.samples(ids, measure)
    first, rest = case.samples(ids[:1], measure), case.samples(ids[1:], measure, first=1)
    assert together == {name: first[name] + rest[name] for name in together}
    if isinstance(measure, HessianTrace):
        assert case.samples(ids[1:], measure) != rest  # the number of a sequence decides its signs


def test_batches_at_once_are_as_many_as_memory_allows(monkeypatch, llama):
    """With no free memory it is one, in every step of the walk."""
    working, most = [0], {"forward": 0, "head": 0, "backward": 0}

    def counted(name):
        def method(self, *args):
            working[0] += 1
            most[name] = max(most[name], working[0])
            time.sleep(0.02)
            found = getattr(OutputFisher, name)(self, *args)
            working[0] -= 1
            return found

        return method

    measure = type("Counted", (OutputFisher,), {name: counted(name) for name in most})()
    monkeypatch.setattr("mspc.passes.blocks.TOKENS_PER_BATCH", tiny.LENGTH)
    monkeypatch.setattr(threads, "free_memory", lambda _: 0)
    case = opened(llama)
    with threads.using(3, CPU):
        assert len(list(reverse_walk(case.model, tiny.ids(4), case.matrices, measure))) == 4 * len(case.flat)
    assert most == {"forward": 1, "head": 1, "backward": 1}


def test_seed_decides_the_signs(llama):
    case, ids = opened(llama), tiny.ids(1)
    assert case.samples(ids, HessianTrace(seed=1)) == case.samples(ids, HessianTrace(seed=1))
    assert case.samples(ids, HessianTrace(seed=1)) != case.samples(ids, HessianTrace(seed=2))


def test_fused_attention_gives_the_same_gradients(llama):
    """Oracle: eager attention."""
    model, eager, ids = open_model(llama, device=CPU), opened(llama), tiny.ids(1)
    assert model.model.config._attn_implementation == "sdpa"
    samples = Case(model, model.matrices(()), eager.whole).samples(ids, SquaredGradient())
    for name, values in eager.samples(ids, SquaredGradient()).items():
        assert samples[name] == pytest.approx(values, rel=1e-4), name


def test_blocks_are_on_meta_between_and_after(llama):
    """One block at most has weights at any time; the outer part has none while a block has."""
    case = opened(llama)
    for _ in reverse_walk(case.model, tiny.ids(1), case.matrices, HessianTrace(seed=0)):
        assert len(tiny.parts_in_memory(case.model)) == 1
    assert tiny.parts_in_memory(case.model) == []


def test_gradients_that_are_not_finite_are_an_error(tmp_path):
    """float16 ends at 65504: weights of a thousand make activations beyond it."""
    model = tiny.make("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1e4)
    case = opened(tiny.save(model.half(), tmp_path), "float16")
    with pytest.raises(ActivationError, match=r"model\.layers\.1\.\S+: its gradient contains NaN .* --dtype float32"):
        case.samples(tiny.ids(1), HessianTrace(seed=0))


class OldStyle(torch.autograd.Function):
    """A function with a derivative of its own that torch.func cannot use, such as Bloom's GELU."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_first_derivatives_pass_functions_of_the_old_style(llama, monkeypatch):
    """Oracle: the same model without the function, which changes nothing."""
    case, forward = opened(llama), LlamaMLP.forward
    expected = case.samples(tiny.ids(1), SquaredGradient())
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: OldStyle.apply(forward(self, x)))
    assert case.samples(tiny.ids(1), SquaredGradient()) == expected


def test_blocks_without_usable_derivatives_are_an_error(llama, monkeypatch):
    case, measure = opened(llama), HessianTrace(seed=0)
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: OldStyle.apply(forward(self, x)))
    with pytest.raises(
        InputError, match=r"model\.layers\.\d: its derivatives .* Runs without gradients: --solver admm with"
    ):
        case.samples(tiny.ids(1), measure)
    assert tiny.parts_in_memory(case.model) == []


def test_gradients_that_are_mostly_zero_are_kept():
    """Oracle: the plain mean, for experts that few tokens reach, and sequences of two tokens."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.zeros(20, 6)
    gradients[:3] = torch.randn(3, 6, generator=generator)
    kept = _second_moment(_typical(gradients, 2, 7))
    assert float(kept[0].diagonal().sum()) == pytest.approx(float(gradients.square().sum()) / 20, rel=1e-5)
    pairs = torch.randn(8, 6, generator=generator)
    pairs[1::2] = 0
    assert float(_typical(pairs, 4, 2).square().sum()) == pytest.approx(float(pairs.square().sum()), rel=1e-5)
    assert _second_moment(_typical(torch.zeros(0, 6), 2, 7)).tolist() == torch.zeros(1, 6, 6).tolist()
