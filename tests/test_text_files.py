"""Files of text as people have them. Oracle: the texts that were written, and the line of what is wrong."""

import codecs
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from test_cli import mspc_cli, refused
from test_tokens import parquet

import mspc
from mspc.errors import InputError
from mspc.text.reading import Reading
from mspc.text.tokens import load_documents

TEXTS = ["first é", "second \u2028 line\nand 漢字", "third 😀"]
CHAT = [{"role": "user", "content": "hi é"}, {"role": "assistant", "content": "hello"}]
SHARED = [{"from": "human", "value": "hi é"}, {"from": "gpt", "value": "hello"}]
WRITTEN = "<user>hi é</user><assistant>hello</assistant>"
TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('no ' + m.role) }}{% endif %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
)


def read(path: Path, **options: str) -> list[str]:
    chatting = tiny.byte_tokenizer()
    chatting.chat_template = TEMPLATE
    return load_documents(str(path), "calibration", Reading(**options), chatting)


def rows(texts: list[object], column: str = "text") -> list[dict[str, object]]:
    return [{"id": number, column: text} for number, text in enumerate(texts)]


def lines(texts: list[object], column: str = "text") -> str:
    return "\n".join(json.dumps(row) for row in rows(texts, column))


# Marks, blank lines, arrays


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(TEXTS) + "\n"),
        ("a.jsonl", "\n\n" + lines(TEXTS).replace("\n", "\r\n\r\n  \t \r\n") + "\n\n"),
        ("a.json", json.dumps(rows(TEXTS))),
        ("a.json", json.dumps(rows(TEXTS), ensure_ascii=False, indent=2) + "\n\n"),
        ("a.json", json.dumps(TEXTS)),
        ("a.json", "\n" + lines(TEXTS) + "\n\n"),
        ("A.JSON", json.dumps(rows(TEXTS))),
    ],
)
def test_a_byte_order_mark_and_blank_lines_are_no_text(name, content, encoding, tmp_path):
    mark = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}.get(encoding, b"")
    (tmp_path / name).write_bytes(mark + content.encode(encoding))
    assert read(tmp_path / name) == TEXTS
    assert read(tmp_path) == TEXTS


def test_marks_of_files_that_were_joined_are_left_out(tmp_path):
    part = lines(TEXTS).encode("utf-8-sig")
    (tmp_path / "a.jsonl").write_bytes(part + b"\n" + part)
    assert read(tmp_path / "a.jsonl") == TEXTS * 2


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "cp1252", "latin-1", "utf-16-le", "cp1251"])
@pytest.mark.parametrize("named", [True, False])
def test_a_txt_is_in_the_encoding_that_is_named_or_that_its_mark_tells(encoding, named, tmp_path):
    text = "слово" if encoding == "cp1251" else "café, naïve"
    (tmp_path / "a.txt").write_bytes(f"{text}\r\n{text}".encode(encoding))
    if named or encoding in ("utf-8-sig", "utf-16", "utf-32"):
        assert read(tmp_path / "a.txt", **({"encoding": encoding} if named else {})) == [f"{text}\n{text}"]
        assert read(tmp_path / "a.txt", encoding="utf-8" if not named else encoding) == [f"{text}\n{text}"]
        return
    with pytest.raises(InputError, match=r"a\.txt.*line 1.*--text-encoding, such as"):
        read(tmp_path / "a.txt")


def test_an_object_with_a_text_is_one_document(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"text": "one"}))
    assert read(tmp_path / "a.json") == ["one"]


def test_what_is_no_text_in_a_folder_is_left_out(tmp_path, caplog):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "a.txt").write_text("hidden")
    (tmp_path / "._a.txt").write_bytes(b"\0\5\x16\7")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"features": {}, "splits": []}))
    (tmp_path / "numbers.json").write_text("[1, 2, 3]")
    (tmp_path / "b.txt").mkdir()
    (tmp_path / "b.txt" / "c.JSONL").write_text(lines(TEXTS))
    with caplog.at_level("INFO", "mspc"):
        assert read(tmp_path) == TEXTS
    assert re.search(r"dataset_info\.json, line 1: expected .* The file is left out\.", caplog.text)
    assert re.search(r"numbers\.json, .* The file is left out\.", caplog.text)
    with pytest.raises(InputError, match=r"dataset_info\.json, line 1: expected .*`text` field, but it holds features"):
        read(tmp_path / "dataset_info.json")


# Columns and chats


@pytest.mark.parametrize("column", ["body", "content", "messages", "text"])
def test_a_column_that_is_named_is_read(column, tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(TEXTS, column))
    (tmp_path / "b.json").write_text(json.dumps(rows(TEXTS, column)))
    parquet(tmp_path / "c.parquet", **{"text": ["x", "y", "z"], column: TEXTS})
    assert read(tmp_path, column=column) == TEXTS * 3


def transposed(chat: list[dict[str, str]]) -> dict[str, list[str]]:
    return {name: [message[name] for message in chat] for name in chat[0]}


@pytest.mark.parametrize(
    ("column", "chat"),
    [
        ("messages", CHAT),
        ("conversations", SHARED),
        ("conversations", CHAT),
        ("messages", transposed(CHAT)),
        ("conversations", transposed(SHARED)),
    ],
)
def test_chats_go_through_the_chat_template(column, chat, tmp_path):
    (tmp_path / "a.jsonl").write_text(lines([chat, chat, []], column))
    (tmp_path / "b.json").write_text(json.dumps(rows([chat], column)))
    parquet(tmp_path / "c.parquet", **{column: [chat, None]})
    assert read(tmp_path) == [WRITTEN] * 4
    assert read(tmp_path, column=column) == [WRITTEN] * 4
    (tmp_path / "d.jsonl").write_text(json.dumps({column: chat, "text": "a text wins"}))
    assert read(tmp_path / "d.jsonl") == ["a text wins"]
    assert read(tmp_path / "d.jsonl", column=column) == [WRITTEN]


def test_a_parquet_file_of_another_writer(tmp_path):
    """Some write lists and strings of the large kind, and leave out nothing: absent values are null."""
    pyarrow = pytest.importorskip("pyarrow")
    message = pyarrow.struct(
        [("role", pyarrow.large_string()), ("content", pyarrow.string()), ("name", pyarrow.string())]
    )
    chats = pyarrow.array([CHAT, None], pyarrow.large_list(message))
    parquet(tmp_path / "a.parquet", messages=chats)
    parquet(tmp_path / "b.parquet", text=pyarrow.array(["x", None], pyarrow.large_string()))
    assert read(tmp_path) == [WRITTEN, "x"]


def test_a_column_of_a_hub_dataset(monkeypatch):
    datasets = pytest.importorskip("datasets")
    found = [{"body": "a", "messages": CHAT, "other": 3}, {"body": None, "messages": CHAT}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: iter(found))
    assert read(Path("some/text"), column="body") == ["a", ""]
    assert read(Path("some/text")) == [WRITTEN] * 2
    with pytest.raises(InputError, match=r"Dataset 'some/text' has no `words` column, but body, messages, other"):
        read(Path("some/text"), column="words")
    with pytest.raises(InputError, match=r"Dataset 'some/text', row 0: the `other` field is not a string"):
        read(Path("some/text"), column="other")
    with pytest.raises(InputError, match="text_encoding cp1252 has no effect with some/text"):
        read(Path("some/text"), encoding="cp1252")


# Errors


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "tool", "content": "x"}]}, r"chat template of the model refuses this chat \(no tool\)"),
        ({"messages": [{"content": "x"}]}, "a message must have `role` and `content`, or `from` and `value`, but has "),
        ({"conversations": [{"human": "x"}]}, "must have `role`.* but has human"),
        ({"messages": "text", "text": None, "n": 1}, None),
        ({"messages": ["hi"]}, "the `messages` field is not a string and no chat"),
        ({"messages": {"role": ["user"], "content": []}}, "the `messages` field is not a string and no chat"),
        ({"messages": {"role": "user"}}, "the `messages` field is not a string and no chat"),
        ({"body": "x", "title": "y"}, r"expected a JSON object with a `text` field, but it holds body, title"),
        ({}, "it holds nothing"),
        ({"text": "half \ud83d"}, r"the text holds '\\ud83d', half of a surrogate pair"),
        ({"messages": [{"role": "user", "content": "half \ude00"}]}, "half of a surrogate pair"),
        ({"text": ["a", "b"]}, "the `text` field is not a string"),
    ],
)
def test_errors_name_the_file_and_the_line(row, message, tmp_path):
    """The third object of a .jsonl, of an array on lines of its own, and of one that is indented."""
    good = {"text": "fine"}
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(one) for one in (good, good, row)))
    (tmp_path / "b.json").write_text("[\n" + ",\n".join(json.dumps(one) for one in (good, good, row)) + "\n]")
    (tmp_path / "c.json").write_text(json.dumps([good, good, row], indent=1))
    for name, line in (("a.jsonl", 5), ("b.json", 4), ("c.json", 8)):
        if message is None:
            assert read(tmp_path / name) == ["fine", "fine", "text"]
            continue
        with pytest.raises(InputError, match=rf"{name}, line {line}: .*{message}"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{}", r"a\.json, line 1: this is no JSON"),
        ('[\n{"text": "a"},\n{"text" "b"}]', r"a\.json, line 3: this is no JSON"),
        ('{"text": "a"}\n{"text": "b"', r"a\.json, line 2: expected a JSON object with a `text` field"),
        ("[" * 100_000, r"a\.json, line 1: this JSON cannot be read"),
        ("3", r"a\.json, line 1: expected an array of objects"),
        ('["a", 3]', r"a\.json, line 1: expected a JSON object"),
        ("1" * 5000, r"a\.json, line 1"),
        ("", "is empty"),
        ("[]", "is empty"),
        (" \n ", "is empty"),
    ],
)
def test_json_that_is_none_is_named(content, message, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / "a.json")


def test_lines_that_are_nested_too_deep_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(TEXTS) + "\n" + "[" * 100_000)
    with pytest.raises(InputError, match=r"a\.jsonl, line 4: expected a JSON object"):
        read(tmp_path / "a.jsonl")


def test_bytes_that_are_no_text_name_their_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nna\xefve\n" * 3)
    (tmp_path / "b.jsonl").write_bytes(lines(TEXTS).encode() + b'\n{"text": "na\xefve"}\n')
    (tmp_path / "c.json").write_bytes(b'[\n{"text": "na\xefve"}]')
    (tmp_path / "d.txt").write_bytes("one\n".encode("utf-16") + b"\x00")
    for name, line, advice in (
        ("a.txt", 3, "--text-encoding, such as cp1252"),
        ("b.jsonl", 4, "Save it as UTF-8"),
        ("c.json", 2, "Save it as UTF-8"),
        ("d.txt", 2, "--text-encoding"),
    ):
        with pytest.raises(InputError, match=rf"{name} cannot be read: line {line} .*{advice}"):
            read(tmp_path / name)
    with pytest.raises(InputError, match=r"a\.txt cannot be read: line 3 .*, not ascii"):
        read(tmp_path / "a.txt", encoding="ascii")
    assert read(tmp_path / "a.txt", encoding="latin-1") == ["one\ntwo\nnaïve\n" * 3]


def test_a_chat_needs_a_template(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines([CHAT], "messages"))
    for tokenizer in (None, tiny.byte_tokenizer()):
        with pytest.raises(InputError, match=r"a\.jsonl, line 1: a chat needs the chat template of the model"):
            load_documents(str(tmp_path / "a.jsonl"), "test", Reading(), tokenizer)


def test_a_template_that_writes_the_date_writes_the_same_every_day(tmp_path):
    """As those of Llama 3 and SmolLM3 do. Oracle: the day that is documented."""
    (tmp_path / "a.jsonl").write_text(lines([CHAT], "messages"))
    tokenizer = tiny.byte_tokenizer()
    for call in (
        "strftime_now('%d %b %Y')",
        'strftime_now( "%d %b %Y" )',
        "strftime_now('%d') ~ strftime_now(' %b %Y')",
    ):
        tokenizer.chat_template = "{% if strftime_now is defined %}{{ " + call + " }}{% endif %}" + TEMPLATE
        assert load_documents(str(tmp_path), "test", Reading(), tokenizer) == ["26 Jul 2024" + WRITTEN]


def test_parquet_files_name_their_columns(tmp_path):
    parquet(tmp_path / "a.parquet", words=["x"], numbers=[[1, 2]])
    with pytest.raises(
        InputError, match=r"a\.parquet cannot be read as parquet with a `text` column: .*words, numbers"
    ):
        read(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="with a `numbers` column"):
        read(tmp_path / "a.parquet", column="numbers")
    parquet(tmp_path / "c.parquet", text=["words of another encoding"])
    damaged = (tmp_path / "c.parquet").read_bytes().replace(b"another", b"\xff\xff\xff\xff\xff\xff\xff")
    (tmp_path / "c.parquet").write_bytes(damaged)
    with pytest.raises(InputError, match=r"c\.parquet cannot be read as parquet"):
        read(tmp_path / "c.parquet")
    parquet(tmp_path / "b.parquet", messages=[CHAT, [{"role": "tool", "content": "x"}]])
    with pytest.raises(InputError, match=r"b\.parquet, row 2: the chat template .* \(no tool\)"):
        read(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("builtin", {"column": "body"}, "text_column body has no effect with builtin, which has no columns"),
        ("builtin", {"encoding": "cp1252"}, "text_encoding cp1252 has no effect with builtin, which has no .txt"),
        ("{}/a.txt", {"column": "body"}, r"text_column body has no effect with .*a\.txt"),
        ("{}/a.jsonl", {"encoding": "cp1252"}, r"text_encoding cp1252 has no effect with .*a\.jsonl"),
        (["text"], {"column": "body"}, "text_column body has no effect with a list of 1 documents"),
        (["text"], {"encoding": "cp1252"}, "text_encoding cp1252 has no effect with a list"),
        (["half \ud83d"], {}, "Document 0 of the text: the text holds .*half of a surrogate pair"),
    ],
)
def test_options_without_effect_are_refused(source, options, message, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.jsonl").write_text(lines(TEXTS))
    with pytest.raises(InputError, match=message):
        load_documents(source.format(tmp_path) if isinstance(source, str) else source, "test", Reading(**options))


# The commands


def test_compress_and_eval_take_the_options(llama, tmp_path):
    """Oracle: the same text in a plain file."""
    text = tiny.text(1000, seed=5) + " é"
    (tmp_path / "plain.txt").write_text(text, encoding="utf-8")
    (tmp_path / "latin.txt").write_text(text, encoding="cp1252")
    (tmp_path / "column.jsonl").write_text(json.dumps({"body": text}) + "\n\n", encoding="utf-8-sig")
    named = {"latin.txt": {"text_encoding": "cp1252"}, "column.jsonl": {"text_column": "body"}}
    expected = mspc.evaluate(llama, tmp_path / "plain.txt", sequence_length=32, progress=False)
    artifact = tiny.compress(llama, tmp_path / "out", tmp_path / "plain.txt", effort="fast")
    for name, option in named.items():
        found = mspc.evaluate(llama, tmp_path / name, sequence_length=32, progress=False, **option)
        assert found == replace(expected, text=str(tmp_path / name))
        flags = [word for key, value in option.items() for word in ("--" + key.replace("_", "-"), value)]
        shown = mspc_cli("eval", llama, "--text", tmp_path / name, "--sequence-length", 32, "--json", *flags)
        assert json.loads(shown.stdout)["nll"] == expected.nll
        made = tiny.compress(llama, tmp_path / f"out-{name}", tmp_path / name, effort="fast", **option)
        assert made.manifest["calibration"]["sha256"] == artifact.manifest["calibration"]["sha256"]
        assert option.items() <= made.manifest["settings"].items()
        assert "line 1" in refused("eval", llama, "--text", tmp_path / name, "--sequence-length", 32)


def test_options_of_text_have_no_effect_on_token_ids(llama, tmp_path):
    for option in ({"text_column": "body"}, {"text_encoding": "cp1252"}):
        with pytest.raises(InputError, match=f"{next(iter(option))} .* has no effect with token ids"):
            mspc.evaluate(llama, tiny.ids(2), progress=False, **option)
        recipe = mspc.Recipe(sparsity=0.5, effort="fast", **option)
        with pytest.raises(InputError, match=f"{next(iter(option))} .* has no effect with token ids"):
            mspc.compress(llama, recipe, out=tmp_path / "out", calibration=tiny.ids(4), progress=False)
    assert list(tmp_path.iterdir()) == []
