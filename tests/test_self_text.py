"""Calibration text that the model writes. Oracles: whole forward passes without a cache, and scripts cut by hand."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor

import mspc
from mspc.errors import ActivationError, InputError, Stopped
from mspc.passes import sampling
from mspc.passes.sampling import Row, Writer, draw
from mspc.pipeline import own_text
from mspc.storage.artifact import OWN_TEXT
from mspc.text.reading import Beginning
from mspc.text.scripts import Script, chat_script, document_script

TEMPLATE = "{% for m in messages %}<turn>{{ m.role }}: {{ m.content }}<end>{% endfor %}"
TURN, END = 256, 257
NUMBERS = 8  # sequences of a run
OF_THE_RUN = ("measurements", "progress", "resume", "threads", "tokenizer")


def chatting(template: str | None = TEMPLATE) -> Any:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>", "<end>"]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that ends its turns often, with a chat template."""
    folder = tmp_path_factory.mktemp("chatty")
    model = tiny.make("llama", bos_token_id=None, eos_token_id=END)
    model.lm_head.weight.data[END] *= 2
    tiny.save(model.to(torch.bfloat16), folder)
    chatting().save_pretrained(folder)
    return folder


def compress(model: Any, out: Path, **options: Any) -> mspc.Artifact:
    run = {name: options.pop(name) for name in OF_THE_RUN if name in options}
    given = {"num_sequences": NUMBERS, "sequence_length": 48, "eval": False, "calibration": "self"}
    quick = {"effort": "fast", "solver": "mask", "sparsity": 0.5}
    return mspc.compress(model, mspc.Recipe(**given | quick | options), out=out, **{"progress": False} | run)


def kept(folder: Path) -> list[Tensor]:
    """The texts in a folder, the shortest first."""
    return sorted((load_file(file)["ids"] for file in folder.glob("text-*")), key=len)


def text_of(model: Any, folder: Path, **options: Any) -> Tensor:
    """The calibration text of a run."""
    compress(model, folder / "out", measurements=folder / "kept", **options)
    (text,) = kept(folder / "kept")
    return text


def never(*_: object) -> None:
    raise AssertionError("a text was written again")


# What is written


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_tokens_are_drawn_from_what_whole_passes_without_a_cache_predict(family):
    model, seed = tiny.make(family), 5
    scripts = [Script(((3,),), frozenset({7})), Script(((1, 2), (9, 4)), frozenset({7}))]
    allowed = torch.ones(tiny.VOCABULARY, dtype=torch.bool)
    allowed[200:] = False
    writer = Writer(model, scripts, 40, seed, allowed)
    writer.advance(7)
    writer.advance(100)
    generator, rows, written = torch.Generator().manual_seed(seed), [Row(script) for script in scripts], []
    for place in range(40):
        logits = torch.zeros(2, tiny.VOCABULARY)
        if place:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor(written).T, use_cache=False).logits[:, -1]
        shares = torch.where(allowed, logits, -torch.inf).softmax(-1)
        sampled = draw(shares, generator).tolist()
        written.append([row.next(token) for row, token in zip(rows, sampled, strict=True)])
    assert torch.equal(writer.ids, torch.tensor(written).T)
    assert writer.ids.max() < 200


def test_draws_have_the_frequencies_of_the_probabilities():
    shares = torch.tensor([[0.0, 0.5, 0.2, 0.0, 0.3, 0.0]])
    found = draw(shares.expand(20_000, 6), torch.Generator().manual_seed(0)).bincount(minlength=6) / 20_000
    assert found[shares[0] == 0].sum() == 0
    assert (found - shares[0]).abs().max() < 0.015  # four standard deviations


def test_rows_follow_their_scripts():
    chat = Row(Script(((1, 2), (9, 4)), frozenset({9, 8})))
    #        given  user   its end, given, reply, end, given, user, end of all: a new document
    sampled = [0, 0, 5, 6, 9, 0, 5, 8, 0, 0, 5, 8, 0, 0]
    assert [chat.next(token) for token in sampled] == [1, 2, 5, 6, 9, 4, 5, 8, 1, 2, 5, 8, 1, 2]
    document = Row(Script(((3,),), frozenset({7})))
    assert [document.next(token) for token in (0, 5, 7, 5, 5)] == [3, 5, 7, 3, 5]
    free = Row(Script((), frozenset({7})))
    assert [free.next(token) for token in (0, 5, 7, 5)] == [0, 5, 7, 5]


def test_a_chat_begins_where_the_template_has_the_turn_of_the_user():
    tokenizer = chatting()
    script = chat_script(tokenizer, Beginning(), (END,))
    assert script is not None
    assert [tokenizer.decode(list(part)) for part in script.parts] == ["<turn>user: ", "<end><turn>assistant: "]
    assert script.ends == {END}
    script = chat_script(tokenizer, Beginning((), (99,)), ())
    assert (script.parts[0][:2], script.ends) == ((99, TURN), {END})


def test_a_template_without_a_token_for_the_end_of_a_turn_leaves_it_to_the_model():
    tokenizer = chatting("{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}")
    script = chat_script(tokenizer, Beginning(), (END,))
    assert [tokenizer.decode(list(part)) for part in script.parts] == ["[user]"]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (None, ""),
        ("{{ raise_exception('no system message') }}", "refuses this chat (no system message)"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "does not write turns as they are"),
    ],
)
def test_a_template_that_cannot_be_used_gives_no_chats(template, why, caplog):
    with caplog.at_level("INFO", "mspc"):
        assert chat_script(chatting(template), Beginning(), (END,)) is None
    assert why in caplog.text
    assert ("writes no chats" in caplog.text) == bool(why)


def test_documents_begin_as_the_tokenizer_begins_them_or_else_after_another_one():
    tokenizer = chatting()
    parts = [
        document_script(tokenizer, begin, bos, ends).parts
        for begin, bos, ends in ((Beginning((4,), (4,)), 5, (6,)), (Beginning(), 5, (6,)), (Beginning(), None, (6,)))
    ]
    assert parts == [((4,),), ((5,),), ((6,),)]
    assert document_script(tokenizer, Beginning(), None, ()).parts == ()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    assert document_script(tokenizer, Beginning(), 5, (6,)).parts == ((258,),)


# A run


def test_every_second_sequence_is_a_chat_and_documents_begin_anew(chatty, tmp_path):
    text = text_of(chatty, tmp_path, num_sequences=32)
    tokenizer = mspc.model.hub.load_tokenizer(chatty)
    assert text.shape == (32, 48)
    assert (text[0::2, 0] == END).all()  # no BOS: after the end of another document
    assert text.max() <= END  # ids that no token has are not written
    head, turn = (tokenizer(part)["input_ids"] for part in ("<turn>user: ", "<end><turn>assistant: "))
    replies = 0
    for row in text[1::2].tolist():
        assert row[: len(head)] == head
        ends = [at for at, token in enumerate(row) if token == END]
        for number, at in enumerate(ends):
            given = turn[1:] if number % 2 == 0 else head
            replies += number % 2
            assert row[at + 1 :][: len(given)] == given[: len(row) - at - 1]
    assert replies


def test_a_model_without_any_special_token_begins_with_any(tmp_path):
    model = tiny.build(tmp_path / "model", "llama", bos_token_id=None, eos_token_id=None)
    text = text_of(model, tmp_path, num_sequences=32)
    assert len(set(text[:, 0].tolist())) > 16
    assert text.max() < 256


def test_seed_and_text_decide_each_other(chatty, tmp_path):
    first, again, other = (text_of(chatty, tmp_path / str(number), seed=seed) for number, seed in enumerate((0, 0, 1)))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_threads_change_no_byte(chatty, tmp_path, monkeypatch):
    monkeypatch.setattr(own_text, "ROWS", 2)
    runs = [compress(chatty, tmp_path / str(threads), threads=threads) for threads in (1, 3)]
    assert runs[0].manifest["calibration"] == runs[1].manifest["calibration"]


def test_calibration_text_does_not_depend_on_the_other_texts(chatty, tmp_path):
    alone, whole = (compress(chatty, tmp_path / str(e), eval=e, measurements=tmp_path / "kept") for e in (False, True))
    assert alone.manifest["calibration"] == whole.manifest["calibration"]
    assert whole.manifest["evaluation"]["text"] == "self"
    calibration, test = kept(tmp_path / "kept")
    assert (len(calibration), len(test)) == (NUMBERS, 16)
    rows = {tuple(row) for part in (calibration, test) for row in part.tolist()}
    assert len(rows) == NUMBERS + 16  # no sequence is in both


def test_the_manifest_says_what_was_written(chatty, tmp_path):
    artifact = compress(chatty, tmp_path / "out", measurements=tmp_path / "kept")
    said = artifact.manifest["calibration"]
    (text,) = kept(tmp_path / "kept")
    assert (said["source"], said["tokens"]) == ("self", NUMBERS * 48)
    assert said["sha256"] == mspc.text.tokens.Tokens(text, "self").sha256
    assert artifact.manifest["seconds_by_stage"]["Writing calibration text"] > 0
    assert not (artifact.path / OWN_TEXT).exists()


def test_a_second_run_writes_nothing(chatty, tmp_path, monkeypatch):
    first = compress(chatty, tmp_path / "first", measurements=tmp_path / "kept")
    monkeypatch.setattr(own_text, "Writer", never)
    second = compress(chatty, tmp_path / "second", measurements=tmp_path / "kept", sparsity=0.25)
    assert first.manifest["calibration"] == second.manifest["calibration"]
    with pytest.raises(AssertionError, match="written again"):
        compress(chatty, tmp_path / "third", measurements=tmp_path / "kept", seed=1)


@pytest.mark.parametrize("stage", [pytest.param("Trying the dense model", marks=pytest.mark.slow), "Compressing"])
def test_a_run_that_was_cut_off_does_not_write_again(chatty, tmp_path, monkeypatch, stage):
    whole = compress(chatty, tmp_path / "whole")
    with pytest.raises(Stopped):
        compress(chatty, tmp_path / "out", progress=lambda event: event.stage != stage)
    assert len(kept(tmp_path / "out" / OWN_TEXT)) == 1
    monkeypatch.setattr(own_text, "Writer", never)
    resumed = compress(chatty, tmp_path / "out", resume=True)
    assert resumed.manifest["files"] == whole.manifest["files"]
    assert not (tmp_path / "out" / OWN_TEXT).exists()


def test_a_run_that_is_stopped_while_it_writes_keeps_the_pieces(chatty, tmp_path, monkeypatch):
    monkeypatch.setattr(own_text, "ROWS", 2)
    whole, written = compress(chatty, tmp_path / "whole"), []
    with pytest.raises(Stopped):
        compress(chatty, tmp_path / "out", threads=1, progress=lambda e: (e.stage[:7], e.done) != ("Writing", 5))
    assert len(kept(tmp_path / "out" / OWN_TEXT)) == 2  # four steps
    monkeypatch.setattr(own_text, "Writer", lambda *given: written.append(given) or Writer(*given))
    resumed = compress(chatty, tmp_path / "out", resume=True)
    assert len(written) == 2
    assert resumed.manifest["calibration"] == whole.manifest["calibration"]


def test_progress_counts_every_step(chatty, tmp_path, monkeypatch):
    monkeypatch.setattr(own_text, "ROWS", 4)
    events: list[mspc.Event] = []
    compress(chatty, tmp_path / "out", progress=events.append)
    counts = [(event.done, event.total) for event in events if event.stage == "Writing calibration text"]
    assert counts == [(done, 4) for done in range(5)]  # 2 pieces of 4 sequences, 48 tokens by 32


def test_a_model_in_memory_and_its_tokenizer(chatty, tmp_path):
    artifact = compress(tiny.reference(chatty), tmp_path / "out", tokenizer=chatting())
    assert artifact.manifest["calibration"]["source"] == "self"


# What is refused


def test_too_little_memory_is_said_before_the_model_is_read(chatty, tmp_path, monkeypatch):
    monkeypatch.setattr(own_text, "free_memory", lambda device: 10_000)
    with pytest.raises(InputError, match=r"needs the whole model and 32 sequences in memory, .* 10 KB are free"):
        compress(chatty, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bos": "no"}, "bos no has no effect with calibration self"),
        ({"text_column": "body"}, "text_column body has no effect with self"),
        ({"text_encoding": "cp1252"}, "text_encoding cp1252 has no effect with self"),
    ],
)
def test_options_without_effect_are_refused(chatty, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        compress(chatty, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_logits_that_are_nan_are_refused(monkeypatch):
    model = tiny.make("llama")
    model.lm_head.weight.data[3] = torch.nan
    writer = Writer(model, [Script(((3,),), frozenset())], 4, 0, torch.ones(tiny.VOCABULARY, dtype=torch.bool))
    with pytest.raises(ActivationError, match="NaN in the logits of token 1"):
        writer.advance(4)


def test_a_model_without_a_key_value_cache_is_refused():
    with pytest.raises(InputError, match="needs a model with a key-value cache, and Linear has none"):
        sampling.cache_keyword(torch.nn.Linear(2, 2))


def test_a_damaged_text_is_named(chatty, tmp_path):
    compress(chatty, tmp_path / "first", measurements=tmp_path / "kept")
    (file,) = (tmp_path / "kept").glob("text-*")
    file.write_bytes(b"{}")
    with pytest.raises(InputError, match=rf"{file} cannot be read as text .* Delete it to write it again"):
        compress(chatty, tmp_path / "second", measurements=tmp_path / "kept")


def test_evaluation_takes_no_text_of_the_model(chatty):
    with pytest.raises(InputError, match=r"The text self, which the model writes, is for --calibration of compress"):
        mspc.evaluate(chatty, "self", progress=False)


def test_a_folder_of_that_name_is_a_folder(chatty, tmp_path, monkeypatch, calibration):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "text.txt").write_text(calibration.read_text())
    found, same = (
        compress(chatty, tmp_path / f"out{n}", calibration=c) for n, c in enumerate(("./self", str(calibration)))
    )
    assert found.manifest["calibration"]["sha256"] == same.manifest["calibration"]["sha256"]
    assert compress(chatty, tmp_path / "out", calibration="self").manifest["calibration"]["source"] == "self"
