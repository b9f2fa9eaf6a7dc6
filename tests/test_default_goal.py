"""`compress` without a goal: its size and what it says; and the note about layers that are slower than dense ones."""

import re
from itertools import product

import pytest
import tiny
import torch

import mspc
from mspc.formats.description import StoredMatrix
from mspc.kernels.slow import slow_note
from mspc.pipeline.summary import DEFAULT_GOAL
from mspc.types import NM, Grid, Unstructured

BF16, FP32 = torch.bfloat16, torch.float32
HALF, DENSE, INT4 = Unstructured(0.5), Unstructured(0.0), Grid(4, 128)
QUICK = {"effort": "fast", "num_sequences": 4, "sequence_length": tiny.LENGTH, "eval": False, "group_size": 32}


def said(records: list) -> list[str]:
    return [record.getMessage() for record in records]


def test_without_a_goal_the_model_has_the_size_of_int4(calibration, tmp_path, caplog):
    """Oracle: the bytes of the stored matrices, and the run that asks for this size; the first line says it."""
    model = tiny.build(tmp_path / "model", "llama", dtype=BF16)
    options = {"measurements": tmp_path / "kept", "progress": False}
    with caplog.at_level("INFO", "mspc"):
        made = mspc.compress(model, mspc.Recipe(calibration=str(calibration), **QUICK), out=tmp_path / "a", **options)
    assert said(caplog.records)[0] == DEFAULT_GOAL
    assert DEFAULT_GOAL.startswith("No goal was given: 4.25 bits per weight, the size of int4 with groups of 64")
    rows = made.manifest["matrices"]
    bits = 8 * sum(row["bytes"] for row in rows) / sum(row["shape"][0] * row["shape"][1] for row in rows)
    assert 4.0 < bits <= 4.25
    assert made.manifest["settings"]["bits_per_weight"] == 4.25
    assert made.manifest["allocation"] == {"chosen": "curves", "tried": {}}
    assert not mspc.Recipe().settings().needs_validation  # no text is set apart for it
    assert "bits_per_weight" not in (made.path / "recipe.toml").read_text()
    caplog.clear()
    asked = mspc.Recipe(bits_per_weight=4.25, head_bits=8, embedding_bits=8, calibration=str(calibration), **QUICK)
    with caplog.at_level("INFO", "mspc"):
        same = mspc.compress(model, asked, out=tmp_path / "b", **options)
    assert not any("No goal" in line for line in said(caplog.records))
    assert same.manifest["files"] | {"recipe.toml": ""} == made.manifest["files"] | {"recipe.toml": ""}


def test_token_ids_need_no_goal_either(llama, tmp_path, caplog):
    """A checkpoint in float32."""
    recipe = mspc.Recipe(effort="fast", eval=False, group_size=32)
    with caplog.at_level("INFO", "mspc"):
        made = mspc.compress(llama, recipe, out=tmp_path / "out", calibration=tiny.ids(4), progress=False)
    assert said(caplog.records)[0] == DEFAULT_GOAL
    assert made.manifest["bits_per_weight"] <= 4.25


def test_a_run_says_that_its_layers_are_slow_in_plain_torch(llama, calibration, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("MSPC_CPU_ISA", "torch")
    with caplog.at_level("INFO", "mspc"):
        tiny.compress(llama, tmp_path / "out", calibration, effort="fast", device="cpu")
    lines = [line for line in said(caplog.records) if line.startswith("Speed:")]
    assert lines == [
        "Speed: in plain torch compressed layers are slower than dense ones. --export dense avoids that, at full size."
    ]
    caplog.clear()
    with caplog.at_level("INFO", "mspc"):
        tiny.compress(llama, tmp_path / "as-it-is", calibration, effort="fast", device="cpu", sparsity=0)
    assert not [line for line in said(caplog.records) if line.startswith("Speed:")]


@pytest.mark.parametrize(
    ("pattern", "grid", "dtype", "slow"),
    [
        (HALF, INT4, BF16, "1 with masks and codes"),
        (NM(8, 16), INT4, BF16, "1 with masks and codes"),
        (NM(2, 4), Grid(3, 128), BF16, "1 with masks and codes"),
        (HALF, INT4, FP32, "1 with masks and codes"),
        (HALF, Grid(4, 16), BF16, "1 without a kernel"),
        (DENSE, Grid(4, 16), BF16, "1 without a kernel"),
        (HALF, None, FP32, "1 without a kernel"),
        (NM(2, 4), INT4, BF16, None),
        (NM(2, 4), None, BF16, None),
        (NM(8, 16), None, BF16, None),
        (HALF, None, BF16, None),
        (DENSE, INT4, BF16, None),
        (DENSE, INT4, FP32, None),
        (DENSE, None, BF16, None),
    ],
)
def test_what_is_slow_on_a_gpu_is_what_the_table_of_predictions_says(pattern, grid, dtype, slow):
    """Oracle: the table of docs/speed.md, and the list of kernels there."""
    note = slow_note([StoredMatrix((16, 512), pattern, grid, dtype)], "cuda")
    assert note == (
        slow
        and f"Speed: of 1 matrices, {slow} are predicted to be slower than dense ones on a GPU. --sparsity 0 --bits 4 "
        "avoids that."
    )


def test_the_note_counts_and_what_it_advises_is_not_slow():
    """The advice is followed with every group size that `auto` may choose."""
    kinds = [(HALF, INT4), (HALF, INT4), (DENSE, Grid(4, 16)), (DENSE, INT4), (DENSE, None)]
    note = slow_note([StoredMatrix((16, 512), pattern, grid, BF16) for pattern, grid in kinds], "cuda")
    assert re.search(r"of 5 matrices, 2 with masks and codes and 1 without a kernel are", note)
    for size, dtype in product((128, 64, 32, None), (BF16, torch.float16, FP32)):
        assert slow_note([StoredMatrix((16, 512), DENSE, Grid(4, size), dtype)], "cuda") is None
