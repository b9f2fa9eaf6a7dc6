"""Tokenizers that do not belong to the model. Oracle: ids and embeddings, counted by hand."""

import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from test_bos import tokenizer
from test_cli import FAST, mspc_cli, refused
from transformers import AutoConfig, PreTrainedTokenizerFast

import mspc
from mspc.errors import InputError
from mspc.model.vocabulary import check_tokenizer_of, differences

Make = Callable[[], PreTrainedTokenizerFast]


def more(*tokens: str, **named: str) -> PreTrainedTokenizerFast:
    """Bytes and the four special tokens of `tokenizer`, ids 0 .. 259, and further tokens."""
    made = tokenizer("$A", **named)
    made.add_tokens(list(tokens))
    return made


def with_special(*tokens: str, **named: str) -> PreTrainedTokenizerFast:
    made = tokenizer("$A", **named)
    made.add_special_tokens({"additional_special_tokens": list(tokens)})
    return made


def with_image() -> PreTrainedTokenizerFast:
    """A special token that only the backend knows."""
    made = tokenizer("$A")
    made.backend_tokenizer.add_special_tokens(["<image>"])
    return made


def model_with(folder: Path, made: PreTrainedTokenizerFast, **config: object) -> Path:
    tiny.build(folder, "llama", **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | config)
    made.save_pretrained(folder)
    return folder


TOO_LARGE: dict[str, tuple[Make, int, int]] = {
    "one word": (lambda: more("word"), 261, 260),
    "many words": (lambda: more(*(f"word{i}" for i in range(40))), 300, 260),
    "an end token": (lambda: more(eos_token="<end>"), 261, 260),
    "a smaller model": (lambda: more(), 260, 200),
}
"""A tokenizer, its ids, and the embeddings of the model."""


@pytest.mark.parametrize("kind", TOO_LARGE)
def test_more_ids_than_embeddings_is_an_error_with_both_numbers(kind, calibration, tmp_path):
    make, ids, embeddings = TOO_LARGE[kind]
    folder = model_with(tmp_path / "model", make(), vocab_size=embeddings)
    message = rf"the tokenizer has {ids} ids, but the model has {embeddings} embeddings"
    text = ("--text", calibration, "--sequence-length", 32)
    out = tmp_path / "out"
    assert re.search(
        message, refused("compress", folder, "--out", out, "--calibration", calibration, "--sparsity", 0.5, *FAST)
    )
    assert re.search(message, refused("eval", folder, *text))
    assert re.search(message, refused("bench", folder, "--device", "cpu"))
    with pytest.raises(InputError, match=message):
        mspc.compress(
            folder, mspc.Recipe(sparsity=0.5, effort="fast"), out=out, calibration=tiny.ids(4) % 200, progress=False
        )
    with pytest.raises(InputError, match=message):
        mspc.evaluate(tiny.reference(folder), calibration, tokenizer=make(), sequence_length=32, progress=False)
    assert not out.exists()


def test_exports_and_their_verification_refuse_it_too(llama, calibration, tmp_path):
    artifact = tiny.compress(llama, tmp_path / "artifact", calibration, effort="fast")
    dense = artifact.export("dense", tmp_path / "dense", progress=False)
    more("word").save_pretrained(artifact.path)
    message = "the tokenizer has 261 ids, but the model has 260 embeddings"
    for arguments in (
        ("export", artifact.path, "sparse", "--out", tmp_path / "sparse"),
        ("export", artifact.path, "sparse", "--out", tmp_path / "sparse", "--no-verify"),
        ("verify", dense, "--against", artifact.path),
        ("eval", artifact.path, "--sequence-length", 32),
        ("bench", artifact.path, "--device", "cpu"),
    ):
        assert message in refused(*arguments)
    assert not (tmp_path / "sparse").exists()
    more("word").save_pretrained(dense)
    assert message in refused("verify", dense)


@pytest.mark.parametrize(
    ("make", "config", "warnings"),
    [
        (more, {}, []),
        (more, {"bos_token_id": 256, "eos_token_id": 257}, []),
        (lambda: more(bos_token="<s>", eos_token="</s>"), {}, []),
        (lambda: more(bos_token="<s>", eos_token="</s>"), {"bos_token_id": 256, "eos_token_id": [1, 257]}, []),
        (lambda: more(bos_token="<s>"), {"bos_token_id": 3}, ["bos_token_id is 256 in the tokenizer, but 3 in config"]),
        (
            lambda: more(eos_token="</s>", pad_token="<s>"),
            {"eos_token_id": [1, 2], "pad_token_id": 0},
            [r"eos_token_id is 257 .*\[1, 2\] in config", "pad_token_id is 256 .* but 0 in config"],
        ),
        (lambda: more(pad_token="<pad>"), {}, ["has 261 ids, but vocab_size is 260 in config"]),
        (more, {"vocab_size": 320}, ["has 260 ids, but vocab_size is 320 in config"]),
        (tiny.byte_tokenizer, {}, ["has 256 ids, but vocab_size is 260 in config"]),
        (lambda: with_special("<image>"), {}, ["has 261 ids, but vocab_size is 260 in config"]),
        (with_image, {}, ["has 261 ids, but vocab_size is 260 in config"]),
    ],
)
def test_other_differences_are_warnings(make, config, warnings, test_text, calibration, tmp_path, caplog):
    folder = model_with(tmp_path / "model", make(), **config)
    for work in (
        lambda: mspc.evaluate(folder, test_text, sequence_length=32, progress=False),
        lambda: tiny.compress(folder, tmp_path / "out", calibration, effort="fast"),
        lambda: mspc.export(tmp_path / "out", "dense", tmp_path / "dense", verify=False, progress=False),
    ):
        caplog.clear()
        work()
        found = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        found = [line for line in found if "was not verified" not in line]
        assert len(found) == len(warnings)
        assert all(re.search(warning, line) for warning, line in zip(warnings, found, strict=True))


def test_the_command_line_shows_them(test_text, tmp_path):
    folder = model_with(tmp_path / "model", more(bos_token="<s>"), bos_token_id=3)
    shown = mspc_cli("eval", folder, "--text", test_text, "--sequence-length", 32)
    assert f"Note: {folder}: bos_token_id is 256 in the tokenizer, but 3 in config.json." in shown.stderr


def test_a_text_that_holds_a_token_without_embedding_is_refused(calibration, tmp_path):
    """A special token for images, in a model of text alone."""
    folder = model_with(tmp_path / "model", with_special("<image>"))
    (tmp_path / "a.txt").write_text("words <image> " * 40)
    message = r"a\.txt' holds the token 260, but the model has 260 embeddings"
    with pytest.raises(InputError, match=message):
        mspc.evaluate(folder, tmp_path / "a.txt", sequence_length=tiny.LENGTH, progress=False)
    with pytest.raises(InputError, match=message):
        tiny.compress(folder, tmp_path / "out", tmp_path / "a.txt", effort="fast")
    assert not (tmp_path / "out").exists()


def test_configs_nested_in_others_count(tmp_path):
    """By hand: the vocabulary of the text model, whatever the wrapper says."""
    config = AutoConfig.for_model("gemma3", text_config={"vocab_size": 100, "bos_token_id": 2}, vocab_size=999)
    with pytest.raises(InputError, match="260 ids, but the model has 100 embeddings"):
        differences(more(), config.get_text_config(), "here")
    config.save_pretrained(tmp_path)
    more().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="260 ids, but the model has 100 embeddings"):
        check_tokenizer_of(tmp_path)


def test_folders_without_a_tokenizer_or_config_are_passed(tmp_path):
    assert check_tokenizer_of(tmp_path) == []
    more("word").save_pretrained(tmp_path)
    assert check_tokenizer_of(tmp_path) == []
    for content in ("[]", "{", '{"vocab_size": null}', '{"vocab_size": "many"}', '{"text_config": 3}'):
        (tmp_path / "config.json").write_text(content)
        assert check_tokenizer_of(tmp_path) == []


def test_the_bundled_model_has_its_own(llama):
    assert check_tokenizer_of(Path(__file__).parents[1] / "examples" / "tiny_llama") == []
