"""Text that models write: tokens against `generate` of transformers, pieces against whole texts, and the command."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
import torch
from conftest import BUNDLED
from gguf_models import AWKWARD, byte_level, fast, pieces
from test_cli import mspc_cli, refused
from transformers import AutoModelForCausalLM, AutoTokenizer

import mspc
from mspc.errors import InputError
from mspc.progress import Silent
from mspc.runtime.generation import Choosing, Generation, Request
from mspc.text.prompts import BROKEN, Pieces

PROMPT = "the other thing"
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
QUIET = {"progress": False, "device": "cpu"}


def by_transformers(folder: Path, ids: Sequence[int], count: int, **options: object) -> list[int]:
    """Oracle: the new tokens of a plain greedy `generate` of the dense model in a folder, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.tensor([list(ids)])
    written = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False, **options
    )
    return written[0, len(ids) :].tolist()


def copy_of(folder: Path, out: Path, **files: dict[str, object]) -> Path:
    """A copy of a model with some values of its JSON files changed."""
    shutil.copytree(folder, out)
    for name, values in files.items():
        path = out / f"{name}.json"
        old = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(old | values))
    return out


# Tokens


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_greedy_tokens_are_those_of_transformers(folder_of, family):
    """Beyond the sliding window of gemma2, too."""
    folder = folder_of(family)
    written = mspc.generate(folder, PROMPT, max_new_tokens=24, **QUIET)
    text = "".join(written)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT)["input_ids"]
    assert written.request.prompt_ids == ids
    assert written.ids == by_transformers(folder, ids, 24)
    assert (written.ended, written.prompt_tokens, len(written.ids)) == ("limit", len(ids), 24)
    whole = tokenizer.decode(written.ids, clean_up_tokenization_spaces=False)
    assert whole.rstrip(BROKEN) == text


def test_every_kind_of_path_writes_the_same(artifact_of, tmp_path):
    """Oracle: transformers on the dense export."""
    artifact = artifact_of("llama")
    dense = artifact.export("dense", tmp_path / "dense", verify=False, progress=False)
    sparse = artifact.export("sparse", tmp_path / "sparse", verify=False, progress=False)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    expected = by_transformers(dense, tokenizer(PROMPT)["input_ids"], 12)
    models = (artifact, artifact.path, str(dense), sparse, mspc.load(sparse, device="cpu"))
    for model in (*models, AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)):
        in_memory = {} if isinstance(model, str | Path | mspc.Artifact) else {"tokenizer": tokenizer}
        written = mspc.generate(model, PROMPT, max_new_tokens=12, **QUIET, **in_memory)
        assert "".join(written) == tokenizer.decode(expected).rstrip(BROKEN)
        assert written.ids == expected


def test_a_gguf_file_is_a_path(tmp_path, artifact_of, monkeypatch):
    """Oracle: transformers on the file."""
    pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tiny.build(tmp_path / "model", "llama", hidden_size=64, vocab_size=4096)
    for file in BUNDLED.glob("tokenizer*"):
        shutil.copy(file, model)
    artifact = artifact_of(model, bits=8)
    artifact.export("gguf", tmp_path / "out", verify=False, progress=False)
    file = next((tmp_path / "out").glob("*.gguf"))
    written = mspc.generate(file, "def add(", max_new_tokens=6, **QUIET)
    list(written)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    ids = torch.tensor([written.request.prompt_ids])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert written.ids == expected[0, ids.shape[1] :].tolist()


def test_a_text_ends_at_every_end_token(llama, tmp_path):
    """Oracle: transformers with the same list. The token that ends the text is not in it."""
    ids = AutoTokenizer.from_pretrained(llama)(PROMPT)["input_ids"]
    free = by_transformers(llama, ids, 24, eos_token_id=None)
    at = next(place for place, token in enumerate(free) if place >= 3 and token not in free[:place])
    unused = next(token for token in range(256) if token not in free)
    folder = copy_of(llama, tmp_path / "model", generation_config={"eos_token_id": [unused, free[at]]})
    written = mspc.generate(folder, PROMPT, max_new_tokens=24, **QUIET)
    text = "".join(written)
    assert written.ids == by_transformers(folder, ids, 24) == free[: at + 1]
    assert written.ended == "end of text"
    assert text == AutoTokenizer.from_pretrained(llama).decode(free[:at])


def test_the_end_token_of_the_tokenizer_ends_a_text(llama, tmp_path):
    """As in models that were tuned on chats, whose configs still name the end of a document."""
    ids = AutoTokenizer.from_pretrained(llama)(PROMPT)["input_ids"]
    free = by_transformers(llama, ids, 24, eos_token_id=None)
    folder = copy_of(llama, tmp_path / "model", generation_config={"eos_token_id": 259})
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(free[5])
    tokenizer.save_pretrained(folder)
    written = mspc.generate(folder, PROMPT, max_new_tokens=24, **QUIET)
    list(written)
    assert written.ids == free[: free.index(free[5]) + 1]


def test_a_model_without_end_tokens_says_so(llama, tmp_path, caplog):
    folder = copy_of(llama, tmp_path / "model")
    for name in ("config", "generation_config"):
        values = json.loads((folder / f"{name}.json").read_text())
        values["eos_token_id"] = None
        (folder / f"{name}.json").write_text(json.dumps(values))
    with caplog.at_level("INFO", "mspc"):
        written = mspc.generate(folder, PROMPT, max_new_tokens=3, **QUIET)
    assert "names an end of text" in caplog.text
    list(written)
    assert written.ended == "limit"


def test_other_settings_of_the_model_do_not_count(llama, tmp_path):
    """Penalties and samplers of generation_config.json change nothing. Oracle: the model without them."""
    folder = copy_of(
        llama, tmp_path / "model", generation_config={"repetition_penalty": 9.0, "do_sample": True, "top_k": 3}
    )
    both = [mspc.generate(path, PROMPT, max_new_tokens=12, **QUIET) for path in (llama, folder)]
    for written in both:
        list(written)
    assert both[0].ids == both[1].ids


# Sampling


def test_a_seed_decides_the_text(llama):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    texts = []
    for seed in (1, 1, 2):
        written = mspc.generate(llama, PROMPT, max_new_tokens=20, temperature=1.0, seed=seed, **QUIET)
        torch.rand(seed)  # somebody else draws
        texts.append(("".join(written), written.ids))
    assert texts[0] == texts[1]
    assert texts[0][1] != texts[2][1]
    torch.set_rng_state(state)
    expected = torch.rand(3)
    torch.set_rng_state(state)
    list(mspc.generate(llama, PROMPT, max_new_tokens=3, temperature=1.0, **QUIET))
    assert torch.equal(torch.rand(3), expected)  # the global generator is left alone


def test_a_low_temperature_draws_the_likeliest(llama):
    greedy, cold = (
        mspc.generate(llama, PROMPT, max_new_tokens=12, temperature=temperature, **QUIET)
        for temperature in (None, 1e-6)
    )
    assert (list(greedy), greedy.ids) == (list(cold), cold.ids)


def test_draws_follow_the_probabilities():
    """Oracle: softmax of the logits over the temperature, within five standard deviations of 4000 draws."""
    logits, temperature, draws = torch.tensor([[0.0, 1.0, 2.0, -1.0, -torch.inf]]), 0.7, 4000
    choose = Choosing(torch.nn.Identity(), torch.device("cpu"), temperature, 3)
    found = torch.bincount(torch.cat([choose(logits, logits).argmax(-1) for _ in range(draws)]), minlength=5) / draws
    expected = (logits[0] / temperature).softmax(-1)
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt()).all()


# Prompts


def test_the_chat_template_is_that_of_transformers(llama, tmp_path, caplog):
    """Oracle: `apply_chat_template`; raw, the tokenizer on the prompt itself."""
    folder = copy_of(llama, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True)
    with caplog.at_level("INFO", "mspc"):
        asked, raw = (
            mspc.generate(folder, PROMPT, max_new_tokens=2, raw=raw, **QUIET).request.prompt_ids
            for raw in (False, True)
        )
    assert asked == chat["input_ids"]
    assert raw == tokenizer(PROMPT)["input_ids"]
    assert "no chat template" not in caplog.text


def test_a_raw_prompt_begins_with_bos(llama, tmp_path):
    """If the tokenizer is said to add it, as in `mspc eval`."""
    folder = copy_of(llama, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(7)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert mspc.generate(folder, "a b", **QUIET).request.prompt_ids == [7, *tokenizer("a b")["input_ids"]]


def test_without_a_template_the_prompt_is_continued_and_stderr_says_so(llama):
    plain = mspc_cli("generate", llama, "--prompt", PROMPT, "--max-new-tokens", 5)
    raw = mspc_cli("generate", llama, "--prompt", PROMPT, "--max-new-tokens", 5, "--raw")
    assert plain.stdout == raw.stdout
    assert "no chat template" in plain.stderr
    assert "no chat template" not in raw.stderr


def test_a_template_that_refuses_is_an_error(llama, tmp_path):
    folder = copy_of(llama, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}")
    message = refused("generate", folder, "--prompt", PROMPT)
    assert "no users here" in message
    assert "--raw" in message


def test_the_context_is_a_limit(llama, caplog):
    """128 tokens: a prompt of 120 leaves 8. Oracle: the config."""
    with caplog.at_level("INFO", "mspc"):
        written = mspc.generate(llama, "x" * 120, **QUIET)
        assert "leaves" not in caplog.text
        asked = mspc.generate(llama, "x" * 120, max_new_tokens=50, **QUIET)
    assert "leaves 8 of the 128" in caplog.text
    list(written)
    assert (len(written.ids), written.ended, asked.request.most) == (8, "context", 8)
    message = refused("generate", llama, "--prompt", "x" * 130)
    assert "130" in message
    assert "128" in message


# Pieces


def pieces_of(tokenizer: object, before: Sequence[int], ids: Sequence[int]) -> tuple[list[str], str]:
    made = Pieces(tokenizer, list(before))
    return [piece for token in ids if (piece := made.add(token))], made.rest()


@pytest.fixture(scope="module", params=["bytes", "gpt-2", "gemma", "metaspace", "prepend"])
def tokenizer(request: pytest.FixtureRequest) -> object:
    if request.param == "bytes":
        return tiny.byte_tokenizer()
    return fast(byte_level("gpt-2") if request.param == "gpt-2" else pieces(request.param))


@pytest.mark.parametrize("text", [text for text in AWKWARD if text])
def test_characters_stream_whole(tokenizer, text):
    """Oracle: the tokenizer on all tokens at once. No piece holds part of a character."""
    tokens = list(tokenizer(f"to {text}")["input_ids"])
    before, ids = tokens[:2], tokens[2:]
    known, whole = (
        tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for part in (before, tokens)
    )
    found, rest = pieces_of(tokenizer, before, ids)
    assert "".join(found) == whole[len(known) :]
    assert rest == ""
    assert not any(BROKEN in piece for piece in found)


def test_letters_come_one_by_one():
    """Oracle: by hand. A character of several bytes is a piece when its last byte has come."""
    found = pieces_of(tiny.byte_tokenizer(), [], tiny.byte_tokenizer()("aé😀b")["input_ids"])
    assert found == (["a", "é", "😀", "b"], "")


def test_bytes_that_are_no_text_are_not_lost():
    """Oracle: `decode` of random bytes at once."""
    tokenizer = tiny.byte_tokenizer()
    for seed in range(20):
        ids = tiny.ids(1, 40, seed)[0].tolist()
        found, rest = pieces_of(tokenizer, [], ids)
        assert "".join(found) + rest == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_spaces_before_punctuation_stay():
    """Some tokenizers of old models clean these up by default, which would take back text that was shown."""
    tokenizer = tiny.byte_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    assert "".join(pieces_of(tokenizer, [], tokenizer("a . b n't")["input_ids"])[0]) == "a . b n't"


def test_a_character_that_the_limit_cuts_is_left_out(llama, monkeypatch):
    """Oracle: by hand. At the end of a text it is shown as the tokenizer shows it."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    ids = tokenizer("a😀")["input_ids"]
    end = 250
    for cut, expected in ((ids[:3], "a"), ([*ids[:3], end], f"a{BROKEN}"), ([*ids, end], "a😀")):
        written = Generation(torch.nn.Identity(), Request(tokenizer, [5], (end,), 9, "limit"), 0.0, 0, None, Silent())
        monkeypatch.setattr(written, "_tokens", lambda tokens=cut: (token for token in tokens))
        assert "".join(written) == expected


# What is left behind


def test_a_text_that_is_not_read_to_its_end_leaves_nothing_behind(llama):
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).train()
    config = model.generation_config
    threads = torch.get_num_threads()
    written = mspc.generate(
        model, PROMPT, tokenizer=AutoTokenizer.from_pretrained(llama), threads=threads + 1, progress=False
    )
    for _ in written:
        assert torch.is_grad_enabled()
        assert torch.get_num_threads() == threads
        break
    assert torch.is_grad_enabled()
    assert model.training
    assert model.generation_config is config
    with pytest.raises(InputError, match="written already"):
        list(written)


def test_seconds_are_those_of_the_model(llama, monkeypatch):
    """Oracle: a clock that only the model moves, 2 s for the prompt and 1 s for each further token."""
    clock = [0.0]
    monkeypatch.setattr("mspc.runtime.generation.time.perf_counter", lambda: clock[0])
    model = mspc.load(llama, device="cpu")
    model.register_forward_pre_hook(
        lambda _, args, given: clock.__setitem__(0, clock[0] + (2.0 if given["input_ids"].shape[1] > 1 else 1.0)),
        with_kwargs=True,
    )
    written = mspc.generate(
        model, PROMPT, tokenizer=AutoTokenizer.from_pretrained(llama), max_new_tokens=5, progress=False
    )
    assert (written.prefill_tokens_per_second, written.tokens_per_second) == (None, None)
    for _ in written:
        clock[0] += 100.0  # the caller takes its time
    assert (written.prefill_seconds, written.decode_seconds) == (2.0, 4.0)
    assert (written.prefill_tokens_per_second, written.tokens_per_second) == (written.prompt_tokens / 2, 1.0)
