"""Plans: what is written is what is read; edits are obeyed; every mistake names its matrix."""

import json
from pathlib import Path

import pytest

from mspc.errors import InputError
from mspc.formats.targets import target_from_dict, target_to_dict
from mspc.planning.plan_file import KEYS, read_plan, write_plan
from mspc.types import NM, Grid, Matrix, PlannedMatrix, Target, Unstructured

MATRICES = [Matrix(f"layers.{i}.{name}.weight", (8, 16)) for i in range(2) for name in ("q", "k")]
MATRICES.append(Matrix("layers.1.experts.up", (8, 16), index=3))
TARGETS = [
    Target(Unstructured(43 / 128)),
    Target(NM(2, 4)),
    Target(NM(5, 16), Grid(3, None, False)),
    Target(Unstructured(0.0), Grid(4, 128)),
    Target(Unstructured(1 / 3), Grid(8, 16)),
]
PLAN = [
    PlannedMatrix(matrix.name, matrix.shape, target, sensitivity)
    for matrix, target, sensitivity in zip(MATRICES, TARGETS, (None, 0.1, 1e-30, 2.5, -0.7), strict=True)
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_plan(tmp_path / "plan.json", PLAN)
    return tmp_path / "plan.json"


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content["matrices"])
    path.write_text(json.dumps(content))


def test_a_plan_comes_back_as_it_was(path):
    assert read_plan(path, MATRICES) == PLAN


def test_a_plan_has_one_matrix_a_line(path):
    lines = path.read_text().splitlines()
    assert len(lines) == len(PLAN) + 2
    for line, planned in zip(lines[1:-1], PLAN, strict=True):
        row = json.loads(line.rstrip(","))
        assert row["name"] == planned.name
        assert set(row) <= set(KEYS)
    assert json.loads(path.read_text())["format_version"] == 1


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_targets_come_back_through_json(target):
    assert target_from_dict(json.loads(json.dumps(target_to_dict(target)))) == target


def test_order_is_that_of_the_model_not_of_the_file(path):
    edit(path, lambda rows: rows.reverse())
    assert read_plan(path, MATRICES) == PLAN


def test_edits_are_obeyed(path):
    edit(path, lambda rows: rows[0].update(pattern="4:8", sparsity=0.5, bits=4, group_size=8, symmetric=False))
    assert read_plan(path, MATRICES)[0].target == Target(NM(4, 8), Grid(4, 8, False))


def test_shapes_are_only_for_the_reader(path):
    edit(path, lambda rows: rows[0].update(shape=[1, 2]))
    assert read_plan(path, MATRICES)[0].shape == (8, 16)


def test_a_line_may_be_short(path):
    """A name and a sparsity will do; an N:M pattern needs no sparsity."""
    rows = [{"name": matrix.name, "sparsity": 0.25} for matrix in MATRICES[:-1]]
    path.write_text(json.dumps({"matrices": [*rows, {"name": MATRICES[-1].name, "pattern": "1:4"}]}))
    targets = [planned.target for planned in read_plan(path, MATRICES)]
    assert targets == [Target(Unstructured(0.25))] * 4 + [Target(NM(1, 4))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 1.1}, r"layers\.0\.q: A sparsity must lie in \[0, 1\], not 1\.1"),
        ({"sparsity": float("nan")}, r"layers\.0\.q: A sparsity must lie in \[0, 1\], not nan"),
        ({"sparsity": "half"}, r"layers\.0\.q: sparsity must be a number, not 'half'"),
        ({"sparsity": None}, r"layers\.0\.q: sparsity must be a number, not None"),
        ({"sparsity": True}, r"layers\.0\.q: sparsity must be a number, not True"),
        ({"pattern": "2:4", "sparsity": "x"}, r"layers\.0\.q: sparsity must be a number, not 'x'"),
        ({"pattern": "2:4", "sparsity": 0.6}, r"layers\.0\.q: pattern 2:4 fixes the sparsity at 0\.5, not 0\.6"),
        ({"pattern": "N:16"}, r"layers\.0\.q: Unknown pattern 'N:16'"),
        ({"pattern": "5:4"}, r"layers\.0\.q: An N:M pattern needs 1 <= N <= M <= 256, not 5:4"),
        ({"pattern": 4}, r"layers\.0\.q: Unknown pattern '4'"),
        ({"bits": 5}, r"layers\.0\.q: bits must be 16, 8, 4, 3 or 2, not 5"),
        ({"bits": 4, "group_size": 0}, r"layers\.0\.q: group_size must be a whole number from 1 or 'row', not 0"),
        ({"bits": 4, "group_size": -8}, r"layers\.0\.q: group_size must be .*not -8"),
        ({"bits": 4, "group_size": 8.5}, r"layers\.0\.q: group_size must be .*not 8\.5"),
        ({"bits": 4, "group_size": "wide"}, r"layers\.0\.q: group_size must be .*not 'wide'"),
        ({"bits": 4, "symmetric": "no"}, r"layers\.0\.q: symmetric must be true or false, not 'no'"),
        ({"groupsize": 8}, r"layers\.0\.q: Unknown key 'groupsize': did you mean 'group_size'"),
        ({"name": "layers.0.qq"}, r"Unknown matrix 'layers\.0\.qq': did you mean 'layers\.0\.q'"),
        ({"name": 5}, r"Unknown matrix '5': choose one of layers"),
        ({"name": "layers.0.k"}, r"more than one line for layers\.0\.k"),
    ],
)
def test_mistakes_name_their_matrix(change, message, path):
    edit(path, lambda rows: rows[0].update(change))
    with pytest.raises(InputError, match=message) as raised:
        read_plan(path, MATRICES)
    assert str(path) in str(raised.value)
    assert not str(raised.value).endswith("..")


def test_a_missing_sparsity_is_named(path):
    edit(path, lambda rows: rows[0].pop("sparsity"))
    with pytest.raises(InputError, match=r"layers\.0\.q: its sparsity is missing"):
        read_plan(path, MATRICES)


def test_matrices_that_are_left_out_are_named(path):
    edit(path, lambda rows: rows.pop(0))
    with pytest.raises(InputError, match=r"leaves out layers\.0\.q and 1 in all.*--skip"):
        read_plan(path, MATRICES)
    edit(path, lambda rows: rows.clear())
    with pytest.raises(InputError, match=r"leaves out layers\.0\.q, layers\.0\.k, layers\.1\.q and 5 in all"):
        read_plan(path, MATRICES)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"matrices": 3}', b'{"matrices": ["a"]}', b'{"matrices": [{"sparsity": 0}]}', b"\xff"],
)
def test_files_that_are_no_plan_are_named(content, path):
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"plan\.json cannot be read .*Give a plan\.json, edited or not"):
        read_plan(path, MATRICES)


def test_a_plan_of_another_format_is_refused(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    with pytest.raises(InputError, match=r"plan\.json has format 2, and this mspc reads 1"):
        read_plan(path, MATRICES)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.json does not exist"):
        read_plan(tmp_path / "nowhere.json", MATRICES)
