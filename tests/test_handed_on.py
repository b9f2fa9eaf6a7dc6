"""States that a block returns for the next one, such as those of ZAYA's routers, by transformers' own whole model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_gradients import Recording, hessian_products
from test_gradients import opened as in_precision
from test_rerouted import Call, reroute
from test_walk import assert_gram
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from mspc.errors import InputError
from mspc.model.open import open_model
from mspc.model.streamed import StreamedModel
from mspc.passes import perplexity
from mspc.passes.blocks import batches_of
from mspc.passes.gradients import SquaredGradient, reverse_walk
from mspc.passes.trial import irregular_layers
from mspc.passes.walk import install, walk
from mspc.types import Matrix, flatten

CPU = torch.device("cpu")
BLOCKS = 4


def by_name(blocks: nn.ModuleList, call: Call, hidden: Tensor) -> Tensor:
    state = None
    for block in blocks:
        hidden, state = call(lambda x, block=block, state=state, **given: block(x, state=state, **given), hidden)
    return hidden


def by_position(blocks: nn.ModuleList, call: Call, hidden: Tensor) -> Tensor:
    state = None
    for block in blocks:
        hidden, state = call(lambda x, block=block, state=state, **given: block(x, state, **given), hidden)
    return hidden


def two_later(blocks: nn.ModuleList, call: Call, hidden: Tensor) -> Tensor:
    states = [None, None]
    for block in blocks:
        hidden, state = call(lambda x, block=block, **given: block(x, states[-2], **given), hidden)
        states.append(state)
    return hidden


def changed(blocks: nn.ModuleList, call: Call, hidden: Tensor) -> Tensor:
    state = None
    for block in blocks:
        given_on = None if state is None else 2 * state
        hidden, state = call(lambda x, block=block, state=given_on, **given: block(x, state, **given), hidden)
    return hidden


def built(folder: Path, monkeypatch: pytest.MonkeyPatch, state_of: Callable[[Tensor, Tensor], Tensor]) -> Path:
    """A Llama whose blocks hand state_of(their input, their output) to the next one, which adds half of it."""
    own = LlamaDecoderLayer.forward

    def forward(self: Any, hidden: Tensor, state: Tensor | None = None, **given: Any) -> tuple[Tensor, Tensor]:
        parts = [] if state is None else [state] * (hidden.shape[-1] // state.shape[-1])
        found = own(self, hidden + 0.5 * torch.cat(parts, -1) if parts else hidden, **given)
        return found, state_of(hidden, found)

    tiny.build(folder, "llama", num_hidden_layers=BLOCKS)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    return folder


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """Its states are in float32, depend on the weights, and matter."""
    return built(tmp_path / "model", monkeypatch, lambda _, found: found[..., :16] * found[..., 16:].tanh())


def opened(folder: Path) -> tuple[StreamedModel, list[list[Matrix]]]:
    model = open_model(folder, device=CPU, eager=True)
    return model, model.matrices((), irregular_layers(model))


@pytest.mark.parametrize("run", [by_name, by_position])
def test_passes_and_gradients_equal_the_whole_model(run, source, monkeypatch):
    """Oracles: hooks, and one autograd pass, whose gradients reach weights through states, too."""
    reroute(monkeypatch, run)
    (model, matrices), ids, whole = opened(source), tiny.ids(3), tiny.reference(source)
    flat = flatten(matrices)
    assert len(flat) == 7 * BLOCKS
    expected = tiny.inputs_of(whole, ids, [matrix.name for matrix in flat])
    batches = batches_of(model, ids, batch_size=2)
    for visit in walk(model, batches, matrices):
        assert_gram(visit, expected[visit.matrix.name])
    with torch.no_grad():
        loss = float(tiny.losses(whole, ids).double().mean())
    *_, found = perplexity.measure(model, ids)
    assert found.nll == pytest.approx(loss, rel=1e-5)
    weights = [whole.get_parameter(matrix.parameter).requires_grad_(True) for matrix in flat]
    single = torch.autograd.grad(tiny.losses(whole, ids[:1]).mean(), weights)
    squares = {s.matrix.name: float(s.value) for s in reverse_walk(model, ids[:1], matrices, SquaredGradient())}
    for matrix, gradient in zip(flat, single, strict=True):
        assert squares[matrix.name] == pytest.approx(float(gradient.double().square().mean()), rel=1e-4), matrix.name


def test_curvature_reaches_weights_through_states(source, monkeypatch):
    """Oracle: z * (H z) by double backward through the whole model, with the signs that the walk drew."""
    reroute(monkeypatch, by_position)
    case, ids, measure = in_precision(source, "float64"), tiny.ids(1), Recording(seed=3)
    samples = case.samples(ids, measure)
    signs = {
        matrix.name: measure.drawn[index][case.model.name_in_block(index, matrix)]
        for index, of_block in enumerate(case.matrices)
        for matrix in of_block
    }
    products = hessian_products(case, ids[0], list(signs.values()))
    scale = max(float((signs[m.name] * hz).mean().abs()) for m, hz in zip(case.flat, products, strict=True))
    for matrix, hz in zip(case.flat, products, strict=True):
        expected = float((signs[matrix.name] * hz).mean())
        assert samples[matrix.name] == [pytest.approx(expected, rel=1e-4, abs=1e-6 * scale)], matrix.name


def test_later_blocks_see_the_states_of_compressed_ones(source, monkeypatch):
    """Oracle: hooks on the whole model with the new weights."""
    reroute(monkeypatch, by_position)
    (model, matrices), ids, whole = opened(source), tiny.ids(3), tiny.reference(source)
    batches, dense = (batches_of(model, ids, batch_size=2) for _ in range(2))
    for visit in walk(model, batches, matrices, dense=dense, memory=0):
        name = visit.matrix.name
        assert_gram(visit, tiny.inputs_of(whole, ids, [name])[name])
        install(visit.weight, visit.weight * 0.9)
        install(whole.get_parameter(visit.matrix.parameter), visit.weight)


def test_states_are_dropped_when_the_blocks_are_done(source, monkeypatch):
    """Only the call of the last block still holds one."""
    reroute(monkeypatch, by_position)
    (model, matrices), ids = opened(source), tiny.ids(2)
    batches = batches_of(model, ids, batch_size=1)
    list(walk(model, batches, matrices))
    for batch in batches:
        held = [isinstance(call.args[0], Tensor) for call in batch.calls]
        assert held == [False] * (BLOCKS - 1) + [True]
        assert batch.calls[-1].args[0].shape == (1, tiny.LENGTH, 16)


@pytest.mark.parametrize(
    "state_of", [lambda hidden, _: hidden, lambda _, found: found[..., :16]], ids=["input", "view of the output"]
)
def test_states_that_are_no_tensors_of_their_own(state_of, tmp_path, monkeypatch):
    """Oracle: hooks on the whole model. Hidden states are written over, and the state must not change or keep them."""
    source = built(tmp_path / "model", monkeypatch, state_of)
    reroute(monkeypatch, by_position)
    (model, matrices), ids = opened(source), tiny.ids(3)
    expected = tiny.inputs_of(tiny.reference(source), ids, [matrix.name for matrix in flatten(matrices)])
    batches = batches_of(model, ids, batch_size=2)
    for visit in walk(model, batches, matrices):
        assert_gram(visit, expected[visit.matrix.name])
    states = [batch.calls[-1].args[0] for batch in batches]
    assert [state.untyped_storage().nbytes() for state in states] == [4 * state.numel() for state in states]


@pytest.mark.parametrize("run", [two_later, changed])
def test_states_that_go_elsewhere_are_refused(run: Callable[..., Tensor], source, monkeypatch):
    reroute(monkeypatch, run)
    with pytest.raises(InputError, match="returns 2 values, and later blocks may read more than the first"):
        list(perplexity.measure(open_model(source, device=CPU), tiny.ids(2)))
