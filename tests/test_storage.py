"""Ways to store one model: precisions, shards, tied weights, names. The oracle is what transformers makes of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor

import mspc
from mspc.errors import InputError
from mspc.model.open import open_model
from mspc.storage.checkpoint import INDEX

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def compressed(source: Path, calibration: Path, folder: Path, **recipe: Any) -> tuple[mspc.Artifact, Path]:
    """The artifact, and its dense export."""
    asked = {"sparsity": 0.5, "allocator": "uniform", "num_sequences": 8} | recipe
    artifact = tiny.compress(source, folder / "artifact", calibration, **asked)
    return artifact, artifact.export("dense", folder / "dense")


def assert_same_scores(source: Path, artifact: mspc.Artifact, dense: Path, text: Path) -> None:
    """mspc and transformers agree on the source, and on what was made of it, which is another model."""
    after = tiny.agreed_perplexity(dense, text)
    assert tiny.agreed_perplexity(artifact.path, text, dense) == pytest.approx(after, rel=1e-5)
    assert tiny.agreed_perplexity(source, text) != pytest.approx(after, rel=1e-6)


def rewrite(folder: Path, **changes: Tensor | None) -> None:
    """Change tensors of a checkpoint that is one file; None removes one."""
    tensors = {key: tensor for key, tensor in (tiny.tensors(folder) | changes).items() if tensor is not None}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (16, None)])
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_checkpoints_stay_what_they_are(dtype, bits, group_size, calibration, test_text, tmp_path):
    source = tiny.build(tmp_path / "source", "llama", dtype=HALVES[dtype])
    artifact, dense = compressed(source, calibration, tmp_path, bits=bits, group_size=group_size)
    assert {tensor.dtype for tensor in tiny.tensors(dense).values()} == {HALVES[dtype]}
    assert {row["dtype"] for row in artifact.manifest["matrices"]} == {dtype}
    assert_same_scores(source, artifact, dense, test_text)
    for row in artifact.manifest["matrices"]:
        assert int((tiny.tensors(dense)[row["tensor"]] == 0).sum()) == row["zeros"] >= row["pruned"]


@pytest.mark.parametrize("dtype", HALVES)
def test_forward_passes_in_half_precision(dtype, llama, calibration, test_text, tmp_path):
    """The precision of the forward passes is not that of the file, and changes the result little."""
    asked = {"allocator": "trace-rank", "sensitivity_sequences": 2}
    _, dense = compressed(llama, calibration, tmp_path, dtype=dtype, **asked)
    assert {tensor.dtype for tensor in tiny.tensors(dense).values()} == {torch.float32}
    _, precise = compressed(llama, calibration, tmp_path / "p", **asked)
    assert tiny.perplexity(dense, test_text) == pytest.approx(tiny.perplexity(precise, test_text), rel=0.1)
    assert tiny.perplexity(dense, test_text) != tiny.perplexity(precise, test_text)


def test_mixed_precisions_in_one_checkpoint(calibration, test_text, tmp_path):
    """Each tensor keeps its own dtype, as in checkpoints with float32 norms."""
    source = tiny.build(tmp_path / "source", "llama", dtype=torch.bfloat16)
    half = tiny.tensors(source)
    rewrite(source, **{key: tensor.float() for key, tensor in half.items() if "norm" in key or "q_proj" in key})
    artifact, dense = compressed(source, calibration, tmp_path)
    before, after = tiny.tensors(source), tiny.tensors(dense)
    assert {key: tensor.dtype for key, tensor in before.items()} == {key: tensor.dtype for key, tensor in after.items()}
    assert len({tensor.dtype for tensor in after.values()}) == 2
    assert_same_scores(source, artifact, dense, test_text)


def test_shards_keep_their_files_and_names(calibration, test_text, tmp_path):
    source = tiny.build(tmp_path / "source", "llama", sharded=True)
    artifact, dense = compressed(source, calibration, tmp_path)
    before, after = (json.loads((folder / INDEX).read_text()) for folder in (source, dense))
    assert len(set(before["weight_map"].values())) > 3
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tiny.tensors(dense).values())
    for shard in set(before["weight_map"].values()):
        assert tiny.keys_of(dense / shard) == tiny.keys_of(source / shard)
    assert_same_scores(source, artifact, dense, test_text)


@pytest.mark.parametrize("sharded", [False, True])
def test_tied_embeddings_stay_tied(sharded, calibration, test_text, tmp_path):
    source = tiny.build(tmp_path / "source", "llama", sharded=sharded, tie_word_embeddings=True)
    assert "lm_head.weight" not in tiny.tensors(source)
    artifact, dense = compressed(source, calibration, tmp_path)
    assert tiny.tensors(dense).keys() == tiny.tensors(source).keys()
    assert_same_scores(source, artifact, dense, test_text)


def test_head_is_read_where_the_checkpoint_has_one(test_text, tmp_path):
    """The config ties it to the embedding, but the file holds another: transformers then unties them."""
    source = tiny.build(tmp_path, "llama", tie_word_embeddings=True)
    tied = tiny.perplexity(source, test_text)
    rewrite(source, **{"lm_head.weight": tiny.tensors(source)["model.embed_tokens.weight"].roll(1, 0).contiguous()})
    assert tiny.agreed_perplexity(source, test_text) != pytest.approx(tied, rel=1e-3)


def test_embedding_may_be_stored_as_the_head(test_text, tmp_path):
    source = tiny.build(tmp_path, "llama", tie_word_embeddings=True)
    tied = tiny.perplexity(source, test_text)
    embedding = tiny.tensors(source)["model.embed_tokens.weight"]
    rewrite(source, **{"lm_head.weight": embedding, "model.embed_tokens.weight": None})
    assert tiny.agreed_perplexity(source, test_text) == tied


@pytest.mark.parametrize(("family", "prefix"), [("gpt2", "transformer."), ("opt", "model.")])
def test_checkpoints_of_the_base_model(family, prefix, calibration, test_text, tmp_path):
    """Published GPT-2 and OPT files name `h.0` what the causal LM calls `transformer.h.0`; the names stay."""
    model = tiny.make(family)
    source = tiny.save(model.base_model, tmp_path / "source")
    keys = tiny.tensors(source).keys()
    assert keys == {key.removeprefix(prefix) for key in model.state_dict() if key != "lm_head.weight"}
    artifact, dense = compressed(source, calibration, tmp_path)
    assert tiny.tensors(dense).keys() == keys
    assert all(row["parameter"] == prefix + row["tensor"] for row in artifact.manifest["matrices"])
    assert_same_scores(source, artifact, dense, test_text)


@pytest.mark.parametrize(
    ("family", "stale"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt_neox", "gpt_neox.layers.1.attention.masked_bias"),
    ],
)
def test_stored_buffers_that_are_computed_today_are_kept_and_ignored(family, stale, calibration, test_text, tmp_path):
    """Old files hold masks and rotary frequencies. They are passed on, but not used: transformers computes them."""
    source = tiny.build(tmp_path / "source", family)
    expected = tiny.perplexity_by_transformers(source, test_text)
    rewrite(source, **{stale: torch.full((4,), 7.0)})
    assert tiny.perplexity(source, test_text) == pytest.approx(expected, rel=1e-5)
    _, dense = compressed(source, calibration, tmp_path)
    assert tiny.tensors(dense).keys() == tiny.tensors(source).keys()
    assert torch.equal(tiny.tensors(dense)[stale], torch.full((4,), 7.0))


@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_missing_tensors_are_named(key, calibration, test_text, tmp_path):
    source = tiny.build(tmp_path / "source", "llama")
    rewrite(source, **{key: None})
    with pytest.raises(InputError, match=f"The checkpoint holds no {key}.* incomplete"):
        tiny.compress(source, tmp_path / "out", calibration)
    with pytest.raises(InputError, match=f"The checkpoint holds no {key}"):
        tiny.perplexity(source, test_text)


def test_tensors_of_another_shape_are_named(test_text, tmp_path):
    source = tiny.build(tmp_path, "llama")
    rewrite(source, **{"model.layers.1.mlp.up_proj.weight": torch.ones(64, 31)})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has shape \(64, 31\).*\(64, 32\)"):
        tiny.perplexity(source, test_text)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_parameters_are_read_as_transformers_reads_them(family, folder_of, tmp_path):
    """Oracle: every parameter of the loaded transformers model, in the file's dtype; experts are fused as it does."""
    source = tiny.build(tmp_path, family, dtype=torch.bfloat16)
    model = open_model(source, device=torch.device("cpu"))
    whole = tiny.reference(source, torch.bfloat16)
    for name, parameter in whole.named_parameters():
        assert torch.equal(model.read_parameter(name), parameter), name
    assert tiny.parts_in_memory(model) == []
