"""Masks of models, and the callback of the Trainer that keeps zeros zero. Oracles: files, and a loop by hand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import mspc
from mspc.storage.artifact import read_matrix
from mspc.storage.manifest import MatrixEntry

ROOT = Path(__file__).parents[1]


def stored_masks(artifact):
    """By parameter, from the matrices of the artifact."""
    entries = [MatrixEntry.from_row(row, "") for row in artifact.manifest["matrices"]]
    found = {entry.address.parameter: read_matrix(artifact.path, entry).mask for entry in entries}
    return {name: mask.T if entries[0].address.transposed else mask for name, mask in found.items()}


def same(masks, others):
    return masks.keys() == others.keys() and all(torch.equal(masks[name].cpu(), others[name]) for name in others)


@pytest.mark.parametrize(("family", "pattern"), [("llama", "unstructured"), ("gpt2", "2:4")])
def test_masks_are_exact_wherever_they_are_kept(family, pattern, artifact_of, tmp_path):
    """4-bit codes: some kept weights are zero, and only a plain folder takes them for pruned ones."""
    artifact = artifact_of(family, pattern=pattern)
    exact = stored_masks(artifact)
    dense = artifact.export("dense", tmp_path / "dense", progress=False, verify=False)
    sparse = artifact.export("sparse", tmp_path / "sparse", progress=False, verify=False)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    assert same(mspc.masks(model, artifact), exact)
    assert same(mspc.masks(model, artifact.path), exact)
    assert same(mspc.masks(model, sparse), exact)
    assert same(mspc.masks(artifact), exact)
    assert same(mspc.masks(sparse), exact)
    assert same(mspc.masks(artifact.load()), exact)
    nonzero = {name: model.get_parameter(name) != 0 for name in exact}
    assert any(not torch.equal(nonzero[name], exact[name]) for name in exact)
    assert same(mspc.masks(model), nonzero)
    assert same(mspc.masks(dense), nonzero)


def test_a_dense_model_has_no_masks(llama):
    assert mspc.masks(llama) == {}
    assert mspc.masks(AutoModelForCausalLM.from_pretrained(llama)) == {}


def test_the_head_and_embeddings_have_no_masks(llama):
    model = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        model.lm_head.weight[:100] = 0
        model.model.embed_tokens.weight[:100] = 0
        model.model.layers[1].mlp.up_proj.weight[:, 7] = 0
    assert list(mspc.masks(model)) == ["model.layers.1.mlp.up_proj.weight"]


def test_what_does_not_belong_together_is_refused(llama, artifact_of, folder_of):
    artifact, model = artifact_of("llama"), AutoModelForCausalLM.from_pretrained(folder_of("gpt2"))
    with pytest.raises(mspc.InputError, match=r"q_proj\.weight: the model has no such parameter of shape \(64, 64\)"):
        mspc.masks(model, artifact)
    with pytest.raises(mspc.InputError, match="the model has no such parameter"):
        mspc.masks(AutoModelForCausalLM.from_pretrained(llama), artifact)  # another width
    with pytest.raises(mspc.InputError, match="are two folders"):
        mspc.masks(llama, artifact)
    with pytest.raises(mspc.InputError, match="is not an mspc artifact"):
        mspc.masks(model, folder_of("gpt2"))
    model.peft_config = {}
    with pytest.raises(mspc.InputError, match="the model has adapters"):
        mspc.masks(model)


def trained(model, callbacks, folder, **settings):
    given = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "weight_decay": 0.1}
    given |= {"optim": "adamw_torch", "lr_scheduler_type": "constant", "max_grad_norm": 1.0}
    arguments = TrainingArguments(
        str(folder), report_to=[], save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, seed=0,
        use_cpu=True, **given | settings,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in tiny.ids(16)]
    Trainer(model, arguments, train_dataset=rows, callbacks=callbacks).train()
    return model


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_the_trainer_moves_kept_weights_only(family, artifact_of, tmp_path):
    artifact = artifact_of(family, pattern="2:4", bits=16)
    folder = artifact.export("dense", tmp_path / "dense", progress=False, verify=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    masks = mspc.masks(model, artifact)
    assert len(masks) == len(artifact.manifest["matrices"])
    trained(model, [mspc.KeepZeros(masks)], tmp_path / "trainer", gradient_accumulation_steps=2)
    for name, mask in masks.items():
        after = model.get_parameter(name).detach()
        assert not bool(after[~mask].any())
        assert float((after != before[name])[mask].float().mean()) > 0.9
    assert model.get_parameter(next(iter(masks)))._backward_hooks in (None, {})
    loose = trained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), [], tmp_path / "trainer")
    assert any(bool(loose.get_parameter(name)[~mask].any()) for name, mask in masks.items())


def test_training_is_that_of_a_model_without_the_pruned_weights(artifact_of, tmp_path):
    """Oracle: a loop by hand in which each weight is a parameter times its mask; AdamW, and a norm that is clipped."""
    artifact = artifact_of("llama", pattern="2:4", bits=16)
    folder = artifact.export("dense", tmp_path / "dense", progress=False, verify=False)
    model, other = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    masks = mspc.masks(model, artifact)
    trained(model, [mspc.KeepZeros(masks)], tmp_path, max_steps=3, per_device_train_batch_size=16, weight_decay=0.0)
    for name, mask in masks.items():
        layer = other.get_submodule(name.removesuffix(".weight"))
        torch.nn.utils.parametrize.register_parametrization(layer, "weight", Masked(mask))
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.0)
    ids = tiny.ids(16)
    for _ in range(3):
        optimizer.zero_grad()
        other(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
    for name in masks:
        wanted = other.get_submodule(name.removesuffix(".weight")).weight
        # AdamW divides by the size of gradients: where one is nearly 0, its rounding decides.
        differs = (model.get_parameter(name) - wanted).abs() > 1e-4
        assert int(differs.sum()) <= differs.numel() // 500


class Masked(torch.nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, weight):
        return weight * self.mask


def test_merged_weights_lose_what_was_added_to_zeros(artifact_of, tmp_path):
    """As after `merge_and_unload` of PEFT: a product of low rank is added to every matrix."""
    artifact = artifact_of("llama", pattern="2:4", bits=16)
    model = AutoModelForCausalLM.from_pretrained(
        artifact.export("dense", tmp_path / "dense", progress=False, verify=False)
    )
    masks = mspc.masks(model, artifact)
    before = {name: model.get_parameter(name).detach().clone() for name in masks}
    added = {name: torch.randn(len(mask), 2) @ torch.randn(2, mask.shape[1]) for name, mask in masks.items()}
    with torch.no_grad():
        for name, product in added.items():
            model.get_parameter(name).add_(product)
    mspc.KeepZeros(masks).apply(model)
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name), torch.where(mask, before[name] + added[name], 0.0))


@pytest.mark.slow
def test_the_example_tunes_a_sparse_model_and_exports_it(tmp_path):
    """Oracle: what it prints, and the export in transformers."""
    command = [sys.executable, str(ROOT / "examples" / "finetune.py"), "--out", str(tmp_path / "out")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "Pruned weights that are not zero after training: 0." in ran.stdout
    assert "Patterns: ['2:4']." in ran.stdout
    pruned, tuned, rounded = (float(value) for value in re.findall(r"(\d+\.\d+) (?:pruned|tuned)", ran.stdout))
    assert tuned < 0.9 * pruned
    assert rounded < 1.1 * tuned
    assert mspc.verify(tmp_path / "out" / "small-sparse", tmp_path / "out" / "small", progress=False)
