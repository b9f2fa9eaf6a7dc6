"""JetMoE's experts, in the MLP and in attention, whose modules are given groups of inputs and no numbers of tokens."""

import pytest
import torch
from families import NEEDED
from tiny_configs import tiny_config
from transformers import AutoModelForCausalLM

from mspc.model.experts import Product, expert_matrices
from mspc.model.own_experts import Grouped, GroupingRouter, Groups, adopt_experts


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = tiny_config("jetmoe", NEEDED.get("jetmoe", {}))
    made = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made


def grouped(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Grouped)}


def test_every_module_is_adopted_and_the_logits_stay(model):
    """Oracle: the logits of transformers' own modules. Sums over experts may have another order."""
    ids = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(1))
    expected = model(input_ids=ids, use_cache=False).logits
    adopt_experts(model)
    found = grouped(model)
    assert len(found) == 4 * len(model.model.layers)
    assert sum(isinstance(module, GroupingRouter) for module in model.modules()) == 2 * len(model.model.layers)
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
    for name, module in found.items():
        assert [matrix.index for matrix in expert_matrices(f"{name}.weight", "weight", module)] == [
            *range(len(module.weight))
        ]
    adopt_experts(model)  # again, as loading does
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)


def test_products_are_told_with_ascending_tokens_in_any_order_of_inputs(model):
    """Oracle: the loop of transformers over the same groups, whose inputs are in an order that was drawn."""
    adopt_experts(model)
    (experts, *_) = grouped(model).values()
    count, _, width = experts.weight.shape
    generator = torch.Generator().manual_seed(2)
    sizes = [3, 0, *[2] * (count - 2)]
    groups = Groups(sizes)
    groups.tokens = torch.cat([torch.randperm(50, generator=generator)[:size] for size in sizes])
    inputs = torch.randn(sum(sizes), width, generator=generator)
    told: list[Product] = []
    expected = torch.cat([part @ w.T for part, w in zip(inputs.split(sizes), experts.weight, strict=True)])
    torch.testing.assert_close(experts(inputs, groups), expected)  # nobody looks on, and one expert has no token
    experts.before_product = told.append
    torch.testing.assert_close(experts(inputs, groups), expected)
    assert [product.expert for product in told] == [*range(count)]
    for product, tokens, part in zip(told, groups.tokens.split(sizes), inputs.split(sizes), strict=True):
        assert product.tokens.tolist() == sorted(tokens.tolist())
        assert torch.equal(product.inputs, part[tokens.argsort()])


def test_modules_without_such_a_router_are_left_alone(model):
    """Without the tokens of a group the difference to the dense inputs is not known."""
    for layer in model.model.layers:
        for part in (layer.mlp, layer.self_attention.experts):
            part.router.forward = lambda hidden: (hidden,)
    adopt_experts(model)
    assert not grouped(model)


def test_modules_that_cannot_be_copied_are_left_alone():
    """Oracle: the output before. torch copies no module with weight normalization, such as those of audio encoders."""
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 4))
    model, x = torch.nn.Sequential(layer), torch.ones(1, 4)
    expected = model(x)
    adopt_experts(model)
    assert torch.equal(model(x), expected)
