"""Quantized heads and embeddings, tied (gemma2, gpt2) and not (llama): artifacts, loading, evaluation and exports.

Oracles: codes times scales in float64, transformers with these weights, and a run without the options.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import mspc
from exporters.formats import FORMATS
from mspc.errors import InputError
from mspc.model.open import open_model
from mspc.model.outer import is_lookup, outer_matrices
from mspc.numerics.quant import dequantize
from mspc.pipeline.outer import PlannedOuter, planned_outer, rounded
from mspc.runtime.embedding import SparseEmbedding, TiedHead
from mspc.runtime.linear import SparseLinear
from mspc.storage.artifact import ArtifactSource
from mspc.types import EMBEDDINGS, HEAD, Grid, PlannedMatrix, Target, Unstructured

CPU = torch.device("cpu")
OPTIONS = {
    "llama": {"head_bits": 4, "embedding_bits": 8},
    "gemma2": {"head_bits": 8},
    "gpt2": {"embedding_bits": 8, "asymmetric": True},
}
TIED = ("gemma2", "gpt2", "bundled")
families = pytest.mark.parametrize("family", OPTIONS)


@pytest.fixture(scope="module")
def made(artifact_of):
    return lambda family: artifact_of(family, **OPTIONS.get(family, {"head_bits": 4}))


def parameters(model, family: str) -> tuple[Tensor, Tensor]:
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


def by_hand(artifact: mspc.Artifact, row: dict) -> np.ndarray:
    """The weight (V, D) of a row of the manifest in float64, one byte of codes after the other."""
    stored = load_file(artifact.path / row["file"])
    codes, scales = (stored[f"{row['name']}.{part}"].numpy() for part in ("codes", "scales"))
    bits, (num_rows, num_columns) = row["bits"], row["shape"]
    values = codes if bits == 8 else np.stack([codes & 15, codes >> 4], -1).reshape(num_rows, -1)
    zeros = np.full(scales.shape, 2 ** (bits - 1))
    if not row["symmetric"]:
        zeros = stored[f"{row['name']}.zeros"].numpy()
    size = num_columns // scales.shape[1]
    difference = values.astype(np.float64) - zeros.repeat(size, 1)
    return difference * scales.astype(np.float64).repeat(size, 1)


@families
def test_codes_are_the_nearest_and_scales_no_worse_than_those_of_the_largest_weight(family, made):
    """Oracle: float64, with the rounding error of a grid whose step holds the largest weight of each group."""
    artifact = made(family)
    model = open_model(artifact.path.parent / "model", device=CPU)
    rows = artifact.manifest["outer"]
    assert [row["role"] for row in rows] == ([EMBEDDINGS] if family in TIED else [EMBEDDINGS, HEAD])
    for row in rows:
        dense = model.read_parameter(row["parameter"]).double().numpy()
        found = by_hand(artifact, row)
        stored = dict(ArtifactSource(artifact.path).read([row["tensor"]]))[row["tensor"]]
        assert np.array_equal(stored.double().numpy(), found)
        groups = dense.reshape(len(dense), -1, row["group_size"])
        low, high = groups.min(-1, keepdims=True).clip(max=0), groups.max(-1, keepdims=True).clip(min=0)
        levels = 2 ** row["bits"] - 1
        step = (2 * np.maximum(-low, high) if row["symmetric"] else high - low) / levels
        at_most = (np.abs(step) ** 2 / 4).sum() * row["group_size"]  # every weight off by half of a step
        assert ((found - dense) ** 2).sum() < at_most


@families
def test_the_manifest_says_what_is_tied_and_how_large_it_is(family, made):
    manifest = made(family).manifest
    rows = {row["name"]: row for row in manifest["outer"]}
    assert sum(row["bytes"] for row in rows.values()) <= manifest["bytes"]["embeddings"]
    assert [row.get("tied") for row in rows.values()] == (["lm_head.weight"] if family in TIED else [None, None])
    assert not {row["name"] for row in manifest["matrices"]} & rows.keys()
    unchanged = {key for file in (made(family).path / "unchanged").iterdir() for key in tiny.keys_of(file)}
    assert not unchanged & {row["tensor"] for row in rows.values()}


@families
def test_a_loaded_model_looks_up_and_multiplies_by_the_stored_weights(family, made, tmp_path):
    """Oracle: transformers, with the weights of the artifact read one by one."""
    artifact = made(family)
    loaded, ids = mspc.load(artifact.path, device="cpu"), tiny.ids(3)
    embeddings, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    assert isinstance(embeddings, SparseEmbedding)
    assert isinstance(head, TiedHead if family in TIED else SparseLinear)
    with open_model(artifact.path, device=CPU).whole() as expected, torch.no_grad():
        wanted = expected.get_input_embeddings()(ids)
        assert torch.equal(embeddings(ids), wanted)
        assert torch.equal(embeddings.weight, expected.get_input_embeddings().weight)
        assert torch.equal(head.weight, expected.get_output_embeddings().weight)
        for part in (ids, ids[:1, :3]):  # many tokens, and few, which another product takes
            right = expected(input_ids=part).logits
            assert float((loaded(input_ids=part).logits - right).norm() / right.norm()) < 5e-4
    halves = loaded.to(torch.bfloat16)
    assert halves.get_input_embeddings()(ids).dtype == torch.bfloat16


@families
def test_the_sparse_export_is_loaded_and_saved_by_transformers(family, made, tmp_path):
    artifact = made(family)
    ids = tiny.ids(2)
    exported = artifact.export("sparse", tmp_path / "sparse", progress=False)
    assert tiny_size(exported) <= artifact.manifest["bytes"]["sparse_export"]
    first = AutoModelForCausalLM.from_pretrained(exported)
    first.tie_weights()  # as lm-evaluation-harness does
    first.save_pretrained(tmp_path / "saved")
    again = mspc.load(tmp_path / "saved", device="cpu")
    with torch.no_grad():
        assert torch.equal(first(input_ids=ids).logits, again(input_ids=ids).logits)
    kept = {key: value for key, value in tiny.tensors(exported).items() if "embed" in key or "head" in key}
    assert kept.keys() == {key for key in tiny.tensors(tmp_path / "saved") if "embed" in key or "head" in key}
    dense = dict(open_model(exported, device=CPU).source.read(source_keys(artifact)))
    for name, weight in ArtifactSource(artifact.path).read(source_keys(artifact)):
        assert torch.equal(weight, dense[name])


def tiny_size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def source_keys(artifact: mspc.Artifact) -> list[str]:
    return [row["tensor"] for row in artifact.manifest["outer"]]


@pytest.mark.filterwarnings("ignore")  # those of the packages that load such folders
@pytest.mark.parametrize(
    ("family", "format_name"),
    [
        ("llama", "dense"), ("gpt2", "dense"), ("llama", "gptq"), ("llama", "compressed-tensors"),
        ("gemma2", "compressed-tensors"), pytest.param("bundled", "gguf", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_exports_are_verified_in_the_loader_of_transformers(family, format_name, made, tmp_path, monkeypatch):
    """Oracle: transformers. The export fails if a weight or a logit differs."""
    monkeypatch.setitem(FORMATS, format_name, replace(FORMATS[format_name], runtimes=("transformers",)))
    out = made(family).export(format_name, tmp_path / "out", progress=False)
    report = json.loads((out / "verification.json").read_text())
    assert report["runtimes"]["transformers"]["status"] == "verified"
    assert report["weights"]["matrices"] == len(made(family).manifest["matrices"]) + (1 if family in TIED else 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("vocabulary", "packed"), [(288, True), (260, False)])
def test_compressed_tensors_packs_a_head_of_whole_words(vocabulary, packed, calibration, tmp_path):
    """Oracle: the loader of transformers, which the export is verified in."""
    model = tiny.build(tmp_path / "model", "llama", vocab_size=vocabulary, hidden_size=64)
    made = tiny.compress(
        model, tmp_path / "made", calibration, bits=4, group_size=32, allocator="uniform", head_bits=8
    )  # fmt: skip
    names = tiny.tensors(made.export("compressed-tensors", tmp_path / "out", progress=False))
    assert ("lm_head.weight_packed" in names) == packed
    assert ("lm_head.weight" in names) != packed
    assert "model.embed_tokens.weight" in names


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("weights", "bits", "operators"),
    [
        ("matmulnbits", 8, {"GatherBlockQuantized", "MatMulNBits", "Reshape"}),
        ("matmulnbits", 4, {"GatherBlockQuantized", "MatMulNBits", "Reshape"}),
        ("qdq", 8, {"Gather", "DequantizeLinear"}),
        ("matmulnbits", 16, set()),
    ],
)  # fmt: skip
def test_onnx_stores_tied_embeddings_once(weights, bits, operators, artifact_of, tmp_path, monkeypatch):
    """Oracle: ONNX Runtime, in which the export is verified, and the bytes of the graph's initializers."""
    onnx = pytest.importorskip("onnx")
    monkeypatch.setitem(FORMATS, "onnx", replace(FORMATS["onnx"], runtimes=("onnxruntime",)))
    artifact = artifact_of("bundled", **({} if bits == 16 else {"head_bits": bits}))
    out = artifact.export("onnx", tmp_path / "out", weights=weights, progress=False)
    assert json.loads((out / "verification.json").read_text())["runtimes"]["onnxruntime"]["status"] == "verified"
    graph = onnx.load(out / "model.onnx").graph
    tables = [one for one in graph.initializer if np.prod(one.dims) >= 4096 * 256 * bits // 16 // 2 and
              "layers" not in one.name]  # fmt: skip
    assert len(tables) == 1
    assert len(tables[0].raw_data) == 4096 * 256 * bits // 8
    users = {node.op_type for node in graph.node for name in node.input if name == "model.embed_tokens.weight.codes"}
    assert (users <= operators) if operators else not users


@pytest.mark.parametrize("weights", ["matmulnbits", "qdq"])
def test_onnx_has_no_lookup_in_4_bits_by_the_standard(weights):
    onnx = pytest.importorskip("exporters.onnx")
    matrix = PlannedMatrix("model.embed_tokens", (64, 64), Target(Unstructured(0.0), Grid(4, 32)), role=EMBEDDINGS)
    if weights == "matmulnbits":
        onnx.check([matrix], {}, onnx.Options(weights), Path())
        return
    with pytest.raises(InputError, match="model.embed_tokens: ONNX has no lookup in 4 bits.*matmulnbits"):
        onnx.check([matrix], {}, onnx.Options(weights), Path())


def test_the_cost_is_that_of_each_step(folder_of, calibration, test_text, tmp_path):
    """Oracles: the run without the options, and transformers with the quantized head or all that is stored."""
    model = folder_of("llama")
    common = {"eval": True, "bits": 4, "group_size": 32, "allocator": "uniform", "num_sequences": 12}
    plain = tiny.compress(model, tmp_path / "plain", calibration, **common)
    made = tiny.compress(model, tmp_path / "made", calibration, head_bits=4, embedding_bits=8, **common)
    found = made.manifest["evaluation"]
    none, _, both = found["outer"]
    assert [step["quantized"] for step in found["outer"]] == [[], [HEAD], [HEAD, EMBEDDINGS]]
    for name in ("perplexity", "divergence"):
        assert none[name] == plain.manifest["evaluation"][name]
        assert both[name] == found[name]
    assert found["perplexity"]["mean"] != none["perplexity"]["mean"]
    assert made.manifest["matrices"] == plain.manifest["matrices"]
    assert len({step["divergence"]["mean"] for step in found["outer"]}) == 3
    dense = made.export("dense", tmp_path / "dense", progress=False)
    by_transformers = tiny.perplexity_by_transformers(dense, test_text)
    assert tiny.perplexity(made.path, test_text) == pytest.approx(by_transformers, rel=1e-5)


def test_a_head_of_4_bits_is_swept_with_the_inputs_that_it_gets(folder_of, tmp_path):
    """Oracles: hidden states by transformers' own forward pass of the artifact's blocks; rounding to nearest."""
    model, ids = open_model(folder_of("llama"), device=CPU), tiny.ids(4)
    recipe = mspc.Recipe(sparsity=0.5, allocator="uniform", head_bits=4, embedding_bits=8, eval=False)
    artifact = mspc.compress(folder_of("llama"), recipe, out=tmp_path / "made", calibration=ids, progress=False)
    row = artifact.manifest["outer"][1]
    seen = []
    with open_model(artifact.path, device=CPU).whole() as whole, torch.no_grad():
        # The head is swept before embeddings are rounded.
        whole.get_input_embeddings().weight.copy_(model.read_parameter("model.embed_tokens.weight"))
        whole.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1).double()))
        whole(input_ids=ids)
    x, dense = torch.cat(seen), model.read_parameter("lm_head.weight").double()

    def error(weight: Tensor) -> float:
        return float(((weight - dense) @ x.T).square().sum() / (dense @ x.T).square().sum())

    nearest = rounded(dense.float(), PlannedOuter(outer_matrices(model)[HEAD], Grid(4, 32), torch.float32))
    assert row["output_error"] == pytest.approx(error(torch.from_numpy(by_hand(artifact, row))), rel=1e-3)
    assert row["output_error"] < 0.9 * error(dequantize(nearest.codes).double())
    assert row["num_tokens"] == ids.numel()


def test_the_cost_is_said(folder_of, calibration, tmp_path, caplog):
    with caplog.at_level("INFO", "mspc"):
        tiny.compress(
            folder_of("gemma2"), tmp_path / "out", calibration, eval=True, bits=4, group_size=32, allocator="uniform",
            head_bits=8, num_sequences=12,
        )  # fmt: skip
    lines = [record.getMessage() for record in caplog.records]
    said = [line for line in lines if line.startswith(("Head in 8 bits, ", "Embeddings in 8 bits, "))]
    assert len(said) == 2
    assert all("perplexity" in line and "KL from the dense model" in line for line in said)
    assert any("Embeddings and head, which are one matrix in 8 bits, are" in line for line in lines)


def test_a_target_size_counts_the_quantized_head(folder_of, calibration, tmp_path):
    """Oracle: the bytes of the export. What the head saves goes to the blocks."""
    model, size = folder_of("llama"), 90_000
    sizes = {}
    for name, more in (("plain", {}), ("made", {"head_bits": 4, "embedding_bits": 8})):
        made = tiny.compress(
            model, tmp_path / name, calibration, effort="fast", group_size=32, target_size=f"{size}B", **more
        )  # fmt: skip
        sizes[name] = made.manifest["bits_per_weight"]
        assert made.manifest["bytes"]["sparse_export"] <= size
    assert sizes["made"] > sizes["plain"]


def test_a_run_that_was_cut_off_ends_with_the_same_bytes(folder_of, calibration, tmp_path, monkeypatch):
    model, given = folder_of("llama"), {"bits": 4, "group_size": 32, "allocator": "uniform", "head_bits": 8}
    whole = tiny.compress(model, tmp_path / "whole", calibration, **given)
    recipe = replace(mspc.Recipe(**given), calibration=str(calibration), num_sequences=4, eval=False)
    recipe = replace(recipe, sequence_length=tiny.LENGTH, sparsity=0.5)
    with monkeypatch.context() as patched:
        patched.setattr("mspc.pipeline.run.results", stop)
        with pytest.raises(KeyboardInterrupt):
            mspc.compress(model, recipe, out=tmp_path / "cut", progress=False)
    monkeypatch.setattr("mspc.pipeline.outer.rounded", stop)  # it is committed
    resumed = mspc.compress(model, recipe, out=tmp_path / "cut", resume=True, progress=False)
    assert resumed.manifest["outer"] == whole.manifest["outer"]
    assert resumed.manifest["files"] == whole.manifest["files"]


def stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


# What is refused


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("gemma2", {"head_bits": 4, "embedding_bits": 8}, "head_bits 4 and embedding_bits 8 contradict each other"),
        ("gemma2", {"head_bits": 8, "embedding_bits": 16}, "head_bits 8 and embedding_bits 16 contradict each other"),
        ("llama", {"head_bits": 8, "group_size": 24, "bits": 16}, "group size 24 does not divide its 32"),
    ],
)
def test_what_contradicts_itself_is_refused_before_anything_is_made(
    family, options, message, folder_of, calibration, tmp_path
):
    with pytest.raises(InputError, match=message):
        tiny.compress(folder_of(family), tmp_path / "out", calibration, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("values", [{"head_bits": 3}, {"head_bits": 2}, {"embedding_bits": 4}])
def test_other_numbers_of_bits_are_refused(values):
    with pytest.raises(InputError, match="must be 16 .not quantized.*8"):
        mspc.Recipe(**values)


def test_a_value_of_16_is_no_choice():
    outer = {"head_bits": 16, "embedding_bits": 16}
    assert mspc.Recipe(bits=4, **outer).settings().to_dict() == mspc.Recipe(bits=4).settings().to_dict()


@pytest.mark.parametrize("option", ["head_bits", "embedding_bits"])
def test_without_a_goal_a_tied_matrix_has_the_bits_of_the_one_option_that_was_given(option, folder_of, calibration):
    settings = mspc.Recipe(**{option: 16}).settings()
    model = open_model(folder_of("gemma2"), device=CPU)
    assert planned_outer(model, settings, [option]) == []
    assert [one.grid.bits for one in planned_outer(model, mspc.Recipe().settings(), [])] == [8]


def test_without_a_goal_what_cannot_be_quantized_stays_and_is_said(llama, calibration, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("mspc.model.outer.is_lookup", lambda layer: False)
    recipe = mspc.Recipe(effort="fast", eval=False, group_size=32, num_sequences=4, calibration=str(calibration))
    with caplog.at_level("INFO", "mspc"):
        made = mspc.compress(llama, recipe, out=tmp_path / "out", progress=False)
    said = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("Head and embeddings stay as they are: ") for line in said)
    assert "outer" not in made.manifest
    with pytest.raises(InputError, match="does not quantize"):
        mspc.compress(llama, replace(recipe, embedding_bits=8), out=tmp_path / "asked", progress=False)


def test_an_embedding_that_computes_more_is_no_lookup():
    class Normed(torch.nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids).square()

    assert is_lookup(torch.nn.Embedding(2, 2))
    assert not is_lookup(Normed(2, 2))


def test_the_matrices_of_a_model_by_role(folder_of):
    tied = outer_matrices(open_model(folder_of("gemma2"), device=CPU))
    assert tied[HEAD] is tied[EMBEDDINGS]
    assert tied[HEAD].tied == "lm_head.weight"
    apart = outer_matrices(open_model(folder_of("llama"), device=CPU))
    assert {role: found.matrix.parameter for role, found in apart.items()} == {
        EMBEDDINGS: "model.embed_tokens.weight", HEAD: "lm_head.weight",
    }  # fmt: skip
