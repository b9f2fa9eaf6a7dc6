"""Tokenizers in GGUF files: token ids by transformers' reading of the file, against those of the tokenizer itself."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import gguf_models
import numpy as np
import pytest
from gguf_models import AWKWARD, TOKENIZERS, byte_level, fast, pieces
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from exporters.reading import gguf as reading
from mspc.errors import InputError

gguf = pytest.importorskip("gguf")
tokenizing = pytest.importorskip("exporters.gguf_tokenizer")
joining = pytest.importorskip("exporters.gguf_pieces")

ARCHITECTURES = {"gemma": "gemma2", "prepend": "phi3"}
"""By which transformers chooses how to read a SentencePiece vocabulary."""
READ = [name for name in TOKENIZERS if name != "smollm"]
"""transformers does not know `smollm`, and cuts such texts as GPT-2 does."""


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, object]]]:
    """`stored(tokenizer, architecture, size)`: a folder with nothing but a GGUF file of it, and its metadata."""

    def store(
        made: PreTrainedTokenizerFast, architecture: str = "llama", size: int = gguf_models.VOCABULARY, **files: object
    ) -> tuple[Path, dict[str, object]]:
        source, out = tmp_path / "source", tmp_path / "out"
        made.save_pretrained(source)
        for name, content in files.items():
            (source / f"{name}.json").write_text(json.dumps(content))
        out.mkdir()
        writer = gguf.GGUFWriter(out / "model.gguf", architecture)
        tokenizing.add_tokenizer(writer, tokenizing.read_vocabulary(source, size))
        writer.add_tensor("token_embd.weight", np.zeros((2, 2), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return out, reading.parse(np.fromfile(out / "model.gguf", np.uint8), out)[0]

    return store


@pytest.mark.parametrize("name", READ)
def test_transformers_reads_the_tokenizer_of_the_file(name, stored):
    made = TOKENIZERS[name]()
    folder, metadata = stored(made, ARCHITECTURES.get(name, "llama"))
    found = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    for text in AWKWARD:
        assert found(text).input_ids == made(text).input_ids, text
    assert found.eos_token_id == made.eos_token_id
    assert found.bos_token_id == made.bos_token_id
    assert metadata["tokenizer.ggml.add_bos_token"] == (made.bos_token is not None)
    assert metadata["tokenizer.ggml.add_eos_token"] is False


@pytest.mark.parametrize("name", gguf_models.CUTS)
def test_byte_level_tokenizers(name, stored):
    """Names of llama.cpp by the definition of the pre-tokenizer; what they mean is tested by `make verify-llamacpp`."""
    made = TOKENIZERS[name]()
    _, metadata = stored(made)
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert metadata["tokenizer.ggml.pre"] == name
    described = json.loads(made.backend_tokenizer.to_str())
    assert metadata["tokenizer.ggml.merges"] == [" ".join(pair) for pair in described["model"]["merges"]]
    tokens = metadata["tokenizer.ggml.tokens"]
    assert tokens[: len(made)] == made.convert_ids_to_tokens(range(len(made)))
    assert tokens[-1] == "[PAD639]"
    assert metadata["tokenizer.ggml.token_type"][len(made) - 3 : len(made) + 1] == [
        3,
        3,
        4,
        5,
    ]  # control, added, unused
    assert "tokenizer.ggml.bos_token_id" not in metadata  # nobody names one


@pytest.mark.parametrize(("kind", "prefix"), [("gemma", False), ("metaspace", True), ("prepend", True)])
def test_sentencepiece_vocabularies(kind, prefix, stored):
    """The joins that scores stand for, by a loop that does what readers do."""
    made = TOKENIZERS[kind]()
    _, metadata = stored(made, ARCHITECTURES.get(kind, "llama"))
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] is prefix
    tokens, kinds = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    assert kinds.count(6) == 256
    assert [tokens[i] for i, kind in enumerate(kinds) if kind == 2] == ["<unk>"]
    assert {tokens[i] for i, kind in enumerate(kinds) if kind == 3} >= {"<|begin|>", "<|end|>"}
    assert [tokens[i] for i, kind in enumerate(kinds) if kind == 4] == (["\n\n"] if kind == "gemma" else [])
    scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))
    for text in AWKWARD:
        if not any(part in text for part in ("<|", "\n\n", "  ")) and text[:1] != " ":
            expected = made.convert_ids_to_tokens(made(text, add_special_tokens=False).input_ids)
            assert joined(("▁" if prefix and text else "") + text.replace(" ", "▁"), scores) == expected


def joined(text: str, scores: dict[str, float]) -> list[str]:
    """The pieces of a text, joined pair by pair from the best score down, the rest as bytes."""
    parts = list(text)
    while True:
        pairs = [(scores.get(a + b), -i) for i, (a, b) in enumerate(pairwise(parts))]
        best = max(((score, place) for score, place in pairs if score is not None), default=None)
        if best is None:
            break
        i = -best[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    spelled = ([part] if part in scores else [f"<0x{byte:02X}>" for byte in part.encode()] for part in parts)
    return [piece for pieces in spelled for piece in pieces]


# Special tokens


def test_all_ends_of_text_are_named(stored):
    """llama.cpp has three places for them. The tokenizer's own is the first, since templates write it."""
    made = fast(byte_level("gpt-2"), eos_token="<|end|>", pad_token="<think>")
    end, begin, think = (made.convert_tokens_to_ids(text) for text in ("<|end|>", "<|begin|>", "<think>"))
    _, metadata = stored(made, generation_config={"eos_token_id": [begin, end, think], "bos_token_id": begin})
    roles = ("bos", "eos", "eot", "eom", "padding")
    assert [metadata[f"tokenizer.ggml.{role}_token_id"] for role in roles] == [begin, end, begin, think, think]


def test_an_end_that_nobody_names_is_one_that_no_text_has(stored, caplog):
    """llama.cpp would take token 11, which is a comma in many vocabularies."""
    _, metadata = stored(fast(byte_level("gpt-2")))
    assert metadata["tokenizer.ggml.eos_token_id"] == 559
    assert metadata["tokenizer.ggml.token_type"][559] == 5
    assert not {f"tokenizer.ggml.{role}_token_id" for role in ("bos", "padding", "unknown")} & metadata.keys()


def test_a_bos_that_a_template_writes_and_nobody_names_is_an_unused_id(stored):
    """llama.cpp writes an unused token as nothing, as transformers writes a BOS token that there is not."""
    made = TOKENIZERS["gpt-2"]()
    made.chat_template = "{{ bos_token }}{{ messages }}"
    _, metadata = stored(made)
    assert metadata["tokenizer.ggml.bos_token_id"] == 559
    assert metadata["tokenizer.ggml.token_type"][559] == 5
    assert metadata["tokenizer.ggml.add_bos_token"] is False


def test_without_an_unused_id_the_end_is_a_byte_that_no_text_has(stored):
    made = fast(byte_level("gpt-2"))
    _, metadata = stored(made, size=len(made))
    assert metadata["tokenizer.ggml.tokens"][metadata["tokenizer.ggml.eos_token_id"]] == "ÿ"
    assert b"\xff".decode(errors="replace") == made.decode([metadata["tokenizer.ggml.eos_token_id"]])


@pytest.mark.parametrize(("single", "before", "after"), [("$A", 0, 0), ("<s> $A", 1, 0), ("<s> $A </s>", 1, 1)])
def test_tokens_around_a_text(single, before, after, stored):
    made = byte_level("gpt-2", ["<s>", "</s>"])
    ids = [(text, made.token_to_id(text)) for text in ("<s>", "</s>")]
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    folder, metadata = stored(fast(made, eos_token="</s>"))
    assert metadata["tokenizer.ggml.add_bos_token"] == bool(before)
    assert metadata["tokenizer.ggml.add_eos_token"] == bool(after)
    if before:  # nobody else names it
        assert metadata["tokenizer.ggml.bos_token_id"] == ids[0][1]
        assert AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")("12").input_ids == made.encode("12").ids


@pytest.mark.parametrize(
    ("single", "message"),
    [
        ("<s> <s> $A", "puts 2 tokens before and 0 after a text, and one is accepted"),
        ("$A <s>", "puts '<s>' after a text, at which the model does not stop"),
        ("$A </s> <s>", "puts 0 tokens before and 2 after"),
    ],
)
def test_other_tokens_around_a_text_are_refused(single, message, stored):
    made = byte_level("gpt-2", ["<s>", "</s>"])
    ids = [(text, made.token_to_id(text)) for text in ("<s>", "</s>")]
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    with pytest.raises(InputError, match=message):
        stored(fast(made, eos_token="</s>"))


# Chat templates


PLAIN, LISTED = {"default": "A{{ messages }}"}, {"default": "B", "tool_use": "C"}


@pytest.mark.parametrize("templates", [PLAIN, LISTED, LISTED | {"rag": "D"}], ids=len)
@pytest.mark.parametrize("place", ["files", "tokenizer_config.json", "chat_template.json"])
def test_chat_templates_are_in_the_file(place, templates, stored, tmp_path):
    """Wherever a model may keep them."""
    files: dict[str, object] = {}
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    named = {name: text for name, text in templates.items() if name != "default"}
    if place == "files":
        (source / "chat_template.jinja").write_text(templates["default"])
        for name, text in named.items():
            (source / "additional_chat_templates" / f"{name}.jinja").write_text(text)
    else:
        listed = [{"name": name, "template": text} for name, text in templates.items()]
        content = {"chat_template": listed if named else templates["default"]}
        files[place.removesuffix(".json")] = content | {"tokenizer_class": "PreTrainedTokenizerFast"}
    _, metadata = stored(fast(byte_level("gpt-2")), **files)
    assert metadata["tokenizer.chat_template"] == templates["default"]
    assert {name: metadata[f"tokenizer.chat_template.{name}"] for name in named} == named
    assert set(metadata.get("tokenizer.chat_templates", [])) == set(named)


def test_no_template_is_no_key(stored):
    assert not [key for key in stored(TOKENIZERS["gpt-2"]())[1] if "chat_template" in key]


# Refusals


def changed(made: Tokenizer, changes: dict[str, object]) -> dict[str, object]:
    found = json.loads(made.to_str())
    return found | changes | {"model": found["model"] | changes.get("model", {})}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False, "trim_offsets": True}
OTHER = {"type": "Split", "pattern": {"Regex": r"\w+|\W+"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"ignore_merges": True}}, r"cuts text in a way that readers have no name for \(GPT-2's own cut, "),
        ({"normalizer": {"type": "Lowercase"}}, "it has a normalizer, Lowercase"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, r"no name for \(Whitespace\)"),
        ({"pre_tokenizer": None}, r"no name for \(none\)"),
        ({"pre_tokenizer": BYTES | {"add_prefix_space": True}}, "no name for"),
        ({"pre_tokenizer": BYTES}, r"no name for \(bytes\)"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [OTHER, BYTES]}},
            r"no name for \(\\w\+\|\\W\+, then bytes\)",
        ),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [OTHER | {"behavior": "Removed"}, BYTES]}},
            r"no name for \(Removed \\w\+\|\\W\+, then bytes\)",
        ),
    ],
    ids=str,
)
def test_cuts_without_a_name_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        tokenizing.split_name(changed(byte_level("gpt-2"), changes))


def word_level() -> Tokenizer:
    return Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, "<unk>"))


def unigram() -> Tokenizer:
    return Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("a", -2.0)], 0, byte_fallback=False))


def with_suffix() -> Tokenizer:
    return Tokenizer(models.BPE({"a": 0, "b": 1, "ab</w>": 2}, [("a", "b</w>")][:0], end_of_word_suffix="</w>"))


def one_way() -> Tokenizer:
    """`abc` is made of `ab` and `c` only, though `bc` is a token too."""
    texts = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "a", "b", "c", "ab", "bc", "abc"]
    merges = [("a", "b"), ("b", "c"), ("ab", "c")]
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(texts)}, merges, byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "▁")
    return made


def few_bytes() -> Tokenizer:
    texts = ["<unk>", "a", "b", "ab"]
    return Tokenizer(models.BPE({t: i for i, t in enumerate(texts)}, [("a", "b")], byte_fallback=True))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (word_level, "not this one: it is WordLevel"),
        (unigram, "it is Unigram"),
        (with_suffix, "it has no merges"),
        (one_way, "no merge joins 'a' and 'bc', although 'abc' is a token"),
        (few_bytes, "it falls back to bytes, and has not all 256 of them"),
    ],
)
def test_other_tokenizers_are_refused(made, message, tmp_path):
    fast(made(), unk_token="<unk>", eos_token="<unk>").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message):
        tokenizing.read_vocabulary(tmp_path, 300)


@pytest.mark.parametrize(
    ("normalizer", "cut", "shown"),
    [
        (normalizers.NFKC(), None, "NFKC"),
        (None, None, "not at all"),
        (None, pre_tokenizers.Metaspace(split=True), "Metaspace"),
        (None, pre_tokenizers.Metaspace(replacement="_", split=False), "Metaspace"),
        (normalizers.Replace(" ", "▁"), pre_tokenizers.Whitespace(), "Replace, then Whitespace"),
    ],
)
def test_other_treatments_of_spaces_are_refused(normalizer, cut, shown):
    made = pieces("gemma")
    described = json.loads(made.to_str())
    for part, name in ((normalizer, "normalizer"), (cut, "pre_tokenizer")):
        described[name] = None if part is None else json.loads(part.__getstate__())
    with pytest.raises(InputError, match=rf"treats spaces in a way that readers have no name for \({shown}\)"):
        joining.space_prefix(described)


def test_a_missing_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer cannot be loaded .* gguf holds the tokenizer too"):
        tokenizing.read_vocabulary(tmp_path, 260)


def test_tokens_beyond_the_embeddings():
    """A special one that no text holds is left out, as the image token of text-only models; others are refused."""
    made = byte_level("gpt-2", ["<image>"])
    described = json.loads(made.to_str())
    last = made.token_to_id("<think>")
    with pytest.raises(InputError, match=f"its token '<think>' has the id {last}, and the model has {last} of them"):
        tokenizing.vocabulary(described, last)
    described["added_tokens"] = [token for token in described["added_tokens"] if token["special"]]
    tokens, _ = tokenizing.vocabulary(described, last - 1)
    assert len(tokens) == last - 1
    assert "<image>" not in tokens


def test_what_llamacpp_does_otherwise_is_noted(tmp_path):
    for name, word in (("qwen2", "does not normalize"), ("metaspace", "puts a space before every text")):
        TOKENIZERS[name]().save_pretrained(tmp_path / name)
        (note,) = tokenizing.read_vocabulary(tmp_path / name, gguf_models.VOCABULARY).notes
        assert word in note
    TOKENIZERS["gemma"]().save_pretrained(tmp_path / "gemma")
    assert tokenizing.read_vocabulary(tmp_path / "gemma", gguf_models.VOCABULARY).notes == []
