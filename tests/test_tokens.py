"""Tokens against a corpus of numbered words: every token says where it came from."""

import json
import sys
import time
from itertools import count, pairwise
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import few
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mspc.errors import InputError
from mspc.text import builtin as builtin_text
from mspc.text.tokens import AT_ONCE, calibration_tokens, load_documents, windows_of_test_text

BOS = 9999


def numbers_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """The word "123" is token 123; with `bos` every text begins with 9999."""
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(BOS + 1)}, unk_token="9998"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(str(BOS), BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


NUMBERS = numbers_tokenizer()


def corpus(folder: Path, lengths: list[int]) -> str:
    """One document per length, of numbered words, as lines of a .jsonl; the numbers go on from one to the next."""
    path = folder / "corpus.jsonl"
    first, lines = 0, []
    for length in lengths:
        lines.append(json.dumps({"text": " ".join(map(str, range(first, first + length)))}))
        first += length
    path.write_text("\n".join(lines))
    return str(path)


def runs(ids: Tensor) -> list[tuple[int, int]]:
    """The token stream as (first, length) of its pieces of consecutive numbers."""
    flat = ids.flatten().tolist()
    starts = [i for i in range(len(flat)) if i == 0 or flat[i] != flat[i - 1] + 1]
    return [(flat[i], j - i) for i, j in zip(starts, [*starts[1:], len(flat)], strict=True)]


def test_the_same_seed_gives_the_same_tokens_and_another_does_not(tmp_path):
    source = corpus(tmp_path, [100] * 20)
    first, again, other = (calibration_tokens(NUMBERS, source, 8, 32, seed) for seed in (1, 1, 2))
    assert torch.equal(first.ids, again.ids)
    assert first.sha256 == again.sha256 != other.sha256
    assert not torch.equal(first.ids, other.ids)
    assert first.ids.shape == (8, 32)
    assert first.ids.dtype == torch.int64
    assert first.source == source


def test_long_documents_give_one_window_each_before_any_gives_two(tmp_path):
    source = corpus(tmp_path, [100] * 20)
    ids = calibration_tokens(NUMBERS, source, 20, 32, 0).ids
    assert sorted((ids[:, 0] // 100).tolist()) == list(range(20))
    assert (ids.diff(dim=1) == 1).all()  # every sequence is one piece of text
    assert (ids[:, 0] // 100 == ids[:, -1] // 100).all()
    assert len({first % 100 for first in ids[:, 0].tolist()}) > 5  # at random places


def test_a_document_gives_more_windows_when_all_were_visited(tmp_path):
    ids = calibration_tokens(NUMBERS, corpus(tmp_path, [100, 100]), 4, 32, 0).ids
    assert sorted((ids[:, 0] // 100).tolist()) == [0, 0, 1, 1]
    assert len(set(ids.flatten().tolist())) == 4 * 32


@few
@given(st.data(), st.integers(2, 9), st.integers(0, 99))
def test_no_text_is_used_twice_and_all_of_it_is_used_before_giving_up(tmp_path_factory, data, length, seed):
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=8))
    source = corpus(tmp_path_factory.mktemp("text"), lengths)
    available = sum(lengths) // length
    if available:
        flat = calibration_tokens(NUMBERS, source, available, length, seed).ids.flatten().tolist()
        assert len(set(flat)) == len(flat) == available * length
        assert set(flat) <= set(range(sum(lengths)))
    with pytest.raises(InputError, match=rf"it has {sum(lengths)} tokens.* {available + 1} sequences of {length} need"):
        calibration_tokens(NUMBERS, source, available + 1, length, seed)


def test_short_documents_are_packed_whole(tmp_path):
    ids = calibration_tokens(NUMBERS, corpus(tmp_path, [5] * 40), 6, 32, 3).ids
    pieces = runs(ids)[:-1]  # the last is cut
    assert len(pieces) > 20
    assert all(first % 5 == 0 and length % 5 == 0 for first, length in pieces)


def test_every_document_begins_with_the_bos_of_its_tokenizer(tmp_path):
    """Oracle: the numbers of first words; of other words, only the first of a window has one."""
    ids = calibration_tokens(numbers_tokenizer(bos=True), corpus(tmp_path, [5] * 40), 6, 32, 3).ids
    assert (ids[:, 0] == BOS).all()
    for row in ids[:, 1:].tolist():
        for before, token in pairwise(row):
            assert (before == BOS) == (token != BOS and token % 5 == 0)


def test_evaluation_windows_are_slices_of_one_tokenization(tmp_path):
    source = corpus(tmp_path, [50, 3, 200, 1, 77])
    ids = windows_of_test_text(NUMBERS, source, 32, None).ids
    assert ids.flatten().tolist() == list(range(331 // 32 * 32))  # in order, the remainder dropped
    assert ids.shape == (10, 32)


def test_documents_are_joined_by_blank_lines_and_tokenized_as_one_text(tmp_path, test_text):
    tokenizer = tiny.byte_tokenizer()
    (tmp_path / "b.txt").write_text("second é\n")
    (tmp_path / "a.txt").write_text("first " * 20)
    ids = windows_of_test_text(tokenizer, str(tmp_path), 7, None).ids.flatten().tolist()
    assert tokenizer.decode(ids) == ("first " * 20 + "\n\nsecond é\n").encode()[: len(ids)].decode(errors="replace")


def test_there_is_one_bos_at_the_start_of_each_window(tmp_path):
    ids = windows_of_test_text(numbers_tokenizer(bos=True), corpus(tmp_path, [50, 30, 60]), 20, None).ids
    assert ids.tolist() == [[BOS, *range(i, i + 19)] for i in range(0, 133, 19)]


def words(lengths: list[int]) -> str:
    return " ".join("x" * length for length in lengths)


@pytest.mark.parametrize("characters", [1, 4, 10, 11, 12, 13, 16, 33, 400])
@pytest.mark.parametrize("max_windows", [1, 3])
def test_max_windows_are_the_first_of_all_however_long_a_token_is(max_windows, characters, tmp_path):
    """Words of one token each, some of them hundreds of characters long; the last windows must not be cut words."""
    vocabulary = {"x" * length: length for length in range(1, 500)} | {"y": 0}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="y"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    (tmp_path / "a.txt").write_text(words([characters + i % 7 for i in range(90)]))
    everything = windows_of_test_text(fast, str(tmp_path), 16, None).ids
    assert len(everything) == 5
    assert torch.equal(windows_of_test_text(fast, str(tmp_path), 16, max_windows).ids, everything[:max_windows])


def test_the_prefix_changes_no_token_of_a_trained_tokenizer():
    """BPE merges of a real vocabulary, on the built-in text, at every small number of windows."""
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "examples" / "tiny_llama")
    everything = windows_of_test_text(tokenizer, "builtin", 64, 400).ids
    for max_windows in (1, 2, 3, 10, 57):
        assert torch.equal(windows_of_test_text(tokenizer, "builtin", 64, max_windows).ids, everything[:max_windows])


def test_builtin_splits_are_used_where_they_belong():
    assert load_documents("builtin", "calibration") == builtin_text.documents("calibration")
    assert load_documents("builtin", "test") == builtin_text.documents("test")


def test_too_little_text_for_one_window(tmp_path):
    source = corpus(tmp_path, [31])
    with pytest.raises(InputError, match=r"Too little text.*31 tokens do not fill one window of 32.*--sequence-length"):
        windows_of_test_text(NUMBERS, source, 32, None)
    assert windows_of_test_text(NUMBERS, source, 31, None).ids.shape == (1, 31)


def parquet(path: Path, **columns: list[object]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path)
    return path


def test_every_kind_of_file_and_a_folder_of_them(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\nstill one")
    (tmp_path / "b.jsonl").write_text('{"text": "two", "id": 1}\n{"text": "three"}\n')
    parquet(tmp_path / "c.parquet", text=["four", "five"], label=[0, 1])
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "d.txt").write_text("six")
    (tmp_path / "ignored.md").write_text("seven")
    expected = {"a.txt": ["one\n\nstill one"], "b.jsonl": ["two", "three"], "c.parquet": ["four", "five"]}
    for name, texts in expected.items():
        assert load_documents(str(tmp_path / name), "calibration") == texts
        assert load_documents(str(tmp_path / name), "test") == texts
    assert load_documents(str(tmp_path), "calibration") == [*expected["a.txt"], "two", "three", "four", "five", "six"]


def test_empty_documents_and_missing_values_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": " \\n"}\n{"text": "b"}')
    parquet(tmp_path / "b.parquet", text=["c", None, ""])
    assert load_documents(str(tmp_path), "calibration") == ["b", "c"]


@pytest.mark.parametrize(
    "line",
    ["{", '"text"', "[]", '{"txt": "a"}', '{"text": 3}', '{"text": null}', "\x00", "null", '{"text": "a"'],
    ids=repr,
)
def test_a_malformed_line_is_named(line, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "fine"}\n' + line + '\n{"text": "fine"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl, line 3: .*`text` field"):
        load_documents(str(path), "calibration")


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    parquet(tmp_path / "other.parquet", words=["a"])
    parquet(tmp_path / "lists.parquet", text=[["a"], ["b"]])
    for name in ("latin.txt", "latin.jsonl", "broken.parquet", "other.parquet", "lists.parquet"):
        with pytest.raises(InputError, match=rf"{name} cannot be read"):
            load_documents(str(tmp_path / name), "calibration")


def test_sources_that_are_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.md").write_text("text")
    (tmp_path / "empty.txt").write_text(" \n")
    for source, message in (
        (tmp_path / "folder", r"holds no text: give \.txt, \.jsonl, \.parquet"),
        (tmp_path / "a.md", r"a\.md: text must be one of \.txt, \.jsonl, \.parquet"),
        (tmp_path / "empty.txt", r"empty\.txt' is empty"),
        (tmp_path / "nowhere.txt", r"nowhere\.txt' does not exist"),
        ("./nowhere", r"Text '\./nowhere' does not exist"),
        ("", "name of the text is empty"),
    ):
        with pytest.raises(InputError, match=message):
            load_documents(str(source), "calibration")


@pytest.mark.parametrize("source", ["someone/no-such-text", "nosuchtext"])
def test_unknown_texts_are_refused_at_once_offline(source):
    begin = time.monotonic()
    with pytest.raises(
        InputError, match=rf"Text '{source}' .*/{source}\) and could not be loaded from the hub.*or use builtin"
    ):
        load_documents(source, "calibration")
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize(
    ("source", "split", "asked", "expected"),
    [
        ("c4", "calibration", ("allenai/c4", "en", "train"), ["a", "", "b"]),
        ("c4", "test", ("allenai/c4", "en", "validation"), ["a", "", "b"]),
        ("wikitext2", "calibration", ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"), ["a\n\n\n\nb"]),
        ("wikitext2", "test", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"), ["a\n\n\n\nb"]),
        ("some/text", "test", ("some/text", None, "test"), ["a", "", "b"]),
    ],
)
def test_which_split_of_a_hub_text_is_read(source, split, asked, expected, monkeypatch):
    """Rows of WikiText are joined by blank lines, empty rows too, as GPTQ and its successors do."""
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(name, configuration, *, split, streaming, trust_remote_code):
        assert streaming
        assert trust_remote_code is False
        calls.append((name, configuration, split))
        return iter([{"text": "a"}, {"text": ""}, {"text": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_documents(source, split) == expected
    assert calls == [asked]


def test_a_hub_text_without_a_text_column(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: iter([{"words": "a"}]))
    with pytest.raises(InputError, match="Dataset 'some/text' has no `text` column"):
        load_documents("some/text", "calibration")


def test_every_place_of_a_document_can_be_drawn(tmp_path):
    """Oracle: the five places that a window of 4 has in 8 words, over seeds."""
    source = corpus(tmp_path, [8])
    assert {int(calibration_tokens(NUMBERS, source, 1, 4, seed).ids[0, 0]) for seed in range(100)} == set(range(5))


def test_only_the_documents_that_are_needed_are_tokenized(tmp_path):
    """Oracle: a count; ten windows need ten documents of fifty, which are two times those that go together."""
    seen = []

    def counted(texts: list[str], *, verbose: bool) -> dict[str, list[list[int]]]:
        seen.extend(texts)
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}

    calibration_tokens(counted, corpus(tmp_path, [50] * 50), 10, 10, 0)
    assert len(set(seen)) == len(seen) == 2 * AT_ONCE == 16


def test_so_many_documents_of_a_hub_text_are_read_and_no_more(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("mspc.text.tokens.MOST_HUB_DOCUMENTS", 3)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: ({"text": str(i)} for i in count()))
    assert load_documents("c4", "calibration") == ["0", "1", "2"]


def test_packages_that_are_not_installed_are_named(monkeypatch, tmp_path):
    """A None in sys.modules makes its import fail."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"the extra datasets of mspc"):
        load_documents("c4", "calibration")
    with pytest.raises(InputError, match=r"a\.parquet needs pyarrow, in mspc's extra parquet"):
        load_documents(str(tmp_path / "a.parquet"), "calibration")
