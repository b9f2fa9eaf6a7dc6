"""DBRX's experts, which are rows of three 2-D parameters, against transformers' own eager code and float64."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import NEEDED
from test_experts import ROW, golden
from tiny_configs import tiny_config
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

import mspc
from exporters.formats import FORMATS
from mspc.errors import InputError
from mspc.model import experts as experts_module
from mspc.model.experts import expert_matrices, experts_per_token, matrix_shapes
from mspc.model.open import open_model
from mspc.model.own_experts import Stacked, adopt_experts
from mspc.passes import gradients
from mspc.passes.blocks import batches_of
from mspc.passes.gradients import OutputFisher, SquaredGradient, reverse_walk
from mspc.passes.walk import FEW_TOKENS, walk
from mspc.published.hutchinson import HessianTrace
from mspc.runtime.linear import SparseLinear
from mspc.storage.artifact import ArtifactSource
from mspc.storage.sparse_export import SparseSource
from mspc.types import flatten

CPU = torch.device("cpu")
LEAVES = ("w1", "v1", "w2")
COUNT = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    model = AutoModelForCausalLM.from_config(tiny_config("dbrx", NEEDED["dbrx"]), attn_implementation="eager")
    return tiny.save(tiny.randomized(model, 64), tmp_path_factory.mktemp("models") / "dbrx")


@pytest.fixture(scope="module")
def artifact(source, calibration, tmp_path_factory) -> mspc.Artifact:
    recipe = {"effort": "fast", "bits": 4, "group_size": 16, "exports": ["dense", "sparse"]}
    return tiny.compress(source, tmp_path_factory.mktemp("artifacts") / "out", calibration, **recipe)


def modules_of(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if name.endswith(".ffn.experts")}


def rows_of(module: Any, leaf: str, expert: int) -> Tensor:
    """The rows of one expert in float64, by counting."""
    size = module.ffn_hidden_size
    return getattr(module.mlp, leaf).detach().double()[expert * size : (expert + 1) * size]


def routed(model: Any, ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """By module of experts, in one pass: hidden states (T, H) float64 and the experts of tokens (T, k)."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: found.update({name: (args[0].detach().double().flatten(0, -2), args[1])})
        )
        for name, module in modules_of(model).items()
    ]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def test_every_module_is_adopted_and_the_logits_stay(source):
    """Oracle: the logits of transformers' own loop."""
    model, ids = tiny.reference(source), tiny.ids(2)
    expected = model(input_ids=ids, use_cache=False).logits
    for _ in range(2):  # again, as loading does
        adopt_experts(model)
        found = modules_of(model)
        assert len(found) == 2
        assert all(isinstance(module, Stacked) for module in found.values())
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
    for module in found.values():
        for leaf in LEAVES:
            matrices = expert_matrices(f"m.{leaf}", leaf, module.mlp)
            assert [matrix.index for matrix in matrices] == [*range(COUNT)]
            for matrix in matrices:
                assert matrix.transposed == (leaf == "w2")
                rows = rows_of(module, leaf, matrix.index)
                assert torch.equal(matrix.read(getattr(module.mlp, leaf)).double(), rows.T if leaf == "w2" else rows)
    shapes = [*matrix_shapes(model.transformer.blocks[0])]
    assert shapes.count((COUNT, 128, 64)) == 3
    assert experts_per_token(model.config) == 2


@pytest.mark.parametrize("sequences", [1, 24])
def test_grams_equal_brute_force(sequences, source):
    """Oracle: X^T X in float64, X computed from the rows of an expert. Of few tokens: mixed with all of the layer's."""
    ids, whole = tiny.ids(sequences), tiny.reference(source)
    given, expected, counts = routed(whole, ids), {}, {}
    for name, module in modules_of(whole).items():
        hidden, chosen = given[name]
        inputs: dict[str, list[Tensor]] = {leaf: [] for leaf in LEAVES}
        for expert in range(COUNT):
            x = hidden[(chosen == expert).any(1)]
            inner = torch.nn.functional.silu(x @ rows_of(module, "w1", expert).T) * (
                x @ rows_of(module, "v1", expert).T
            )
            for leaf, found in zip(LEAVES, (x, x, inner), strict=True):
                inputs[leaf].append(found)
        for leaf, of_experts in inputs.items():
            layer = torch.cat(of_experts)
            for expert, x in enumerate(of_experts):
                gram, few = x.T @ x, FEW_TOKENS * x.shape[1]
                if len(x) < few:
                    gram = (gram + (few - len(x)) * layer.T @ layer / len(layer)) * max(len(x), 1) / few
                expected[f"{name}.mlp.{leaf}[{expert}]"], counts[f"{name}.mlp.{leaf}[{expert}]"] = gram, len(x)
    model, seen = open_model(source, device=CPU, eager=True), set()
    for visit in walk(model, batches_of(model, ids, batch_size=8), model.matrices(())):
        if visit.matrix.index is not None:
            name = visit.matrix.name
            seen.add(name)
            assert visit.stats.num_tokens == counts[name]
            assert float((visit.stats.gram - expected[name]).norm() / expected[name].norm()) < 1e-5
    assert seen == expected.keys()
    assert len(seen) == 2 * COUNT * len(LEAVES)


class Outputs(TorchFunctionMode):
    """The outputs of products with parts of the rows of parameters, by name and number of the part."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.names = {
            p.untyped_storage().data_ptr(): (f"{name}.mlp.{leaf}", p)
            for name, module in modules_of(model).items()
            for leaf, p in module.mlp.named_parameters()
        }
        self.found: dict[str, Tensor] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "matmul" and args[1].untyped_storage().data_ptr() in self.names:
            name, parameter = self.names[args[1].untyped_storage().data_ptr()]
            self.found[f"{name}[{args[1].storage_offset() // (parameter.numel() // COUNT)}]"] = result
        return result


def test_fisher_factors_equal_autograd(source, monkeypatch):
    """Oracle: autograd at the outputs of transformers' own loop, without the first token of each sequence."""
    monkeypatch.setattr(gradients, "TYPICAL", 1.0)  # no gradient is shortened
    ids, whole = tiny.ids(2), tiny.reference(source)
    given = routed(whole, ids)
    whole.requires_grad_(True)
    with Outputs(whole) as outputs:
        losses = tiny.losses(whole, ids)
    names = list(outputs.found)
    found = torch.autograd.grad(losses.sum(), [outputs.found[name] for name in names])
    model = open_model(source, device=CPU, eager=True)
    samples = {s.matrix.name: s.value for s in reverse_walk(model, ids, model.matrices(()), OutputFisher())}
    assert len(names) > COUNT * len(LEAVES)
    for name, gradient in zip(names, found, strict=True):
        _, tokens = torch.where((given[name.partition(".mlp.")[0]][1] == int(name.partition("[")[2][:-1])).T)
        g = gradient[tokens % tiny.LENGTH > 0].double()
        expected = g.T @ g / (2 * (tiny.LENGTH - 1))
        block = torch.block_diag(*samples[name].double())
        torch.testing.assert_close(block, expected, rtol=1e-3, atol=1e-5 * float(expected.diagonal().max()))


def test_sensitivities_equal_autograd(source):
    """Oracle: autograd on the whole model, by the rows of an expert."""
    ids, whole = tiny.ids(1), tiny.reference(source)
    model = open_model(source, device=CPU, eager=True)
    matrices = [[matrix for matrix in of_block if matrix.index is not None] for of_block in model.matrices(())]
    parameters = {m.parameter: whole.get_parameter(m.parameter).requires_grad_(True) for m in flatten(matrices)}
    found = torch.autograd.grad(tiny.losses(whole, ids).mean(), list(parameters.values()))
    expected = {name: g.double().square().chunk(COUNT) for name, g in zip(parameters, found, strict=True)}
    for sample in reverse_walk(model, ids, matrices, SquaredGradient()):
        mean = float(expected[sample.matrix.parameter][sample.matrix.index].mean())
        assert float(sample.value) == pytest.approx(mean, rel=1e-4, abs=1e-20)
    traces = [float(sample.value) for sample in reverse_walk(model, ids, matrices, HessianTrace(0))]
    assert len(set(traces)) == len(traces) == 2 * COUNT * len(LEAVES)


def test_experts_are_compressed_exported_and_run(source, artifact, test_text, tmp_path):
    """Oracles: the verification of each export; logits and tokens of transformers for the dense export."""
    rows = {row["name"]: row for row in artifact.manifest["matrices"]}
    stacked = {name: row for name, row in rows.items() if row["index"] is not None}
    assert len(stacked) == 2 * COUNT * len(LEAVES)
    assert all(row["stacked"] and row["num_slices"] == COUNT for row in stacked.values())
    assert artifact.manifest["format_version"] == 2
    dense, sparse = (artifact.path / "exports" / name for name in ("dense", "sparse"))
    assert json.loads((sparse / "config.json").read_text())["quantization_config"]["format_version"] == 3
    before, after = tiny.tensors(source), tiny.tensors(dense)
    assert {key: t.shape for key, t in before.items()} == {key: t.shape for key, t in after.items()}
    for name, row in stacked.items():
        ours = after[row["tensor"]].chunk(COUNT)[row["index"]]
        assert (ours == 0).double().mean() >= row["sparsity"], name
    changed = sum(before[key].numel() for key in before if not torch.equal(before[key], after[key]))
    assert changed == sum(row["shape"][0] * row["shape"][1] for row in rows.values())
    again = SparseSource(sparse)
    for key, tensor in again.read(again.keys()):
        assert torch.equal(tensor, after[key]), key
        assert again.types()[key][1] == tuple(after[key].shape)
    assert ArtifactSource(artifact.path).types() == again.types()
    weights = sum(file.stat().st_size for file in sparse.glob("*.safetensors"))
    assert weights == artifact.manifest["bytes"]["sparse_export"]
    ids, whole = tiny.ids(2), tiny.reference(dense)
    expected = whole(input_ids=ids, use_cache=False).logits
    prompt = {"max_new_tokens": 6, "do_sample": False}
    for number, path in enumerate((sparse, artifact.path)):
        model = mspc.load(path)
        assert {name for name, layer in model.named_modules() if isinstance(layer, SparseLinear)} == rows.keys()
        found = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
        assert torch.equal(model.generate(ids[:1], **prompt), whole.generate(ids[:1], **prompt))
        model.save_pretrained(tmp_path / f"saved{number}")
        saved = mspc.load(tmp_path / f"saved{number}")
        assert torch.equal(saved(input_ids=ids, use_cache=False).logits, found)
    tiny.agreed_perplexity(artifact.path, test_text, dense)
    assert tiny.perplexity(sparse, test_text) == tiny.perplexity(artifact.path, test_text)


def test_some_parameters_may_stay_dense(source, calibration, tmp_path):
    """Oracle: transformers for the dense export."""
    made = tiny.compress(source, tmp_path / "out", calibration, effort="fast", skip=("mlp.v1", "blocks.1.*w2"))
    dense = made.export("dense", tmp_path / "dense", verify=False, progress=False)
    model, ids = mspc.load(made.path), tiny.ids(2)
    kept = {name.rpartition(".")[2] for name, p in model.named_parameters() if ".experts." in name and p.ndim == 2}
    assert kept == {"v1", "w2"}
    expected = tiny.reference(dense)(input_ids=ids, use_cache=False).logits
    found = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("format_name", [name for name in FORMATS if not FORMATS[name].holds_slices])
def test_formats_without_experts_refuse_them_by_name(format_name, artifact, tmp_path):
    with pytest.raises(InputError, match=rf"w1\[0\]: {format_name} cannot hold one slice of a parameter"):
        artifact.export(format_name, tmp_path / "out", verify=False, progress=False)


OTHERS: dict[str, Callable[..., Tensor]] = {
    "gate": lambda own, mlp, x, w1, v1, w2: own(mlp, x, v1, w1, w2),
    "rows": lambda own, mlp, x, w1, v1, w2: own(mlp, x, w1.flip(0), v1, w2),
    "scale": lambda own, mlp, x, w1, v1, w2: 1.01 * own(mlp, x, w1, v1, w2),
}


@pytest.mark.parametrize("weights", [2**22, 100])
@pytest.mark.parametrize("change", [None, *OTHERS])
def test_experts_that_compute_something_else_are_left_alone(change, weights, source, monkeypatch):
    """Oracle: changes in the own code of a module, which the trial must notice, also where parameters are large."""
    monkeypatch.setattr(experts_module, "WHOLE_TRIAL", weights)
    monkeypatch.setattr("mspc.model.own_experts._tried", {})
    model = tiny.reference(source)
    if change is not None:
        glu = type(model.transformer.blocks[0].ffn.experts.mlp)
        own, other = glu.forward, OTHERS[change]
        monkeypatch.setattr(glu, "forward", lambda *given: other(own, *given))
    adopt_experts(model)
    assert all(isinstance(module, Stacked) == (change is None) for module in modules_of(model).values())


def test_golden_bytes_of_version_3(tmp_path):
    """Oracle: the row by hand of the specification, one expert below the other."""
    found = SparseSource(golden(tmp_path / "new", 3, ["e.w1[0]", "e.w1[1]"], parameter="e.w1", stacked=True))
    assert found.types() == {"e.w1": ("float32", (2, 8))}
    ((_, weight),) = found.read(["e.w1"])
    assert weight.tolist() == [ROW, ROW]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.update(stacked="yes"), "stacked must be true or false, not 'yes'"),
        (lambda row: row.pop("stacked"), "stacked differs from slice to slice"),
    ],
)
def test_damaged_descriptions_are_refused(change, message, artifact, tmp_path):
    copy = Path(shutil.copytree(artifact.path / "exports" / "sparse", tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    change(config["quantization_config"]["matrices"]["transformer.blocks.1.ffn.experts.mlp.w2[3]"])
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        AutoModelForCausalLM.from_pretrained(copy)
    with pytest.raises(InputError, match=message):
        SparseSource(copy)
