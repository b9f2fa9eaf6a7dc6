"""Damaged checkpoints are named for what they are; a file is there whole or not at all."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mspc.errors import InputError, StorageError
from mspc.storage.checkpoint import INDEX, SINGLE, Checkpoint, read_file
from mspc.storage.files import write_atomically, write_json, write_tensors

TENSORS = {
    "a": torch.arange(12.0).view(3, 4),
    "b": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "c": torch.arange(4),
    "empty": torch.zeros(0, 5),
}
SHARDS = {"one.safetensors": ["a"], "two.safetensors": ["b", "c", "empty"]}


def single(folder: Path, **tensors: torch.Tensor) -> Path:
    save_file(TENSORS | tensors, folder / SINGLE)
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    for name, keys in SHARDS.items():
        save_file({key: TENSORS[key] for key in keys}, tmp_path / name)
    write_index(tmp_path, {key: name for name, keys in SHARDS.items() for key in keys})
    return tmp_path


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_equal(found: dict[str, torch.Tensor]) -> None:
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[key], TENSORS[key]) and found[key].dtype == TENSORS[key].dtype for key in TENSORS)


def test_one_file_and_many_hold_the_same(sharded, tmp_path_factory):
    one = Checkpoint(single(tmp_path_factory.mktemp("single")))
    many = Checkpoint(sharded)
    assert_equal(dict(one.read(one.keys())))
    assert_equal(dict(many.read(many.keys())))
    assert {name: sorted(keys) for name, keys in many.shards().items()} == SHARDS
    assert [key for key, _ in many.read(["c", "a"])] == ["c", "a"]


def test_what_is_read_does_not_hang_on_the_file(tmp_path):
    """Overwriting the file in place must not change a tensor that was read before."""
    path = single(tmp_path) / SINGLE
    (_, tensor), *_ = read_file(path, ["a"])
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert torch.equal(tensor, TENSORS["a"])


def test_fingerprints_are_the_digests_of_the_files(sharded):
    expected = {name: hashlib.sha256((sharded / name).read_bytes()).hexdigest() for name in SHARDS}
    assert dict(Checkpoint(sharded).fingerprint()) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_named(value, tmp_path):
    single(tmp_path, wrong=torch.tensor([1.0, value]).bfloat16())
    with pytest.raises(InputError, match=r"model\.safetensors: wrong contains NaN or infinity"):
        list(Checkpoint(tmp_path).fingerprint())


def test_a_mask_of_old_files_may_be_infinite(tmp_path):
    """GPT-NeoX and GPT-J stored -1e9 in float16, which transformers ignores."""
    single(tmp_path, **{"layers.0.attention.masked_bias": torch.tensor(-1e9).half()})
    assert len(list(Checkpoint(tmp_path).fingerprint())) == 1


def test_a_single_file_goes_before_all_others_as_in_transformers(tmp_path):
    """Published folders also hold the same weights in other layouts (consolidated.safetensors) or a stale index."""
    source = tiny.build(tmp_path, "llama")
    save_file(TENSORS, source / "consolidated.safetensors")
    write_index(source, dict.fromkeys(TENSORS, "consolidated.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    checkpoint = Checkpoint(source)
    assert list(checkpoint.shards()) == [SINGLE]
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in checkpoint.read(checkpoint.keys()))


def test_an_index_goes_before_files_it_does_not_name(sharded):
    save_file({"stale": torch.zeros(1)}, sharded / "stale.safetensors")
    assert "stale" not in Checkpoint(sharded).keys()  # noqa: SIM118
    (sharded / INDEX).unlink()
    assert "stale" in Checkpoint(sharded).keys()  # noqa: SIM118


GARBAGE = [b"\xff" * 8 + b"{}", (9).to_bytes(8, "little") + b"not json!", b"pickle" * 9]


@pytest.mark.parametrize("kept", [0, 4, 8, 60, -1, *GARBAGE])
def test_truncated_files_and_garbage_are_named(kept, tmp_path):
    path = single(tmp_path) / SINGLE
    path.write_bytes(kept if isinstance(kept, bytes) else path.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read as safetensors .*truncated or damaged"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "deeper/x.safetensors", "..", "", 5])
def test_an_index_that_points_elsewhere_is_refused(name, sharded):
    save_file(TENSORS, sharded.parent / "x.safetensors")
    (sharded / "deeper").mkdir()
    save_file(TENSORS, sharded / "deeper" / "x.safetensors")
    write_index(sharded, {"a": name})
    with pytest.raises(InputError, match="points outside its folder"):
        Checkpoint(sharded)


def test_a_missing_shard_is_named(sharded):
    (sharded / "two.safetensors").unlink()
    with pytest.raises(InputError, match=r"two\.safetensors is missing, though .*index\.json names it"):
        Checkpoint(sharded)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": [1]}}'])
def test_an_index_that_is_none_is_named(content, sharded):
    (sharded / INDEX).write_text(content)
    with pytest.raises(InputError, match=r"index\.json is not a valid safetensors index"):
        Checkpoint(sharded)


def test_pickles_are_not_read(tmp_path):
    with pytest.raises(InputError, match=r"holds no \.safetensors files; give a Hugging Face checkpoint"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds no .safetensors files; convert its \.bin files.*no pickle"):
        Checkpoint(tmp_path)


def test_written_tensors_are_read_by_safetensors_itself(tmp_path):
    """Also views and transposes, which safetensors alone refuses."""
    path = tmp_path / "deeper" / "x.safetensors"
    write_tensors(path, TENSORS | {"a": TENSORS["a"].T.contiguous().T})
    assert_equal(load_file(path))
    assert path.stat().st_mode & 0o777 == 0o644
    assert [file.name for file in path.parent.iterdir()] == ["x.safetensors"]


def assert_untouched(folder: Path) -> None:
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"x": b"old"}


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(step, tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"old")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    def write(path):
        path.write_bytes(b"ne")
        if step == "write":
            full()

    if step == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    elif step == "replace":
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StorageError, match=r"Cannot write .*x \(.*No space left.*free some space.*--resume"):
        write_atomically(tmp_path / "x", write)
    assert_untouched(tmp_path)


def test_a_limit_of_the_system_leaves_the_old_files_and_nothing_else(tmp_path):
    """A real failure in the middle of a write: files may not grow beyond 10 kB."""
    (tmp_path / "x").write_bytes(b"old")
    script = """
import resource, sys
from pathlib import Path
import torch
from mspc.storage.files import write_tensors, write_text
from mspc.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
path = Path(sys.argv[1]) / "x"
for write in (lambda: write_text(path, "y" * 100_000), lambda: write_tensors(path, {"a": torch.zeros(100_000)})):
    try:
        write()
    except StorageError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert result.stdout.count("Cannot write") == 2, result.stderr
    assert_untouched(tmp_path)


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    (tmp_path / "x" / "deeper").mkdir(parents=True)
    with pytest.raises(StorageError, match="Cannot write"):
        write_json(tmp_path / "x", {})
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
