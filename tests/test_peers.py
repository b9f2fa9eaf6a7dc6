"""Other engines in `mspc bench`: the models that are made for them, and rows of the real ones.

Oracles: the decoders of the package gguf for random blocks; mspc's decoder with the decoded weights for the ONNX graph;
closed forms for bytes.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from test_bench import check_schema, small_ceilings  # noqa: F401  a fixture
from test_cli import mspc_cli, refused

from mspc.bench.decoder import Block, Decoder, Operations, OuterLayers, Shape
from mspc.bench.mixtures import mixture_bytes, mixture_decoder, mixture_of
from mspc.bench.models import EPS, random_outer, rotations
from mspc.bench.peers import engines, files, running
from mspc.bench.peers.blocks import block_of, misfit
from mspc.bench.request import Request, make_plan
from mspc.bench.run import bench
from mspc.errors import InputError
from mspc.runtime.joined import DenseLinear
from mspc.types import Grid, Unstructured

gguf = pytest.importorskip("gguf")
SHAPE = Shape("small", 256, 512, 3, 4, 2, 64, 320, tied=True)
HEAD = SHAPE.hidden * SHAPE.vocabulary
INSTALLED = [name for name in engines.ENGINES if not engines.missing(name)]


def needs(name: str) -> None:
    if absent := engines.missing(name):
        pytest.skip(f"{name} needs {', '.join(absent)}")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    return tiny.build(tmp_path_factory.mktemp("peers") / "wide", "llama", **sizes)


# GGUF


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K", "Q3_K"])
def test_random_blocks_are_ordinary_numbers(kind):
    from mspc.bench.peers.random_gguf import random_blocks

    blocks = random_blocks((16, 512), kind, np.random.default_rng(0))
    weight = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    assert weight.shape == (16, 512)
    assert np.isfinite(weight).all()
    assert 0 < np.abs(weight).max() < 5
    assert len(np.unique(weight)) > 1000


def test_a_file_holds_the_tensors_of_its_shape(tmp_path):
    from mspc.bench.peers.random_gguf import write

    found = write(tmp_path / "random.gguf", SHAPE, "Q4_0", "Q8_0")
    linears = SHAPE.blocks * SHAPE.block_weights
    assert found == {"linears": linears * 18 // 32, "norms": 7 * 256 * 4, "head": HEAD * 34 // 32}
    tensors = gguf.GGUFReader(tmp_path / "random.gguf").tensors
    assert sum(tensor.n_bytes for tensor in tensors) == sum(found.values())
    assert {tensor.tensor_type.name for tensor in tensors} == {"Q4_0", "Q8_0", "F32"}


# ONNX


def decoded(parts: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    """Weights (O, I) of codes that lie little-endian in bytes."""
    codes, scales = (part.numpy() for part in parts.values())
    rows, blocks, _ = codes.shape
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(rows, blocks, -1)
    weight = (codes.astype(np.float64) - 2 ** (bits - 1)) * scales[..., None].astype(np.float64)
    return torch.from_numpy(weight.reshape(rows, -1)).float()


def logits_of_our_decoder(shape: Shape, head_bits: int, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """(T, V): the logits after a prompt, and after each token that is then given one by one."""
    from mspc.bench.peers.random_onnx import ROWS, draw

    embeddings, drawn = draw(shape, head_bits)
    ones = torch.ones(shape.hidden)
    layers = {name: DenseLinear(decoded(drawn[name], 4)) for name in shape.linears()}
    table = embeddings.repeat(-(-shape.vocabulary // ROWS), 1)[: shape.vocabulary]
    cos, sin = rotations(shape, ids.shape[1], torch.float32, torch.device("cpu"))
    outer = OuterLayers(table, ones, decoded(drawn["head"], head_bits), cos, sin, EPS)
    decoder = Decoder(shape, outer, [Block(layers, (ones, ones), None)] * shape.blocks, Operations())
    cache = decoder.cache(1, ids.shape[1])
    with torch.no_grad():
        found = [decoder(ids[:, :prompt], cache, 0)]
        found += [decoder(ids[:, at : at + 1], cache, at) for at in range(prompt, ids.shape[1])]
    return torch.cat(found)


@pytest.mark.parametrize("head_bits", [4, 8])
def test_the_onnx_graph_computes_what_our_decoder_does(head_bits, tmp_path):
    """In ONNX Runtime, with inputs that are not rounded; a prompt, and then token by token through the cache."""
    needs("onnxruntime")
    import onnxruntime

    from mspc.bench.peers.random_onnx import write_random

    found = write_random(tmp_path, SHAPE, head_bits, accuracy_level=0)
    linears = SHAPE.blocks * SHAPE.block_weights
    assert found == {
        "linears": linears * (4 + 32 / 128) / 8,
        "norms": 7 * 256 * 4,
        "head": HEAD * (head_bits + 0.25) / 8,
    }
    ids = torch.randint(320, (1, 12), generator=torch.Generator().manual_seed(0))
    expected = logits_of_our_decoder(SHAPE, head_bits, ids, 8)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    outputs = [item.name for item in session.get_outputs()]
    pasts = [item.name for item in session.get_inputs() if item.name.startswith("past_key_values.")]
    past = {name: np.zeros((1, 2, 0, 64), np.float32) for name in pasts}
    logits = []
    for begin, end in ((0, 8), *((at, at + 1) for at in range(8, 12))):
        feeds = {"input_ids": ids[:, begin:end].numpy(), "attention_mask": np.ones((1, end), np.int64)}
        results = dict(zip(outputs, session.run(outputs, feeds | past), strict=True))
        logits.append(results["logits"][0, -1])
        past = {name: results[name.replace("past_key_values", "present")] for name in pasts}
    assert np.abs(np.stack(logits) - expected.numpy()).max() < 1e-4 * float(expected.abs().max())


def test_openvino_reads_the_same_graph_with_its_cache_as_a_state(tmp_path, monkeypatch):
    """The steps of the worker itself; rounding to 8 bits is what remains."""
    needs("openvino")
    from mspc.bench.peers import onnx_worker
    from mspc.bench.peers.random_onnx import write_random

    write_random(tmp_path, SHAPE, 8)
    seen = []
    _, decode, prefill = onnx_worker.of_openvino(tmp_path, 1)
    monkeypatch.setattr(onnx_worker, "likeliest", lambda logits: seen.append(logits[0, -1].copy()) or np.array([[2]]))
    assert prefill(8) > 0
    for _ in range(2):  # the second time from the state that is kept
        assert decode(8, 3) > 0
    ids = torch.from_numpy(np.concatenate([onnx_worker.prompt_of(8)[0], [2, 2, 2]]))[None]
    expected = logits_of_our_decoder(SHAPE, 8, ids, 8).numpy()
    order = [0, 0, 1, 2, 3, 1, 2, 3]
    assert len(seen) == len(order)
    for logits, at in zip(seen, order, strict=True):
        error = np.linalg.norm(logits - expected[at]) / np.linalg.norm(expected[at])
        assert error < 0.03


def test_blocks_are_the_longest_that_fit():
    assert block_of(SHAPE) == 128
    odd = replace(SHAPE, hidden=576, intermediate=1536, heads=9)
    assert block_of(odd) == 64
    assert misfit(odd, "Q4_K") == "rows of 576 weights are no multiple of 256"
    assert misfit(odd, "Q4_0") is misfit(odd, "int4") is None
    assert misfit(replace(SHAPE, hidden=40), "int4") == "rows of 40 weights are no multiple of 16"


# Files


def test_bytes_of_files_are_those_of_their_parts(tmp_path):
    """Oracle: the bytes that were written. Embeddings are the head where there is no other one."""
    from mspc.bench.peers.random_gguf import write

    found = write(tmp_path / "random.gguf", SHAPE, "Q4_0", "Q8_0")
    assert files.prepared(tmp_path / "random.gguf", "llama.cpp", tmp_path)[1] == found
    sizes = [("model.layers.0.a.weight", 5), ("model.embed_tokens.weight", 7), ("model.norm.weight", 2), ("x", 1)]
    heads = ("lm_head.", "model.embed_tokens.")
    assert files.counted(sizes, "model.layers.", heads) == {"linears": 5, "norms": 2, "head": 7}
    sizes.append(("lm_head.weight", 9))
    assert files.counted(sizes, "model.layers.", heads) == {"linears": 5, "norms": 2, "head": 9}


def test_files_are_run_as_they_are(artifact_of, tmp_path, monkeypatch):
    """Oracle: the bytes of the codes of the artifact, whose GGUF file and ONNX model these are."""
    for name in ("llama.cpp", "onnxruntime"):
        needs(name)
    artifact = artifact_of("llama", sparsity=0.0, bits=4, group_size=32)
    folder = artifact.export("onnx", tmp_path / "onnx", weights="matmulnbits", verify=False, progress=False)
    paths = (str(artifact.path), str(tmp_path / "onnx"))
    assert folder
    request = Request(
        paths, contexts=(8,), prefills=(8,), repeats=1, perplexity=False, peers="onnxruntime", device="cpu"
    )
    rows = {row["name"]: row for row in bench(request, progress=False)["rows"]}
    row = rows[f"onnxruntime {paths[1]}"]
    assert not row["random_weights"]
    weights = sum(matrix["shape"][0] * matrix["shape"][1] for matrix in artifact.manifest["matrices"])
    assert row["decode"][0]["bytes"]["linears"] == weights * (4 + 32 / 32) / 8
    assert row["decode"][0]["seconds"]["median"] > 0
    with pytest.raises(InputError, match="is an ONNX model, for onnxruntime and openvino on a CPU"):
        make_plan(replace(request, peers="none"))
    text = (tmp_path / "onnx" / "genai_config.json").read_text()
    (tmp_path / "onnx" / "genai_config.json").write_text(
        text.replace('"log_id"', '"custom_ops_library": "x.so", "log_id"')
    )
    with pytest.raises(InputError, match=r"asks for the library x\.so, and mspc runs none of an export"):
        bench(request, progress=False)


# Mixtures


def test_a_mixture_has_the_formats_of_an_artifact(artifact_of):
    """Oracle: the rows of its manifest, at the same relative depth."""
    artifact = artifact_of("llama", sparsity=0.5)
    rows = {row["name"]: row for row in artifact.manifest["matrices"]}
    mixture = mixture_of(artifact.path, 3)
    depth = 1 + max(int(name.split(".")[2]) for name in rows)
    for number, of_block in enumerate(mixture):
        assert len(of_block) == 7
        for part, target in of_block.items():
            row = rows[f"model.layers.{round(number * (depth - 1) / 2)}.{part}"]
            assert target.pattern == Unstructured(row["sparsity"])
            assert target.grid == (row["bits"] and Grid(row["bits"], 128))
    outer = random_outer(SHAPE, 8, torch.device("cpu"))
    decoder = mixture_decoder(SHAPE, str(artifact.path), outer, Operations())
    assert decoder.weight_bytes()["linears"] == mixture_bytes(SHAPE, str(artifact.path))
    with torch.inference_mode():
        assert decoder(torch.zeros(1, 2, dtype=torch.long), decoder.cache(1, 8), 0).isfinite().all()


def test_an_artifact_is_a_format_of_the_bench(artifact_of, wide):
    artifact = artifact_of("llama", pattern="2:4", bits=4, group_size=16)
    formats = (str(artifact.path), "2:4+int4")
    request = Request((str(wide),), shapes="from-model", formats=formats, contexts=(8,), prefills=(8,), repeats=1)
    mixture, same = bench(replace(request, device="cpu"), progress=False)["rows"][-2:]
    assert mixture["name"] == str(artifact.path)
    assert mixture["bits_per_weight"] == same["bits_per_weight"] == 3.125


def test_an_artifact_of_a_part_is_no_format(artifact_of, wide):
    artifact = artifact_of("llama", pattern="2:4", skip=["k_proj"])
    request = Request((str(wide),), shapes="from-model", formats=(str(artifact.path),), device="cpu")
    with pytest.raises(InputError, match="has no self_attn.k_proj in block 0, so it cannot be a format"):
        make_plan(request)


# The command


@pytest.mark.skipif(not INSTALLED, reason="no other engine is installed: pip install '.[bench]'")
def test_engines_are_measured_in_turns_with_ours(wide, tmp_path):
    options = ["--batch", "1,2", "--context", "8", "--prefill", "8", "--repeats", 2, "--device", "cpu", "--threads", 1]
    options += ["--peers", ",".join(INSTALLED), "--no-perplexity", "--json", tmp_path / "r.json"]
    shown = mspc_cli("bench", wide, *options)
    result = json.loads((tmp_path / "r.json").read_text())
    check_schema(result)
    rows = {row["name"]: row for row in result["rows"]}
    theirs = [f"{engine} {name}" for engine, name in engines.formats_of(INSTALLED)]
    assert list(rows) == [str(wide), "int4 (torch)", "bf16 (torch)", "int4", *theirs]
    ceiling = result["ceilings"]["read_bytes_per_second"]["median"]
    for name in theirs:
        row = rows[name]
        assert row["engine"].startswith(f"{row['peer']} ")
        assert [step["batch"] for step in row["decode"]] == [1]
        (step,) = row["decode"]
        assert step["samples"] == len(step["round_seconds"]) == 2
        assert step["share_of_read"] == pytest.approx(step["bytes_per_second"]["median"] / ceiling)
        ours = rows["int4"]["decode"][0]
        ratios = [other / own for other, own in zip(step["round_seconds"], ours["round_seconds"], strict=True)]
        assert ours["speedup"][name] == pytest.approx(np.median(ratios))
        assert ours["speedup_spread"][name]["p10"] == pytest.approx(np.percentile(ratios, 10))
        assert set(rows["int4"]["decode"][1]["speedup"]) == {"bf16", "int4"}  # batch 2 is not theirs
    assert "decoding, times as fast as" in shown.stdout
    assert "bf16 (torch)" in shown.stdout
    assert rows["bf16 (torch)"]["bits_per_weight"] == 16


def test_engines_that_cannot_be_measured_are_refused():
    shape = ("bench", "--shapes", "1b")
    assert "Unknown engine of --peers 'llamacpp': did you mean 'llama.cpp'?" in refused(*shape, "--peers", "llamacpp")
    assert "--head-bits must be 4, 8 or 16, not 5." in refused(*shape, "--head-bits", 5, "--device", "cpu")


def test_engines_that_are_not_installed(monkeypatch, wide):
    monkeypatch.setattr(engines, "find_spec", lambda package: None if package in ("openvino", "xllamacpp") else True)
    found, told = engines.choose("auto")
    assert found == ["onnxruntime"]
    assert told.startswith("Not installed, and so not measured: llama.cpp, openvino. Install mspc's extra bench: pip ")
    assert engines.choose("none") == ([], None)
    with pytest.raises(InputError, match=r"--peers openvino needs openvino\. Install mspc's extra bench"):
        engines.choose("onnxruntime,openvino")
    plan = make_plan(Request((str(wide),), peers="auto", device="cpu"))
    assert told in plan.left_out
    assert {candidate.peer for candidate in plan.groups[0]} == {None, "onnxruntime"}


def test_engines_are_for_a_cpu_and_heads_of_codes(monkeypatch):
    from mspc.bench import request

    needs("llama.cpp")
    one = Request(shapes="1b", formats=("2:4",), device="cpu")
    with pytest.raises(InputError, match="--head-bits 16 is not for other engines"):
        make_plan(replace(one, peers="llama.cpp", head_bits=16))
    plan = make_plan(replace(one, peers="auto", head_bits=16))
    assert [candidate.name for candidate in plan.groups[0]] == ["dense", "int4 (torch)", "2:4"]
    assert any("--head-bits 16" in reason for reason in plan.left_out)
    monkeypatch.setattr(request, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(request, "free_memory", lambda device: 2**40)
    message = "--peers measures other engines on a CPU, not on cuda. Leave it out, or add --device cpu."
    with pytest.raises(InputError, match=re.escape(message)):
        make_plan(replace(one, peers="llama.cpp"))
    assert [candidate.peer for candidate in make_plan(replace(one, peers="auto")).groups[0]] == [None] * 3


def test_an_engine_that_fails_is_left_out_unless_it_was_named(wide, monkeypatch, caplog):
    needs("llama.cpp")

    def fails(*args):
        raise engines.MspcError("it does not load")

    monkeypatch.setattr(engines, "ENGINES", {"llama.cpp": replace(engines.ENGINES["llama.cpp"], start=fails)})
    monkeypatch.setattr(running, "ENGINES", engines.ENGINES)
    request = Request((str(wide),), contexts=(8,), prefills=(8,), repeats=1, perplexity=False, device="cpu")
    with caplog.at_level("WARNING", logger="mspc"):
        names = [row["name"] for row in bench(replace(request, peers="auto"), progress=False)["rows"]]
    assert names == [str(wide), "int4 (torch)", "bf16 (torch)", "int4"]
    assert "llama.cpp Q8_0 is left out: it does not load" in caplog.messages
    with pytest.raises(engines.MspcError, match="it does not load"):
        bench(replace(request, peers="llama.cpp"), progress=False)


def test_an_engine_that_cannot_load_says_why(tmp_path):
    for name in INSTALLED:
        file = tmp_path / "model.gguf"
        file.write_bytes(b"GGUF, but not really")
        with pytest.raises(engines.MspcError, match=re.escape(name)), engines.ENGINES[name].start(file, 1, 8):
            pass
