"""The parts of `make verify-llamacpp` without llama.cpp: copies of files, rounding, errors, the legacy tokenizer."""

import types
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")
KINDS = gguf.GGMLQuantizationType


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    return folder


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("kind", [KINDS.F32, KINDS.F16, KINDS.BF16, KINDS.Q4_0, KINDS.Q8_0])
def test_a_copy_holds_the_same_in_float32(benchmarks, tmp_path, kind):
    """Oracle: what the gguf package makes of the blocks that it wrote, and the metadata by hand."""
    from gguf_copies import copy_as_float32, kinds_in

    weight, vector = random(6, 64), random(64)
    blocks = gguf.quantize(weight, kind)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_token_list(["a", "é"])
    writer.add_rope_freq_base(500.0)
    writer.add_bos_token_id(1)
    writer.add_tensor("w.weight", blocks, raw_dtype=kind)
    writer.add_tensor("v.weight", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    changed = {"llama.rope.freq_base": 7.0, "tokenizer.ggml.bos_token_id": None}
    changed |= {"tokenizer.ggml.eos_token_id": 70, "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.pre": "b"}
    copy = copy_as_float32(
        tmp_path / "a.gguf", tmp_path / "b.gguf", changed, lambda name, found: -found if name == "v.weight" else found
    )
    assert (kinds_in(tmp_path / "a.gguf"), kinds_in(copy)) == ([kind.name], ["F32"])
    reader = gguf.GGUFReader(copy)
    assert [tensor.name for tensor in reader.tensors] == ["w.weight", "v.weight"]
    assert np.array_equal(reader.tensors[0].data, gguf.dequantize(blocks, kind))
    assert np.array_equal(reader.tensors[1].data, -vector)
    metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    kept = {"general.architecture": "llama", "tokenizer.ggml.tokens": ["a", "é"]}
    assert metadata == kept | {name: value for name, value in changed.items() if value is not None}
    assert reader.fields["tokenizer.ggml.eos_token_id"].types == [gguf.GGUFValueType.UINT32]


def test_activations_are_rounded_as_the_reference_package_does(benchmarks):
    from verify_llamacpp import round_input

    values = random(3, 5, 96)
    values[0, 0, :32] = 0
    (found,) = round_input(torch.nn.Identity(), (torch.from_numpy(values),))
    assert np.array_equal(found.numpy(), gguf.dequantize(gguf.quantize(values, KINDS.Q8_0), KINDS.Q8_0))


def test_errors_are_relative_and_see_no_constant(benchmarks):
    """Oracle: by hand. Rows of mean 0 and norm 2; one element and its opposite are moved."""
    from verify_llamacpp import errors

    expected = np.array([[1, -1, 1, -1], [-1, 1, 1, -1]], np.float32)
    assert errors(expected + np.array([[5], [-3]]), expected)[0] == 0
    error, differences = errors(expected + np.array([[0.1, -0.1, 0, 0], [0, 0, 0, 0]]), expected)
    assert error == pytest.approx(np.sqrt(0.02 / 8))
    assert differences == pytest.approx(np.array([[0.1, -0.1, 0, 0], [0, 0, 0, 0]]), abs=1e-6)
    missing = expected.copy()
    missing[0, 0] = np.nan
    assert not errors(missing, expected)[0] <= 1


def test_the_legacy_tokenizer_puts_a_space_before_every_piece(benchmarks):
    """Oracle: the tokens as text, by hand. Byte-level tokenizers have no other form."""
    from gguf_models import TOKENIZERS
    from verify_llamacpp import legacy_of

    legacy = legacy_of(TOKENIZERS["metaspace"]())
    tokens = legacy.convert_ids_to_tokens(legacy("<|begin|>a<|end|> a")["input_ids"])
    assert "".join(tokens) == "<s><|begin|>▁a<|end|>▁▁a"
    assert legacy_of(TOKENIZERS["smollm"]()) is None


@pytest.mark.parametrize("ours", [True, False])
def test_only_an_environment_of_ours_is_replaced(ours, benchmarks, tmp_path, monkeypatch):
    import environments

    wanted, folder = tmp_path / "wanted.txt", tmp_path / "venv"
    wanted.write_text("one==1\n")
    folder.mkdir()
    (folder / "pyvenv.cfg").write_text("home = /usr/bin")
    if ours:
        (folder / environments.STAMP).write_text("one==0\n")
    done = types.SimpleNamespace(returncode=0)
    monkeypatch.setattr(environments.subprocess, "run", lambda *_, **__: done)
    with nullcontext() if ours else pytest.raises(SystemExit, match="venv is there and has no .*Choose another --venv"):
        environments.environment(folder, wanted)
    assert (folder / "pyvenv.cfg").is_file() is not ours
    assert not ours or (folder / environments.STAMP).read_text() == "one==1\n"
