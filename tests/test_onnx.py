"""ONNX layouts against brute force, golden bytes and the reference implementation of DequantizeLinear in onnx."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families import NEEDED
from hypothesis import given
from hypothesis import strategies as st
from oracles import few
from tiny_configs import tiny_config
from transformers import AutoModelForCausalLM

from exporters.genai import genai_config
from exporters.reading import little_endian_fields, reader_of
from mspc.errors import InputError, MspcError
from mspc.formats.onnx import block_size, pack_dequantize_linear, pack_matmul_nbits
from mspc.model.special_ids import SpecialIds
from mspc.storage.manifest import MatrixEntry
from mspc.types import Codes, Grid, Matrix, PlannedMatrix, Target, Unstructured

onnx = pytest.importorskip("onnx")
pytestmark = pytest.mark.filterwarnings("ignore")  # onnx's own

from exporters import onnx as exporter  # noqa: E402
from exporters.onnx_graph import decoder_graph  # noqa: E402

MATRIX = Matrix("model.layers.0.mlp.up_proj.weight", (8, 64))


def planned(grid: Grid | None, shape: tuple[int, int] = (8, 64)) -> PlannedMatrix:
    return PlannedMatrix(MATRIX.name, shape, Target(Unstructured(0.5), grid))


def entry() -> MatrixEntry:
    return MatrixEntry(
        MATRIX, MATRIX.parameter, Target(Unstructured(0.5), Grid(4, 32)), torch.float32, (), 0, "", 256, 256, None, 0.0,
        0.0, 0.0, "float32", 1,
    )  # fmt: skip


def random_codes(num_out: int, num_groups: int, group_size: int, bits: int, seed: int) -> Codes:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(0, 2**bits, shape, generator=generator).to(torch.uint8)

    scales = torch.rand(num_out, num_groups, generator=generator).half()
    return Codes(draw(num_out, num_groups * group_size), scales, draw(num_out, num_groups))


@pytest.mark.parametrize(("group_size", "block"), [(32, 32), (128, 128), (96, 32), (768, 256), (4096, 256), (24, 8)])
def test_blocks(group_size, block):
    assert block_size(group_size) == block


grids = given(
    st.integers(1, 5), st.integers(1, 4), st.sampled_from([16, 32, 48]), st.sampled_from([2, 4, 8]), st.integers(0, 9)
)


@few
@grids
def test_matmul_nbits_by_brute_force(num_out, num_groups, group_size, bits, seed):
    """One Python integer for every block, and for the zero points of every row."""
    codes = random_codes(num_out, num_groups, group_size, bits, seed)
    parts = pack_matmul_nbits(codes, bits, symmetric=False)
    block = block_size(group_size)
    repeats = group_size // block
    for o in range(num_out):
        for b in range(num_groups * repeats):
            values = codes.values[o, b * block : (b + 1) * block].tolist()
            number = sum(value << (bits * place) for place, value in enumerate(values))
            assert bytes(parts["codes"][o, b].tolist()) == number.to_bytes(block * bits // 8, "little")
            assert parts["scales"][o, b] == codes.scales[o, b // repeats].float()
        zeros = [int(codes.zeros[o, b // repeats]) for b in range(num_groups * repeats)]
        number = sum(zero << (bits * place) for place, zero in enumerate(zeros))
        assert bytes(parts["zeros"][o].tolist()) == number.to_bytes(-(-len(zeros) * bits // 8), "little")
    assert set(pack_matmul_nbits(codes, bits, symmetric=True)) == {"codes", "scales"}


@few
@grids
def test_dequantize_linear_by_brute_force(num_out, num_groups, group_size, bits, seed):
    codes = random_codes(num_out, num_groups, group_size, bits, seed)
    parts = pack_dequantize_linear(codes, bits)
    num_in = num_groups * group_size
    for name, expected in (("codes", codes.values), ("zeros", codes.zeros)):
        flat = little_endian_fields(parts[name].numpy()[None], bits, num_out * (num_in if name == "codes" else len(
            parts["scales"])))[0]  # fmt: skip
        repeats = 1 if name == "codes" else group_size // block_size(group_size)
        assert flat.tolist() == expected.repeat_interleave(repeats, 1).T.flatten().tolist()
    assert parts["scales"].tolist() == codes.scales.float().repeat_interleave(repeats, 1).T.tolist()


def test_dequantize_linear_is_what_the_standard_computes():
    """Oracle: onnx.reference, which knows nothing of blocks of ours."""
    codes = random_codes(4, 2, 32, 4, 0)
    parts = pack_dequantize_linear(codes, 4)
    integers = onnx.TensorProto.UINT4
    tensors = [
        onnx.helper.make_tensor("codes", integers, [64, 4], parts["codes"].numpy().tobytes(), raw=True),
        onnx.helper.make_tensor("scales", onnx.TensorProto.FLOAT, [2, 4], parts["scales"].numpy().tobytes(), raw=True),
        onnx.helper.make_tensor("zeros", integers, [2, 4], parts["zeros"].numpy().tobytes(), raw=True),
    ]
    node = onnx.helper.make_node("DequantizeLinear", ["codes", "scales", "zeros"], ["weight"], axis=0, block_size=32)
    output = onnx.helper.make_tensor_value_info("weight", onnx.TensorProto.FLOAT, [64, 4])
    graph = onnx.helper.make_graph([node], "one", [], [output], tensors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    (weight,) = onnx.reference.ReferenceEvaluator(model).run(None, {})
    groups = torch.repeat_interleave(torch.arange(2), 32)
    expected = (codes.values.float() - codes.zeros.float()[:, groups]) * codes.scales.float()[:, groups]
    assert np.array_equal(weight, expected.T.numpy())


@pytest.mark.parametrize(
    ("matrix", "options", "message"),
    [
        (
            planned(Grid(4, 32)),
            {"weights": "int4"},
            "must be one of float32, float16, matmulnbits, qdq, sparse, not 'int4'",
        ),
        (planned(Grid(4, 32)), {"weights": "qdq", "accuracy_level": 9}, "accuracy_level must be 0 to 4, not 9"),
        (
            planned(Grid(4, 32)),
            {"weights": "qdq", "accuracy_level": 4},
            "accuracy_level has no effect with weights=qdq",
        ),
        (planned(Grid(3, 32)), {"weights": "matmulnbits"}, "up_proj: matmulnbits takes 2, 4 or 8 bits, not 3"),
        (planned(None), {"weights": "qdq"}, "no matrix has a grid; use float32 or float16"),
        (
            planned(Grid(4, 32)),
            {"weights": "sparse", "accuracy_level": 3},
            "of sparse weights is 0 or 4, not 3",
        ),
        (planned(Grid(4, 8)), {"weights": "qdq"}, "multiple of 16 inputs, not of 8"),
        (planned(Grid(4, None), (8, 72)), {"weights": "qdq"}, "multiple of 16 inputs, not of 72"),
    ],
)
def test_what_it_cannot_hold_is_refused(matrix, options, message):
    with pytest.raises(InputError, match=message):
        exporter.check([matrix], {}, exporter.Options(**options), Path())


def test_genai_config_takes_what_the_configs_lack():
    config = {"vocab_size": 260, "n_embd": 32, "n_head": 4, "n_positions": 64, "eos_token_id": None}
    made = genai_config(config, SpecialIds(eos=(7, 8)), (2, 4, 8), {"session.entry": "1"})
    model = made["model"]
    assert (model["eos_token_id"], model["pad_token_id"]) == ([7, 8], 7)
    assert (model["context_length"], model["decoder"]["hidden_size"]) == (64, 32)
    assert model["decoder"]["session_options"]["session.entry"] == "1"
    json.dumps(made)


def test_what_is_no_onnx_model_is_an_error(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match="model.onnx is no ONNX model"):
        reader_of("onnx", tmp_path)


def with_weights_in(location: str, folder: Path) -> Path:
    """A model of one tensor that lies in another file."""
    tensor = onnx.TensorProto(name=MATRIX.parameter, dims=[64, 8], data_type=1, data_location=1)
    tensor.external_data.add(key="location", value=location)
    graph = onnx.helper.make_graph([], "one", [], [], [tensor])
    (folder / "model.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    return folder


@pytest.mark.parametrize("location", ["../elsewhere", "/etc/hostname"])
def test_weights_outside_the_folder_are_not_read(location, tmp_path):
    with pytest.raises(InputError, match="points outside the folder"):
        reader_of("onnx", with_weights_in(location, tmp_path))(entry())


def test_a_data_file_cut_short_is_an_error(tmp_path):
    (tmp_path / "model.onnx.data").write_bytes(b"abcd")
    with pytest.raises(ValueError, match="reshape"):
        reader_of("onnx", with_weights_in("model.onnx.data", tmp_path))(entry())


@pytest.mark.parametrize("key", ["mamba2", "qwen3_next"])
def test_states_other_than_keys_and_values_are_refused_by_name(key):
    """Oracle: the cache of transformers, which has other states for these models."""
    model = AutoModelForCausalLM.from_config(tiny_config(key, NEEDED.get(key, {})))
    with pytest.raises(MspcError, match=f"{type(model).__name__} keeps other states .* Export dense or sparse"):
        decoder_graph(model, [], 18)
