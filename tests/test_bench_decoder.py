"""The decoder of the bench: its logits, random matrices, bytes and timing.

Oracles: transformers' own logits; the packer of real exports, bit for bit, for random matrices; bytes in files and
closed forms for what a step moves; numpy's percentiles; matrices in float64 for the int4 of torch.
"""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_bench import CPU, SMALL, small_ceilings  # noqa: F401  a fixture

import mspc
from mspc.bench import measure, timing
from mspc.bench import run as bench_run
from mspc.bench.decoder import Decoder, Operations, Shape, add_norm, gated, rotate
from mspc.bench.formats import Source, describe, parse_format, random_stored
from mspc.bench.measure import Sample, in_turns, measure_decode, measure_prefill, of_decoder, step_bytes
from mspc.bench.models import (
    SHAPES,
    TINYGEMM,
    engine_of,
    format_of,
    model_decoder,
    outer_bytes,
    random_bytes,
    random_decoder,
    random_outer,
)
from mspc.bench.request import Request, make_plan
from mspc.bench.run import bench
from mspc.bench.timing import Ceilings, device_seconds, spread
from mspc.bench.tinygemm import TinygemmLinear
from mspc.errors import InputError
from mspc.formats import layout
from mspc.formats.decoding import decode_mask
from mspc.kernels.cpu import library, memory
from mspc.runtime.joined import ConcatenatedLinear
from mspc.runtime.linear import SparseLinear
from mspc.types import NM

ENGINE = f"C++, {library.available()[-1]}" if library.available() else "plain torch"
FORMATS = ("dense", "int8", "int4", "int3", "2:4", "4:8", "8:16", "5:16", "16:32", "2:4+int4", "6:16+int3", "50%")
FORMATS += ("30%+int4", "70%+int3")
CEILINGS = Ceilings(dict.fromkeys(("p10", "median", "p90"), 1e10), dict.fromkeys(("p10", "median", "p90"), 1e12))


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
