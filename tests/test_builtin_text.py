"""The builtin text against the files on disk, and against itself in another process."""

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tokenize
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from mspc.text.builtin import EXCLUDED_PACKAGES, documents, split_of

STDLIB = Path(sysconfig.get_path("stdlib"))


@cache
def texts(split: str) -> tuple[str, ...]:
    return tuple(documents(split))


@cache
def files() -> dict[str, str]:
    """Second implementation: dotted name -> source of every file of the library, by walking its folders."""
    found = {}
    for path in sorted(STDLIB.rglob("*.py")):
        parts = path.relative_to(STDLIB).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names or parts[0].startswith("_sysconfigdata"):
            continue
        packages = [STDLIB.joinpath(*parts[:depth]) for depth in range(1, len(parts))]
        if any(not (package / "__init__.py").exists() for package in packages):
            continue
        if {"test", "tests"} & set(parts[1:]) or not all(part.isidentifier() for part in parts):
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        try:
            with tokenize.open(path) as file:
                found[name] = file.read()
        except SyntaxError:
            continue
    return found


def included(name: str) -> bool:
    return name.split(".")[0] not in EXCLUDED_PACKAGES


def expected(split: str) -> list[str]:
    named = {f"pydoc_data.topics.{name}": text for name, text in topics.items()}
    named |= {name: text for name, text in files().items() if included(name) and text}
    return sorted(text for name, text in named.items() if split_of(name) == split)


@pytest.mark.parametrize("split", ["calibration", "test"])
def test_documents_are_the_files_and_topics_of_their_split(split):
    """Oracle: the folders of the library on disk, each file in the split of its name."""
    assert sorted(texts(split)) == expected(split)


def test_splits_share_no_document():
    """By comparing texts; a few short package files are the same everywhere."""
    calibration, test = ({text for text in texts(split) if len(text) > 500} for split in ("calibration", "test"))
    assert not calibration & test


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("json.decoder", "calibration"),
        ("pydoc_data.topics.with", "calibration"),
        ("argparse", "calibration"),
        ("json.encoder", "test"),
        ("pydoc_data.topics.calls", "test"),
        ("typing", "test"),
    ],
)
def test_split_of_a_name_never_changes(name, split):
    """Pinned: a name that is test text today is test text in every version of Python and of mspc."""
    assert split_of(name) == split


def test_a_tenth_of_the_names_is_test_text():
    """Oracle: the last byte of SHA-256 below 26, on made-up names."""
    names = [f"package.module_{i}" for i in range(5000)]
    for name in names:
        assert (split_of(name) == "test") == (hashlib.sha256(name.encode()).digest()[-1] < 26)
    assert 0.08 < sum(split_of(name) == "test" for name in names) / 5000 < 0.12


def in_a_fresh_interpreter(*options: str) -> dict:
    """Modules that another process imports for its documents, without the import machinery, and their digests."""
    code = """
import hashlib, inspect, json, sys, sysconfig
import pydoc_data.topics
from mspc.text.builtin import documents
sysconfig.get_path("stdlib")
before = set(sys.modules)
digests = [hashlib.sha256(repr(documents(split)).encode()).hexdigest() for split in ("calibration", "test")]
print(json.dumps({"imported": sorted(set(sys.modules) - before), "digests": digests}))
"""
    command = [sys.executable, *options, "-c", code]
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def digests() -> list[str]:
    return [hashlib.sha256(repr(list(texts(split))).encode()).hexdigest() for split in ("calibration", "test")]


def test_nothing_is_imported_and_another_process_agrees():
    """Oracle: the modules of a fresh interpreter before and after, and its documents in their order."""
    there = in_a_fresh_interpreter()
    assert there["imported"] == []
    assert there["digests"] == digests()


def test_documents_do_not_depend_on_how_the_interpreter_was_started():
    """Oracle: an interpreter without frozen modules, as debuggers start it."""
    assert in_a_fresh_interpreter("-X", "frozen_modules=off")["digests"] == digests()


def test_files_of_the_same_name_elsewhere_do_not_count(tmp_path, monkeypatch):
    """Oracle: the documents without a module `ftplib` of our own in front of the library on the path."""
    (tmp_path / "ftplib.py").write_text("stray = 'not the library'")
    monkeypatch.syspath_prepend(tmp_path)
    assert documents("calibration") == list(texts("calibration"))
    assert documents("test") == list(texts("test"))


def test_order_mixes_topics_and_modules():
    """By counting: neither kind fills the first hundred documents."""
    first = texts("calibration")[:100]
    assert 5 < sum(text in set(topics.values()) for text in first) < 95
