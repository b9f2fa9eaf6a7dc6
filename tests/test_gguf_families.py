"""Families of models in GGUF files: logits of transformers, the metadata, and the factors of Llama 3.1.

Each model is exported and verified: matrices are read back by code that shares nothing with the exporter, and logits
are compared with transformers' own reading of the file. Whether it reads the whole model from it is stated here.
"""

import json
from collections.abc import Callable
from pathlib import Path

import gguf_models
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import mspc
from exporters.reading import gguf as reading
from exporters.runtimes import transformers as runtime
from mspc.errors import InputError

gguf = pytest.importorskip("gguf")
families = pytest.importorskip("exporters.gguf_families")
rope = pytest.importorskip("exporters.gguf_rope")

QUICK = ("llama-3.1", "gemma3-linear", "phi3-window")
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in gguf_models.MODELS]
WHOLE = {"llama", "mistral", "qwen2", "qwen2-tied"}
"""The models that transformers reads from the file alone."""


@pytest.fixture(scope="module")
def export_of(
    artifact_of: Callable[..., mspc.Artifact], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`export_of(name, bits)`: the verified export of one of `gguf_models.MODELS`, made once."""
    made: dict[tuple[str, int], Path] = {}
    models: dict[str, Path] = {}

    def get(name: str, bits: int) -> Path:
        if name not in models:
            models[name] = gguf_models.build(name, tmp_path_factory.mktemp("model") / name)
        if (name, bits) not in made:
            out = tmp_path_factory.mktemp("export") / "out"
            made[name, bits] = artifact_of(models[name], bits=bits).export("gguf", out, progress=False)
        return made[name, bits]

    return get


@pytest.mark.parametrize("bits", [16, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_every_family_is_read_back_and_computed(name, bits, export_of):
    """In floats, and quantized: the file then holds the products of codes and scales exactly."""
    out = export_of(name, bits)
    report = json.loads((out / "verification.json").read_text())
    assert report["weights"]["wrong"] == []
    found = report["runtimes"]["transformers"]
    assert found["status"] == "verified"
    assert found["relative_error"] < 1e-6
    assert (runtime._config_beside(out) == {}) == (name in WHOLE)


def test_transformers_reads_the_tensors_of_the_file(export_of):
    """The weights of every module, by transformers' reading, are those of the dense checkpoint."""
    out = export_of("gemma3-linear", 16)
    source = AutoConfig.from_pretrained(out)
    read = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", config=source, dtype=torch.float32)
    names = {tensor.name for tensor in gguf.GGUFReader(out / "model.gguf").tensors}
    assert len(names) == len([*read.named_parameters()])  # none is missing, none of them is read twice
    assert "output.weight" not in names
    norm = next(t.data for t in gguf.GGUFReader(out / "model.gguf").tensors if t.name == "blk.3.attn_k_norm.weight")
    assert np.allclose(norm, 1 + read.model.layers[3].self_attn.k_norm.weight.detach().numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-3.1", {"llama.rope.freq_base": 500.0, "llama.rope.dimension_count": 16}),
        pytest.param(
            "qwen2-yarn",
            {
                "qwen2.rope.scaling.type": "yarn",
                "qwen2.rope.scaling.factor": 4.0,
                "qwen2.rope.scaling.original_context_length": 32,
            },
            marks=pytest.mark.slow,
        ),
        (
            "gemma3-linear",
            {
                "gemma3.rope.freq_base": 1e6,
                "gemma3.rope.scaling.type": "linear",
                "gemma3.rope.scaling.factor": 8.0,
                "gemma3.attention.sliding_window": 8,
                "gemma3.attention.key_length": 16,
                "gemma3.attention.value_length": 16,
            },
        ),
        (
            "phi3-window",
            {
                "phi3.attention.sliding_window": 64,
                "phi3.rope.dimension_count": 16,
                "phi3.rope.scaling.original_context_length": 128,
            },
        ),
    ],
)
def test_metadata_that_llamacpp_reads(name, expected, export_of):
    """The keys are those of llama.cpp's converter."""
    path = export_of(name, 16) / "model.gguf"
    metadata, tensors = reading.parse(np.fromfile(path, np.uint8), path)
    assert {key: metadata[key] for key in expected} == expected
    assert ("rope_freqs.weight" in tensors) == (name == "llama-3.1")


@pytest.mark.parametrize("key", sorted(reading.SIZES))
def test_metadata_that_differ_from_the_config_are_noticed(key):
    name = f"llama.{reading.SIZES[key]}"
    reading.check_sizes({"general.architecture": "llama", name: 64}, {key: 64})
    with pytest.raises(InputError, match=f"is 64 in the file, but {key} is 65 in config.json"):
        reading.check_sizes({"general.architecture": "llama", name: 64}, {key: 65})
    with pytest.raises(InputError, match=f"but {key} is 65"):
        reading.check_sizes({"general.architecture": "llama", name: 64}, {"rope_parameters": {key: 65}})


@pytest.mark.parametrize(
    ("theta", "factor", "low", "high", "context"),
    [(5e5, 8.0, 1.0, 4.0, 8192), (5e5, 32.0, 1.0, 4.0, 8192), (500.0, 4.0, 1.0, 4.0, 32), (1e4, 2.0, 0.5, 3.0, 64)],
)
def test_factors_of_llama_3_1(theta, factor, low, high, context):
    """Oracle: the frequencies of transformers."""
    scaling = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    scaling |= {"rope_theta": theta, "original_max_position_embeddings": context}
    config = AutoConfig.for_model("llama", head_dim=64, rope_parameters=scaling | {"rope_type": "llama3"})
    plain = theta ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, None)
    factors = rope.rope_factors(config)
    assert factors.dtype == torch.float32
    assert torch.allclose(factors.double(), plain / frequencies.double(), rtol=1e-5)
    assert 1 == factors.min() < factors.max() == factor


@pytest.mark.parametrize("factor", [1.0, 2.0, 4.0, 40.0])
def test_attention_factor_of_yarn(factor):
    """Oracle: transformers, for a config that names none."""
    scaling = {"rope_type": "yarn", "rope_theta": 1e4, "factor": factor, "original_max_position_embeddings": 64}
    config = AutoConfig.for_model("qwen2", rope_parameters=scaling)
    assert rope.yarn_attention_factor(factor) == pytest.approx(ROPE_INIT_FUNCTIONS["yarn"](config, None)[1])


def test_the_window_of_phi3_is_noted():
    note = families.family_notes(AutoConfig.for_model("phi3", sliding_window=2047, max_position_embeddings=4096))
    assert "llama.cpp ignores the sliding window of phi3 models: beyond 2047 tokens" in note[0]
    assert not families.family_notes(AutoConfig.for_model("phi3", sliding_window=4096, max_position_embeddings=4096))
    assert not families.family_notes(AutoConfig.for_model("qwen2"))
