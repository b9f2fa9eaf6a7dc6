"""Windows that begin as the tokenizer begins a text. Oracle: windows made by hand, in a plain forward pass."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import few
from test_cli import FAST, mspc_cli, refused
from test_tokens import NUMBERS, corpus, numbers_tokenizer
from tokenizers import Tokenizer, processors
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import mspc
from mspc.bench.request import Request, make_plan
from mspc.bench.run import perplexity_of
from mspc.errors import InputError
from mspc.pipeline.calibration import draw
from mspc.progress import Silent
from mspc.text.reading import Beginning, Reading, beginning
from mspc.text.tokens import calibration_tokens, windows_of_test_text

BOS, EOS, MASK, SOP = 256, 257, 258, 259
NAMES = {"<s>": BOS, "</s>": EOS, "[gMASK]": MASK, "<sop>": SOP}
TEMPLATES = {
    "bos": ("<s> $A", [BOS]),
    "bos and eos": ("<s> $A </s>", [BOS]),
    "two tokens": ("[gMASK] <sop> $A", [MASK, SOP]),
    "bos twice": ("<s> <s> $A", [BOS, BOS]),
    "eos": ("$A </s>", []),
    "nothing": ("$A", []),
}
"""Template of the post-processor, and what every window must begin with."""


def tokenizer(template: str, **named: str) -> PreTrainedTokenizerFast:
    """Bytes, and four special tokens that a template may use."""
    backend = Tokenizer.from_str(tiny.byte_tokenizer().backend_tokenizer.to_str())
    backend.add_special_tokens(list(NAMES))
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(NAMES.items()))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def model_with(folder: Path, template: str, **named: str) -> Path:
    tiny.build(folder, "llama", bos_token_id=None, eos_token_id=None, pad_token_id=None)
    tokenizer(template, **named).save_pretrained(folder)
    return folder


def plain(text: str) -> list[int]:
    """The tokens of a text and nothing else: one for each byte."""
    return list(tiny.byte_tokenizer()(text)["input_ids"])


def by_hand(text: str, begin: list[int], length: int = tiny.LENGTH) -> Tensor:
    """The beginning and as many bytes of text as fit, for all windows that are full."""
    left, data = length - len(begin), plain(text)
    return torch.tensor([begin + data[i : i + left] for i in range(0, len(data) - left + 1, left)])


# Evaluation


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_perplexity_is_that_of_windows_made_by_hand(kind, test_text, tmp_path):
    """The folder a block at a time, and the model in memory."""
    template, begin = TEMPLATES[kind]
    folder = model_with(tmp_path / "model", template)
    ids = by_hand(test_text.read_text(), begin)
    with torch.no_grad():
        losses = tiny.losses(tiny.reference(folder), ids)[:, max(len(begin) - 1, 0) :].double()
    for model in (folder, tiny.reference(folder)):
        found = mspc.evaluate(model, test_text, sequence_length=tiny.LENGTH, device="cpu", progress=False)
        assert found.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-5)
        assert (found.windows, found.tokens) == (len(ids), losses.numel())
        assert losses.shape[1] == tiny.LENGTH - max(len(begin), 1)


@pytest.mark.parametrize("kind", ["bos", "two tokens", "nothing"])
def test_the_divergence_is_that_of_windows_made_by_hand(kind, test_text, tmp_path):
    template, begin = TEMPLATES[kind]
    folder = model_with(tmp_path / "model", template)
    other = tiny.build(tmp_path / "other", "llama", seed=1)
    ids, first = by_hand(test_text.read_text(), begin), max(len(begin) - 1, 0)
    with torch.no_grad():
        q, p = (
            tiny.reference(path)(input_ids=ids).logits[:, first:].double().log_softmax(-1) for path in (folder, other)
        )
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    options = {"sequence_length": tiny.LENGTH, "device": "cpu", "progress": False}
    assert mspc.evaluate(folder, test_text, against=other, **options).divergence == pytest.approx(expected, rel=1e-4)
    in_memory = mspc.evaluate(tiny.reference(folder), test_text, against=other, **options)
    assert in_memory.divergence == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("max_windows", [1, 3, None])
def test_no_window_depends_on_how_many_there_are(max_windows, test_text):
    for template, begin in TEMPLATES.values():
        ids = windows_of_test_text(tokenizer(template), str(test_text), 16, max_windows).ids
        assert torch.equal(ids, by_hand(test_text.read_text(), begin, 16)[:max_windows])


def test_the_last_window_may_end_with_the_text():
    """The EOS of the tokenizer is no text, so it fills no window."""
    both = tokenizer("<s> $A </s>")
    assert windows_of_test_text(both, ["abcdef"], 4, None).ids.tolist() == [[BOS, *plain("abc")], [BOS, *plain("def")]]
    assert windows_of_test_text(both, ["abcde"], 4, None).ids.tolist() == [[BOS, *plain("abc")]]
    with pytest.raises(InputError, match="3 tokens do not fill one window of 4"):
        windows_of_test_text(both, ["ab"], 4, None)


# Options


@pytest.mark.parametrize(
    ("template", "named", "bos", "begin"),
    [
        ("<s> $A", {}, "auto", [BOS]),
        ("<s> $A", {}, "yes", [BOS]),
        ("<s> $A", {"bos_token": "<s>"}, "no", []),
        ("<s> $A </s>", {"bos_token": "<s>", "eos_token": "</s>"}, "no", []),
        ("$A", {"bos_token": "<s>"}, "auto", []),
        ("$A", {"bos_token": "<s>"}, "yes", [BOS]),
        ("$A", {"bos_token": "<s>"}, "no", []),
        ("$A", {"eos_token": "</s>"}, "no", []),
        ("$A </s>", {"bos_token": "</s>", "eos_token": "</s>"}, "auto", []),
        ("</s> $A", {"bos_token": "</s>", "eos_token": "</s>"}, "auto", [EOS]),
        ("</s> $A </s>", {"bos_token": "</s>", "eos_token": "</s>"}, "auto", [EOS]),
        ("[gMASK] <sop> $A", {"eos_token": "</s>"}, "yes", [MASK, SOP]),
    ],
)
def test_what_windows_begin_with(template, named, bos, begin, test_text):
    ids = windows_of_test_text(tokenizer(template, **named), str(test_text), 16, 5, Reading(bos)).ids
    assert torch.equal(ids, by_hand(test_text.read_text(), begin, 16)[:5])
    drawn = calibration_tokens(tokenizer(template, **named), str(test_text), 5, 16, 0, Reading(bos))
    assert drawn.begin == tuple(begin)
    assert (drawn.ids[:, : len(begin)] == torch.tensor(begin)).all()
    assert set(drawn.ids[:, len(begin) :].flatten().tolist()) <= set(plain(test_text.read_text())) | {EOS} - set(begin)


@pytest.mark.parametrize("config", [{}, {"add_bos_token": False}, {"add_bos_token": True}, {"add_bos_token": None}])
def test_a_tokenizer_that_is_said_to_add_a_bos_has_one(config, tmp_path):
    """transformers reads no `add_bos_token` where there is a tokenizer.json."""
    tokenizer("$A", bos_token="<s>").save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    begin = (BOS,) if config.get("add_bos_token") else ()
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("a")["input_ids"] == plain("a")
    assert beginning(loaded, "auto").wanted == begin
    assert beginning(loaded, "no").wanted == ()


def test_what_a_tokenizer_is_said_to_add_reaches_the_artifact(calibration, test_text, tmp_path):
    """Oracle: the artifact of the folder, whose tokenizer files are copied."""
    folder = model_with(tmp_path / "model", "$A", bos_token="<s>")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"add_bos_token": True}))
    copied = tiny.compress(folder, tmp_path / "a", calibration, effort="fast")
    recipe = mspc.Recipe(
        sparsity=0.5, effort="fast", calibration=str(calibration), num_sequences=4, sequence_length=tiny.LENGTH
    )
    loaded = AutoTokenizer.from_pretrained(folder)
    saved = mspc.compress(tiny.reference(folder), recipe, out=tmp_path / "b", tokenizer=loaded, progress=False)
    assert saved.manifest["calibration"] == copied.manifest["calibration"]
    assert saved.manifest["calibration"]["bos"] == [BOS]
    options = {"sequence_length": 32, "device": "cpu", "progress": False}
    assert mspc.evaluate(saved, test_text, **options) == mspc.evaluate(copied, test_text, **options)
    assert mspc.evaluate(saved, test_text, **options) != mspc.evaluate(saved, test_text, bos="no", **options)


def test_add_bos_token_of_a_tokenizer_counts():
    made = tokenizer("$A", bos_token="<s>", add_bos_token=True)
    assert beginning(made, "auto") == Beginning((BOS,), (BOS,))
    made.add_bos_token = False
    assert beginning(made, "auto") == Beginning()


def test_a_bos_that_is_not_there_cannot_be_asked_for(llama, test_text, calibration, tmp_path):
    options = ("--text", test_text, "--sequence-length", 32)
    assert "bos is yes, but the tokenizer has no BOS token" in refused("eval", llama, *options, "--bos", "yes")
    assert "Unknown bos 'ye': did you mean 'yes'" in refused("eval", llama, *options, "--bos", "ye")
    assert "Unknown bos 'never'" in refused("bench", llama, "--bos", "never")
    with pytest.raises(InputError, match="Unknown bos 'maybe': choose one of auto, no, yes"):
        mspc.Recipe(bos="maybe")
    with pytest.raises(InputError, match="bos is yes, but the tokenizer has no BOS token"):
        tiny.compress(llama, tmp_path / "out", calibration, effort="fast", bos="yes")
    assert not (tmp_path / "out").exists()


def test_token_ids_are_used_as_they_are(llama, tmp_path):
    folder, ids = model_with(tmp_path / "model", "<s> $A"), tiny.ids(3)
    found = mspc.evaluate(folder, ids, device="cpu", progress=False)
    with torch.no_grad():
        assert found.nll == pytest.approx(float(tiny.losses(tiny.reference(folder), ids).mean()), rel=1e-5)
    assert found == mspc.evaluate(folder, ids, device="cpu", bos="no", progress=False)
    with pytest.raises(InputError, match="bos yes has no effect with token ids"):
        mspc.evaluate(folder, ids, device="cpu", bos="yes", progress=False)
    recipe = mspc.Recipe(sparsity=0.5, effort="fast", bos="yes")
    with pytest.raises(InputError, match="bos yes has no effect with token ids"):
        mspc.compress(llama, recipe, out=tmp_path / "out", calibration=ids, progress=False)
    made = mspc.compress(
        folder, mspc.Recipe(sparsity=0.5, effort="fast"), out=tmp_path / "b", calibration=ids, progress=False
    )
    assert made.manifest["calibration"]["bos"] == []


def test_eval_and_bench_and_the_manifest_say_bos(test_text, calibration, tmp_path):
    """Oracle: `mspc.evaluate` with the same option, which differs from that without."""
    folder = model_with(tmp_path / "model", "$A", bos_token="<s>")
    options = ("--text", test_text, "--sequence-length", 32, "--json")
    found = [json.loads(mspc_cli("eval", folder, *options, "--bos", bos).stdout) for bos in ("auto", "yes", "no")]
    assert found[0] == found[2] != found[1]
    assert found[1]["nll"] == mspc.evaluate(folder, test_text, sequence_length=32, bos="yes", progress=False).nll
    artifact = tiny.compress(folder, tmp_path / "out", calibration, effort="fast", bos="yes")
    assert artifact.manifest["settings"]["bos"] == artifact.manifest["recipe"]["bos"] == "yes"
    assert artifact.manifest["calibration"]["bos"] == [BOS]
    plain = tiny.compress(folder, tmp_path / "plain", calibration, effort="fast")
    assert plain.manifest["settings"]["bos"] == "auto"
    assert plain.manifest["calibration"]["bos"] == []
    assert plain.manifest["calibration"]["sha256"] != artifact.manifest["calibration"]["sha256"]


def test_a_note_says_what_windows_begin_with(test_text, calibration, tmp_path):
    folder = model_with(tmp_path / "model", "<s> $A")
    note = "Every window begins with BOS (token 256)."
    options = ("--text", test_text, "--sequence-length", 32)
    assert note in mspc_cli("eval", folder, *options).stderr
    assert note not in mspc_cli("eval", folder, *options, "--bos", "no").stderr
    command = ("compress", folder, "--out", tmp_path / "out", "--calibration", calibration, "--sparsity", 0.5, *FAST)
    assert note in mspc_cli(*command).stderr


def test_the_bench_passes_it_on(tmp_path):
    folder = model_with(tmp_path / "model", "<s> $A")
    for bos in ("auto", "no"):
        expected = mspc.evaluate(folder, max_windows=20, bos=bos, progress=False).perplexity
        plan = make_plan(Request((str(folder),), device="cpu", bos=bos))
        assert perplexity_of(plan.groups[0][0], plan, Silent()) == expected


# Calibration


def test_calibration_validation_and_test_windows_begin_with_it(calibration):
    """Oracle: slices of the text."""
    settings = mspc.Recipe(calibration=str(calibration), num_sequences=16, sparsity=0.5).settings()
    nothing = partial(pytest.fail, "the text is given")
    drawn = draw(replace(settings, sequence_length=24), None, lambda: tokenizer("<s> $A"), nothing)
    parts = drawn.calibration.ids, drawn.validation, drawn.test
    text, data = calibration.read_text(), torch.cat(parts)
    assert [len(part) for part in parts] == [16, 2, 16]
    assert (data[:, 0] == BOS).all()
    assert all(tiny.byte_tokenizer().decode(row) in text for row in data[:, 1:])
    assert len({tuple(row) for row in data.tolist()}) == 34


@few
@given(st.data(), st.integers(3, 9), st.integers(0, 99))
def test_a_bos_is_neither_doubled_nor_lost_and_no_text_is_used_twice(tmp_path_factory, data, length, seed):
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=8))
    source = corpus(tmp_path_factory.mktemp("text"), lengths)
    starts, bos = {sum(lengths[:i]) for i in range(len(lengths))}, 9999
    sequences = sum(lengths) // length
    if not sequences:
        return
    rows = calibration_tokens(numbers_tokenizer(bos=True), source, sequences, length, seed).ids.tolist()
    seen = [token for row in rows for token in row if token != bos]
    assert len(seen) == len(set(seen))
    for row in rows:
        assert row[0] == bos
        for place in range(1, length):
            before, token = row[place - 1], row[place]
            assert not before == token == bos
            if token in starts:
                assert before == bos  # each document begins with it
            elif before == bos:
                assert place == 1  # and nothing else does but a window
    with pytest.raises(InputError, match="Too little text"):
        calibration_tokens(numbers_tokenizer(bos=True), source, sum(lengths) + 1, length, seed)


def test_a_chat_that_writes_its_own_bos_has_one(tmp_path):
    """Templates of Llama 3 and Gemma write the BOS that the tokenizer adds too."""
    chatting = tokenizer("<s> $A", bos_token="<s>")
    chatting.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")
    ids = calibration_tokens(chatting, str(file), 1, 6, 0).ids
    assert ids.tolist() == [[BOS, *plain("u:hi;")]]
    assert windows_of_test_text(chatting, str(file), 6, None).ids.tolist() == [[BOS, *plain("u:hi;")]]


def test_a_beginning_that_a_cut_would_part_moves_on():
    """By hand: two tokens before each document; the second document would begin with the last place of a window."""
    begin = Beginning((7, 8), (7, 8))
    stream = begin.before([1, 2, 3]) + begin.before([4, 5])
    assert begin.cut(stream, 6) == [[7, 8, 1, 2, 3, 7], [7, 8, 4, 5]]
    assert begin.cut(stream, 4) == [[7, 8, 1, 2], [7, 8, 3, 7], [7, 8, 4, 5]]
    assert begin.before([7, 8, 1]) == [7, 8, 1]
    assert Beginning().cut([1, 2, 3], 2) == [[1, 2], [3]]


def test_a_window_must_have_room_for_text():
    with pytest.raises(InputError, match="sequence_length is 2, but every window begins with 2 tokens"):
        windows_of_test_text(tokenizer("[gMASK] <sop> $A"), ["abc"], 2, None)
    with pytest.raises(InputError, match="sequence_length is 2, but every window begins with 2 tokens"):
        calibration_tokens(tokenizer("[gMASK] <sop> $A"), ["abc"], 1, 2, 0)


def test_without_a_bos_the_draw_is_what_it_was(tmp_path):
    """Golden bytes, from before there was the option."""
    drawn = calibration_tokens(NUMBERS, corpus(tmp_path, [100] * 20 + [5] * 40 + [33] * 7), 40, 32, 3)
    assert drawn.sha256 == "b27c09e7c28d2bdf77c4ec3b608f421a925f30291fff96646292b795698e77ce"
