"""The bench on a CPU, at sizes that take no time: what it refuses, its results, and how it tells them."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_cli import mspc_cli, refused

import mspc
from mspc.bench import run as bench_run
from mspc.bench import timing
from mspc.bench.decoder import Shape
from mspc.bench.models import (
    SHAPES,
    TINYGEMM,
    copied_bytes,
    matrices_of,
    outer_bytes,
    random_bytes,
    shape_of,
    stored_dtype,
)
from mspc.bench.request import Request, check_memory, make_plan, needed_bytes
from mspc.bench.rows import compare
from mspc.bench.run import bench
from mspc.bench.tables import compared_with, gain, notes, tables, verdicts
from mspc.bench.timing import spread
from mspc.errors import InputError, MspcError

CPU = torch.device("cpu")
SMALL = Shape("small", 128, 256, 2, 4, 2, 32, 260, tied=False)


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timing.COPY_BYTES, "cpu", 2**16)
    monkeypatch.setitem(timing.GEMM_SIZE, "cpu", 32)


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


# The command line


def test_wrong_usage():
    assert "Give a PATH" in refused("bench")
    assert "--batch must be whole numbers with commas between, such as 1,4,8, not '1,x'" in refused(
        "bench", "--shapes", "1b", "--batch", "1,x"
    )
    assert "--plot draws a PNG. Name it r.png, not r.pdf." in refused("bench", "--shapes", "1b", "--plot", "r.pdf")
