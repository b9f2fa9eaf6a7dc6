"""The sparse export: what comes back is bitwise what was there; a spoiled file raises InputError and nothing else.

Oracle of the round trip: the artifact's own matrices. The fuzzer flips bytes and edits the description.
"""

import json
import random
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import few

import mspc
from mspc.errors import InputError
from mspc.storage.artifact import ArtifactSource
from mspc.storage.sparse_export import read_sparse

SETTINGS = [
    {"sparsity": 0.5},
    {"pattern": "2:4"},
    {"pattern": "8:16", "bits": 4, "group_size": 32},
    {"sparsity": 0.6, "bits": 3, "group_size": "row", "asymmetric": True},
    {"sparsity": 0.0, "bits": 8, "group_size": 32},
]


@pytest.fixture(scope="module")
def exported(calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[mspc.Artifact, Path]]:
    """The same model in every setting; bf16, and sharded."""
    folder = tmp_path_factory.mktemp("sparse")
    model = tiny.build(folder / "model", "llama", dtype=torch.bfloat16, sharded=True)
    found = []
    for number, setting in enumerate(SETTINGS):
        artifact = tiny.compress(model, folder / f"artifact{number}", calibration, allocator="uniform", **setting)
        found.append((artifact, artifact.export("sparse", folder / f"sparse{number}", progress=False)))
    return found


@pytest.mark.parametrize("number", range(len(SETTINGS)), ids=[str(setting) for setting in SETTINGS])
def test_every_matrix_comes_back_bit_for_bit(number, exported):
    artifact, folder = exported[number]
    source = ArtifactSource(artifact.path)
    entries = {key.removesuffix(".weight"): entry for key, entry in source.whole.items()}
    back = {name: matrix for name, _, matrix in read_sparse(folder)}
    assert back.keys() == entries.keys()
    for name, matrix in back.items():
        expected = source.matrix(entries[name])
        assert matrix.weight.dtype == torch.bfloat16
        assert torch.equal(matrix.weight.view(torch.int16), expected.weight.view(torch.int16))
        assert torch.equal(matrix.mask, expected.mask)
        if expected.codes is not None:
            assert torch.equal(matrix.codes.values, expected.codes.values)


def try_to_read(folder: Path) -> None:
    """Any outcome but an error that is not ours."""
    try:
        for _ in read_sparse(folder):
            pass
    except InputError:
        pass


@pytest.mark.parametrize("number", range(len(SETTINGS)), ids=[str(setting) for setting in SETTINGS])
def test_flipped_bytes_and_truncated_files_raise_only_input_errors(number, exported, tmp_path):
    folder = Path(shutil.copytree(exported[number][1], tmp_path / "copy"))
    rng = random.Random(number)
    shards = sorted(folder.glob("*.safetensors"))
    for _ in range(60):
        shard = rng.choice(shards)
        whole = shard.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        spoiled = bytearray(whole)
        if rng.random() < 0.25:
            del spoiled[rng.randrange(len(spoiled)) :]
        else:
            place = rng.randrange(header if rng.random() < 0.7 else len(spoiled))
            spoiled[place] ^= 1 << rng.randrange(8)
        shard.write_bytes(spoiled)
        try_to_read(folder)
        shard.write_bytes(whole)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 2**40), st.floats(), st.text(max_size=5), st.just("2:4"),
    st.just("1:256"), st.lists(st.integers(-1, 2**40), max_size=3), st.just("float16"), st.just("int8"),
    st.just("unstructured"),
)  # fmt: skip


@few
@given(st.integers(0, len(SETTINGS) - 1), st.data())
def test_edited_descriptions_raise_only_input_errors(exported, tmp_path_factory, number, data):
    folder = exported[number][1]
    config = json.loads((folder / "config.json").read_text())
    matrices = config["quantization_config"]["matrices"]
    row = matrices[data.draw(st.sampled_from(sorted(matrices)))]
    row[data.draw(st.sampled_from(sorted(row)))] = data.draw(VALUES)
    copy = tmp_path_factory.mktemp("edited")
    for path in folder.iterdir():
        if path.is_file() and path.name != "config.json":
            (copy / path.name).symlink_to(path)
    (copy / "config.json").write_text(json.dumps(config))
    try_to_read(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [2**30, 2**30]}, "its mask are torch.uint8"),
        ({"shape": [32, -1]}, "two whole numbers above 0"),
        ({"pattern": "2:4", "sparsity": 0.5}, "its indices are missing"),
        ({"dtype": "float64"}, "dtype must be one of"),
        ({"sparsity": 0.0}, "its values are torch.bfloat16"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(change, message, exported, tmp_path):
    """A shape that no file justifies is refused before anything of that size is made."""
    folder = Path(shutil.copytree(exported[0][1], tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["matrices"]["model.layers.0.mlp.down_proj"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        list(read_sparse(folder))
