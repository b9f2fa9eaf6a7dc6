"""Inputs changed at random, by a seed: each is used or refused in words, in seconds, and leaves nothing behind.

`python tests/test_fuzz.py 0 300` tries the seeds 0 to 299 and ends at the first that takes too long. No memory above
`MEMORY` is given to it, so that a size that a file claims cannot take that of the machine.
"""

import faulthandler
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

import mspc
from mspc.errors import ActivationError, InputError

SECONDS, MEMORY = 10, 24 * 2**30
IN_TESTS, IN_FUZZ, PER_PROCESS = 30, 400, 100
FAMILIES = ("llama", "gpt2", "gemma2")
VALUES = (
    None, True, False, -1, 0, 1, 2, 3, 7, 2**31, 2**63, 10**15, 1e-30, 1e30, float("inf"), float("nan"), "", "x",
    "llama", "../x", "\ud800", [], [0], ["x"], {}, {"x": 1}, [[[]]],
)  # fmt: skip
ENTRIES = {
    "quantization_config": ({}, "x", {"load_in_4bit": True}, {"quant_method": "gptq"}, {"quant_method": ["x"]}, [], 3),
    "compression_config": ({"format": "dense"}, 1),
    "auto_map": ({"AutoModelForCausalLM": "code.Model", "AutoConfig": "code.Config"}, "x", {"AutoConfig": 3}),
    "model_type": ("t5", "llava", "bert", "whisper", "mamba", "gpt2", "mixtral", "nothing", "gemma3", 3),
    "architectures": (["T5ForConditionalGeneration"], ["LlamaForTokenClassification"], "x", [3], {}, True),
    "text_config": ({"model_type": "llama"}, {"quantization_config": {"quant_method": "awq"}}, 3),
    "is_encoder_decoder": (True,),
    "torch_dtype": ("float8_e4m3fn", "float64", "x", 3),
    "num_hidden_layers": (0, 1, 3, 10**9),
    "rope_scaling": ({"rope_type": "x"}, {"rope_type": "yarn"}, {"type": "dynamic", "factor": 0}),
    "layer_types": (["x"], ["full_attention"], ["sliding_attention"] * 2),
    "tie_word_embeddings": (True, False),
}
"""Entries of config.json to set."""
BYTES = (b"", b"{", b"[]", b"null", b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b"[" * 200_000, b"\x00" * 64, b"{}" * 9)
LINES = (
    b"{",
    b'{"text": 3}',
    b'{"text": null}',
    b'{"x": "y"}',
    b"\xff\xfe",
    b'{"text": "\\ud800"}',
    b"[]",
    b"3",
    b"",
    b'""',
)


class Mutation:
    """One change of the files of a folder, drawn by a seed. `told` says what it is."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng, self.told = folder, rng, ""
        kinds = [
            self.config,
            self.config,
            self.entry,
            self.tokenizer,
            self.index,
            self.header,
            self.text,
            self.whole,
        ]
        rng.choice(kinds)()

    def config(self) -> None:
        self.in_json(self.folder / "config.json")

    def tokenizer(self) -> None:
        self.in_json(self.rng.choice(sorted(self.folder.glob("*token*.json"))))

    def index(self) -> None:
        path = self.folder / "model.safetensors.index.json"
        self.in_json(path if path.is_file() else self.folder / "config.json")

    def entry(self) -> None:
        key = self.rng.choice(sorted(ENTRIES))
        path, value = self.folder / "config.json", self.rng.choice(ENTRIES[key])
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
        self.told = f"config.json, {key}: {value!r}"

    def in_json(self, path: Path) -> None:
        whole = json.loads(path.read_text(encoding="utf-8"))
        self.told = f"{path.name}, {self.in_tree(whole)}"
        path.write_text(json.dumps(whole))

    def in_tree(self, whole: Any) -> str:
        """Replace or delete one value of a tree of JSON. Short branches are as likely as long ones."""
        node, keys = whole, []
        while True:
            key = self.rng.choice(sorted(node) if isinstance(node, dict) else range(len(node)))
            keys.append(str(key))
            if not (isinstance(node[key], dict | list) and node[key]) or self.rng.random() < 0.2:
                break
            node = node[key]
        if self.rng.random() < 0.2:
            del node[key]
            return f"{'.'.join(keys)} deleted"
        node[key] = self.rng.choice(VALUES)
        return f"{'.'.join(keys)}: {node[key]!r}"

    def header(self) -> None:
        """Change the header of a safetensors file, whose tensors stay."""
        path = self.rng.choice(sorted(self.folder.glob("*.safetensors")))
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header, size_told = json.loads(content[8 : 8 + size]), None
        key = self.rng.choice(sorted(set(header) - {"__metadata__"}))
        change = self.rng.choice(["dtype", "shape", "name", "tree", "size"])
        if change == "dtype":
            header[key]["dtype"] = self.rng.choice(
                ["F64", "F16", "I32", "I8", "F8_E4M3", "BOOL", "U8", "F8_E8M0", "C64"]
            )
        elif change == "shape":
            shape = header[key]["shape"]
            header[key]["shape"] = self.rng.choice([shape[::-1], [*shape, 1], [2 * shape[0], *shape[1:]], [0], []])
        elif change == "name":
            header[f"{key}{self.rng.choice(['x', '.weight', '_scale'])}"] = header.pop(key)
        elif change == "tree":
            change = self.in_tree(header)
        else:
            size_told = self.rng.choice([0, 1, size - 1, size + 1, 2**40, 2**63])
        written = json.dumps(header).encode()
        told = len(written) if size_told is None else size_told
        path.write_bytes(told.to_bytes(8, "little") + written + content[8 + size :])
        self.told = f"{path.name}, {key}: {change} {header.get(key)} {size_told}"

    def text(self) -> None:
        path = self.folder / "text.jsonl"
        lines = path.read_bytes().splitlines()
        line, place = self.rng.choice(LINES), self.rng.randrange(len(lines))
        lines[place] = line
        path.write_bytes(b"\n".join(lines if self.rng.random() < 0.7 else [line]))
        self.told = f"text.jsonl, line {place}: {line!r}"

    def whole(self) -> None:
        path = self.rng.choice([path for path in sorted(self.folder.iterdir()) if path.is_file()])
        content = path.read_bytes()
        change = self.rng.choice(["bytes", "cut", "flip", "gone", "folder"])
        if change == "bytes":
            path.write_bytes(self.rng.choice(BYTES))
        elif change == "cut":
            path.write_bytes(content[: self.rng.randrange(len(content))])
        elif change == "flip":
            place = self.rng.randrange(len(content))
            path.write_bytes(
                content[:place] + bytes([content[place] ^ 1 << self.rng.randrange(8)]) + content[place + 1 :]
            )
        else:
            path.unlink()
            if change == "folder":
                path.mkdir()
        self.told = f"{path.name}: {change}"


def sources(folder: Path) -> list[Path]:
    """One small model of each family in several files, and a sparse export, with a text."""
    found = []
    for family in FAMILIES:
        found.append(tiny.build(folder / family, family, sharded=True))
        write_text(found[-1])
    small = tiny.compress(found[0], folder / "small", found[0] / "text.jsonl", bits=4, group_size=16, effort="fast")
    found.append(small.export("sparse", folder / "sparse", verify=False, progress=False))
    write_text(found[-1])
    return found


def write_text(folder: Path) -> None:
    lines = [json.dumps({"text": tiny.text(60, seed)}) for seed in range(20)]
    (folder / "text.jsonl").write_text("\n".join(lines))


def try_seed(seed: int, models: list[Path], folder: Path) -> str | None:
    """Try the mutation of a seed, and say what is wrong; None if it is used or refused as it should."""
    rng = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    source = folder / "model"
    shutil.copytree(models[seed % len(models)], source)
    mutation, out = Mutation(source, rng), folder / "out"
    verbs = [evaluate, load] if models[seed % len(models)].name == "sparse" else [compress, compress, evaluate, load]
    verb: Callable[[Path, Path], object] = rng.choice(verbs)
    what = f"seed {seed}, {models[seed % len(models)].name}, {verb.__name__}, {mutation.told}"
    begin, before = time.monotonic(), sorted(folder.iterdir())
    try:
        verb(source, out)
    except InputError as error:
        if "\n" in str(error) or not str(error).strip():
            return f"{what}: more than one line: {error}"
        if sorted(folder.iterdir()) != before:
            return f"{what}: left {sorted(folder.iterdir())} after {error}"
    except ActivationError:
        pass  # a config that is valid may make a model that overflows
    except Exception:
        return f"{what}: {traceback.format_exc()}"
    finally:
        seconds = time.monotonic() - begin
    return f"{what}: {seconds:.0f} s" if seconds > SECONDS else None


def compress(source: Path, out: Path) -> object:
    return tiny.compress(
        source, out, source / "text.jsonl", effort="fast", num_sequences=2, sequence_length=16, device="cpu", eval=True
    )


def evaluate(source: Path, out: Path) -> object:
    text = str(source / "text.jsonl")
    return mspc.evaluate(source, text, sequence_length=16, max_windows=2, device="cpu", progress=False)


def load(source: Path, out: Path) -> object:
    return mspc.load(source, device="cpu")


def failures(seeds: range, folder: Path) -> Iterator[str]:
    models = sources(folder / "models")
    for seed in seeds:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if failure := try_seed(seed, models, folder / "tried"):
                yield failure


def test_changed_inputs_are_used_or_refused_in_words(tmp_path):
    assert list(failures(range(IN_TESTS), tmp_path)) == []


@pytest.mark.fuzz
@pytest.mark.parametrize("first", range(0, IN_FUZZ, PER_PROCESS))
def test_many_changed_inputs(first):
    """In a process of its own, which ends when an input takes too long or crashes it."""
    command = [sys.executable, __file__, str(first), str(first + PER_PROCESS)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert f"{PER_PROCESS} tried, 0 failed" in done.stdout


def main() -> None:
    first, last = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    failed = 0
    with tempfile.TemporaryDirectory(prefix="mspc-fuzz-") as temporary:
        models = sources(Path(temporary) / "models")
        for seed in range(first, last):
            faulthandler.dump_traceback_later(2 * SECONDS, exit=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                failure = try_seed(seed, models, Path(temporary) / "tried")
            if failure:
                failed += 1
                print(failure, flush=True)
        faulthandler.cancel_dump_traceback_later()
    print(f"{last - first} tried, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
