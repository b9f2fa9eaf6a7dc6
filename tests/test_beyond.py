"""Sequences longer than the sliding window or the original context of a model, in every runtime.

The faults here are invisible within 16 tokens: each test shows that those agree and the long sequence does not.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from transformers import AutoConfig, Gemma3Config
from typer.testing import CliRunner

import mspc
from exporters import exporting, formats, reference, verification
from exporters import onnx as onnx_format
from exporters.limits import limits_of
from exporters.runtimes import Runner
from exporters.runtimes.transformers import runner_of
from mspc.cli.main import app
from mspc.errors import InputError, VerificationError
from mspc.progress import Silent
from mspc.text.tokens import Tokens

WINDOW = 24
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}


def rope(rope_type: str, **values: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": rope_type, **values}}


LONG_ROPE = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 4.0, 6.0, 8.0]}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GATED = tiny.CONFIGS["llama"]
MODELS = {
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "gemma2": ("gemma2", MIXED),
    "gemma3": ("gemma3_text", GATED | MIXED | {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "longrope": (
        "phi3",
        rope("longrope", original_max_position_embeddings=WINDOW, **LONG_ROPE)
        | {"original_max_position_embeddings": WINDOW},
    ),
    "llama3": ("llama", rope("llama3", original_max_position_embeddings=WINDOW, **LLAMA3)),
    "yarn": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=WINDOW)),
    "doge": ("doge", GATED | {"keep_window_size": WINDOW}),
    "dynamic": ("llama", rope("dynamic", factor=4.0) | {"max_position_embeddings": 40}),
    "chunks": (
        "llama4_text",
        GATED
        | {"head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": 2, "attention_chunk_size": WINDOW}
        | {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0], "moe_layers": []},
    ),
    "gpt_neo": (
        "gpt_neo",
        {"vocab_size": 260, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 128}
        | {"window_size": WINDOW, "attention_types": [[["global", "local"], 1]], "intermediate_size": 64}
        | {"bos_token_id": 0, "eos_token_id": 0},
    ),
    "linear attention": (
        "qwen3_next",
        GATED
        | {"layer_types": ["linear_attention"] * 2, "num_experts": 0, "mlp_only_layers": [0, 1]}
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "head_dim": 16}
        | {"linear_key_head_dim": 16, "linear_value_head_dim": 16},
    ),
}


def config_of(name: str, **changes: object) -> object:
    family, values = MODELS[name]
    return AutoConfig.for_model(family, **tiny.CONFIGS.get(family, {}) | values | changes)


@pytest.fixture(scope="module")
def made(calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[mspc.Artifact, Path]]:
    """`made(name)`: the artifact of a model above in 2:4, and its dense export. Not to be written to."""
    known: dict[str, tuple[mspc.Artifact, Path]] = {}

    def get(name: str) -> tuple[mspc.Artifact, Path]:
        if name not in known:
            folder, (family, values) = tmp_path_factory.mktemp("beyond"), MODELS[name]
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(tiny.CONFIGS, family, tiny.CONFIGS.get(family, {}))
                tiny.build(folder / "model", family, **values)
            artifact = tiny.compress(
                folder / "model", folder / "artifact", calibration, pattern="2:4", allocator="uniform"
            )
            known[name] = artifact, artifact.export("dense", folder / "dense", reference=True, progress=False)
        return known[name]

    return get


def report_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "verification.json").read_text())


def reconfigured(folder: Path, out: Path, change: Callable[[dict[str, object]], None]) -> dict[str, object]:
    """The result of transformers for a copy whose config.json was changed after the export."""
    tiny.copied(folder, out)
    config = json.loads((out / "config.json").read_text())
    change(config)
    (out / "config.json").write_text(json.dumps(config))
    tiny.redigest(out)
    return verification.verify(out, None, Silent())["runtimes"]["transformers"]


# What the config says


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("mistral", {}, ["the sliding window of 24"]),
        ("mistral", {"sliding_window": None}, []),
        ("mistral", {"sliding_window": 128}, []),  # no sequence is longer
        ("gemma2", {}, ["the sliding window of 24"]),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, []),
        ("qwen2", {}, ["the sliding window of 24"]),
        ("qwen2", {"use_sliding_window": False}, []),
        ("longrope", {}, ["the original context of 24"]),
        ("longrope", {"sliding_window": 50}, ["the original context of 24", "the sliding window of 50"]),
        ("longrope", {"max_position_embeddings": 24}, []),
        ("llama3", {}, ["the original context of 24"]),
        ("yarn", {}, ["the original context of 24"]),
        ("dynamic", {}, ["the original context of 40"]),
        ("llama3", rope("linear", factor=2.0), []),
        ("chunks", {}, ["the attention chunk of 24"]),
        ("gpt_neo", {}, ["the window of local attention of 24"]),
    ],
)
def test_limits_of_configs(name, changes, expected):
    assert [str(limit) for limit in limits_of(config_of(name, **changes))] == expected


def test_limits_inside_a_wrapper_and_of_one_kind_of_layer():
    sets = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    }
    text = MODELS["gemma3"][1] | {"rope_parameters": sets}
    expected = ["the sliding window of 24", "the original context of 32"]
    assert [str(limit) for limit in limits_of(Gemma3Config(text_config=text))] == expected


# Right exports


@pytest.mark.parametrize(
    "name",
    ["mistral", "longrope", "dynamic", "doge", "chunks"]
    + [
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("gemma2", "gemma3", "qwen2", "phi3", "llama3", "yarn", "gpt_neo")
    ],
)
def test_models_are_right_beyond_their_limits(name, made):
    """Oracle: one pass without a cache in transformers, of the folder that was exported."""
    _, folder = made(name)
    report = report_of(folder)
    limit = 40 if name == "dynamic" else WINDOW
    assert report["beyond"]["tokens"] == limit + reference.COMPARED
    assert report["beyond"]["exceeded"].endswith(f" of {limit}")
    result = report["runtimes"]["transformers"]
    assert result["relative_error_beyond"] < 1e-6
    beyond = tiny.kept_reference(folder).beyond
    with torch.no_grad():
        logits = tiny.reference(folder)(input_ids=torch.from_numpy(beyond.ids), use_cache=False).logits
    torch.testing.assert_close(torch.from_numpy(beyond.logits), logits[:, -32:], rtol=1e-4, atol=1e-4)


def test_linear_attention_alone_generates(made):
    _, folder = made("linear attention")
    report = report_of(folder)
    assert "beyond" not in report
    assert report["runtimes"]["transformers"]["greedy_tokens_equal"] == 16


# Faults that 16 tokens do not show


@pytest.mark.parametrize(
    ("name", "change", "where"),
    [
        ("mistral", {"sliding_window": 48}, "sliding window"),
        ("mistral", {"sliding_window": None}, "sliding window"),
        ("longrope", {"rope_parameters.long_factor": LONG_ROPE["short_factor"]}, "original context"),
        ("dynamic", {"rope_parameters.factor": 2.0}, "original context"),
        ("chunks", {"attention_chunk_size": 32}, "attention chunk"),
        pytest.param("gemma2", {"sliding_window": 23}, "sliding window", marks=pytest.mark.slow),
        pytest.param("gemma3", {"sliding_window": 64}, "sliding window", marks=pytest.mark.slow),
        pytest.param("qwen2", {"layer_types": ["full_attention"] * 2}, "sliding window", marks=pytest.mark.slow),
        pytest.param("gpt_neo", {"window_size": 32}, "window of local attention", marks=pytest.mark.slow),
    ],
)
def test_a_config_changed_after_the_export_is_noticed(name, change, where, made, tmp_path):
    def edit(config):
        for key, value in change.items():
            outer, _, inner = key.rpartition(".")
            (config[outer] if outer else config)[inner] = value

    result = reconfigured(made(name)[1], tmp_path / "dense", edit)
    assert result["relative_error"] < 1e-6
    assert result["greedy_tokens_equal"] >= result["greedy_tokens_compared"]
    assert result["status"] == "mismatch"
    assert result["relative_error_beyond"] > result["tolerance"]
    assert result["reason"].startswith(f"logits beyond the {where} of ")


@pytest.mark.parametrize("fault", ["none", "cache", "shape", "nan"])
def test_what_goes_through_the_cache_is_compared(fault, made, monkeypatch):
    """A runtime that is right in one pass, and forgets the first key when it decodes."""
    _, folder = made("mistral")
    expected = tiny.kept_reference(folder).beyond.logits
    decoded = tiny.kept_reference(folder).beyond.decoded
    assert decoded == 16

    def load(*_: object) -> Runner:
        runner = runner_of(tiny.reference(folder), "1", 1e-2)
        found = expected.copy()
        if fault == "cache":
            found[:, -decoded:] *= 1.05
        elif fault == "nan":
            found[0, 0, 0] = float("nan")
        return replace(runner, last_logits=lambda *_: found[:, 1:] if fault == "shape" else found)

    monkeypatch.setattr(verification.runtimes, "load", load)
    result = verification.verify(folder, None, Silent())["runtimes"]["transformers"]
    assert result["status"] == ("verified" if fault == "none" else "mismatch")
    words = {"none": "", "cache": "beyond the sliding window of 24 are off by", "shape": "shape", "nan": "off by nan"}
    assert words[fault] in result.get("reason", "")


# Lengths


def test_what_is_not_reached_is_said_and_long_reaches_it(calibration, tmp_path, caplog, monkeypatch):
    assert reference.USUAL == 2048
    monkeypatch.setattr(reference, "USUAL", 64)
    tiny.build(tmp_path / "model", "mistral", sliding_window=80)
    artifact = tiny.compress(tmp_path / "model", tmp_path / "artifact", calibration, pattern="2:4", allocator="uniform")
    with caplog.at_level(logging.WARNING, logger="mspc"):
        out = artifact.export("dense", tmp_path / "dense", reference=True, progress=False)
    assert "Not reached: the sliding window of 80; mspc verify --against ARTIFACT --long checks it." in caplog.text
    assert report_of(out)["missed"] == "the sliding window of 80"
    assert "relative_error_beyond" not in report_of(out)["runtimes"]["transformers"]
    with pytest.raises(InputError, match=r"beyond the sliding window of 80: give --against ARTIFACT"):
        mspc.verify(out, long=True, progress=False)
    done = CliRunner().invoke(app, ["verify", str(out), "--against", str(artifact.path), "--long", "--json"])
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    assert report["beyond"] == {"tokens": 112, "exceeded": "the sliding window of 80"}
    assert report["runtimes"]["transformers"]["relative_error_beyond"] < 1e-6


@pytest.mark.parametrize(("most", "tokens", "decoded"), [(25, 25, 0), (30, 30, 5), (48, 48, 16), (2048, 56, 16)])
def test_a_sequence_is_cut_at_what_is_usual(most, tokens, decoded, made, monkeypatch):
    monkeypatch.setattr(reference, "USUAL", most)
    found = reference.compute_reference(made("mistral")[0].path)
    assert found.missed == ""
    assert found.beyond.ids.shape == (1, tokens)
    assert found.beyond.decoded == decoded
    assert found.beyond.logits.shape == (1, min(32, tokens), 260)


def test_only_a_text_that_exceeds_a_limit_counts(made, monkeypatch):
    monkeypatch.setattr(reference, "USUAL", 24)
    found = reference.compute_reference(made("mistral")[0].path)
    assert (found.missed, found.beyond) == ("the sliding window of 24", None)


def test_a_text_is_begun_again_where_it_is_too_short(made, monkeypatch):
    """Oracle: the windows themselves, one after the other."""
    windows = tiny.ids(3, 16)

    def of_a_short_text(tokenizer: object, source: str, length: int, count: int | None) -> Tokens:
        if length > 16:
            raise InputError("Too little text")
        return Tokens(windows[:count], source)

    monkeypatch.setattr(reference, "windows_of_test_text", of_a_short_text)
    found = reference._ids(made("mistral")[0].path, config_of("mistral"), 1, 100)
    assert found[0].tolist() == [*windows.flatten().tolist() * 2, *windows[0, :4].tolist()]


# ONNX


@pytest.mark.parametrize("where", [{}, {"text_config": {}}])
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("named", ["rope_type", "type"])
def test_dynamic_frequencies_are_refused_as_a_graph(where, key, named):
    config = {key: {named: "dynamic", "factor": 2.0}}
    config = {"text_config": config} if where else config
    with pytest.raises(InputError, match=r"rope_type is dynamic.*Export dense or sparse"):
        onnx_format.check([], config, onnx_format.Options(), Path())
    onnx_format.check([], {key: {named: "linear"}}, onnx_format.Options(), Path())


@pytest.mark.parametrize(("length", "decoded", "count"), [(12, 3, 8), (12, 0, 5), (17, 1, 4), (4, 2, 4), (11, 5, 6)])
def test_the_last_tokens_go_through_the_cache_of_a_graph(length, decoded, count):
    """Oracle: a graph whose logits are the token and its place, by the length of the cache that it was given."""
    runtime = pytest.importorskip("exporters.runtimes.onnxruntime")
    pieces = []

    def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        ids, past = feeds["input_ids"], feeds["past_key_values.0.key"]
        pieces.append(ids.shape[1])
        places = past.shape[2] + np.arange(ids.shape[1])
        longer = np.concatenate([past, np.zeros((1, 2, ids.shape[1], 4), np.float32)], axis=2)
        return {"logits": np.stack([ids, places[None]], axis=-1), "present.0.key": longer}

    inputs = {"input_ids": ([None, None], np.int64), "past_key_values.0.key": ([None, 2, None, 4], np.float32)}
    found = runtime.cached_runner("1", 1e-4, inputs, run).last_logits(
        np.arange(100, 100 + length)[None], decoded, count
    )
    expected = np.arange(length - count, length)
    np.testing.assert_array_equal(found, np.stack([100 + expected, expected], axis=-1)[None])
    assert pieces == [length - decoded] + [1] * decoded


def onnx_results(artifact: mspc.Artifact, out: Path) -> dict[str, dict[str, object]]:
    exporting.export(artifact.path, "onnx", out, verified=False)
    return verification.verify(out, artifact.path, Silent())["runtimes"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_graph_without_the_window_is_noticed(made, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    pytest.importorskip("onnxruntime_genai")
    trace = onnx_format.decoder_graph

    def without_window(model: nn.Module, *args: object) -> object:
        model.config.sliding_window = None
        return trace(model, *args)

    monkeypatch.setattr(onnx_format, "decoder_graph", without_window)
    results = onnx_results(made("mistral")[0], tmp_path / "out")
    assert tuple(results) == formats.FORMATS["onnx"].runtimes
    for result in results.values():
        assert result["relative_error"] < 1e-6
        assert result["greedy_tokens_equal"] == 16
        assert result["reason"].startswith("logits beyond the sliding window of 24 are off by")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["mistral", "gemma2", "gemma3", "qwen2", "phi3", "longrope", "llama3", "yarn", "gpt_neo"]
)
def test_graphs_are_right_beyond_the_limits(name, made, tmp_path):
    pytest.importorskip("openvino")
    pytest.importorskip("onnxruntime_genai")
    for result in onnx_results(made(name)[0], tmp_path / "out").values():
        assert result["status"] == "verified"
        assert result["relative_error_beyond"] < 2e-6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("original", [7, 8, 15, 20])
def test_a_text_that_grows_beyond_the_switch_is_not_compared_there(original, calibration, tmp_path, caplog):
    """The cache of every runtime but transformers' own keeps the keys of the short factors."""
    pytest.importorskip("onnxruntime")
    values = rope("longrope", original_max_position_embeddings=original, **LONG_ROPE)
    tiny.build(tmp_path / "model", "phi3", original_max_position_embeddings=original, **values)
    artifact = tiny.compress(tmp_path / "model", tmp_path / "artifact", calibration, pattern="2:4", allocator="uniform")
    with caplog.at_level(logging.WARNING, logger="mspc"):
        results = onnx_results(artifact, tmp_path / "out")
    assert "keeps keys of the shorter one" in caplog.text
    for result in results.values():
        assert result["status"] in ("verified", "not installed")
    tokens = {7: 16, 8: 1, 15: 8, 20: 13}[original]
    assert results["onnxruntime"]["greedy_tokens_compared"] <= tokens


def test_an_export_that_is_wrong_beyond_the_window_is_not_kept(made, tmp_path, monkeypatch):
    compute = reference.compute_reference

    def of_another_window(artifact: Path, **options: object) -> reference.Reference:
        found = compute(artifact, **options)
        return replace(found, beyond=replace(found.beyond, logits=found.beyond.logits[:, ::-1]))

    monkeypatch.setattr(verification, "compute_reference", of_another_window)
    with pytest.raises(VerificationError, match=r"not kept: transformers: logits beyond the sliding window of 24"):
        made("mistral")[0].export("dense", tmp_path / "dense", progress=False)
    assert not (tmp_path / "dense").exists()


# GPTQ folders, whose other runtimes do not know every model


def gptq(name: str, calibration: Path, out: Path) -> tuple[Path, Path]:
    family, values = MODELS[name]
    tiny.build(out / "model", family, **{"hidden_size": 64, "intermediate_size": 64} | values)
    artifact = tiny.compress(
        out / "model", out / "artifact", calibration, bits=4, group_size=32, allocator="uniform", effort="fast"
    )
    return artifact.path, exporting.export(artifact.path, "gptq", out / "gptq", verified=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("mistral", {}, "leaves out a sliding window unless layer_types say where it is"),
        ("yarn", {}, "does not compute rotary embeddings of rope_type yarn"),
        ("yarn", rope("linear", factor=4.0), "does not compute rotary embeddings of rope_type linear"),
        ("gemma3", {}, "does not read rotary embeddings that differ between layers"),
    ],
)
def test_models_that_the_builder_of_genai_computes_wrong(name, changes, reason, calibration, tmp_path, monkeypatch):
    """They are known to fail: each is run without the check, so that the day it works is seen."""
    genai = pytest.importorskip("exporters.runtimes.onnxruntime_genai")
    monkeypatch.setitem(MODELS, name, (MODELS[name][0], MODELS[name][1] | changes))
    monkeypatch.setitem(formats.FORMATS, "gptq", replace(formats.FORMATS["gptq"], runtimes=("onnxruntime-genai",)))
    monkeypatch.setitem(tiny.CONFIGS, MODELS[name][0], tiny.CONFIGS.get(MODELS[name][0], {}))
    artifact, out = gptq(name, calibration, tmp_path)
    result = verification.verify(out, artifact, Silent())["runtimes"]["onnxruntime-genai"]
    assert result["status"] == "unsupported"
    assert reason in result["reason"]
    monkeypatch.setattr(genai, "_check_gptq", lambda *_: None)
    assert verification.verify(out, artifact, Silent())["runtimes"]["onnxruntime-genai"]["status"] in (
        "mismatch",
        "failed",
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["qwen2", "gemma2", "llama3"])
def test_models_that_every_runtime_of_gptq_computes_right(name, calibration, tmp_path):
    for module in ("gptqmodel", "optimum", "onnxruntime_genai"):
        pytest.importorskip(module)
    artifact, out = gptq(name, calibration, tmp_path)
    for result in verification.verify(out, artifact, Silent())["runtimes"].values():
        assert result["status"] == "verified"
        assert result["relative_error_beyond"] < result["tolerance"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_phi3_is_known_to_fail_in_gptqmodel(calibration, tmp_path, monkeypatch):
    runtime = pytest.importorskip("exporters.runtimes.gptqmodel")
    monkeypatch.setitem(formats.FORMATS, "gptq", replace(formats.FORMATS["gptq"], runtimes=("gptqmodel",)))
    artifact, out = gptq("phi3", calibration, tmp_path)
    result = verification.verify(out, artifact, Silent())["runtimes"]["gptqmodel"]
    assert (result["status"], "gate_proj and up_proj" in result["reason"]) == ("unsupported", True)
    monkeypatch.setattr(runtime, "check", lambda folder: None)
    assert "gate_proj" in verification.verify(out, artifact, Silent())["runtimes"]["gptqmodel"]["reason"]
