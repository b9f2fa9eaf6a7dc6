"""`mspc generate`: wrong input, its output on stdout and stderr, and interruptions."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import tiny
import torch
from conftest import BUNDLED
from test_cli import mspc_cli, only_json, refused
from test_generate import PROMPT, QUIET, copy_of
from torch import Tensor
from transformers import AutoModelForCausalLM

import mspc
from mspc.errors import InputError
from mspc.runtime.generation import Handing

# Wrong input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--temperature", -1), ("temperature", "-1")),
        (("--temperature", "nan"), ("temperature", "nan")),
        (("--temperature", "inf"), ("temperature", "inf")),
        (("--max-new-tokens", 0), ("max_new_tokens", "0")),
        (("--max-new-tokens", -3), ("max_new_tokens", "-3")),
        (("--seed", 1), ("seed", "no effect")),
        (("--seed", 1, "--temperature", 0), ("seed", "no effect")),
        (("--seed", -1, "--temperature", 1), ("seed", "-1")),
        (("--threads", 0), ("threads", "0")),
        (("--device", "gpu7"), ("gpu7",)),
        (("--dtype", "float31"), ("float31",)),
    ],
)
def test_wrong_options_are_refused(llama, options, words):
    message = refused("generate", llama, "--prompt", PROMPT, *options)
    assert all(word in message for word in words)


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_refused(llama, prompt):
    assert "prompt is empty" in refused("generate", llama, "--prompt", prompt)


def test_broken_unicode_in_a_prompt_is_refused(llama):
    """As the shell hands over bytes that are no UTF-8."""
    assert "surrogate" in refused("generate", llama, "--prompt", "a\udcff")


def test_wrong_types_are_refused(llama):
    for wrong in ({"prompt": b"a"}, {"prompt": "a", "max_new_tokens": 2.5}, {"prompt": "a", "temperature": True}):
        with pytest.raises(InputError):
            mspc.generate(llama, **QUIET, **wrong)
    with pytest.raises(InputError, match="model must be"):
        mspc.generate(7, "a", **QUIET)
    with pytest.raises(InputError, match="needs tokenizer="):
        mspc.generate(tiny.make("llama"), "a", progress=False)


def test_a_folder_without_a_tokenizer_is_refused(llama, tmp_path):
    folder = copy_of(llama, tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    message = refused("generate", folder, "--prompt", PROMPT)
    assert str(folder) in message
    assert "tokenizer files" in message


def test_nan_in_weights_is_named(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    folder = tiny.save(model, tmp_path / "model")
    assert "layers.1.mlp.up_proj.weight contains NaN" in refused("generate", folder, "--prompt", PROMPT)


# The command


def test_a_prompt_on_stdin_is_the_same(llama):
    """Without the ends of its last line."""
    given = mspc_cli("generate", llama, "--prompt", PROMPT, "--max-new-tokens", 8).stdout
    assert piped(f"{PROMPT}\r\n\n", llama, "--max-new-tokens", 8) == given


def piped(text: str | bytes, *arguments: object) -> str:
    from typer.testing import CliRunner

    from mspc.cli.main import app

    result = CliRunner().invoke(app, ["generate", *map(str, arguments)], input=text)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_stdin_must_hold_a_prompt(llama, monkeypatch):
    assert "prompt is empty" in refused("generate", llama)  # stdin is empty
    from mspc.cli import generate_command

    terminal = io.StringIO(PROMPT)
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    for stdin in (terminal, None):
        monkeypatch.setattr(generate_command.sys, "stdin", stdin)
        with pytest.raises(InputError, match="Give --prompt TEXT"):
            generate_command._from_stdin()
    monkeypatch.setattr(generate_command.sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    with pytest.raises(InputError, match="no UTF-8"):
        generate_command._from_stdin()


def test_text_goes_to_stdout_and_all_else_to_stderr(llama):
    written = mspc.generate(llama, PROMPT, max_new_tokens=8, **QUIET)
    text = "".join(written)
    result = mspc_cli("generate", llama, "--prompt", PROMPT, "--max-new-tokens", 8)
    assert result.stdout == text + "\n"
    closing = result.stderr.strip().splitlines()[-1]
    assert f"Prompt: {len(PROMPT)} tokens in " in closing
    assert "Text: 8 tokens in " in closing
    assert "tokens/s" in closing
    assert closing.endswith("--max-new-tokens reached.")


def test_one_json_object(llama):
    shown = only_json(mspc_cli("generate", llama, "--prompt", PROMPT, "--max-new-tokens", 8, "--json"))
    written = mspc.generate(llama, PROMPT, max_new_tokens=8, **QUIET)
    assert shown["text"] == "".join(written)
    assert (shown["ended"], shown["prompt_tokens"], shown["tokens"]) == ("limit", len(PROMPT), 8)
    assert shown["tokens_per_second"] == pytest.approx(7 / shown["decode_seconds"])


def interrupted_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ctrl-C come while token `number` is computed."""
    put, count = Handing.put, iter(range(-1, 1000))

    def stopping(self: Handing, ids: Tensor) -> None:
        if next(count) == number:
            raise KeyboardInterrupt
        put(self, ids)

    monkeypatch.setattr(Handing, "put", stopping)


@pytest.mark.parametrize("json_option", [(), ("--json",)])
def test_an_interruption_keeps_what_was_written(llama, monkeypatch, json_option):
    """Oracle: the text of four tokens."""
    expected = "".join(mspc.generate(llama, PROMPT, max_new_tokens=4, **QUIET))
    interrupted_at(4, monkeypatch)
    result = mspc_cli("generate", llama, "--prompt", PROMPT, "--max-new-tokens", 8, *json_option, code=130)
    assert "Interrupted." in result.stderr
    if json_option:
        shown = only_json(result)
        assert (shown["text"], shown["ended"], shown["tokens"]) == (expected, None, 4)
    else:
        assert result.stdout == expected


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a long text of the bundled model as a process of its own."""
    processes = []

    def start(*arguments: object) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "mspc", "generate", BUNDLED, "--prompt", "def add(", *arguments]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        processes.append(
            subprocess.Popen(
                list(map(str, command)),
                stdout=-1,
                stderr=-1,
                stdin=subprocess.DEVNULL,
                env=environment,
                # Shells let what they start in the background ignore Ctrl-C, and its children inherit that.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_ctrl_c_ends_a_process(started):
    process = started()
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130
    whole = "".join(mspc.generate(BUNDLED, "def add(", **QUIET))
    assert whole.startswith((first + out).decode())
    assert error.decode().strip().endswith("Interrupted.")


def test_a_pipe_that_closes_ends_quietly(started):
    process = started()
    process.stdout.read(1)
    process.stdout.close()
    error = process.stderr.read().decode()
    assert process.wait(timeout=60) == 1
    assert "Error" not in error
    assert "Exception" not in error
    assert "Traceback" not in error
