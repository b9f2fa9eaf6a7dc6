"""GGUF against brute force, golden bytes, the `gguf` package's own dequantization, and transformers' loader.

Blocks are compared with loops over struct and with what the reference package makes of them; whole files with the
artifact, by a reader that shares no code with the exporter, and by logits and tokens of transformers.
"""

import json
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import few
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from exporters import exporting, verification
from exporters.reading import gguf as reading
from exporters.reference import NEW_TOKENS
from exporters.verification import UNREADABLE
from mspc.errors import InputError, VerificationError
from mspc.formats.gguf import pack_blocks, unpack_blocks
from mspc.numerics.quant import dequantize
from mspc.progress import Silent
from mspc.storage.artifact import ArtifactSource
from mspc.types import Codes, Grid, PlannedMatrix, Target, Unstructured

gguf = pytest.importorskip("gguf")
exporter = pytest.importorskip("exporters.gguf")

TYPES = {4: gguf.GGMLQuantizationType.Q4_0, 8: gguf.GGMLQuantizationType.Q8_0}
SENTENCE = "Hello, world!  It's 2024:\n\n the the déjà vu 123456"


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
def test_blocks_equal_brute_force_and_come_back(bits, num_rows, num_blocks, seed):
    codes = random_codes(bits, num_rows, num_blocks, seed)
    packed = pack_blocks(codes, bits)
    assert packed.dtype == torch.uint8
    assert [bytes(row) for row in packed.tolist()] == brute_force(codes, bits)
    back = unpack_blocks(packed, bits)
    for part in ("values", "scales", "zeros"):
        assert getattr(back, part).equal(getattr(codes, part))


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


def tokenizer(cut: pre_tokenizers.PreTokenizer | None = None, **options: object) -> Tokenizer:
    """Bytes and four merges: 260 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2")]
    vocabulary = {text: i for i, text in enumerate([*alphabet, *("".join(merge) for merge in merges)])}
    made = Tokenizer(models.BPE(vocabulary, merges, **options))
    made.pre_tokenizer = cut or pre_tokenizers.ByteLevel(add_prefix_space=False)
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
    for against in (artifact.path, None):
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


def planned(bits: int = 4, group_size: int | None = 32, *, symmetric: bool = True) -> PlannedMatrix:
    return PlannedMatrix(
        "model.layers.0.mlp.up_proj", (64, 64), Target(Unstructured(0.5), Grid(bits, group_size, symmetric))
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "qwen3"}, "whose model_type is llama or mistral, not 'qwen3'"),
        ({"model_type": "gpt2"}, "model_type is llama or mistral, not 'gpt2'; .* Export dense"),
        ({"hidden_act": "gelu"}, "hidden_act is silu, not 'gelu'"),
        ({"attention_bias": True}, "attention_bias is false, not True"),
        ({"mlp_bias": True}, "mlp_bias is false, not True"),
        ({"model_type": "mistral", "sliding_window": 64}, "sliding_window is null, not 64"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is default, not 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_type is default, not 'llama3'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 1"),
    ],
)
def test_models_that_readers_would_compute_otherwise_are_refused(config, message):
    with pytest.raises(InputError, match=message):
        exporting.check("gguf", [planned()], LLAMA | config)


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
        exporting.check("gguf", [planned(), planned(**grid)], LLAMA)
    dense = PlannedMatrix("dense", (64, 64), Target(Unstructured(0.5)))
    exporting.check("gguf", [planned(), dense, planned(8)], LLAMA)


def test_tensors_without_a_name_are_refused(artifact_of, model_of):
    source = ArtifactSource(artifact_of(model_of()).path)
    source.keys = lambda: ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.sinks"]
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.sinks has no place in a GGUF file"):
        exporter.tensor_names(source, LLAMA)


def test_a_stored_copy_of_tied_embeddings_is_left_out(artifact_of, model_of):
    """A file with a head of its own is read as one of a model that is not tied."""
    source = ArtifactSource(artifact_of(model_of()).path)
    assert exporter.tensor_names(source, LLAMA | {"tie_word_embeddings": False})["lm_head.weight"] == "output.weight"
    assert "lm_head.weight" not in exporter.tensor_names(source, LLAMA | {"tie_word_embeddings": True})


# Tokenizers


def llama3_cut() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def template(single: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])


def described(made: Tokenizer) -> dict[str, object]:
    return json.loads(made.to_str())


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, object]]]:
    """`stored(tokenizer)`: a folder whose GGUF file is one tensor and the tokenizer, and what the file says of it."""

    def store(made: Tokenizer, **special: str) -> tuple[Path, dict[str, object]]:
        fast = PreTrainedTokenizerFast(tokenizer_object=made, **special)
        fast.save_pretrained(tmp_path)
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
        exporter._add_tokenizer(writer, tmp_path, fast.vocab_size + 3)
        writer.add_tensor("token_embd.weight", np.zeros((2, 2), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        metadata, _ = reading.parse(np.fromfile(tmp_path / "model.gguf", np.uint8), tmp_path)
        return tmp_path, metadata

    return store


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe"])
def test_transformers_reads_the_tokenizer_of_the_file(name, stored):
    made = tokenizer() if name == "gpt-2" else tokenizer(llama3_cut(), ignore_merges=True)
    made.add_special_tokens(["<s>", "</s>"])
    folder, metadata = stored(made, bos_token="<s>", eos_token="</s>")
    assert metadata["tokenizer.ggml.pre"] == name
    assert metadata["tokenizer.ggml.tokens"][260:] == ["<s>", "</s>", *(f"[PAD{i}]" for i in range(262, 265))][:3]
    assert metadata["tokenizer.ggml.merges"] == ["t h", "th e", "Ġ the", "1 2"]
    assert metadata["tokenizer.ggml.bos_token_id"] == 260
    assert metadata["tokenizer.ggml.eos_token_id"] == 261
    found = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    for text in (SENTENCE, f"<s>{SENTENCE}</s> 12"):
        assert found(text).input_ids == made.encode(text).ids


def test_types_of_tokens():
    made = tokenizer()
    made.add_special_tokens(["<s>"])
    made.add_tokens(["<think>"])
    tokens, kinds = exporter.vocabulary(described(made), 264)
    assert tokens[259:] == ["12", "<s>", "<think>", "[PAD262]", "[PAD263]"]
    assert kinds[259:] == [1, 3, 4, 5, 5]
    with pytest.raises(InputError, match="its token '<think>' has the id 261, and the model has 261 of them"):
        exporter.vocabulary(described(made), 261)


def test_tokens_around_a_text():
    made = tokenizer()
    assert exporter.added_tokens(described(made)) == (None, None)
    made.post_processor = processors.Sequence([processors.ByteLevel(), template("<s> $A")])
    assert exporter.added_tokens(described(made)) == ("<s>", None)
    made.post_processor = template("<s> $A </s>")
    assert exporter.added_tokens(described(made)) == ("<s>", "</s>")
    made.post_processor = template("<s> <s> $A")
    with pytest.raises(InputError, match="adds 2 tokens before and 0 after a text"):
        exporter.added_tokens(described(made))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"byte_fallback": True}}, "byte-level BPE .* not this one: it is SentencePiece"),
        ({"model": {"type": "Unigram"}}, "it is Unigram"),
        ({"model": {"merges": []}}, "it has no merges"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "it has a suffix of words"),
        ({"model": {"ignore_merges": True}}, "it cuts text in a way that readers have no name for"),
        ({"normalizer": {"type": "NFC"}}, "it has a normalizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "cuts text in a way"),
        ({"pre_tokenizer": None}, "cuts text in a way"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}}, "cuts text in a way"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}}, "cuts text in a way"),
    ],
    ids=str,
)
def test_other_tokenizers_are_refused(changes, message):
    found = described(tokenizer())
    found = found | changes | {"model": found["model"] | changes.get("model", {})}
    with pytest.raises(InputError, match=message):
        exporter.split_name(found)


def test_a_missing_tokenizer_and_an_unknown_first_token_are_refused(tmp_path):
    writer = gguf.GGUFWriter(None, "llama")
    with pytest.raises(InputError, match=r"tokenizer\.json cannot be read .* gguf holds the tokenizer too"):
        exporter._add_tokenizer(writer, tmp_path, 260)
    made = tokenizer()
    made.post_processor = template("<s> $A")
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="it adds '<s>', which is not its bos token"):
        exporter._add_tokenizer(writer, tmp_path, 260)
