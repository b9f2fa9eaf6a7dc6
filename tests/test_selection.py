"""Choice of matrices by --only and --skip; and tensors that no parameter uses, which are named.

Oracles: the tensors of the dense export against those of the source; sets of names made by hand.
"""

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_cli import FAST, mspc_cli

import mspc
from mspc.errors import InputError

MATRICES = [
    f"model.layers.{block}.{name}" for block in (0, 1) for group in tiny.GROUPS["llama"] for name in group
]  # fmt: skip


@pytest.mark.parametrize(
    ("only", "skip", "expected"),
    [
        (["q_proj"], [], {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}),
        ([r"layers\.1\.mlp", "k_proj$"], [], {n for n in MATRICES if ".1.mlp" in n or n.endswith("k_proj")}),
        (["mlp"], ["down_proj", r"layers\.0"], {"model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"}),
        ([""], ["mlp"], {name for name in MATRICES if "mlp" not in name}),
        ([], ["self_attn"], {name for name in MATRICES if "mlp" in name}),
    ],
)
def test_only_what_is_named_is_compressed(only, skip, expected, llama, calibration, tmp_path):
    recipe = {"effort": "fast", "only": only, "skip": skip}
    artifact = tiny.compress(llama, tmp_path / "out", calibration, **recipe)
    assert {row["name"] for row in artifact.manifest["matrices"]} == expected
    dense = tiny.tensors(artifact.export("dense", tmp_path / "dense", verify=False, progress=False))
    before = tiny.tensors(llama)
    assert {key.removesuffix(".weight") for key in before if not torch.equal(before[key], dense[key])} == expected
    zeros = sum(int((dense[f"{name}.weight"] == 0).sum()) for name in expected)
    assert 2 * zeros == sum(before[f"{name}.weight"].numel() for name in expected)
    for part in ("recipe", "settings"):
        assert artifact.manifest[part].get("only", []) == only


def test_a_recipe_and_the_command_line_know_it(llama, calibration, tmp_path):
    """The recipe of one artifact makes the same bytes again; a budget counts what is named only."""
    options = (
        "--calibration",
        calibration,
        "--sparsity",
        0.5,
        *FAST,
        "--only",
        "q_proj",
        "--only",
        "up_proj",
        "--skip",
        r"\.0\.",
    )
    mspc_cli("compress", llama, "--out", tmp_path / "a", *options)
    mspc_cli("compress", llama, "--out", tmp_path / "b", "--recipe", tmp_path / "a" / "recipe.toml")
    first, second = (json.loads((tmp_path / name / "mspc.json").read_text()) for name in "ab")
    assert first["files"] == second["files"]
    assert [row["name"] for row in first["matrices"]] == [
        "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj",
    ]  # fmt: skip
    budget = tiny.compress(llama, tmp_path / "c", calibration, bits_per_weight=5.0, only=["q_proj"]).manifest
    assert 4.5 < budget["bits_per_weight"] <= 5.0
    assert len(budget["matrices"]) == 2


@pytest.mark.parametrize("pattern", ["nothing", "norm", "embed_tokens", r"layers\.7", "q_proj\\.weight"])
def test_a_pattern_that_names_no_matrix_is_refused(pattern, llama, calibration, tmp_path):
    for only in ([pattern], ["q_proj", pattern]):
        with pytest.raises(InputError, match=rf"--only {re.escape(pattern)} matches no matrix of a block"):
            tiny.compress(llama, tmp_path / "a" / "b", calibration, only=only)
    assert list(tmp_path.iterdir()) == []


def with_extra(source: Path, folder: Path, *names: str) -> Path:
    """A copy of a checkpoint with more tensors."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {name: torch.ones(2, 2) for name in names}, folder / "model.safetensors", {"format": "pt"})
    return folder


ATTENTION = "model.layers.{}.self_attn.q_proj"
LORA = [f"{ATTENTION.format(block)}.lora_{ab}.default.weight" for block in (0, 1) for ab in "AB"]


@pytest.mark.parametrize("extra", [LORA, ["score.weight"], ["a.b", "model.layers.0.mlp.up_proj.scale"]])
def test_tensors_that_no_parameter_uses_are_named_once(extra, llama, calibration, tmp_path):
    """By compress and inspect, in one line with their number; they are in no way part of the model."""
    model = with_extra(llama, tmp_path / "model", *extra)
    done = mspc_cli(
        "compress", model, "--out", tmp_path / "out", "--calibration", calibration, "--sparsity", 0.5, *FAST
    )
    told = [line for line in done.stderr.splitlines() if "belong" in line and line.startswith("Note")]
    assert told == [line for line in mspc_cli("inspect", tmp_path / "out").stderr.splitlines() if "belong" in line]
    (note,) = told
    assert note.startswith(f"Note: {len(extra)} tensor{'s' * (len(extra) > 1)} of the checkpoint, such as ")
    assert sum(name in note for name in extra) == min(len(extra), 3)
    assert ("Merge the adapter first" in note) == (extra == LORA)
    plain = tiny.compress(llama, tmp_path / "plain", calibration, num_sequences=2, sequence_length=16, effort="fast")
    manifest = mspc.Artifact(tmp_path / "out").manifest
    assert sorted(manifest["unused_tensors"]) == sorted(extra)
    assert "unused_tensors" not in plain.manifest
    blocks = [name for name in plain.manifest["files"] if name.startswith("matrices/")]
    assert len(blocks) == 2
    assert all(manifest["files"][name] == plain.manifest["files"][name] for name in blocks)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "opt", "phi3"])
def test_all_tensors_of_whole_models_are_used(family, folder_of):
    from mspc.model.open import open_model

    assert open_model(folder_of(family), device=torch.device("meta")).unused() == []


@pytest.mark.parametrize("name", ["rotary_emb.inv_freq", "self_attn.rotary_emb.inv_freq", "attn.masked_bias"])
def test_buffers_of_old_versions_are_not_named(name, llama, tmp_path):
    from mspc.model.open import open_model

    model = with_extra(llama, tmp_path / "model", f"model.layers.0.{name}")
    assert open_model(model, device=torch.device("meta")).unused() == []
