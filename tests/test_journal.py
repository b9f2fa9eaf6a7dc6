"""The journal: what was committed holds, what was torn or changed never was, and another run is recognized."""

import errno
import json
import os
from pathlib import Path

import pytest

from mspc.errors import InputError, StorageError
from mspc.storage.files import sha256_of
from mspc.storage.journal import NAME, Journal

HEADER = {"settings": {"sparsity": 0.5, "skip": ["a"]}, "source": {"name": "m", "sha256": {"x": "12"}}, "version": 1}


def solved(folder: Path, block: int) -> dict[str, object]:
    """One block on disk, and the entry that commits it."""
    file = folder / f"{block}.safetensors"
    file.write_text(f"block {block}")
    return {"file": file.name, "sha256": sha256_of(file), "matrices": [{"name": f"é{block}"}]}


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    journal = Journal.start(tmp_path, HEADER)
    for block in range(3):
        journal.commit(solved(tmp_path, block))
    return tmp_path


def blocks(journal: Journal) -> list[str]:
    return [entry["file"].removesuffix(".safetensors") for entry in journal.entries]


def test_a_resumed_journal_goes_on(begun):
    Journal.resume(begun, HEADER).commit(solved(begun, 3))
    assert blocks(Journal.resume(begun, HEADER)) == ["0", "1", "2", "3"]


def test_wherever_the_last_line_is_torn_the_others_hold(begun):
    """Cut after every byte of the last line, its newline included."""
    whole = (begun / NAME).read_bytes()
    last = whole[:-1].rindex(b"\n") + 1
    for cut in range(last, len(whole)):
        (begun / NAME).write_bytes(whole[:cut])
        journal = Journal.resume(begun, HEADER)
        assert blocks(journal) == ["0", "1"], cut
        journal.commit(solved(begun, 2))
        assert (begun / NAME).read_bytes() == whole, cut


def test_a_torn_line_of_garbage_is_as_if_it_never_was(begun):
    with (begun / NAME).open("ab") as file:
        file.write(b'\0\xff{"fi\n')
    assert blocks(Journal.resume(begun, HEADER)) == ["0", "1", "2"]


@pytest.mark.parametrize("damage", [lambda file: file.write_text("other"), Path.unlink])
def test_nothing_holds_from_a_file_of_other_bytes_on(damage, begun):
    damage(begun / "1.safetensors")
    assert blocks(Journal.resume(begun, HEADER)) == ["0"]
    solved(begun, 1)
    assert blocks(Journal.resume(begun, HEADER)) == ["0"]  # what was dropped does not come back


def test_resume_without_a_journal_starts_one(tmp_path):
    assert Journal.resume(tmp_path, HEADER).entries == []
    assert json.loads((tmp_path / NAME).read_text()) == HEADER


def test_start_forgets_what_there_was(begun):
    assert Journal.start(begun, HEADER).entries == []
    assert Journal.resume(begun, HEADER).entries == []


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"settings": {"sparsity": 0.6, "skip": ["a"]}}, r"settings\.sparsity was 0\.5 and is 0\.6"),
        ({"settings": {"sparsity": 0.5, "skip": ["b"]}}, r"settings\.skip was \['a'\] and is \['b'\]"),
        ({"settings": {"sparsity": 0.5}}, r"settings\.skip was \['a'\] and is None"),
        ({"settings": {**HEADER["settings"], "seed": 1}}, r"settings\.seed was None and is 1"),
        ({"source": {"name": "m", "sha256": {"x": "13"}}}, r"source\.sha256\.x was '12' and is '13'"),
        ({"source": {"name": "m", "sha256": {"y": "12"}}}, r"sha256\.x was '12' and is None; source\.sha256\.y"),
        ({"source": {"name": "n", "sha256": {"x": "12"}}}, r"source\.name was 'm' and is 'n'"),
        (
            {"settings": {"sparsity": 0.6, "skip": ["a"]}, "version": 2},
            r"settings\.sparsity was .*; version was 1 and is 2",
        ),
    ],
)
def test_another_run_is_refused_with_what_differs(change, difference, begun):
    before = (begun / NAME).read_bytes()
    with pytest.raises(InputError, match=rf"holds a run that differs.*{difference}.*--resume.*--overwrite"):
        Journal.resume(begun, HEADER | change)
    assert (begun / NAME).read_bytes() == before


def test_tuples_and_lists_are_the_same_in_json(begun):
    same = HEADER | {"settings": {"sparsity": 0.5, "skip": ("a",)}}
    assert len(Journal.resume(begun, same).entries) == 3


def test_a_manifest_may_know_more(tmp_path):
    manifest = HEADER | {"source": HEADER["source"] | {"shards": {"x": ["k"]}}, "matrices": []}
    Journal.compare(tmp_path, manifest, HEADER)
    with pytest.raises(InputError, match=r"source\.sha256\.x was '13' and is '12'"):
        Journal.compare(tmp_path, manifest | {"source": {"name": "m", "sha256": {"x": "13"}}}, HEADER)


def test_a_commit_is_flushed_before_it_counts(begun, monkeypatch):
    journal = Journal.resume(begun, HEADER)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"journal\.jsonl .*No space left.*--resume"):
        journal.commit(solved(begun, 3))
    assert blocks(journal) == ["0", "1", "2"]
