"""The bench on a CPU, at sizes that take no time.

Oracles: transformers' own logits for the decoder; the packer of real exports, bit for bit, for random matrices; bytes
in files and closed forms for what a step moves; numpy's percentiles; matrices in float64 for the int4 of torch.
"""

import importlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_cli import mspc_cli, refused

import mspc
from mspc.bench import measure, timing
from mspc.bench import run as bench_run
from mspc.bench.decoder import Decoder, Operations, Shape, add_norm, gated, rotate
from mspc.bench.formats import Source, describe, parse_format, random_stored
from mspc.bench.measure import Sample, in_turns, measure_decode, measure_prefill, of_decoder, step_bytes
from mspc.bench.models import (
    SHAPES,
    TINYGEMM,
    copied_bytes,
    engine_of,
    format_of,
    matrices_of,
    model_decoder,
    outer_bytes,
    random_bytes,
    random_decoder,
    random_outer,
    shape_of,
    stored_dtype,
)
from mspc.bench.request import Request, check_memory, make_plan, needed_bytes
from mspc.bench.rows import compare
from mspc.bench.run import bench
from mspc.bench.tables import compared_with, gain, notes, tables, verdicts
from mspc.bench.timing import Ceilings, device_seconds, spread
from mspc.bench.tinygemm import TinygemmLinear
from mspc.errors import InputError, MspcError
from mspc.formats import layout
from mspc.formats.decoding import decode_mask
from mspc.kernels.cpu import library, memory
from mspc.runtime.joined import ConcatenatedLinear
from mspc.runtime.linear import SparseLinear
from mspc.types import NM

CPU = torch.device("cpu")
ENGINE = f"C++, {library.available()[-1]}" if library.available() else "plain torch"
DOCS = Path(__file__).parents[1] / "docs" / "benchmark.md"
FORMATS = ("dense", "int8", "int4", "int3", "2:4", "4:8", "8:16", "5:16", "16:32", "2:4+int4", "6:16+int3", "50%")
FORMATS += ("30%+int4", "70%+int3")
SMALL = Shape("small", 128, 256, 2, 4, 2, 32, 260, tied=False)
CEILINGS = Ceilings(dict.fromkeys(("p10", "median", "p90"), 1e10), dict.fromkeys(("p10", "median", "p90"), 1e12))


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timing.COPY_BYTES, "cpu", 2**16)
    monkeypatch.setitem(timing.GEMM_SIZE, "cpu", 32)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose matrices take groups of 128."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    return tiny.build(tmp_path_factory.mktemp("bench") / "wide", "llama", **sizes)


@pytest.fixture(scope="module")
def compressed(
    folder_of: Callable[..., Path], calibration: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`compressed(family or folder, **recipe)`: an artifact, with its sparse export in `exports/sparse`."""

    def get(model: str | Path, **settings: object) -> Path:
        out = tmp_path_factory.mktemp("bench") / "artifact"
        folder = folder_of(model) if isinstance(model, str) else model
        quick = {"solver": "mask", "criterion": "magnitude", "allocator": "uniform", "num_sequences": 2}
        return tiny.compress(folder, out, calibration, exports=["sparse"], **quick | settings).path

    return get


# The decoder


def greatest_difference(decoder: Decoder, logits: torch.Tensor, ids: torch.Tensor, prompt: int) -> float:
    """From those of transformers (B, T, V): after a prompt, and after each token that is then given one by one."""
    cache = decoder.cache(len(ids), ids.shape[1])
    with torch.no_grad():
        found = [decoder(ids[:, :prompt], cache, 0)]
        found += [decoder(ids[:, i : i + 1], cache, i) for i in range(prompt, ids.shape[1])]
    return float((torch.stack(found, 1) - logits[:, prompt - 1 :]).abs().max())


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
    ids=["llama", "tied, biases", "llama3 rotations", "mistral", "qwen2", "qwen3"],
)  # fmt: skip
def test_the_decoder_computes_what_transformers_does(family, changes, tmp_path):
    folder, ids = tiny.build(tmp_path / "model", family, **changes), tiny.ids(2)
    with torch.no_grad():
        logits = tiny.reference(folder)(input_ids=ids, use_cache=False).logits
    decoder = model_decoder(folder, tiny.LENGTH, CPU, Operations())
    assert format_of(decoder) == "dense"
    for prompt in (1, 10):
        assert greatest_difference(decoder, logits, ids, prompt) < 3e-5 * float(logits.abs().max())


@pytest.mark.parametrize(
    ("family", "settings", "name", "is_joined"),
    [
        ("qwen2", {"pattern": "2:4", "bits": 4, "group_size": 16}, "2:4+int4", True),
        ("llama", {"pattern": "8:16"}, "8:16", True),
        ("llama", {"sparsity": 0.5}, "50%", False),
        ("llama", {"pattern": "2:4", "skip": ["k_proj"]}, "mixed", False),
    ],
    ids=str,
)
def test_compressed_models_run_as_they_are_stored(family, settings, name, is_joined, compressed):
    """Oracle: the dense export of the same artifact in transformers; the bytes of the files.

    Inputs of codes are rounded to 16 bits in C++.
    """
    artifact = compressed(family, **settings)
    mspc.Artifact(artifact).export("dense", artifact.with_name("dense"), verify=False, progress=False)
    ids = tiny.ids(2)
    with torch.no_grad():
        logits = tiny.reference(artifact.with_name("dense"))(input_ids=ids, use_cache=False).logits
    for folder in (artifact, artifact / "exports" / "sparse"):
        decoder = model_decoder(folder, tiny.LENGTH, CPU, Operations())
        limit = 1e-3 if library.available() and "bits" in settings else 3e-5
        assert greatest_difference(decoder, logits, ids, 8) < limit * float(logits.abs().max())
        assert format_of(decoder) == name
        assert engine_of(decoder) == ENGINE
        assert isinstance(decoder.blocks[0].qkv, SparseLinear if is_joined else ConcatenatedLinear)
        stored = load_file(artifact / "exports" / "sparse" / "model.safetensors")
        linears = sum(tensor.nbytes for key, tensor in stored.items() if "_proj" in key)
        biases = sum(tensor.nbytes for key, tensor in stored.items() if key.endswith("bias"))
        assert decoder.weight_bytes()["linears"] in (linears, linears - biases)


@pytest.mark.skipif(not library.available(), reason="there is no C++ compiler")
@pytest.mark.parametrize("name", ["dense", TINYGEMM, "2:4+int4", "50%", "50%+int3"])
def test_blocks_of_random_weights_are_the_same_at_other_addresses(name):
    """Oracle: the first block. Weights of all formats lie in the memory for huge pages, and are read from it."""
    first, second = random_decoder(SMALL, name, random_outer(SMALL, 8, CPU), Operations()).blocks
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(first.qkv(x), second.qkv(x))
    assert not {t.data_ptr() for t in first.buffers()} & {t.data_ptr() for t in second.buffers()}
    for block in (first, second):
        largest = max(block.down.buffers(), key=lambda buffer: buffer.nbytes)
        assert name == TINYGEMM or largest.untyped_storage().nbytes() >= memory.BLOCK


@pytest.mark.skipif(not library.available(), reason="there is no C++ compiler")
def test_inputs_of_8_bits_are_those_of_the_operator(wide, compressed):
    """Oracle: `mspc.load` with the same inputs. Where they have no effect they are refused."""
    artifact = compressed(wide, pattern="2:4", bits=4)
    request = Request((str(artifact),), contexts=(8,), prefills=(8,), repeats=1, inputs="int8", device="cpu")
    row = next(row for row in bench(request, progress=False)["rows"] if row["name"] == str(artifact))
    assert row["engine"] == f"{ENGINE}, int8 inputs"
    rounded, usual = (
        mspc.evaluate(artifact, max_windows=20, progress=False, inputs=inputs).perplexity
        for inputs in ("int8", "int16")
    )
    assert row["perplexity"] == rounded != usual
    with pytest.raises(InputError, match="--inputs int8 has no effect on matrices without codes"):
        make_plan(Request((str(wide),), shapes="from-model", formats=("2:4",), inputs="int8", device="cpu"))
    with pytest.raises(InputError, match="Unknown inputs 'int4'"):
        make_plan(Request((str(wide),), inputs="int4", device="cpu"))


def test_operations_can_be_traced_whole():
    """Oracle: the same functions, not compiled."""
    x, w = torch.randn(2, 1, 64), torch.rand(64)
    qkv, cos, sin = torch.randn(2, 3, 64), torch.rand(3, 8), torch.rand(3, 8)
    norms = torch.rand(8), torch.rand(8)
    for function, given in (
        (add_norm, (x, x + 1, w, 1e-5)),
        (rotate, (qkv, cos, sin, 4, 2, norms, 1e-5)),
        (gated, (x,)),
    ):
        traced = torch.compile(function, backend="eager", fullgraph=True)
        torch.testing.assert_close(traced(*given), function(*given))


def test_operations_that_do_not_compile_are_plain_and_reported(monkeypatch, caplog):
    """The compiler raises; tensors for CUDA are made on the CPU."""

    def fails(*args):
        raise RuntimeError("no gcc\nhere")

    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
    monkeypatch.setattr(Operations, "compiled", lambda operations: Operations(fails, fails, fails))
    with caplog.at_level("INFO", logger="mspc"):
        operations, kind = bench_run.choose_operations(torch.device("cuda"))
    assert (operations, kind) == (Operations(), "plain")
    assert caplog.messages[0].endswith(": no gcc")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("name", ["dense", "2:4+int4", "8:16"])
def test_a_graph_repeats_the_step(name):
    """Oracle: the step run by itself."""
    device = torch.device("cuda")
    decoder = random_decoder(SMALL, name, random_outer(SMALL, 16, device), Operations())
    cache, ids = decoder.cache(2, 16), torch.randint(260, (2, 1), device=device)
    with torch.no_grad():
        replay = timing.captured(lambda: decoder(ids, cache, 9), device)
        ids.copy_(torch.randint(260, (2, 1), device=device))
        torch.testing.assert_close(replay().clone(), decoder(ids, cache, 9))


# Random matrices


@pytest.mark.parametrize("name", FORMATS)
def test_random_matrices_are_what_the_packer_of_exports_makes(name):
    """Unpacked and packed again they are the same bytes; every group is filled, and nothing that is kept is zero."""
    matrix = describe((24, 384), parse_format(name), "m")
    stored = random_stored(matrix, Source.seeded(0, CPU))
    whole = layout.decode(stored, matrix, "m")
    packed = layout.with_offsets(layout.pack(whole, matrix.dtype), matrix, "m")
    assert packed.keys() == stored.keys()
    assert all(torch.equal(packed[part], stored[part]) for part in stored)
    mask = decode_mask(stored, matrix, 0, 24)
    assert int(mask.sum()) == matrix.num_kept
    if isinstance(matrix.pattern, NM):
        assert set(mask.view(-1, matrix.pattern.of).sum(1).tolist()) == {matrix.pattern.keep}
    if matrix.grid is None:
        assert bool((whole.weight[mask] != 0).all())
    again = random_stored(matrix, Source.seeded(0, CPU))
    assert all(torch.equal(again[part], stored[part]) for part in stored)


@pytest.mark.parametrize("name", ["dense", TINYGEMM, "int4", "2:4", "8:16", "2:4+int4", "50%", "50%+int4"])
def test_random_layers_keep_the_size_of_their_input(name):
    layers = random_decoder(SMALL, name, random_outer(SMALL, 8, CPU), Operations()).blocks[0]
    with torch.no_grad():
        out = layers.down(torch.randn(200, 256, generator=torch.Generator().manual_seed(0)))
    assert 0.8 < float(out.std()) < 1.25


def test_the_int4_of_torch_multiplies_by_its_codes():
    shape = (32, 256)
    layer = TinygemmLinear(shape, Source.seeded(3, CPU), torch.float32)
    drawn = Source.seeded(3, CPU).stream(32, 256, 4).numpy()
    codes = np.stack([drawn >> 4, drawn & 15], -1).reshape(shape).astype(float)
    scales = layer.scales_and_zeros[..., 0].double().numpy().T.repeat(128, 1)
    weight = torch.from_numpy((codes - 8) * scales)
    torch.testing.assert_close(layer.dense().double(), weight, rtol=1e-5, atol=1e-7)
    x = torch.randn(2, 3, 256)
    torch.testing.assert_close(layer(x).double(), x.double() @ weight.T, rtol=1e-4, atol=1e-4)


# Bytes


@pytest.mark.parametrize("name", ["dense", TINYGEMM, *FORMATS[1:]])
def test_bytes_of_a_step_are_those_of_the_tensors(name):
    decoder = random_decoder(SMALL, name, random_outer(SMALL, 40, CPU), Operations())
    moved = step_bytes(of_decoder(decoder), batch=3, context=32)
    states = [
        block.state_dict(keep_vars=True) for block in decoder.blocks
    ]  # kept, as tensors as stored are made for it
    tensors = {id(tensor): tensor.nbytes for state in states for tensor in state.values()}
    tensors[id(decoder.outer.norm)] = decoder.outer.norm.nbytes
    assert moved["linears"] + moved["norms"] == sum(tensors.values())
    assert moved["linears"] == random_bytes(SMALL, name, torch.float32)
    assert moved["head"] == 260 * 128 * 4
    assert moved["cache"] == 2 * 2 * (2 * 32) * 4 * 3 * 33  # keys and values, blocks, of a token, bytes, tokens
    assert decoder.stored_bytes() == sum(moved.values()) - moved["cache"] + 260 * 128 * 4


def test_bytes_of_formats_in_closed_form():
    """Bits per weight of docs/sparse-format.md, in the shapes of Llama-3.1-8B, without making the model."""
    weights = SHAPES["8b"].block_weights * SHAPES["8b"].blocks
    assert weights == 6_979_321_856
    bits = {"dense": 16, "int4": 4.125, "2:4": 9, "4:8": 9.5, "8:16": 10, "6:16": 7.5, "2:4+int4": 3.125}
    found = {name: 8 * random_bytes(SHAPES["8b"], name, torch.bfloat16) / weights for name in bits}
    assert found == bits
    assert outer_bytes(SHAPES["8b"], torch.bfloat16) == 2 * 128256 * 4096 * 2
    assert outer_bytes(SHAPES["1b"], torch.bfloat16) == 128256 * 2048 * 2
    assert [SHAPES[name].cache_bytes(1, 2) for name in ("1b", "8b")] == [32768, 131072]


def test_operations_are_counted_by_hand():
    one = Shape("one", 8, 16, 1, 2, 1, 4, 10, tied=True)
    linears = 2 * (16 * 8 + 8 * 8 + 32 * 8 + 8 * 16)
    assert one.flops(1, 1, 0) == linears + 4 * 8 + 2 * 80
    assert one.flops(3, 1, 5) == 3 * (linears + 4 * 8 * 6 + 2 * 80)
    assert one.flops(1, 3, 0) == 3 * linears + 4 * 8 * (1 + 2 + 3) + 2 * 80


# Timing


def test_spreads_are_percentiles():
    samples = [float(n) for n in np.random.default_rng(0).exponential(size=57)]
    found = spread(samples)
    for key, percent in (("p10", 10), ("median", 50), ("p90", 90)):
        assert found[key] == pytest.approx(np.percentile(samples, percent))
    assert spread([3.0]) == {"p10": 3.0, "median": 3.0, "p90": 3.0}
    assert timing.inverse(found, 2.0)["p90"] == 2 / found["p10"]


def test_what_is_slow_is_sampled_less_often(monkeypatch):
    calls = []
    step = lambda: calls.append(0) or torch.zeros(1)  # noqa: E731
    assert len(device_seconds(step, CPU, 7)) == 7
    assert len(calls) == 8
    monkeypatch.setattr(timing, "MOST_SECONDS", 0.0)
    assert len(device_seconds(step, CPU, 7)) == 1


def test_measurements_predict_from_bytes_and_operations():
    decoder = random_decoder(SMALL, "2:4", random_outer(SMALL, 40, CPU), Operations())
    contender = of_decoder(decoder)
    (decoded,) = measure_decode([contender], 2, 16, 3, CEILINGS)
    total = sum(step_bytes(contender, 2, 16).values())
    assert decoded["predicted_seconds"] == total / 1e10
    assert decoded["bytes_per_second"]["median"] == pytest.approx(total / decoded["seconds"]["median"])
    assert decoded["share_of_copy"] == pytest.approx(decoded["bytes_per_second"]["median"] / 1e10)
    assert decoded["tokens_per_second"]["median"] == pytest.approx(2 / decoded["seconds"]["median"])
    assert decoded["share_of_read"] is decoded["round_seconds"] is None
    slow = Ceilings(CEILINGS.copy, dict.fromkeys(("p10", "median", "p90"), 1.0))
    assert measure_prefill([contender], 24, 3, slow)[0]["predicted_seconds"] == SMALL.flops(1, 24, 0)
    read = replace(CEILINGS, read=dict.fromkeys(("p10", "median", "p90"), 4e10))
    (decoded,) = measure_decode([contender], 2, 16, 3, read)
    assert decoded["predicted_seconds"] == total / 4e10
    assert decoded["share_of_read"] == pytest.approx(decoded["share_of_copy"] / 4)


def test_contenders_take_turns_and_the_first_round_is_left_out(monkeypatch):
    """Oracle: a log of the calls, whose times are their places in it."""
    calls = []

    def contender(name):
        def take(count):
            calls.append((name, count))
            return Sample(float(len(calls)))

        return take

    samples = in_turns([contender("a"), contender("b")], 3, 4)
    assert calls == [("a", 4), ("b", 4)] * 4
    assert [[sample.seconds for sample in found] for found in samples] == [[3, 5, 7], [4, 6, 8]]
    monkeypatch.setattr(measure, "MOST_SECONDS", 1e-9)  # one round then
    assert [len(found) for found in in_turns([lambda count: Sample(0.0)] * 2, 3, 4)] == [1, 1]
    monkeypatch.setattr(measure, "MOST_SECONDS", 60.0)  # the steps of one take longer than that, so it is run once
    takes = [lambda count, seconds=seconds: Sample(seconds) for seconds in (1.0, 20.0, 2.0)]
    assert [[sample.seconds for sample in found] for found in in_turns(takes, 2, 4)] == [[1, 1], [20], [2, 2]]


def test_ratios_are_those_of_the_same_rounds():
    """Oracle: by hand. Two contenders that a busy machine slows in the same rounds differ by no noise."""
    one, other = [1.0, 5.0, 2.0, 9.0, 1.0], [2.0, 10.0, 4.0, 18.0, 2.0]
    rows = [{"round_seconds": seconds, "seconds": spread(seconds)} for seconds in (other, one)]
    assert timing.ratios(*rows, in_turns=True) == {"p10": 2.0, "median": 2.0, "p90": 2.0}
    found = timing.ratios(*rows, in_turns=False)
    assert found == timing.ratios(*(row | {"round_seconds": None} for row in rows), in_turns=True)
    assert found["p10"] == spread(other)["p10"] / spread(one)["p90"] < 1 < 2.0 == found["median"]
    assert found["p90"] == spread(other)["p90"] / spread(one)["p10"]


# Requests


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(), "Give a PATH (artifact, sparse export or checkpoint), or --shapes 1b or 8b."),
        (Request(shapes="from-model"), "--shapes from-model takes them from PATH. Give a PATH"),
        (Request(shapes="2b"), "Unknown shapes '2b': choose one of 1b, 8b, from-model."),
        (Request(shapes="1b", baseline="fp8"), "Unknown baseline 'fp8': choose one of bf16, int4."),
        (
            Request(shapes="1b", formats=("2:4", "int5")),
            "Unknown format 'int5'. Choose dense, bf16, int8, int4, int3, int2,",
        ),
        (Request(shapes="1b", formats=("sparse",)), "Unknown format 'sparse'"),
        (Request(shapes="1b", formats=("2:4+",)), "Unknown format '2:4+'"),
        (Request(shapes="1b", formats=("2:4+50%+int4",)), "Unknown format '2:4+50%+int4'"),
        (
            Request(shapes="1b", formats=("3:5",)),
            "3:5: qkv of 1b has 2048 inputs, but needs a multiple of 5 for groups of 3:5",
        ),
        (Request(shapes="1b", formats=("5:4",)), "An N:M pattern needs 1 <= N <= M"),
        (Request(shapes="1b", batches=(0,)), "--batch must be at least 1, not 0"),
        (Request(shapes="1b", repeats=0), "--repeats must be at least 1, not 0"),
        (Request(shapes="1b", device="warp"), "Device 'warp' cannot be used"),
        (Request(shapes="1b", paths=("x",)), "--shapes 1b measures random weights of its own and takes no PATH"),
        (Request(paths=("./nowhere",)), "Model './nowhere' is not a folder"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_said_first(request_, message):
    with pytest.raises(InputError, match=re.escape(message)):
        make_plan(request_)


def test_what_models_do_not_allow(folder_of, wide, tmp_path, monkeypatch):
    path, narrow = str(wide), tiny.build(tmp_path / "narrow", "llama", hidden_size=48)
    refusals = {
        Request((path,), contexts=(128,)): "--context 128 is longer than the model allows (127). Lower it.",
        Request((path,), prefills=(129,)): "--prefill 129 is longer than the model allows (128). Lower it.",
        Request((path,), formats=("2:4",)): f"--format is for random weights, but {path} has its own. Add --shapes",
        Request((str(folder_of("gpt2")),)): "is a gpt2 model, but the bench runs llama, mistral, qwen2, qwen3",
        Request((str(folder_of("llama")),), baseline="int4"): "torch's int4 product needs outputs divisible by 16",
        Request(
            (str(narrow),), shapes="from-model", formats=("int4",)
        ): "int4: qkv of narrow has 48 inputs, but needs a multiple of 32 for groups of 32 that share a scale",
    }
    for request, message in refusals.items():
        with pytest.raises(InputError, match=re.escape(message)):
            make_plan(request)
    assert shape_of(folder_of("mistral"))[1] == 8  # its attention window
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--shapes 8b is for a GPU, but there is no CUDA here. Choose --shapes 1b"):
        make_plan(Request(shapes="8b"))


def test_a_model_that_does_not_fit_is_refused():
    plan = make_plan(Request(shapes="1b", formats=("2:4",), batches=(4,), contexts=(2047,), device="cpu"))
    needed = random_bytes(SHAPES["1b"], "dense", torch.float32) + outer_bytes(SHAPES["1b"], torch.float32)
    needed += SHAPES["1b"].cache_bytes(4 * 2048, 4)
    check_memory(plan, needed)
    message = (
        "dense of 1b needs 4.94 GB for weights and 536.9 MB for the cache of 8,192 tokens, but cpu has 5.48 GB free"
    )
    with pytest.raises(InputError, match=re.escape(message)):
        check_memory(plan, needed - 1)


def test_rows_that_do_not_fit_at_once_are_measured_in_lots(wide, monkeypatch, caplog):
    """Oracle: the sizes of the lots, from the memory that is free. Rows of other lots are compared by their spreads."""
    request = Request((str(wide),), shapes="from-model", formats=("2:4",), contexts=(8,), prefills=(8,), repeats=3)
    plan = make_plan(replace(request, device="cpu"))
    (group,) = plan.groups
    needed = {one.name: needed_bytes(plan, one) for one in group}
    assert needed["int4 (torch)"] < needed["2:4"] < needed["dense"]
    shared = outer_bytes(group[0].shape, torch.float32)
    free = bench_run.TO_MAKE * (shared + needed["int4 (torch)"] + needed["2:4"] + 1)
    monkeypatch.setattr(bench_run, "free_memory", lambda device: int(free))
    with caplog.at_level("WARNING", logger="mspc"):
        result = bench(replace(request, device="cpu"), progress=False)
    assert "in 2 lots, and only those of one lot take turns" in caplog.text
    dense, torch_int4, ours = result["rows"]
    assert [row["lot"] for row in result["rows"]] == [1, 0, 0]
    for base, together in ((dense, False), (torch_int4, True)):
        found = ours["decode"][0]["speedup_spread"][base["baseline"]]
        assert found == timing.ratios(base["decode"][0], ours["decode"][0], in_turns=together)


def test_sizes_that_a_model_does_not_reach_are_left_out(wide):
    plan = make_plan(Request((str(wide),), shapes="from-model", formats=("2:4", "2:4", "dense")))
    assert (plan.contexts, plan.prefills, plan.batches) == ((127,), (128,), (1,))
    assert [candidate.name for candidate in plan.groups[0]] == ["dense", "int4 (torch)", "2:4"]


def test_memory_that_runs_out_is_an_error_that_says_what_to_do(wide, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(bench_run, "measure_decode", full)
    with pytest.raises(MspcError, match="all in turns: the memory of cpu was not enough .* Choose smaller --shapes"):
        bench(Request((str(wide),), shapes="from-model", formats=("2:4",)), progress=False)


# Results


def check_schema(result: dict[str, object]) -> None:
    """The JSON is as docs/benchmark.md describes it."""
    assert set(result) == {"schema", "date", "label", "versions", "device", "configuration", "ceilings", "rows"}
    assert {"mspc", "torch", "triton", "transformers", "python", "cuda"} == set(result["versions"])
    assert {"type", "name", "clocks"} <= set(result["device"])
    assert set(result["ceilings"]) == {"copy_bytes_per_second", "read_bytes_per_second", "gemm_flops"}
    both = {
        "samples",
        "seconds",
        "round_seconds",
        "tokens_per_second",
        "predicted_seconds",
        "speedup",
        "speedup_spread",
    }
    decode = both | {"batch", "context", "bytes", "bytes_per_second", "share_of_copy", "share_of_read"}
    decode |= {"processor_seconds"}
    for row in result["rows"]:
        for step in row["decode"] + row["prefill"]:
            assert set(step) == (decode if "bytes" in step else both | {"tokens"})
            assert set(step.get("bytes", ())) in (set(), {"linears", "norms", "head", "cache"})
            for key in ("seconds", "tokens_per_second"):
                assert set(step[key]) == {"p10", "median", "p90"}
                assert 0 < step[key]["p10"] <= step[key]["median"] <= step[key]["p90"]


def test_random_weights_in_the_shapes_of_a_model(wide, tmp_path):
    files = tmp_path / "result.json", tmp_path / "result.png"
    options = ["--shapes", "from-model", "--format", "2:4,50%+int4", "--batch", "1,2", "--context", "16,32"]
    options += ["--prefill", "8", "--repeats", 2, "--device", "cpu", "--json", files[0], "--plot", files[1]]
    options += ["--peers", "none"]
    shown = mspc_cli("bench", wide, *options)
    result = json.loads(files[0].read_text())
    check_schema(result)
    assert [row["name"] for row in result["rows"]] == ["dense", "int4 (torch)", "2:4", "50%+int4"]
    assert [row["baseline"] for row in result["rows"]] == ["bf16", "int4", None, None]
    sizes = [(step["batch"], step["context"]) for step in result["rows"][0]["decode"]]
    assert sizes == [(1, 16), (2, 16), (1, 32), (2, 32)]
    dense, *_, last = result["rows"]
    rounds = (row["decode"][1]["round_seconds"] for row in (dense, last))
    ratio = spread([other / own for other, own in zip(*rounds, strict=True)])
    assert last["decode"][1]["speedup_spread"]["bf16"] == ratio
    assert last["decode"][1]["speedup"]["bf16"] == ratio["median"]
    assert dense["decode"][0]["bytes"]["head"] == 260 * 128 * 4  # and codes of 8 bits with their scales
    assert last["decode"][0]["bytes"]["head"] == 260 * 128 * 8.125 / 8
    assert set(dense["decode"][0]["speedup"]) == {"bf16", "int4"}
    assert result["rows"][2]["bits_per_weight"] == 9
    repacked = result["rows"][3]["repacked_bits_per_weight"]  # with whole bytes of streams, and 128 more
    assert abs(repacked - result["rows"][3]["bits_per_weight"]) < 1
    assert all(row["perplexity"] is None for row in result["rows"])
    assert files[1].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "CPU, weights in huge pages" in shown.stdout
    assert "wide, 50%+int4: done" in shown.stderr


def test_models_have_a_perplexity(wide, compressed):
    """Oracle: `mspc.evaluate` on the same text."""
    artifact, saved = compressed(wide, pattern="2:4", bits=4), []
    paths = str(wide), str(artifact), str(artifact / "exports" / "sparse")
    request = Request(paths, baseline="int4", batches=(1,), contexts=(8,), prefills=(8,), repeats=1)
    result = bench(request, progress=False, save=lambda found, new: saved.append((len(found["rows"]), len(new))))
    check_schema(result)
    dense, torch_int4, *rest = result["rows"]
    assert saved == [(4, 1), *[(4, 1)] * 3]  # all are measured when the first perplexity begins
    assert (dense["name"], dense["baseline"], dense["format"]) == (str(wide), "bf16", "dense")
    assert torch_int4["random_weights"]
    assert [row["format"] for row in rest] == ["2:4+int4", "2:4+int4"]
    assert compared_with(result) == "int4"
    kept = sum(matrix.num_kept for matrix in matrices_of(artifact))
    weights = sum(torch.Size(matrix.shape).numel() for matrix in matrices_of(artifact))
    assert [row["bits_per_weight"] for row in rest] == [4 * kept / weights + 1 + 16 / 128] * 2  # codes, indices, scales
    assert compared_with({"configuration": result["configuration"] | {"baseline": "bf16"}}) == "dense float32"
    expected = [mspc.evaluate(path, max_windows=20, progress=False).perplexity for path in paths]
    assert [dense["perplexity"], *(row["perplexity"] for row in rest)] == expected
    assert expected[1] == expected[2] != expected[0]


@pytest.mark.parametrize(
    ("of", "damage", "message"),
    [
        ("artifact", "last byte", r"matrices/00001\.safetensors is damaged"),
        ("sparse", "last byte", r"model\.safetensors cannot be read as safetensors"),
        ("sparse", "model.layers.1.mlp.up_proj.codes", r"model\.layers\.1\.mlp\.up_proj: its codes are missing"),
        ("sparse", "model.norm.weight", r"holds no model\.norm\.weight, which the model needs"),
        ("checkpoint", "model.norm.weight", r"holds no model\.norm\.weight, which the model needs"),
    ],
)
def test_every_path_is_checked_before_anything_is_measured(of, damage, message, wide, compressed, tmp_path):
    artifact = compressed("llama", pattern="2:4", bits=4, group_size=16)
    source = {"artifact": artifact, "sparse": artifact / "exports" / "sparse", "checkpoint": wide}[of]
    folder = Path(shutil.copytree(source, tmp_path / "copy"))
    file = folder / ("matrices/00001.safetensors" if of == "artifact" else "model.safetensors")
    if damage == "last byte":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        tensors = load_file(file)
        del tensors[damage]
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"copy cannot be measured\. .*{message}"):
        make_plan(Request((str(wide), str(folder))))
    assert make_plan(Request((str(folder),), shapes="from-model", formats=("2:4",))).groups  # its weights are not used


def row_of(name: str, seconds: float, baseline: str | None = None) -> dict[str, object]:
    times = dict.fromkeys(("p10", "median", "p90"), seconds)
    step = {
        "seconds": times,
        "round_seconds": None,
        "tokens_per_second": timing.inverse(times, 1),
        "predicted_seconds": 0.5,
    }
    decoded = {"batch": 1, "context": 8, "bytes_per_second": times, "share_of_copy": 0.5, "bytes": {}, **step}
    shared = {
        "model": "m",
        "peer": None,
        "random_weights": True,
        "perplexity": None,
        "peak_memory_bytes": None,
        "engine": "torch",
    }
    shared |= {"stored_dtype": None, "bits_per_weight": 9.0, "copied_bits_per_weight": 0.0, "weight_bytes": 10}
    return {"name": name, "baseline": baseline, "decode": [decoded], "prefill": [{"tokens": 8, **step}], **shared}


def test_a_format_that_is_no_faster_is_called_no_gain(capsys):
    rows = [row_of("dense", 1.0, "bf16"), row_of("faster", 0.5), row_of("equal", 1 / 1.004), row_of("slower", 2.0)]
    compare(rows)
    told = {row["name"]: gain(row, row["decode"][0], "bf16") for row in rows}
    assert told == {
        "dense": "1", "faster": "2.00 2.00..2.00", "equal": "1.00 1.00..1.00 no gain",
        "slower": "0.50 0.50..0.50 no gain",
    }  # fmt: skip
    noisy = {"speedup": {"bf16": 1.2}, "speedup_spread": {"bf16": {"p10": 0.98, "median": 1.2, "p90": 1.5}}}
    assert gain(rows[1], noisy, "bf16") == "1.20 0.98..1.50 no gain"
    assert gain(rows[1], {"speedup": {"bf16": 1.2}}, "bf16") == "1.20 1.20..1.20"  # an older result
    assert gain(rows[1], rows[1]["decode"][0], "int4") == "-"
    configuration = {"baseline": "bf16", "dtype": "bfloat16"}
    result = {"device": {"name": "d"}, "label": "l", "configuration": configuration, "rows": rows}
    assert list(verdicts(result)) == [
        f"m, {stage}: x bf16: faster 2.00; no gain over bf16: equal, slower." for stage in ("decoding", "prefill")
    ]
    assert [table.row_count for table in tables(result)] == [4, 4, 4]


def test_copies_for_cusparselt_take_nine_bits_a_weight():
    assert copied_bytes(SMALL, "2:4") == SMALL.block_weights * SMALL.blocks * 9 // 8
    assert {copied_bytes(SMALL, name) for name in (TINYGEMM, "dense", "8:16", "2:4+int4", "50%")} == {0}


@pytest.mark.parametrize(
    ("computed", "told"),
    [
        ("float32", ["Stored in bfloat16 and computed in float32; dense weights take 32 bits then: b.",
                     "Stored in float16 and computed in float32; dense weights take 32 bits then: a, c."]),
        ("bfloat16", ["Stored in float16 and computed in bfloat16: a, c."]),
    ],
)  # fmt: skip
def test_other_dtypes_than_those_of_the_files_are_told(computed, told):
    rows = [row_of(name, 1.0) | {"stored_dtype": dtype} for name, dtype in
            (("b", "bfloat16"), ("a", "float16"), ("random", None), ("c", "float16"))]  # fmt: skip
    configuration = {"dtype": computed, "perplexity": {"text": "builtin", "max_windows": 20}}
    assert list(notes({"configuration": configuration, "rows": rows})) == told
    for row, clock in zip(rows, (1.5, 1.5, 1.0, 1.5), strict=True):
        row["decode"][0]["processor_seconds"] = {"median": 1.0}
        row["decode"][0]["seconds"] = {"median": clock}
    busy = list(notes({"configuration": configuration, "rows": rows}))[-1]
    assert busy.startswith("Other processes ran: tokens took x1.50 of their time of the processor.")
    rows[0]["perplexity"] = 9.0
    assert list(notes({"configuration": configuration, "rows": rows}))[-1].startswith(
        "Perplexities are of at most 20 windows"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_dtypes_are_those_of_the_files(dtype, compressed, tmp_path):
    """Oracle: the tensors of the checkpoint."""
    source = tiny.build(tmp_path / "source", "llama", dtype=dtype)
    artifact = compressed(source, pattern="2:4", bits=4, group_size=16)
    assert {tensor.dtype for tensor in tiny.tensors(source).values()} == {dtype}
    assert {stored_dtype(path) for path in (source, artifact, artifact / "exports" / "sparse")} == {dtype}


# benchmarks/gpu.py


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, whose parts do not measure the CPU for long."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    module = importlib.import_module("gpu")
    module.gpu_parts = importlib.import_module("gpu_parts")
    return module


def test_what_is_predicted_is_what_the_documentation_says(gpu):
    """Oracle: the table of docs/benchmark.md, which is rounded."""
    rows = re.findall(r"^\| ([^|]+) \| ([\d. to]+) \| [^|]+ \| ([\d. to]+) \|", DOCS.read_text(), re.MULTILINE)
    assert len(rows) == 12
    for name, *of_shapes in rows:
        for shape, milliseconds in zip(("8b", "1b"), of_shapes, strict=True):
            greatest, *least = (float(number) / 1e3 for number in milliseconds.split(" to "))
            found = gpu.gpu_parts.predicted(SHAPES[shape], {"bf16": "dense"}.get(name, name), 4.3e12)
            assert found[1] == pytest.approx(greatest, rel=0.04)
            assert found[0] == pytest.approx(least[0] if least else greatest, rel=0.06)


def run_gpu(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["gpu.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    return stopped.value.code


def test_every_part_runs_and_goes_on_where_it_was_cut_off(gpu, tmp_path, monkeypatch, capsys):
    assert run_gpu(gpu, monkeypatch, "--dry-run", "--results", tmp_path) == 0
    assert {path.name.partition("_")[0] for path in tmp_path.glob("*.md")} == set(gpu.PARTS)
    results = {path.stem.partition("_")[0]: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert all(result["finished"] and result["configuration"]["dry_run"] for result in results.values())
    assert {path.name.partition("_")[0] for path in tmp_path.glob("*.png")} == {"decode-1b", "decode-8b", "layers"}
    assert [unit["bench"]["name"] for unit in results["decode-1b"]["units"].values()][:2] == ["dense", "int4 (torch)"]
    assert "no gain" in next(tmp_path.glob("decode-1b*.md")).read_text()
    (path,) = tmp_path.glob("layers*.json")
    cut = results["layers"]
    kept = dict(list(cut["units"].items())[:2])
    path.write_text(json.dumps(cut | {"units": kept, "finished": False}))
    capsys.readouterr()
    assert run_gpu(gpu, monkeypatch, "--dry-run", "--results", tmp_path) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" s")]
    assert [line.partition(":")[0] for line in told] == ["layers, tiny gate_up", "layers, tiny down"]
    after = json.loads(path.read_text())["units"]
    assert {name: after[name] for name in kept} == kept


def test_what_fails_does_not_stop_the_rest(gpu, tmp_path, monkeypatch, capsys):
    def units(slot):
        yield "bad", lambda: 1 / 0
        yield "wrong", lambda: {"rows": [{"right": False}], "wrong": True}
        yield "good", lambda: {"rows": [{"a": 1.0, "b": "x|y"}]}

    def broken(result, path):
        raise ModuleNotFoundError("No module named 'matplotlib'")

    monkeypatch.setattr(gpu, "draw", broken)
    monkeypatch.setitem(gpu.PARTS, "kernels", units)
    asked = ("--dry-run", "--results", tmp_path, "--parts", "kernels")
    assert run_gpu(gpu, monkeypatch, *asked) == 1
    shown = capsys.readouterr().out
    assert "FAILED kernels, bad: ZeroDivisionError: division by zero" in shown
    assert "FAILED kernels, wrong: wrong results" in shown
    assert "FAILED kernels, its figure: ModuleNotFoundError: No module named 'matplotlib'" in shown
    (path,) = tmp_path.glob("*.json")
    assert set(json.loads(path.read_text())["units"]) == {"bad", "wrong", "good"}
    assert "| x\\|y |" in next(tmp_path.glob("*.md")).read_text()
    monkeypatch.setattr(gpu, "draw", lambda result, path: None)
    assert run_gpu(gpu, monkeypatch, *asked, "--minutes", -1) == 0
    assert "kernels: out of time before bad; the same command goes on there" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "There is no CUDA device here" in run_gpu(gpu, monkeypatch)


# The command line


def test_wrong_usage():
    assert "Give a PATH" in refused("bench")
    assert "--batch must be whole numbers with commas between, such as 1,4,8, not '1,x'" in refused(
        "bench", "--shapes", "1b", "--batch", "1,x"
    )
    assert "--plot draws a PNG. Name it r.png, not r.pdf." in refused("bench", "--shapes", "1b", "--plot", "r.pdf")
