"""Bytes and seconds of a compression, in its manifest: against the files that are there, and a clock of the test."""

import json
import random
import time
from contextlib import suppress

import pytest
import tiny
import torch
from safetensors.torch import save_file
from test_cost import QUICK, compress
from test_resume import killed_at

import mspc
from mspc.pipeline import solve_blocks
from mspc.pipeline.stopwatch import Stopwatch
from mspc.progress import Silent
from mspc.storage.checkpoint import types_in
from mspc.storage.sizes import file_bytes

# Bytes


NAMES = (
    "float64", "float32", "float16", "bfloat16", "bool", "complex64", "int64", "int32", "int16", "int8", "uint64",
    "uint32", "uint16", "uint8", "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip


def test_a_file_of_types_that_are_only_carried_has_its_size(tmp_path):
    """Oracle: the file that safetensors writes."""
    names = ("float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz", "float4_e2m1fn_x2", "uint8", "bool")
    tensors = {name[-4:]: torch.zeros(3 + i).byte().view(getattr(torch, name)) for i, name in enumerate(names)}
    tensors["x"] = torch.zeros(5, dtype=torch.int16)
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert file_bytes(types_in(tmp_path / "x.safetensors")) == (tmp_path / "x.safetensors").stat().st_size


@pytest.mark.parametrize("seed", range(6))
def test_a_file_has_the_size_that_is_computed_before_it_is_written(seed, tmp_path):
    """Oracle: the file that safetensors writes, with names that need escapes and more than one byte a letter."""
    rng = random.Random(seed)
    types = {
        f"{rng.choice(['é', 'a', chr(34), '模', ' '])}.{i}": (
            rng.choice(NAMES), tuple(rng.randint(1, 40) for _ in range(rng.randint(0, 3)))
        )
        for i in range(rng.randint(1, 40))
    }  # fmt: skip
    tensors = {name: torch.zeros(shape, dtype=getattr(torch, kind)) for name, (kind, shape) in types.items()}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert file_bytes(types) == (tmp_path / "x.safetensors").stat().st_size


EMBEDDINGS = (
    "embed_tokens.weight",
    "lm_head.weight",
    "wte.weight",
    "wpe.weight",
    "embed_in.weight",
    "embed_out.weight",
)
SETTINGS = [
    ("llama", {"sparsity": 0.3}, {}),
    ("llama", {"bits": 4, "group_size": 16, "asymmetric": True}, {"dtype": torch.bfloat16, "sharded": True}),
    ("llama", {"pattern": "2:4", "bits": 3, "group_size": "row", "skip": ("v_proj",)}, {"dtype": torch.float16}),
    ("gpt2", {"pattern": "N:16", "sparsity": 0.4}, {"sharded": True}),
    ("gemma2", {"sparsity": 0, "bits": 8, "group_size": 32}, {}),
    ("gpt_neox", {}, {}),
]


@pytest.mark.parametrize(("family", "recipe", "model"), SETTINGS, ids=str)
def test_bytes_are_those_of_the_files(family, recipe, model, calibration, tmp_path):
    """Oracle: the sizes of the files that are there, of those that the export writes, and of transformers' weights."""
    source = tiny.build(tmp_path / "model", family, **model)
    made = compress(source, tmp_path / "out", calibration, eval=False, **recipe)
    out = made.export("sparse", tmp_path / "sparse", verify=False, progress=False)
    sizes = made.manifest["bytes"]
    assert sizes["dense"] == sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert sizes["artifact"] == sum(file.stat().st_size for file in made.path.rglob("*.safetensors"))
    assert sizes["sparse_export"] == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    files = [file for file in made.path.rglob("*") if file.is_file() and file.name != "mspc.json"]
    assert sizes["folder"] == sum(file.stat().st_size for file in files)
    loaded = tiny.reference(source, dtype=model.get("dtype", torch.float32))
    own = {id(p): p.nbytes for name, p in loaded.named_parameters() if name.endswith(EMBEDDINGS)}
    assert sizes["embeddings"] == sum(own.values())


# Seconds


class Clock:
    """A clock that a test turns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("mspc.pipeline.stopwatch.time.monotonic", lambda: self.now)


def test_the_seconds_of_stages_are_summed_over_runs(tmp_path, monkeypatch):
    clock, file = Clock(monkeypatch), tmp_path / "work" / "seconds.json"
    first = Stopwatch(Silent())
    with first.stage("Checking", 1):
        clock.now += 1
    first.keep_in(file)
    with suppress(KeyboardInterrupt), first.stage("Solving", 4) as step:
        clock.now += 2
        step()
        clock.now += 4
        raise KeyboardInterrupt
    clock.now += 1000  # nothing runs
    second = Stopwatch(Silent())
    with second.stage("Checking", 1):
        clock.now += 1
    second.keep_in(file)
    with second.stage("Solving", 4, done=1) as step:
        clock.now += 8
        step()
    clock.now += 16
    assert second.stages == {"Checking": 2, "Solving": 14}
    assert second.seconds == 1 + 2 + 4 + 1 + 8 + 16
    file.write_text("{")
    third = Stopwatch(Silent())
    third.keep_in(file)
    assert third.stages == {}


def test_a_killed_run_that_is_resumed_reports_the_sum_and_counts_on(llama, calibration, tmp_path, monkeypatch):
    """Oracle: the seconds that passed before the kill, by the clock of this process."""
    out, recipe = tmp_path / "out", mspc.Recipe(**QUICK, calibration=str(calibration))

    def slowly() -> None:
        mspc.compress(llama, recipe, out=out, progress=lambda event: time.sleep(0.2) if event.row else None)

    before = time.monotonic()
    assert killed_at(2, solve_blocks, "write_tensors", slowly)  # the first block is committed
    spent = time.monotonic() - before
    kept = json.loads((out / "measurements" / "seconds.json").read_text())
    assert 0.5 < kept["seconds"] < spent
    events: list[mspc.Event] = []
    begin = time.monotonic()
    made = mspc.compress(llama, recipe, out=out, progress=events.append, resume=True)
    now = time.monotonic() - begin
    manifest = made.manifest
    assert kept["seconds"] < manifest["seconds"] < kept["seconds"] + now
    assert kept["stages"]["Compressing"] < manifest["seconds_by_stage"]["Compressing"]
    assert sum(manifest["seconds_by_stage"].values()) <= manifest["seconds"]
    assert not (out / "measurements").exists()
    counted = [(event.done, event.total) for event in events if event.stage == "Compressing"]
    assert counted == [(done, 14) for done in range(7, 15)]  # the first block was committed
