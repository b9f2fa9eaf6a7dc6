"""ONNX exports in ONNX Runtime, GenAI and OpenVINO; and faults that those do not notice, which `verify` must.

A failure of a runtime that is known is asserted by running it, so that the day it works is seen.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import nn

import mspc
from exporters import exporting, formats, verification
from mspc.errors import InputError, MspcError
from mspc.kernels.cpu import building, library
from mspc.progress import Silent
from mspc.storage.manifest import MatrixEntry

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ir = pytest.importorskip("onnx_ir")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxruntime_genai")
openvino = pytest.importorskip("openvino")
pytestmark = pytest.mark.filterwarnings("ignore")  # of torch.onnx and the runtimes

from exporters import onnx as exporter  # noqa: E402
from exporters import onnx_graph  # noqa: E402
from exporters.runtimes import Unsupported  # noqa: E402
from exporters.runtimes import onnxruntime as ort_runtime  # noqa: E402
from exporters.runtimes import onnxruntime_genai as genai_runtime  # noqa: E402

SLOW = pytest.mark.slow
RUNTIMES = ("onnxruntime", "onnxruntime-genai", "openvino")


@pytest.fixture(scope="session")
def graphs() -> dict[tuple[object, ...], ir.Model]:
    return {}


@pytest.fixture(autouse=True)
def traced_once(graphs: dict[tuple[object, ...], ir.Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace each family once: artifacts of one model differ only in their compressed matrices."""
    trace = exporter.decoder_graph

    def decoder_graph(model: nn.Module, entries: list[MatrixEntry], opset: int) -> ir.Model:
        weights = {}
        for entry in entries:
            weight = model.get_parameter(entry.address.parameter).detach()
            weights[entry.address.parameter] = weight if entry.address.transposed else weight.T
        key = (str(model.config), model.dtype, opset, tuple(weights))
        if key not in graphs:
            graphs[key] = trace(model, entries, opset)
        graph = graphs[key].clone()
        for name, weight in weights.items():
            graph.graph.initializers[name].const_value = ir.tensor(weight.contiguous().numpy(), name=name)
        return graph

    monkeypatch.setattr(exporter, "decoder_graph", decoder_graph)


def export(artifact: mspc.Artifact, out: Path, **options: object) -> dict[str, dict[str, object]]:
    """The results of the runtimes."""
    exporting.export(artifact.path, "onnx", out, keep_reference=True, options=options)
    return json.loads((out / "verification.json").read_text())["runtimes"]


@pytest.mark.parametrize("family", ["llama", *(pytest.param(name, marks=SLOW) for name in ("qwen3", "opt", "gpt2"))])
def test_families_in_every_runtime(family, artifact_of, tmp_path):
    results = export(artifact_of(family), tmp_path / "out", weights="matmulnbits")
    assert tuple(results) == RUNTIMES
    for result in results.values():
        assert result["status"] == "verified"
        assert result["relative_error"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["qdq", "float16"])
def test_weights_in_every_runtime(weights, artifact_of, tmp_path):
    for result in export(artifact_of("llama"), tmp_path / "out", weights=weights).values():
        assert result["status"] == "verified"
        assert result["relative_error"] < (0.01 if weights == "float16" else 1e-5)


NEEDS_LIBRARY = pytest.mark.skipif(library.library() is None, reason="there is no C++ compiler")


@NEEDS_LIBRARY
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"bits": 3}),
        ("llama", {"asymmetric": True}),
        pytest.param("llama", {"bits": 16, "pattern": "2:4"}, marks=SLOW),
        pytest.param("gpt2", {}, marks=SLOW),
        pytest.param("bundled", {"head_bits": 8}, marks=SLOW),
    ],
)
def test_sparse_weights_in_the_runtimes_that_take_operators(family, options, artifact_of, tmp_path, monkeypatch):
    """With weights in a file of their own, and a file in the place of the library, which must not be run."""
    monkeypatch.setattr(exporter, "LARGEST_FILE", 1000)
    out, artifact = tmp_path / "out", artifact_of(family, **options)
    exporting.export(artifact.path, "onnx", out, verified=False, options={"weights": "sparse"})
    (out / building.NAME).write_text("no library")
    results = verification.verify(out, artifact.path, Silent())["runtimes"]
    assert [results[name]["status"] for name in RUNTIMES] == ["verified", "verified", "unsupported"]
    assert results["onnxruntime"]["relative_error"] < 3e-4
    with pytest.raises(RuntimeError, match=r"ai\.mspc"):
        openvino.Core().compile_model(out / "model.onnx", "CPU")
    graph = onnx.load(out / "model.onnx").graph
    ours = [node.name for node in graph.node if node.domain == "ai.mspc"]
    assert ours == [row["name"] for row in artifact.manifest["matrices"] if row.get("role", "") != "embeddings"]


@NEEDS_LIBRARY
def test_wrong_sparse_weights_are_noticed(artifact_of, tmp_path, monkeypatch):
    """Codes of one matrix, with every bit changed: nothing is out of bounds, and the runtime says nothing."""
    export(artifact_of("llama", bits=3), tmp_path / "out", weights="sparse")

    def change(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx")
        (kept,) = [one for one in model.graph.initializer if one.name == "model.layers.0.mlp.up_proj.weight.kept"]
        kept.raw_data = bytes(255 - byte for byte in kept.raw_data)
        onnx.save(model, folder / "model.onnx")

    monkeypatch.setitem(formats.FORMATS, "onnx", replace(formats.FORMATS["onnx"], runtimes=("onnxruntime",)))
    report = verification.verify(spoiled(tmp_path / "out", tmp_path, change), None, Silent())
    (wrong,) = report["weights"]["wrong"]
    assert wrong.startswith("model.layers.0.mlp.up_proj: ")
    assert report["runtimes"]["onnxruntime"]["status"] == "mismatch"


def test_without_the_library_sparse_weights_are_not_run(monkeypatch):
    monkeypatch.setenv("MSPC_CPU_ISA", "torch")
    with pytest.raises(Unsupported, match="MSPC_CPU_ISA=torch leaves out mspc's C.. library.* Unset it"):
        ort_runtime.library()
    with pytest.raises(InputError, match="MSPC_CPU_ISA=torch"):
        exporter.check([], {}, exporter.Options("sparse"), Path())


@pytest.mark.parametrize("weights", ["matmulnbits", pytest.param("qdq", marks=SLOW)])
def test_two_asymmetric_bits_and_rows(weights, artifact_of, tmp_path):
    artifact = artifact_of("llama", bits=2, group_size="row", asymmetric=True, sparsity=0.3)
    results = export(artifact, tmp_path / "out", weights=weights)
    assert {name: result["status"] for name, result in results.items()} == {
        "onnxruntime": "verified",
        "onnxruntime-genai": "verified",
        "openvino": "verified" if weights == "matmulnbits" else "unsupported",
    }
    if weights == "qdq":
        with pytest.raises(RuntimeError):
            openvino.Core().compile_model(tmp_path / "out" / "model.onnx", "CPU")


@SLOW
def test_the_trained_model_writes_the_same_text_everywhere(artifact_of, tmp_path):
    artifact = artifact_of("bundled", pattern="2:4", bits=8)
    for result in export(artifact, tmp_path / "out", weights="matmulnbits").values():
        assert result["greedy_tokens_equal"] == 16


def test_the_graph_is_named_as_others_name_theirs(artifact_of, tmp_path):
    for result in export(artifact_of("llama"), tmp_path / "out").values():
        assert result["status"] == "verified"
        assert result["relative_error"] < 1e-5
    model = onnx.load(tmp_path / "out" / "model.onnx")
    onnx.checker.check_model(model)
    shapes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in [*model.graph.input, *model.graph.output]
    }
    assert shapes["input_ids"] == shapes["position_ids"] == ["batch_size", "sequence_length"]
    assert shapes["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert shapes["past_key_values.1.value"] == ["batch_size", 2, "past_sequence_length", 16]
    assert shapes["logits"] == ["batch_size", "sequence_length", 260]
    assert {"present.0.key", "present.1.value"} <= shapes.keys()
    names = {tensor.name for tensor in model.graph.initializer}
    assert "model.layers.0.mlp.down_proj.weight" in names
    assert not [name for name in names if name.startswith("model.model.")]


def test_weights_beyond_float16_are_refused(calibration, tmp_path):
    model = tiny.make("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 0] = 1e6
    tiny.save(model, tmp_path / "model")
    artifact = tiny.compress(tmp_path / "model", tmp_path / "artifact", calibration, allocator="uniform")
    with pytest.raises(InputError, match=r"model.embed_tokens.weight has weights that do not fit into torch.float16"):
        export(artifact, tmp_path / "out", weights="float16")


class Unexportable(nn.Module):
    """An operator that ONNX has no form of, in the place of a causal LM."""

    def forward(self, input_ids, attention_mask, position_ids=None, past_key_values=None, use_cache=True):
        eigenvalues = torch.linalg.eigvals(torch.eye(3) + input_ids.sum()).real
        hidden = eigenvalues.sum() + input_ids[..., None]

        class Out:
            logits = hidden

        Out.past_key_values = past_key_values
        return Out


def test_a_model_without_an_onnx_form_is_an_error_that_names_the_operator():
    past = [(torch.zeros(2, 1, 5, 4), torch.zeros(2, 1, 5, 4))]
    model = onnx_graph.Decoder(Unexportable())
    with pytest.raises(MspcError, match=r"torch.onnx cannot export Unexportable: it stops at the operator .*eig"):
        onnx_graph.traced(model, past, 18)


# GPTQ folders through the model builder of ONNX Runtime GenAI


@pytest.fixture
def only_genai(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(formats.FORMATS, "gptq", replace(formats.FORMATS["gptq"], runtimes=("onnxruntime-genai",)))


def gptq(artifact: mspc.Artifact, out: Path) -> dict[str, object]:
    artifact.export("gptq", out, progress=False)
    return json.loads((out / "verification.json").read_text())["runtimes"]["onnxruntime-genai"]


@pytest.mark.slow
def test_gptq_in_genai(only_genai, artifact_of, tmp_path):
    result = gptq(artifact_of("llama", bits=8), tmp_path / "out")
    assert result["status"] == "verified"
    assert result["relative_error"] < 2e-3


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        pytest.param("opt", {}, "does not know this architecture", marks=SLOW),
        ("llama", {"bits": 3}, "does not unpack 3 bits"),
        ("llama", {"skip": ("down_proj",)}, "matrices left dense"),
        ("llama", {"asymmetric": True}, "reads the zero points of gptq_v2 as those of gptq"),
    ],
)
def test_gptq_that_genai_does_not_read(family, options, reason, only_genai, artifact_of, tmp_path):
    result = gptq(artifact_of(family, **options), tmp_path / "out")
    assert result["status"] == "unsupported"
    assert reason in result["reason"]


@SLOW
@pytest.mark.parametrize(
    ("options", "reason"), [({"bits": 3}, "Unpacking for 3-bit"), ({"skip": ("down_proj",)}, "'NoneType' object")]
)
def test_known_failures_of_the_builder(options, reason, artifact_of, tmp_path):
    exporting.export(artifact_of("llama", **options).path, "gptq", tmp_path / "out", verified=False)
    (tmp_path / "built").mkdir()
    with pytest.raises(RuntimeError, match=reason):
        genai_runtime.build(tmp_path / "out", tmp_path / "built")


@SLOW
def test_gptq_v2_in_genai_is_a_mismatch(only_genai, artifact_of, tmp_path, monkeypatch):
    """Its builder adds one to zero points whatever the version, so such a folder is not run without need."""
    monkeypatch.setattr(genai_runtime, "_check_gptq", lambda *_: None)
    out = exporting.export(artifact_of("llama", asymmetric=True).path, "gptq", tmp_path / "out", verified=False)
    report = verification.verify(out, artifact_of("llama", asymmetric=True).path, Silent())
    assert report["weights"]["wrong"] == []
    assert report["runtimes"]["onnxruntime-genai"]["status"] == "mismatch"
    assert report["runtimes"]["onnxruntime-genai"]["relative_error"] > 0.1


# Silent failures


def spoiled(folder: Path, tmp_path: Path, change: Callable[[Path], None]) -> Path:
    """A copy that `change` was done to, whose export manifest has the new digests."""
    out = tiny.copied(folder, tmp_path / "spoiled")
    change(out)
    tiny.redigest(out)
    return out


def test_g_idx_with_packed_zero_points_is_noticed(artifact_of, tmp_path, monkeypatch):
    """It names the groups that the blocks have anyway, and ONNX Runtime computes something else."""
    export(artifact_of("llama", asymmetric=True), tmp_path / "out", weights="matmulnbits")

    def change(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx")
        for node in model.graph.node:
            if node.op_type == "MatMulNBits":
                sizes = {attribute.name: attribute.i for attribute in node.attribute}
                groups = (np.arange(sizes["K"]) // sizes["block_size"]).astype(np.int32)
                model.graph.initializer.append(onnx.numpy_helper.from_array(groups, f"{node.name}.g_idx"))
                node.input.append(f"{node.name}.g_idx")
        onnx.save(model, folder / "model.onnx")

    # OpenVINO crashes on it, and would take the tests along.
    monkeypatch.setitem(formats.FORMATS, "onnx", replace(formats.FORMATS["onnx"], runtimes=("onnxruntime",)))
    report = verification.verify(spoiled(tmp_path / "out", tmp_path, change), None, Silent())
    assert len(report["weights"]["wrong"]) == 14
    assert report["runtimes"]["onnxruntime"]["status"] == "mismatch"
    assert report["runtimes"]["onnxruntime"]["relative_error"] > 0.1


def test_activations_rounded_behind_qdq_are_noticed(artifact_of, tmp_path, monkeypatch):
    """ONNX Runtime rounds them by default; genai_config.json tells it not to."""
    export(artifact_of("llama"), tmp_path / "out", weights="qdq")

    def change(folder: Path) -> None:
        config = json.loads((folder / "genai_config.json").read_text())
        del config["model"]["decoder"]["session_options"]["session.qdq_matmulnbits_accuracy_level"]
        (folder / "genai_config.json").write_text(json.dumps(config))

    monkeypatch.setattr(onnxruntime.SessionOptions, "add_session_config_entry", lambda *entry: None)
    report = verification.verify(spoiled(tmp_path / "out", tmp_path, change), None, Silent())
    for name in ("onnxruntime", "onnxruntime-genai"):
        assert report["runtimes"][name]["status"] == "mismatch"
        assert 1e-3 < report["runtimes"][name]["relative_error"] < 0.1


def test_large_models_have_their_weights_in_a_file_of_their_own(artifact_of, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "LARGEST_FILE", 1000)
    for result in export(artifact_of("llama"), tmp_path / "out", weights="matmulnbits").values():
        assert result["status"] == "verified"
    artifact = artifact_of("llama")
    embeddings = artifact.path / "unchanged" / "model.safetensors"
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size > embeddings.stat().st_size
