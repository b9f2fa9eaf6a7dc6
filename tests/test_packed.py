"""Packed integers against a brute-force packer, golden words, and the readers that share no code with it."""

import json

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import few
from safetensors.torch import load_file

from exporters import verification
from exporters.reading import little_endian_fields
from mspc.errors import InputError
from mspc.formats.gptq import pack_gptq, pack_quantized, pack_words
from mspc.progress import Silent
from mspc.types import Codes


def brute_force(values: list[int], bits: int) -> list[int]:
    """One Python integer, cut into words of 32 bits with a sign."""
    number = sum(value << (bits * place) for place, value in enumerate(values))
    words = [(number >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(values) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@few
@given(st.integers(1, 5), st.integers(1, 70), st.sampled_from([2, 3, 4, 8]), st.integers(0, 9))
def test_words_equal_brute_force_and_are_read_back(num_rows, count, bits, seed):
    values = torch.randint(0, 2**bits, (num_rows, count), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    words = pack_words(values, bits)
    assert words.dtype == torch.int32
    assert words.tolist() == [brute_force(row, bits) for row in values.tolist()]
    assert np.array_equal(little_endian_fields(words.numpy(), bits, count), values.numpy())


def test_gptq_by_hand():
    """8 inputs, 8 outputs, one group: code i + o, zero point 8 (stored as 7 in the first version of the format)."""
    values = (torch.arange(8)[:, None] + torch.arange(8)).to(torch.uint8)
    codes = Codes(values, torch.full((8, 1), 0.5).half(), torch.full((8, 1), 8, dtype=torch.uint8))
    first = pack_gptq(codes, 4, "gptq")
    assert first["qweight"].tolist() == [[brute_force(list(range(o, o + 8)), 4)[0] for o in range(8)]]
    assert first["qzeros"].tolist() == [[0x77777777]]
    assert pack_gptq(codes, 4, "gptq_v2")["qzeros"].tolist() == [brute_force([8] * 8, 4)]
    assert first["scales"].tolist() == [[0.5] * 8]
    assert first["g_idx"].tolist() == [0] * 8
    assert first["g_idx"].dtype == torch.int32


def test_pack_quantized_by_hand():
    values = torch.arange(16, dtype=torch.uint8).view(2, 8)
    codes = Codes(values, torch.ones(2, 1).half(), torch.tensor([[3], [9]], dtype=torch.uint8))
    tensors = pack_quantized(codes, 4, symmetric=False)
    assert tensors["weight_packed"].tolist() == [[0x76543210], brute_force(list(range(8, 16)), 4)]
    assert tensors["weight_shape"].tolist() == [2, 8]
    assert tensors["weight_zero_point"].tolist() == [[0x93]]
    assert "weight_zero_point" not in pack_quantized(codes, 4, symmetric=True)


# Whole folders


GRIDS = [
    {"bits": 2},
    {"bits": 3, "pattern": "2:4"},
    {"bits": 4, "group_size": "row"},
    {"bits": 8, "sparsity": 0.0},
    {"bits": 4, "asymmetric": True},
    {"bits": 3, "asymmetric": True, "group_size": 64},
]


def only_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "exporters.verification.check_runtime", lambda *_: {"status": "unsupported", "reason": "not here"}
    )


@pytest.mark.parametrize("format_name", ["sparse", "gptq", "compressed-tensors"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_are_read_back_exactly(grid, format_name, artifact_of, tmp_path, monkeypatch):
    only_weights(monkeypatch)
    artifact = artifact_of("llama", **grid)
    out = artifact.export(format_name, tmp_path / "out", progress=False)
    for against in (artifact.path, None):
        assert verification.verify(out, against, Silent())["weights"]["wrong"] == []


@pytest.mark.parametrize("format_name", ["sparse", "gptq"])
@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen3"])
def test_every_storage_of_matrices_is_read_back(family, format_name, artifact_of, tmp_path, monkeypatch):
    """GPT-2 stores its matrices transposed."""
    only_weights(monkeypatch)
    artifact = artifact_of(family)
    out = artifact.export(format_name, tmp_path / "out", progress=False)
    assert verification.verify(out, None, Silent())["weights"]["wrong"] == []


def test_dense_and_mixed_matrices_are_named_where_loaders_look(mixed, tmp_path):
    gptq = mixed.export("gptq", tmp_path / "gptq", verify=False, progress=False)
    config = json.loads((gptq / "config.json").read_text())["quantization_config"]
    assert config == json.loads((gptq / "quantize_config.json").read_text())
    assert config["dynamic"] == {
        r"-:^model\.layers\.0\.mlp\.down_proj$": {},
        r"+:^model\.layers\.0\.self_attn\.q_proj$": {"bits": 8, "group_size": 32},
    }
    ct = mixed.export("compressed-tensors", tmp_path / "ct", verify=False, progress=False)
    config = json.loads((ct / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head", "model.embed_tokens", "model.layers.0.mlp.down_proj"]
    assert config["sparsity_config"] == {}
    assert {group["weights"]["num_bits"]: len(group["targets"]) for group in config["config_groups"].values()} == {
        8: 1,
        4: 12,
    }
    for folder in (gptq, ct):
        tensors = load_file(folder / "model.safetensors")
        assert "model.layers.0.mlp.down_proj.weight" in tensors
        assert "model.layers.1.mlp.down_proj.weight" not in tensors


@pytest.mark.parametrize(
    ("options", "format_name", "message"),
    [
        ({"bits": 16}, "gptq", "no matrix has a grid: compress with --bits 4"),
        ({"bits": 16}, "compressed-tensors", "no matrix has a grid"),
        ({"group_size": 16}, "gptq", r"q_proj: gptq takes groups of 32, 64, 128 or row, not of 16"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_before_any_work(options, format_name, message, artifact_of, tmp_path):
    with pytest.raises(InputError, match=message):
        artifact_of("llama", **options).export(format_name, tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_compress_refuses_an_export_that_cannot_be_before_it_solves(llama, calibration, tmp_path):
    with pytest.raises(InputError, match="no matrix has a grid"):
        tiny.compress(llama, tmp_path / "out", calibration, exports=["gptq"], allocator="uniform")
    assert not (tmp_path / "out").exists()


def test_shapes_that_no_kernel_takes_are_refused(calibration, tmp_path):
    model = tiny.build(tmp_path / "model", "llama")
    options = {"bits": 4, "group_size": "row", "allocator": "uniform"}
    artifact = tiny.compress(model, tmp_path / "artifact", calibration, **options)
    with pytest.raises(InputError, match=r"k_proj: .* divisible by 32, not 32 and 16; leave it out with --skip"):
        artifact.export("gptq", tmp_path / "out", progress=False)


def test_weights_that_float16_cannot_hold_are_refused(calibration, tmp_path):
    model = tiny.make("llama", hidden_size=64)
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 3] = 1e5
    tiny.save(model.bfloat16(), tmp_path / "model")
    options = {"bits": 4, "group_size": 32, "allocator": "uniform"}
    artifact = tiny.compress(tmp_path / "model", tmp_path / "artifact", calibration, **options)
    with pytest.raises(InputError, match=r"embed_tokens\.weight: its largest weight, 99840, does not fit"):
        artifact.export("gptq", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
