"""Weights that several blocks share (Zamba 1 and 2): refused by name, with a remedy that works."""

import re

import pytest
import tiny
import torch
from families import NEEDED
from tiny_configs import tiny_config
from transformers import AutoModelForCausalLM

import mspc
from mspc.errors import InputError
from mspc.model.open import open_model
from mspc.passes.trial import irregular_layers

CPU = torch.device("cpu")
OWN = {"zamba": (r"mamba\.(x_proj_weight|dt_proj_weight|A_log)$",), "zamba2": ()}
"""Patterns for what is dense for other reasons."""


@pytest.fixture(scope="module", params=OWN)
def family_and_source(request, tmp_path_factory):
    config = tiny_config(request.param, NEEDED[request.param])
    model = tiny.randomized(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), 64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):  # a state that grows has no size to compare
                parameter.copy_(parameter.abs())
    return request.param, tiny.save(model, tmp_path_factory.mktemp(request.param) / "model")


@pytest.mark.parametrize("tried", [False, True])
def test_shared_weights_are_refused_by_name(tried, family_and_source):
    """Also after a trial, which loads some blocks and so gives them parameters of their own."""
    family, source = family_and_source
    model = open_model(source, device=CPU)
    irregular = irregular_layers(model) if tried else ()
    with pytest.raises(InputError, match=r"layers\.3\.(\S+) and model\.layers\.1\.\1 are one weight shared by several"):
        model.matrices(OWN[family], irregular)


def test_the_remedy_leaves_them_dense_and_the_rest_is_right(family_and_source, calibration, tmp_path):
    """Oracles: the tensors of the source, and the logits of transformers for the dense export."""
    family, source = family_and_source
    with pytest.raises(InputError) as refused:
        tiny.compress(source, tmp_path / "out", calibration, effort="fast", skip=OWN[family])
    skip = (*OWN[family], *re.findall(r"--skip '(\S+)'", str(refused.value)))
    artifact = tiny.compress(source, tmp_path / "out", calibration, effort="fast", skip=skip)
    assert artifact.manifest["sparsity"]["achieved"] == 0.5
    assert not any("shared" in row["name"] for row in artifact.manifest["matrices"])
    dense = artifact.export("dense", tmp_path / "dense", verify=False, progress=False)
    before, after = tiny.tensors(source), tiny.tensors(dense)
    assert {key for key in before if not torch.equal(before[key], after[key])} == {
        row["tensor"] for row in artifact.manifest["matrices"]
    }
    ids = tiny.ids(2)
    expected = tiny.reference(dense)(input_ids=ids, use_cache=False).logits
    found = mspc.load(artifact.path)(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))
