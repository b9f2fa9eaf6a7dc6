"""GGUF against brute force, golden bytes, the `gguf` package's own dequantization, and transformers' loader.

Blocks are compared with loops over struct and with what the reference package makes of them; whole files with the
artifact, by a reader that shares no code with the exporter, and by logits and tokens of transformers.
"""

import json
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import BUNDLED
from hypothesis import given
from hypothesis import strategies as st
from oracles import few
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from exporters import exporting, verification
from exporters.reading import gguf as reading
from exporters.reference import NEW_TOKENS
from exporters.verification import UNREADABLE
from mspc.errors import InputError, VerificationError
from mspc.formats.gguf import pack_blocks
from mspc.numerics.quant import dequantize
from mspc.progress import Silent
from mspc.storage.artifact import ArtifactSource
from mspc.types import Codes, Grid, PlannedMatrix, Target, Unstructured

gguf = pytest.importorskip("gguf")
exporter = pytest.importorskip("exporters.gguf")
families = pytest.importorskip("exporters.gguf_families")

TYPES = {4: gguf.GGMLQuantizationType.Q4_0, 8: gguf.GGMLQuantizationType.Q8_0}


# Blocks


def random_codes(bits: int, num_rows: int, num_blocks: int, seed: int) -> Codes:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2**bits, (num_rows, 32 * num_blocks), generator=generator).to(torch.uint8)
    scales = torch.randn(num_rows, num_blocks, generator=generator).half()
    return Codes(values, scales, torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.uint8))


def brute_force(codes: Codes, bits: int) -> list[bytes]:
    rows = []
    for values, scales in zip(codes.values.tolist(), codes.scales.tolist(), strict=True):
        row = b""
        for b, scale in enumerate(scales):
            block = values[32 * b : 32 * b + 32]
            row += struct.pack("<e", scale)
            if bits == 4:
                row += bytes(block[i] + 16 * block[i + 16] for i in range(16))
            else:
                row += struct.pack("<32b", *(value - 128 for value in block))
        rows.append(row)
    return rows


@few
@given(st.sampled_from([4, 8]), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_blocks_equal_brute_force(bits, num_rows, num_blocks, seed):
    codes = random_codes(bits, num_rows, num_blocks, seed)
    packed = pack_blocks(codes, bits)
    assert packed.dtype == torch.uint8
    assert [bytes(row) for row in packed.tolist()] == brute_force(codes, bits)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_reference_package_sees_the_same_weights(bits):
    """Every code in every place of a block, -128 among them."""
    codes = random_codes(bits, 64, 3, seed=1)
    codes.values[:, :32] = torch.arange(64 * 32).view(64, 32) % 2**bits
    weights = gguf.dequantize(pack_blocks(codes, bits).numpy(), TYPES[bits])
    assert np.array_equal(weights, dequantize(codes).numpy())


@pytest.mark.parametrize(("num_rows", "heads"), [(32, 4), (12, 1), (128, 2)])
def test_rows_of_a_head_are_paired(num_rows, heads):
    """Rotary embedding joins rows i and i + size / 2 of a head; the format keeps them side by side."""
    size = num_rows // heads
    expected = [head * size + i + half for head in range(heads) for i in range(size // 2) for half in (0, size // 2)]
    matrix = torch.arange(num_rows)[:, None].repeat(1, 3)
    paired = exporter.pairs_from_halves(matrix, heads)
    assert paired[:, 0].tolist() == expected
    assert np.array_equal(paired.numpy()[reading.halves_from_pairs(num_rows, heads)], matrix.numpy())


# The file


def small_file(version: int = 3) -> bytes:
    """A string, an array of numbers and two tensors, by hand."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    head = b"GGUF" + struct.pack("<IQQ", version, 2, 2)
    head += text("a.name") + struct.pack("<I", 8) + text("é")
    head += text("a.list") + struct.pack("<IIQ3i", 9, 5, 3, -1, 0, 7)
    head += text("first") + struct.pack("<IQQIQ", 2, 3, 2, 0, 0)
    head += text("second") + struct.pack("<IQQIQ", 2, 32, 1, 8, 32)
    head += bytes(-len(head) % 32)
    first = struct.pack("<6f", 1, 2, 3, 4, 5, 6)
    return head + first + bytes(8) + struct.pack("<e32b", 0.25, *range(-16, 16))


def test_a_file_made_by_hand_is_read(tmp_path):
    data = np.frombuffer(small_file(), np.uint8)
    metadata, tensors = reading.parse(data, tmp_path)
    assert metadata == {"a.name": "é", "a.list": [-1, 0, 7]}
    first = reading.decode(data, tensors["first"], slice(None))
    assert first.weight.tolist() == [[1, 2, 3], [4, 5, 6]]
    second = reading.decode(data, tensors["second"], slice(None))
    assert second.weight.tolist() == [[0.25 * i for i in range(-16, 16)]]
    assert second.codes.tolist() == [list(range(112, 144))]


def read_all(content: bytes, path: Path) -> None:
    data = np.frombuffer(content, np.uint8)
    for stored in reading.parse(data, path)[1].values():
        reading.decode(data, stored, slice(None))


def test_a_file_cut_short_is_an_error(tmp_path):
    whole = small_file()
    read_all(whole, tmp_path)
    for length in range(len(whole)):
        with pytest.raises(InputError):
            read_all(whole[:length], tmp_path)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # products of scales that are not numbers
@few
@given(st.integers(0, len(small_file()) - 1), st.binary(min_size=1, max_size=8))
def test_damaged_files_raise_what_verify_reports(place, noise):
    whole = small_file()
    with suppress(*UNREADABLE):
        read_all(whole[:place] + noise + whole[place + len(noise) :], Path("model.gguf"))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="is not a GGUF file"):
        reading.parse(np.frombuffer(b"PK\3\4" + bytes(99), np.uint8), tmp_path)
    with pytest.raises(InputError, match="has version 2 of GGUF, not 3"):
        reading.parse(np.frombuffer(small_file(version=2), np.uint8), tmp_path)


# Whole exports


def tokenizer() -> Tokenizer:
    """Bytes and four merges: 260 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2")]
    vocabulary = {text: i for i, text in enumerate([*alphabet, *("".join(merge) for merge in merges)])}
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def build(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    tiny.build(folder, family, dtype=dtype, hidden_size=64, **changes)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`model_of(family, dtype, **config)`: `build` of it, once."""
    made: dict[str, Path] = {}

    def get(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: object) -> Path:
        key = f"{family}{dtype}{changes}"
        if key not in made:
            made[key] = build(tmp_path_factory.mktemp("gguf") / "model", family, dtype, **changes)
        return made[key]

    return get


def in_transformers(folder: Path) -> dict[str, object]:
    return json.loads((folder / "verification.json").read_text())["runtimes"]["transformers"]


def relative_error(folder: Path) -> float:
    """The error of transformers' logits on the tokens that the export was verified with."""
    return in_transformers(folder)["relative_error"]


def types_of(folder: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}


@pytest.mark.parametrize(
    ("grid", "dtype", "matrices"),
    [
        ({"bits": 4}, torch.float32, "Q4_0"),
        ({"bits": 4, "pattern": "2:4"}, torch.bfloat16, "Q4_0"),
        ({"bits": 8}, torch.bfloat16, "Q8_0"),
        ({"bits": 8, "sparsity": 0.0}, torch.float16, "Q8_0"),
        ({"bits": 16}, torch.float32, "F32"),
        ({"bits": 16}, torch.float16, "F16"),
        ({"bits": 16, "pattern": "2:4"}, torch.bfloat16, "BF16"),
    ],
    ids=str,
)
def test_exports_hold_and_compute_the_artifact(grid, dtype, matrices, artifact_of, model_of, tmp_path):
    artifact = artifact_of(model_of(dtype=dtype), **grid)
    out = artifact.export("gguf", tmp_path / "out", progress=False)
    for against in (None, artifact.path):
        assert verification.verify(out, against, Silent())["weights"]["wrong"] == []
    assert relative_error(out) < 1e-6
    types = types_of(out)
    assert types["blk.1.attn_k.weight"] == types["blk.0.ffn_down.weight"] == matrices
    assert types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == "F32"
    assert types["token_embd.weight"] == {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"head_dim": 32, "num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1, "rms_norm_eps": 1e-3}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 128, "tie_word_embeddings": True}),
    ],
    ids=str,
)
def test_shapes_of_models(family, changes, artifact_of, model_of, tmp_path):
    """With and without a head of its own, heads of their own size, other constants."""
    out = artifact_of(model_of(family, **changes)).export("gguf", tmp_path / "out", progress=False)
    assert relative_error(out) < 1e-6
    assert ("output.weight" in types_of(out)) == (not changes.get("tie_word_embeddings"))


def test_a_mixed_plan_has_a_type_for_every_matrix(artifact_of, model_of, tmp_path):
    mixed = tiny.mixed(artifact_of(model_of(), skip=("layers.0.mlp.down_proj",)), model_of(), tmp_path)
    out = mixed.export("gguf", tmp_path / "out", progress=False)
    assert relative_error(out) < 1e-6
    types = types_of(out)
    assert [types[f"blk.0.{name}.weight"] for name in ("attn_q", "attn_k", "ffn_down")] == ["Q8_0", "Q4_0", "F32"]


@pytest.mark.slow
@pytest.mark.parametrize("grid", [{"bits": 4}, {"bits": 8, "pattern": "2:4"}], ids=str)
def test_the_trained_model_writes_the_same_text(grid, artifact_of, tmp_path):
    out = artifact_of("bundled", **grid).export("gguf", tmp_path / "out", progress=False)
    result = in_transformers(out)
    assert result["status"] == "verified"
    assert result["relative_error"] < 1e-6
    assert result["greedy_tokens_equal"] == result["greedy_tokens_compared"] == NEW_TOKENS


def test_rows_in_the_order_of_the_model_are_noticed(artifact_of, model_of, tmp_path, monkeypatch):
    """No reader could tell such a file: it loads, and its logits are wrong."""
    artifact = artifact_of(model_of())
    monkeypatch.setattr(exporter, "pairs_from_halves", lambda matrix, heads: matrix)
    with pytest.raises(VerificationError, match=r"layers\.0\.self_attn\.q_proj: .* codes differ"):
        artifact.export("gguf", tmp_path / "out", progress=False)
    out = artifact.export("gguf", tmp_path / "out", verify=False, progress=False)
    verification.verify(out, artifact.path, Silent())
    assert relative_error(out) > 0.1


# Refusals


LLAMA = {"model_type": "llama", "max_position_embeddings": 128}


def check(config: dict[str, object], *matrices: PlannedMatrix) -> None:
    exporting.check("gguf", matrices or [planned()], LLAMA | config, BUNDLED)


def planned(bits: int = 4, group_size: int | None = 32, *, symmetric: bool = True) -> PlannedMatrix:
    return PlannedMatrix(
        "model.layers.0.mlp.up_proj", (64, 64), Target(Unstructured(0.5), Grid(bits, group_size, symmetric))
    )


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA31 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}


def gemma(family: str, **changes: object) -> dict[str, object]:
    return tiny.CONFIGS[family] | {"model_type": family} | changes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, "gemma3_text or phi3, not 'gpt2'; .* Export dense"),
        ({"model_type": "gemma3"}, "whose model_type is llama, mistral, .*, not 'gemma3'"),
        ({"model_type": "gemma3", "text_config": {}}, "not 'gemma3'; .* Export dense or sparse"),
        ({"model_type": "mixtral"}, "not 'mixtral'"),
        ({"model_type": None}, "not None"),
        ({"hidden_act": "gelu"}, "llama models whose hidden_act is silu, not 'gelu'"),
        ({"attention_bias": True}, "attention_bias is false, not True"),
        ({"mlp_bias": True}, "mlp_bias is false, not True"),
        ({"model_type": "mistral", "sliding_window": 64}, "mistral models whose sliding_window is null, not 64"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "default, linear, yarn or llama3, not 'dynamic'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 1"),
        ({"rope_parameters": YARN | {"attention_factor": 2.0}}, "attention_factor of yarn is null or 1.13863, not 2.0"),
        ({"rope_parameters": YARN | {"beta_fast": 16}}, "beta_fast of yarn is 32, not 16"),
        ({"rope_parameters": YARN | {"mscale": 0.7}}, "mscale of yarn is None, not 0.7"),
        ({"rope_parameters": YARN | {"truncate": False}}, "truncate of yarn is True, not False"),
        ({"model_type": "qwen2", "rope_parameters": LLAMA31}, "linear or yarn, not 'llama3'"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0},
            "qwen2 models whose sliding_window is null, not 64",
        ),
        ({"model_type": "qwen3", "attention_bias": True}, "qwen3 models whose attention_bias is false"),
        ({"model_type": "phi3", "rope_scaling": LONG, "original_max_position_embeddings": 64}, "not 'longrope'"),
        (gemma("gemma2", query_pre_attn_scalar=144), "query_pre_attn_scalar is 16, not 144"),
        (gemma("gemma2", attn_logit_softcapping=None), "attn_logit_softcapping is a number, not None"),
        (gemma("gemma2", tie_word_embeddings=False), "tie_word_embeddings is true, not False"),
        (gemma("gemma2", layer_types=["full_attention"] * 2), "layer_types is full_attention in every layer of 2"),
        (
            gemma("gemma3_text", layer_types=["sliding_attention"] * 6),
            "layer_types is full_attention in every layer of",
        ),
        (gemma("gemma3_text", final_logit_softcapping=30.0), "final_logit_softcapping is null, not 30.0"),
        (
            gemma(
                "gemma3_text", rope_parameters={"full_attention": LOCAL, "sliding_attention": LOCAL | {"rope_theta": 9}}
            ),
            "rope_theta of sliding layers is 10000, not 9",
        ),
        (gemma("gemma3_text", use_bidirectional_attention=True), "use_bidirectional_attention is false, not True"),
        (gemma("gemma3_text", hidden_activation="silu"), "hidden_act is gelu_pytorch_tanh, not 'silu'"),
        ({"rope_scaling": "much"}, "config.json cannot be used"),
        ({"rope_scaling": {"rope_type": "yarn"}}, r"Missing required keys .*'factor'.*Correct or complete it\."),
    ],
    ids=str,
)
def test_models_that_readers_would_compute_otherwise_are_refused(config, message):
    """Each of them is computed in another way by llama.cpp, or has no place in the file."""
    with pytest.raises(InputError, match=message):
        check(config)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"bits": 3}, r"up_proj: gguf takes 4 or 8 bits in groups of 32, .* not 3 bits in groups of 32; compress with"),
        ({"group_size": 128}, "not 4 bits in groups of 128"),
        ({"group_size": None}, "not 4 bits in groups of row"),
        ({"symmetric": False}, "up_proj: gguf takes symmetric grids"),
    ],
    ids=str,
)
def test_grids_that_are_no_blocks_are_refused(grid, message):
    with pytest.raises(InputError, match=message):
        check({}, planned(), planned(**grid))
    dense = PlannedMatrix("dense", (64, 64), Target(Unstructured(0.5)))
    check({}, planned(), dense, planned(8))


def names_in(source: ArtifactSource, **config: object) -> dict[str, str]:
    return exporter.tensor_names(source, *families.family_of(LLAMA | config))


def test_tensors_without_a_name_are_refused(artifact_of, model_of):
    source = ArtifactSource(artifact_of(model_of()).path)
    for name in ("self_attn.sinks", "self_attn.q_proj.bias", "mlp.router.weight"):
        source.keys = lambda name=name: ["model.layers.0.self_attn.rotary_emb.inv_freq", f"model.layers.0.{name}"]
        with pytest.raises(InputError, match=rf"layers\.0\.{name} has no place in a GGUF file of a llama model"):
            names_in(source)


def test_a_stored_copy_of_tied_embeddings_is_left_out(artifact_of, model_of):
    """A file with a head of its own is read as one of a model that is not tied."""
    source = ArtifactSource(artifact_of(model_of()).path)
    assert names_in(source, tie_word_embeddings=False)["lm_head.weight"] == "output.weight"
    assert "lm_head.weight" not in names_in(source, tie_word_embeddings=True)


@pytest.mark.parametrize("own", [True, False])
def test_a_head_of_its_own_is_written_whatever_the_config_says(own, artifact_of, model_of, tmp_path):
    """Oracle: transformers, which ties nothing that a checkpoint stores with other values."""
    model = Path(shutil.copytree(model_of(), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    if not own:
        tensors = load_file(model / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    out = artifact_of(model).export("gguf", tmp_path / "out", progress=False)
    assert ("output.weight" in types_of(out)) == own
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is not own
    assert relative_error(out) < 1e-6


def test_a_gemma_with_a_head_of_its_own_is_refused(artifact_of, tmp_path):
    """llama.cpp reads none from a file of Gemma 2."""
    model = build(tmp_path / "model", "gemma2", tie_word_embeddings=False, hidden_activation="gelu_pytorch_tanh")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(InputError, match="tie_word_embeddings is true, not False"):
        artifact_of(model).export("gguf", tmp_path / "out", verify=False, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_refused_export_is_refused_before_the_run(model_of, calibration, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(model_of(), model)
    described = json.loads((model / "tokenizer.json").read_text())
    described["pre_tokenizer"] = {"type": "Whitespace"}
    (model / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match=r"readers have no name for \(Whitespace\)"):
        tiny.compress(model, tmp_path / "out", calibration, bits=4, exports=["gguf"])
    assert not (tmp_path / "out").exists()
