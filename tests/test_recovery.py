"""`mspc.recover`: distillation on the kept weights. Oracles: a loop by hand over whole logits, the models before."""

import math
from pathlib import Path

import pytest
import tiny
import torch
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM

import mspc
import mspc.runtime.recovery as recovery

IDS = tiny.ids(72)
"""64 sequences to train on and 8 to validate on."""


@pytest.fixture
def sparse(artifact_of, tmp_path):
    """`sparse(family)`: a 3:4 model in float32, its masks, and its dense model."""

    def get(family="llama", **recipe):
        artifact = artifact_of(family, **{"pattern": "3:4", "bits": 16, "solver": "mask"} | recipe)
        folder = artifact.export("dense", tmp_path / family, progress=False, verify=False, overwrite=True)
        model, dense = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (
            folder, artifact.path.parent / "model",
        ))  # fmt: skip
        return model, mspc.masks(model, artifact), dense

    return get


def mean_divergence(dense, model, ids):
    """KL(dense || model) in nats per token, of whole logits."""
    with torch.no_grad():
        p, q = (log_softmax(one(input_ids=ids).logits.double(), -1) for one in (dense.eval(), model.eval()))
    return float((p.exp() * (p - q)).sum() / ids.numel())


def recover(model, dense, **options):
    return mspc.recover(model, dense, IDS, **{"steps": 10, "learning_rate": 3e-3, "progress": False} | options)


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_steps_are_those_of_a_loop_by_hand(family, sparse, monkeypatch):
    """With capped logits and transposed matrices too. Oracle: torch's AdamW on parameters times masks."""
    monkeypatch.setattr(recovery, "POSITIONS", 25)  # does not divide the positions of a batch
    model, masks, dense = sparse(family)
    by_hand, _, _ = sparse(family)
    found = recover(model, dense, steps=2, batch_size=3, learning_rate=3e-4)
    assert found.steps == found.step == 2
    trained = {name: p for name, p in by_hand.named_parameters() if name in masks or p.ndim == 1}
    optimizer = torch.optim.AdamW(trained.values(), betas=(0.9, 0.95), weight_decay=0.0)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    by_hand.eval()
    for step in range(2):
        ids = IDS[order[3 * step : 3 * step + 3]]
        with torch.no_grad():
            p = log_softmax(dense.eval()(input_ids=ids).logits, -1)
        q = log_softmax(by_hand(input_ids=ids).logits, -1)
        optimizer.zero_grad()
        ((p.exp() * (p - q)).sum() / ids.numel()).backward()
        for name, mask in masks.items():
            trained[name].grad *= mask
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.param_groups[0]["lr"] = 3e-4 * (1 + math.cos(math.pi * step / 2)) / 2
        optimizer.step()
    for (name, one), (_, other) in zip(model.named_parameters(), by_hand.named_parameters(), strict=True):
        if "c_attn.bias" not in name:  # that of the keys has no gradient but noise, and Adam makes steps of it
            assert torch.allclose(one, other, atol=2e-5), name


def test_a_model_comes_nearer_and_its_zeros_stay(sparse):
    """Oracle: the divergence of whole logits on the last eight sequences; the weights before."""
    model, masks, dense = sparse()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first = mean_divergence(dense, model, IDS[64:])
    model.train()
    model.lm_head.weight.requires_grad_(False)
    found = recover(model, dense, steps=40)
    assert found.before == pytest.approx(first, rel=1e-4)
    assert model.training
    assert found.after == pytest.approx(mean_divergence(dense, model, IDS[64:]), rel=1e-4)
    assert found.after == min(found.divergences.values()) == found.divergences[found.step] < 0.9 * first
    assert sorted(found.divergences) == [0, *range(4, found.steps + 1, 4)]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name != "lm_head.weight")
        if name in masks:
            assert not bool(parameter[~masks[name]].any())
        assert torch.equal(parameter, before[name]) == ("embed" in name or "lm_head" in name)


def test_a_matrix_that_no_text_passes_stays_as_it_is(sparse):
    model, _, dense = sparse()
    model.for_images = torch.nn.Linear(8, 8)
    with torch.no_grad():
        model.for_images.weight[:, ::2] = 0
    before = model.for_images.weight.clone()
    assert recover(model, dense, steps=4).after > 0
    assert torch.equal(model.for_images.weight, before)


def test_the_same_again(sparse):
    """Oracle: the first run. Another seed gives other weights; text does the same as its ids."""
    weights = []
    for options in ({}, {}, {"seed": 1}):
        model, _, dense = sparse()
        recover(model, dense, **options)
        weights.append(model.model.layers[0].mlp.up_proj.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_model_is_never_worse_than_it_came(sparse):
    """Oracle: the weights before. The rate is so high that every step destroys the model."""
    model, _, dense = sparse()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    found = recover(model, dense, learning_rate=3.0, steps=100)
    assert found.step == 0
    assert found.after == found.before
    assert found.steps == 30 < 100  # it gives up
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_text_and_a_dense_folder(sparse, calibration, artifact_of):
    model, _, _ = sparse()
    artifact = artifact_of("llama", pattern="3:4", bits=16, solver="mask")
    options = {"artifact": artifact, "num_sequences": 16, "sequence_length": 32, "steps": 10, "progress": False}
    found = mspc.recover(model, artifact.path.parent / "model", calibration, learning_rate=3e-3, **options)
    assert found.after < found.before


def test_a_run_that_is_stopped_keeps_the_best_weights(sparse):
    model, _, dense = sparse()
    before = mean_divergence(dense, model, IDS[64:])
    with pytest.raises(mspc.Stopped):
        recover(model, dense, steps=20, progress=lambda event: event.done < 7)
    assert mean_divergence(dense, model, IDS[64:]) < before
    assert not any(module._forward_hooks for module in model.modules())


def test_what_cannot_be_recovered_is_refused(sparse, artifact_of, llama, monkeypatch):
    model, _, dense = sparse()
    for options, message in (
        ({"steps": 0}, "must be above 0"),
        ({"learning_rate": math.nan}, "must be above 0"),
        ({"batch_size": -1}, "must be above 0"),
    ):
        with pytest.raises(mspc.InputError, match=message):
            recover(model, dense, **options)
    with pytest.raises(mspc.InputError, match="no matrix of this model has 1% zeros"):
        recover(dense, model)
    with pytest.raises(mspc.InputError, match="the dense model must be another one"):
        recover(model, model)
    with pytest.raises(mspc.InputError, match="no text is left to validate on, of 1 sequences"):
        mspc.recover(model, dense, IDS[:1], progress=False)
    with pytest.raises(mspc.InputError, match="Export the artifact as dense"):
        recover(artifact_of("llama", pattern="2:4").load(), dense)
    with pytest.raises(mspc.InputError, match=r"has weights that its mask removes"):
        recover(dense, model, artifact=artifact_of("llama", pattern="2:4"))
    with pytest.raises(mspc.InputError, match=r"is torch\.bfloat16, and small steps need float32"):
        recover(sparse()[0].bfloat16(), dense)
    monkeypatch.setattr(recovery, "free_memory", lambda device: 100_000)
    with pytest.raises(mspc.InputError, match=r"training needs [\d,]+ KB for gradients.*, and 100 KB are free"):
        recover(model, dense)


@pytest.mark.slow
def test_the_bundled_model_recovers(artifact_of, tmp_path):
    """On test text that neither trained nor validated. Oracle: `mspc.evaluate`."""
    artifact = artifact_of("bundled", pattern="2:4", bits=16, solver="obs", propagation=0.0, num_sequences=16,
                           sequence_length=128)  # fmt: skip
    folder = artifact.export("dense", tmp_path / "dense", progress=False, verify=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    dense = tiny.reference(Path(__file__).parents[1] / "examples" / "tiny_llama")
    options = {"max_windows": 40, "sequence_length": 128, "against": dense, "progress": False}
    before = mspc.evaluate(model, **options)
    found = mspc.recover(model, dense, artifact=artifact, sequence_length=128, steps=60, progress=False)
    after = mspc.evaluate(model, **options)
    assert found.after < 0.9 * found.before
    assert after.divergence < 0.9 * before.divergence
