"""Special ids and templates: who names them first, against what transformers loads, and the ids in GenAI's config."""

import json
from pathlib import Path

import pytest
from gguf_models import byte_level, fast
from transformers import AutoTokenizer, GenerationConfig

from exporters.genai import genai_config
from mspc.model.special_ids import SpecialIds, chat_templates, special_ids, text_config

SIZE = 600
SOURCES = (
    "generation_config.json", "config.json", "text_config", "special_tokens_map.json", "tokenizer_config.json",
    "tokenizer",
)  # fmt: skip
"""In the order in which they count."""


def write(folder: Path, names: dict[str, int]) -> None:
    """A folder whose sources name these ids as bos, eos, pad and unk."""
    made = byte_level("gpt-2")
    own = {"eos_token": made.id_to_token(names["tokenizer"])} if "tokenizer" in names else {}
    fast(made, **own).save_pretrained(folder)
    files: dict[str, dict[str, object]] = {name: {} for name in SOURCES if name.endswith(".json")}
    files["tokenizer_config.json"] = json.loads((folder / "tokenizer_config.json").read_text())
    for name, i in names.items():
        ids = {f"{role}_token_id": i for role in ("bos", "eos", "pad", "unk")}
        if name == "text_config":
            files["config.json"]["text_config"] = ids
        elif name in ("tokenizer_config.json", "special_tokens_map.json"):
            files[name] |= {f"{role}_token": made.id_to_token(i) for role in ("bos", "eos", "pad", "unk")}
        elif name != "tokenizer":
            files[name] |= ids
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("first", range(len(SOURCES)))
def test_the_first_that_names_an_id_decides(first, tmp_path):
    names = {name: 100 + i for i, name in enumerate(SOURCES)}
    if first < 5:  # what the tokenizer itself says is what the two files before it say
        del names["tokenizer"]
    write(tmp_path, {name: names[name] for name in SOURCES[first:] if name in names})
    found = special_ids(tmp_path, SIZE)
    assert found.eos == (100 + first,)
    if first < 5:
        assert (found.bos, found.pad, found.unk) == (100 + first,) * 3
    if first == 0:
        assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 100
    if first in (3, 4):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (100 + first,) * 2


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ([7, 8, 9], (7, 8, 9)),
        ([7, 8, 7], (7, 8)),
        ([], (101,)),
        (None, (101,)),
        (SIZE, (101,)),
        ([SIZE, 5], (5,)),
        (-1, (101,)),
        (True, (101,)),
        ("7", (101,)),
        (0, (0,)),
    ],
)
def test_what_counts_as_an_id(named, expected, tmp_path):
    """A number below the size of the vocabulary, or several of them; everything else is as if it were not there."""
    write(tmp_path, {"config.json": 101})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    assert special_ids(tmp_path, SIZE).eos == expected


def test_what_nobody_names_is_nothing(tmp_path):
    assert special_ids(tmp_path, SIZE) == SpecialIds()  # not even a tokenizer
    write(tmp_path, {})
    assert special_ids(tmp_path, SIZE) == SpecialIds()
    for name in ("generation_config.json", "config.json", "special_tokens_map.json"):
        (tmp_path / name).write_text("[")
    assert special_ids(tmp_path, SIZE) == SpecialIds()


def test_two_files_of_a_tokenizer_count_as_transformers_lets_them(tmp_path):
    """With the added tokens in `tokenizer_config.json`, the older file is not read."""
    write(tmp_path, {"tokenizer_config.json": 104, "special_tokens_map.json": 103})
    assert special_ids(tmp_path, SIZE).eos == (AutoTokenizer.from_pretrained(tmp_path).eos_token_id,) == (103,)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"added_tokens_decoder": {}}))
    assert special_ids(tmp_path, SIZE).eos == (AutoTokenizer.from_pretrained(tmp_path).eos_token_id,) == (104,)


def test_ids_of_files_beside_a_tokenizer_that_cannot_be_loaded(tmp_path):
    added = {"5": {"content": "<a>"}, "6": {"content": "<b>"}}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": added, "bos_token": {"content": "<a>"}, "eos_token": "<b>"})
    )
    assert special_ids(tmp_path, SIZE) == SpecialIds(5, (6,))


def test_configs_inside():
    config = {"model_type": "outer", "eos_token_id": 1, "text_config": {"eos_token_id": 2, "vocab_size": 9}}
    assert text_config(config) == config | {"eos_token_id": 2, "vocab_size": 9}
    assert text_config({"vocab_size": 9}) == {"vocab_size": 9}


@pytest.mark.parametrize("templates", [{}, {"default": "A"}, {"default": "A", "tool_use": "B"}, {"rag": "C"}], ids=str)
def test_templates_are_those_that_transformers_loads(templates, tmp_path):
    made = fast(byte_level("gpt-2"))
    made.chat_template = templates or None
    made.save_pretrained(tmp_path)
    assert chat_templates(tmp_path, AutoTokenizer.from_pretrained(tmp_path)) == templates


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (SpecialIds(1, (2,), 3, 4), {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}),
        (SpecialIds(0, (0,), 0), {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}),
        (SpecialIds(None, (2, 5)), {"eos_token_id": [2, 5], "pad_token_id": 2}),
        (SpecialIds(pad=3), {"pad_token_id": 3}),
        (SpecialIds(1), {"bos_token_id": 1}),
        (SpecialIds(), {}),
    ],
)
def test_genai_is_told_what_is_named(ids, expected):
    """transformers pads with the first end of text; nothing else stands in for an id that nobody names."""
    found = genai_config({"vocab_size": SIZE}, ids, (2, 2, 8), {})["model"]
    assert {key: value for key, value in found.items() if key.endswith("_token_id")} == expected
