"""Checkpoints that others quantized, read as if they were dense."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import mspc
from mspc.errors import InputError
from mspc.formats.dequantize import AWQ, FP8, GPTQ, MXFP4, PACKED, Scheme, scaled_blocks, unpack_e2m1
from mspc.storage.artifact import ArtifactSource
from mspc.storage.dequantized import Dequantized, dense_config, open_checkpoint

FLOAT8 = torch.float8_e4m3fn
PROJECTIONS = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down"))


def random_fp8(*shape: int, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 50).to(FLOAT8)


def positive(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) / 100 + 1e-3


def random_bytes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(256, 384), (3, 128, 256)], ids=str)
@pytest.mark.parametrize("exponents", [False, True])
def test_fp8_in_blocks(shape, exponents):
    """Oracle: transformers."""
    codes, grid = random_fp8(*shape), (*shape[:-2], shape[-2] // 128, shape[-1] // 128)
    scales = random_bytes(*grid) // 8 + 110 if exponents else positive(*grid)
    found = FP8.decode({"": codes, "_scale_inv": scales}, Scheme("fp8", block=(128, 128)))
    expected = Fp8Dequantize(None)._dequantize_one(codes, scales, output_dtype=torch.float32)
    assert torch.equal(found, expected)


def test_floats_of_four_bits_with_their_own_blocks():
    """Oracle: transformers."""
    codes, scales = random_bytes(8, 32).view(torch.int8), random_bytes(8, 2) // 8 + 110
    found = FP8.decode({"": codes, "_scale_inv": scales}, Scheme("fp8", block=(128, 128)))
    assert torch.equal(found, Fp8Dequantize(None)._dequantize_one(codes, scales, output_dtype=torch.float32))
    assert tuple(found.shape) == FP8.shape({"": ("int8", (8, 32))}, Scheme("fp8"))


def test_the_last_block_may_be_cut_off():
    """Oracle: a loop over every number. DeepSeek's kv_a_proj_with_mqa has 576 rows in blocks of 128."""
    codes, scales = random_fp8(5, 7), positive(2, 3)
    found = scaled_blocks(codes, scales, (4, 3))
    for row in range(5):
        for column in range(7):
            assert found[row, column] == codes[row, column].float() * scales[row // 4, column // 3]


@pytest.mark.parametrize("shape", [(), (1,), (5,), (5, 1)], ids=str)
def test_one_scale_or_one_for_each_row(shape):
    codes, scales = random_fp8(5, 7), positive(*shape)
    found = scaled_blocks(codes, scales, None)
    for row in range(5):
        assert torch.equal(found[row], codes[row].float() * scales.flatten().expand(5)[row])


def test_mxfp4():
    """Oracle: transformers."""
    blocks, scales = random_bytes(3, 10, 2, 16), random_bytes(3, 10, 2, seed=1) // 8 + 110
    found = MXFP4.decode({"_blocks": blocks, "_scales": scales}, Scheme("mxfp4"))
    assert torch.equal(found, convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    assert tuple(found.shape) == MXFP4.shape({"_blocks": ("uint8", (3, 10, 2, 16))}, Scheme("mxfp4"))


def test_every_float_of_four_bits():
    """Oracle: sign, two bits of exponent and one of mantissa, as OCP Microscaling Formats defines them."""
    found = unpack_e2m1(torch.arange(16, dtype=torch.uint8) | torch.arange(16, dtype=torch.uint8) << 4)
    for code in range(16):
        sign, exponent, mantissa = -1 if code & 8 else 1, code >> 1 & 3, code & 1
        value = sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))
        assert found[2 * code] == found[2 * code + 1] == value


def test_awq():
    """Oracle: the packing by its definition: field i of a word is column 0, 2, 4, 6, 1, 3, 5, 7 of eight."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (64, 16), generator=generator)
    zeros = torch.randint(0, 16, (2, 16), generator=generator)
    scales = positive(2, 16).half()

    def packed(values: Tensor) -> Tensor:
        words = torch.zeros(len(values), 2, dtype=torch.int64)
        for word in range(2):
            for field, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                words[:, word] |= values[:, 8 * word + column] << 4 * field
        return words.to(torch.int32)

    parts = {".qweight": packed(codes), ".qzeros": packed(zeros), ".scales": scales}
    found = AWQ.decode(parts, Scheme("awq", 4))
    expected = (codes - zeros.repeat_interleave(32, 0)) * scales.float().repeat_interleave(32, 0)
    assert torch.equal(found, expected.T)
    assert AWQ.shape({".qweight": ("int32", (64, 2))}, Scheme("awq", 4)) == (16, 64)


def test_awq_as_it_is_packed_by_others():
    """Oracle: gptqmodel."""
    packing = pytest.importorskip("gptqmodel.quantization.awq.utils.packing_utils")
    codes, zeros = torch.randint(0, 16, (64, 16)), torch.randint(0, 16, (1, 16))
    weights, points = packing.pack_awq(codes, zeros, 4)
    parts = {".qweight": weights, ".qzeros": points, ".scales": torch.ones(1, 16)}
    assert torch.equal(AWQ.decode(parts, Scheme("awq", 4)), (codes - zeros).T.float())


def test_gptq_with_inputs_in_another_order():
    """Oracle: a loop over inputs, each in the group that `desc_act` gives it. Zero points of 0 are stored as 15."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (32, 8), generator=generator)
    zeros, scales = torch.arange(32).view(4, 8) % 16, positive(4, 8)
    group = torch.randint(0, 4, (32,), dtype=torch.int32, generator=generator)

    def words(values: Tensor, along: int) -> Tensor:
        fields = values.unflatten(along, (-1, 8)).movedim(along + 1, -1)
        return sum(fields[..., i] << 4 * i for i in range(8)).to(torch.int32)

    parts = {".qweight": words(codes, 0), ".qzeros": words((zeros - 1) % 16, 1), ".scales": scales, ".g_idx": group}
    found = GPTQ.decode(parts, Scheme("gptq", 4, zero_offset=1))
    for i in range(32):
        assert torch.equal(found[:, i], (codes[i] - zeros[group[i]]) * scales[group[i]])


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_packed(symmetric):
    """Oracle: the functions of compressed-tensors."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (8, 64), dtype=torch.int8, generator=generator)
    zeros = torch.randint(-8, 8, (8, 2), dtype=torch.int8, generator=generator)
    parts = {
        ".weight_packed": helpers.pack_to_int32(codes, 4),
        ".weight_scale": positive(8, 2),
        ".weight_shape": torch.tensor([8, 64]),
    }
    if not symmetric:
        parts[".weight_zero_point"] = helpers.pack_to_int32(zeros, 4, packed_dim=0)
    found = PACKED.decode(parts, Scheme("compressed-tensors", 4))
    shift = 0 if symmetric else zeros.float().repeat_interleave(32, 1)
    assert torch.equal(found, (codes - shift) * parts[".weight_scale"].repeat_interleave(32, 1))


def to_fp8(folder: Path, out: Path) -> Path:
    """A copy of a checkpoint in block-scaled FP8, and next to it, as `dense`, what its weights are."""
    tensors, dense = {}, {}
    for key, weight in load_file(folder / "model.safetensors").items():
        if not key.endswith(PROJECTIONS):
            tensors[key] = dense[key] = weight
            continue
        scales = torch.full((-(-weight.shape[0] // 16), -(-weight.shape[1] // 16)), float(weight.abs().max()) / 448)
        codes = (weight / scales[0, 0]).to(FLOAT8)
        tensors |= {key: codes, f"{key}_scale_inv": scales, key.replace("weight", "activation_scale"): torch.ones(1)}
        dense[key] = codes.float() * scales[0, 0]
    quantization = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    return written(folder, out, tensors, dense, quantization)


def written(folder: Path, out: Path, tensors: dict, dense: dict, quantization: dict) -> Path:
    for name, found, entries in (("quantized", tensors, {"quantization_config": quantization}), ("dense", dense, {})):
        shutil.copytree(folder, out / name)
        (out / name / "model.safetensors").unlink()
        save_file({key: value.contiguous() for key, value in found.items()}, out / name / "model.safetensors")
        config = json.loads((folder / "config.json").read_text()) | {"dtype": "float32"}
        (out / name / "config.json").write_text(json.dumps(config | entries))
    return out / "quantized"


def test_a_checkpoint_in_fp8_is_compressed_like_its_dense_weights(llama, calibration, tmp_path):
    """Oracle: the same run on a checkpoint of the dense weights."""
    model = to_fp8(llama, tmp_path)
    found, expected = (
        tiny.compress(folder, tmp_path / f"out-{folder.name}", calibration, bits=4, group_size=32)
        for folder in (model, tmp_path / "dense")
    )
    for file in sorted((expected.path / "matrices").iterdir()):
        assert file.read_bytes() == (found.path / "matrices" / file.name).read_bytes()
    config = json.loads((found.path / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dequantized_from"] == "fp8"
    assert found.manifest["bytes"]["dense"] == pytest.approx(expected.manifest["bytes"]["dense"], rel=0.01)
    export = mspc.export(found, "dense", tmp_path / "export", progress=False)
    assert "quantization_config" not in json.loads((export / "config.json").read_text())
    assert mspc.evaluate(export, str(calibration), sequence_length=16, max_windows=2, progress=False).perplexity > 0


def test_a_quantized_checkpoint_is_evaluated_and_loaded(llama, calibration, tmp_path, caplog):
    """Oracle: the checkpoint of its dense weights."""
    model = to_fp8(llama, tmp_path)
    scores = [
        mspc.evaluate(folder, str(calibration), sequence_length=16, max_windows=4, progress=False).perplexity
        for folder in (model, tmp_path / "dense")
    ]
    assert scores[0] == scores[1]
    ids = torch.arange(10)[None]
    logits = [mspc.load(folder, "cpu")(ids).logits for folder in (model, tmp_path / "dense")]
    assert torch.equal(*logits)


@pytest.mark.parametrize("format_name", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 8}, {"bits": 3}, {"bits": 4, "asymmetric": True}], ids=str)
def test_our_own_packed_exports(format_name, options, artifact_of, calibration, tmp_path):
    """Oracle: the weights of the artifact, in the dtype of the checkpoint."""
    if format_name == "compressed-tensors" and options["bits"] == 3:
        pytest.skip("compressed-tensors have 4 and 8 bits")
    artifact = artifact_of("llama", **options)
    export = mspc.export(artifact, format_name, tmp_path / "export", verify=False, progress=False)
    source = open_checkpoint(export)
    assert isinstance(source, Dequantized)
    stored = ArtifactSource(artifact.path)
    expected = dict(stored.read(stored.keys()))
    for key, tensor in source.read(source.keys()):
        assert source.types()[key] == (str(tensor.dtype)[6:], tuple(tensor.shape))
        torch.testing.assert_close(tensor.float(), expected[key].float(), rtol=2e-3, atol=1e-6)
    assert set(source.keys()) == set(expected)


REFUSED = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method 'bitsandbytes'"),
    ({"quant_method": "gptq", "bits": 5}, "5 bits"),
    ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:x": {"bits": 8}}}, "dynamic"),
    ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version gemv"),
    ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {"a": {}}}, "nvfp4"),
    ({"quant_method": "compressed-tensors", "config_groups": {}}, "0 grids"),
    ({"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"R3": {}}}}, "rotated weights"),
    ({"quant_method": "compressed-tensors"}, "config_groups"),
]


@pytest.mark.parametrize(("config", "told"), REFUSED, ids=str)
def test_other_quantizations_are_refused_by_name(config, told):
    with pytest.raises(InputError, match=r"is quantized already") as error:
        dense_config({"quantization_config": config}, Path("model"))
    assert told in str(error.value)
    assert "Give a checkpoint that is not quantized" in str(error.value)


def test_damage_is_named(llama, tmp_path):
    model = to_fp8(llama, tmp_path)
    file = model / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {f"{name}_scale_inv": torch.ones(3, 5)}, file)
    with pytest.raises(InputError, match=rf"{name} cannot be made dense from its fp8 tensors \(3 x 5 scales"):
        dict(open_checkpoint(model).read([name]))
    save_file(tensors | {name: torch.full((64, 32), float("nan")).to(FLOAT8)}, file)
    with pytest.raises(InputError, match=f"{name} contains NaN"):
        list(open_checkpoint(model).fingerprint())
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    with pytest.raises(InputError, match=f"no {name}, without which"):
        open_checkpoint(model)
