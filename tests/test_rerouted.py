"""Llama with its blocks run otherwise, by hand: each broken rule is named, and what breaks none runs.

Oracles: hooks and one autograd pass on the same rewritten model in whole.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from test_routes import CPU, opened
from test_walk import assert_gram
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from mspc.errors import InputError
from mspc.model.open import open_model
from mspc.passes import perplexity
from mspc.passes.blocks import Call as BlockCall
from mspc.passes.blocks import batches_of
from mspc.passes.gradients import SquaredGradient, reverse_walk
from mspc.passes.shared import Layout, Piece, with_entries, written
from mspc.passes.trial import irregular_layers
from mspc.passes.walk import walk

Call = Callable[[nn.Module, Tensor], Any]


def in_a_row(blocks: nn.ModuleList, call: Call, hidden: Tensor) -> Tensor:
    for block in blocks:
        hidden = call(block, hidden)
    return hidden


def with_the_first(blocks: nn.ModuleList, call: Call, hidden: Tensor) -> Tensor:
    first = call(blocks[0], hidden)
    return first + call(blocks[1], first)


ROUTES: dict[str, Callable[[nn.ModuleList, Call, Tensor], Tensor]] = {
    "it runs model.layers.0, model.layers.1 more than once, up to 2 times": lambda blocks, call, hidden: in_a_row(
        blocks, call, in_a_row(blocks, call, hidden)
    ),
    "it runs model.layers.1 before model.layers.0": lambda blocks, call, hidden: in_a_row(blocks[::-1], call, hidden),
    "it never runs model.layers.0, model.layers.1": lambda blocks, call, hidden: hidden,
    "something comes between model.layers.0 and model.layers.1": lambda blocks, call, hidden: call(
        blocks[1], call(blocks[0], hidden).mul_(2)
    ),
    "model.layers.1 is given more than the last output of the blocks before it": lambda blocks, call, hidden: call(
        partial(blocks[1], more=2 * (first := call(blocks[0], hidden))), first
    ),
    "its logits depend on more than the output of the last block": with_the_first,
    "the logits of a token depend on what the last block returns for others": lambda blocks, call, hidden: in_a_row(
        blocks, call, hidden
    ).cumsum(1),
}


def reroute(monkeypatch: pytest.MonkeyPatch, run: Callable[[nn.ModuleList, Call, Tensor], Tensor]) -> None:
    """Make Llama run its blocks otherwise."""

    def forward(self: LlamaModel, input_ids: Tensor, **_: Any) -> BaseModelOutputWithPast:
        hidden = self.embed_tokens(input_ids)
        positions = self.rotary_emb(hidden, position_ids=torch.arange(input_ids.shape[1])[None])
        found = run(self.layers, lambda block, states: block(states, position_embeddings=positions), hidden)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(found))

    monkeypatch.setattr(LlamaModel, "forward", forward)


@pytest.mark.parametrize("named", ROUTES)
def test_each_broken_rule_is_named(named, llama, monkeypatch):
    reroute(monkeypatch, ROUTES[named])
    model = open_model(llama, device=CPU)
    with pytest.raises(InputError, match=r"LlamaForCausalLM cannot be run one block at a time.*" + re.escape(named)):
        batches_of(model, tiny.ids(2))
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.model.modules())


def test_a_model_that_wants_more_than_text_is_told_apart(llama, monkeypatch):
    """The blocks are not to blame where none of them was reached."""

    def forward(self: LlamaModel, pixel_values: Tensor, **_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(LlamaModel, "forward", forward)
    with pytest.raises(InputError, match=r"not get from text alone to its first block.*'pixel_values'.*needs no"):
        batches_of(open_model(llama, device=CPU), tiny.ids(2))


def test_the_usual_route_is_not_refused(llama, monkeypatch):
    """The rewritten forward of the other tests gives what that of transformers gives."""
    expected = list(perplexity.measure(open_model(llama, device=CPU), tiny.ids(2)))[-1]
    reroute(monkeypatch, in_a_row)
    assert list(perplexity.measure(open_model(llama, device=CPU), tiny.ids(2)))[-1] == expected


def test_a_block_that_text_does_not_run_is_passed_by(llama, monkeypatch):
    """Oracles: hooks and one autograd pass of the same rewritten model in whole."""
    reroute(monkeypatch, lambda blocks, call, hidden: call(blocks[1], hidden))
    model, whole, ids = opened(llama), tiny.reference(llama), tiny.ids(2)
    matrices = model.matrices((), irregular_layers(model))
    assert not matrices[0]
    assert set(model.sorted_blocks((), ())[0].unread) == {
        name for name, _ in whole.model.layers[0].named_parameters() if "norm" not in name
    }
    assert matrices[1] == opened(llama).matrices(())[1]
    expected = tiny.inputs_of(whole, ids, [matrix.name for matrix in matrices[1]])
    visits = list(walk(model, batches_of(model, ids, batch_size=1), matrices))
    assert [visit.matrix for visit in visits] == matrices[1]
    for visit in visits:
        assert_gram(visit, expected[visit.matrix.name])
    *_, found = perplexity.measure(model, ids)
    assert found.nll == pytest.approx(float(tiny.losses(whole, ids).double().mean()), rel=1e-5)
    weights = [whole.get_parameter(matrix.parameter).requires_grad_(True) for matrix in matrices[1]]
    wanted = torch.autograd.grad(tiny.losses(whole, ids[:1]).mean(), weights)
    squares = {s.matrix: float(s.value) for s in reverse_walk(model, ids[:1], matrices, SquaredGradient())}
    assert list(squares.values()) == pytest.approx(
        [float(dict(zip(matrices[1], wanted, strict=True))[m].double().square().mean()) for m in squares], rel=1e-4
    )


def test_a_block_that_only_other_texts_run_is_an_error(llama, monkeypatch):
    """Texts of more than 8 tokens, which the trial does not have, run the first block as well."""

    def run(blocks: nn.ModuleList, call: Call, hidden: Tensor) -> Tensor:
        return in_a_row(blocks if hidden.shape[1] > 8 else blocks[1:], call, hidden)

    reroute(monkeypatch, run)
    with pytest.raises(InputError, match=r"model\.layers\.0 runs after 0 blocks, but not for another text"):
        batches_of(opened(llama), tiny.ids(2))


def test_a_route_that_depends_on_the_text_is_refused(llama, monkeypatch):
    """Texts of more than 8 tokens, which the trial does not have, go another way."""

    def run(blocks: nn.ModuleList, call: Call, hidden: Tensor) -> Tensor:
        first = call(blocks[0], hidden)
        return call(blocks[1], first if hidden.shape[1] <= 8 else 2 * first)

    reroute(monkeypatch, run)
    with pytest.raises(InputError, match=r"model\.layers\.1 is not given what the block before it returns"):
        batches_of(open_model(llama, device=CPU), tiny.ids(2))


@pytest.mark.parametrize("shared", [[], {"seen": []}])
def test_blocks_that_write_to_lists_are_refused(shared, llama, monkeypatch):
    """A pass may be run again, and gradients pass dicts alone."""
    whole = LlamaDecoderLayer.forward

    def forward(self, hidden, *, shared, **kwargs):
        (shared if isinstance(shared, list) else shared["seen"]).append(hidden)
        return whole(self, hidden, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    reroute(
        monkeypatch, lambda blocks, call, hidden: in_a_row([partial(b, shared=shared) for b in blocks], call, hidden)
    )
    with pytest.raises(InputError, match="LlamaForCausalLM: blocks write to a list that they share, shared"):
        irregular_layers(open_model(llama, device=CPU))


def test_states_hold_what_blocks_write():
    """Each value comes back in its place with its dtype, and the call that it was made of stays as it was."""
    hidden, call = torch.rand(1, 2, 3), BlockCall((), {"kv": {"old": 1}})
    layout = Layout(Piece.of(hidden))
    own = with_entries(call, layout, [])
    wanted = (torch.rand(2, 2).half(), 3, torch.arange(2))
    own.kwargs["kv"]["new"] = wanted
    after, values = written(own, layout, call)
    assert len(values) == 1
    found, values = after.unpack(after.pack(hidden, values))
    new = with_entries(call, after, values).kwargs["kv"]["new"]
    assert torch.equal(found, hidden)
    assert (new[0].dtype, new[1]) == (torch.float16, 3)
    assert torch.equal(new[0], wanted[0])
    assert torch.equal(new[2], wanted[2])
    assert call.kwargs == {"kv": {"old": 1}}


def test_blocks_may_return_what_nothing_reads(llama, monkeypatch):
    ids, whole = tiny.ids(2), LlamaDecoderLayer.forward
    expected = list(perplexity.measure(open_model(llama, device=CPU), ids))[-1]

    def run(blocks: nn.ModuleList, call: Call, hidden: Tensor) -> Tensor:
        for block in blocks:
            hidden, _ = call(block, hidden)
        return hidden

    monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda *args, **given: (whole(*args, **given), torch.ones(())))
    reroute(monkeypatch, run)
    assert list(perplexity.measure(open_model(llama, device=CPU), ids))[-1] == expected
