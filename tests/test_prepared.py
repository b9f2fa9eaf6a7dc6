"""Layers prepared on the CPU, where the reference computes: the same products, state dict and folder."""

import copy

import pytest
import tiny
import torch
from kernel_cases import BF16, CASES, stored
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import mspc.hf  # noqa: F401  transformers reads sparse exports then
from mspc.runtime import linear
from mspc.runtime.linear import SparseLinear, prepare


def layer_of(case) -> SparseLinear:
    layer = SparseLinear(case.matrix, nn.Parameter(torch.arange(case.shape[0]).to(case.dtype)))
    layer.load_state_dict(case.stored() | {"bias": layer.bias.detach()}, assign=True)
    return layer


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_prepared_layer_computes_and_saves_what_it_did(case):
    """Oracle: the layer before; the reference sums in float32."""
    layer, expected = layer_of(case), layer_of(case)
    layer.prepare(case.dtype)
    assert layer.prepared_for == case.dtype
    assert layer.kernel is case.kernel
    x = torch.randn(2, 3, case.shape[1], generator=torch.Generator().manual_seed(0)).to(case.dtype)
    with torch.no_grad():
        wanted = expected(x.double())
        scale = float(wanted.abs().max())
        torch.testing.assert_close(layer(x).double(), wanted, rtol=0, atol=2e-2 * scale)
        torch.testing.assert_close(layer(x.float()), expected(x.float()), rtol=0, atol=0)  # not what it is prepared for
    saved, before = layer.state_dict(), expected.state_dict()
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], before[name]) for name in before)
    layer.check("m")
    layer.prepare(case.dtype)  # nothing more to do
    assert torch.equal(layer.weight, expected.weight)


@pytest.mark.parametrize("case", CASES[::6], ids=str)
def test_a_prepared_layer_can_be_copied(case):
    layer, x = layer_of(case), torch.ones(1, case.shape[1], dtype=case.dtype)
    layer.prepare(case.dtype)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_a_dtype_without_a_kernel_changes_nothing():
    layer = layer_of(CASES[0])
    layer.prepare(torch.float32)
    assert layer.prepared_for is None


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_a_state_dict_is_loaded_into_a_prepared_layer(case):
    """Oracle: the layer that it is of."""
    expected, layer = layer_of(case), SparseLinear.of(stored(case.matrix, seed=1), case.matrix)
    layer.bias = nn.Parameter(torch.zeros_like(expected.bias))
    layer.prepare(case.dtype)
    for assign in (False, True):
        assert layer.load_state_dict(expected.state_dict(), assign=assign) == ([], [])
        assert layer.prepared_for == case.dtype
        assert torch.equal(layer.weight, expected.weight)
        assert torch.equal(layer.bias, expected.bias)
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({"bias": expected.bias})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_layer_is_prepared_when_it_is_moved_to_a_gpu_and_follows_casts(case, monkeypatch):
    """As in `from_pretrained(...).to("cuda")`; the CPU only says that it compiles kernels. Oracle: the layer before."""
    layer, expected = layer_of(case), layer_of(case)
    monkeypatch.setattr(linear, "compiles_for", lambda device: True)
    model = nn.Sequential(layer).to("cpu")
    assert layer.prepared_for == case.dtype
    before = layer.repacked()
    other = BF16 if case.dtype == torch.float16 else torch.float16
    model.to(other)
    assert layer.prepared_for == (case.dtype if case.grid is None else other)  # values have no kernel for the other
    assert layer.repacked().keys() == before.keys()
    assert all(torch.equal(layer.repacked()[name], before[name]) for name in before)
    x = torch.randn(3, case.shape[1], generator=torch.Generator().manual_seed(0)).to(other)
    with torch.no_grad():
        wanted = expected(x.double())
        torch.testing.assert_close(model(x).double(), wanted, rtol=0, atol=2e-2 * float(wanted.abs().max()))


def test_a_prepared_model_writes_the_export_again_and_generates_the_same(calibration, tmp_path, monkeypatch):
    """Oracle: the tensors of the export, and the model before."""
    monkeypatch.setenv("MSPC_CPU_ISA", "torch")  # kernels of GPUs are meant
    source = tiny.build(tmp_path / "source", "llama", dtype=BF16)
    artifact = tiny.compress(source, tmp_path / "out", calibration, pattern="2:4", effort="fast")
    folder = artifact.export("sparse", tmp_path / "sparse", verify=False, progress=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=BF16)
    prompt = tiny.ids(1)[:, :4]
    before = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    prepare(model, BF16)  # on the CPU nothing is
    layers = [layer for layer in model.modules() if isinstance(layer, SparseLinear)]
    assert not any(layer.prepared_for for layer in layers)
    for layer in layers:
        layer.prepare(BF16)
        assert layer.prepared_for == BF16
    model.save_pretrained(tmp_path / "saved")
    saved, exported = (load_file(path / "model.safetensors") for path in (tmp_path / "saved", folder))
    assert saved.keys() == exported.keys()
    assert all(torch.equal(saved[name], exported[name]) for name in exported)
    assert torch.equal(before, model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0))
