"""Experts in 3-D parameters: Grams, gradients, artifacts and models that run, against transformers' own eager code."""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import mspc
from exporters.formats import FORMATS
from mspc.errors import InputError, Stopped
from mspc.model.experts import IMPLEMENTATION, expert_matrices, is_understood
from mspc.model.open import open_model
from mspc.model.rows import rows_of_slices
from mspc.passes import gradients
from mspc.passes.blocks import batches_of
from mspc.passes.gradients import OutputFisher, SquaredGradient, reverse_walk
from mspc.passes.walk import FEW_TOKENS, walk
from mspc.published.hutchinson import HessianTrace
from mspc.runtime.linear import SparseLinear
from mspc.storage.artifact import ArtifactSource
from mspc.storage.sparse_export import SparseSource, read_sparse
from mspc.types import flatten

CPU = torch.device("cpu")
GATED = tiny.CONFIGS["llama"] | {"num_experts_per_tok": 2}
SHARED = {"n_routed_experts": 4, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_shared_experts": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": tiny.CONFIGS["mixtral"],
    "gpt_oss": tiny.CONFIGS["gpt_oss"],
    "qwen3_moe": GATED | {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
    "olmoe": GATED | {"num_experts": 4},
    "granitemoe": GATED | {"num_local_experts": 4},
    "glm4_moe": GATED | SHARED | {"n_group": 1, "topk_group": 1, "head_dim": 16},
    "deepseek_v3": GATED | SHARED | {
        "n_group": 2, "topk_group": 1, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
}  # fmt: skip
MANY = [f if f in ("mixtral", "gpt_oss") else pytest.param(f, marks=pytest.mark.slow) for f in CONFIGS]
"""Parameters of a test that takes seconds: split and fused files, and transposed with biases, in every run."""


@pytest.fixture(scope="module")
def source_of(tmp_path_factory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            config = AutoConfig.for_model(family, **CONFIGS[family])
            model = tiny.randomized(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), 32)
            made[family] = tiny.save(model, tmp_path_factory.mktemp("models") / family)
        return made[family]

    return get


class Watch(TorchFunctionMode):
    """The products with slices of 3-D parameters, by name and index: inputs and outputs, and which token each row is.

    It knows the storage of the parameters and nothing of modules.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.names = {p.untyped_storage().data_ptr(): (name, p) for name, p in model.named_parameters() if p.ndim == 3}
        self.found: dict[str, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("linear", "matmul", "__matmul__"):
            x, weight = args[:2]
            if weight.untyped_storage().data_ptr() in self.names:
                name, parameter = self.names[weight.untyped_storage().data_ptr()]
                index = weight.storage_offset() // parameter.stride(0)
                self.found[f"{name}[{index}]"] = (x, result)
        return result


def watched(model: PreTrainedModel, ids: Tensor) -> tuple[Watch, Tensor]:
    with Watch(model) as watch:
        losses = tiny.losses(model, ids)
    return watch, losses


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("sequences", [1, 12])
def test_grams_equal_brute_force(family, sequences, source_of):
    """Oracle: X^T X in float64, X caught from the eager loop. Of few tokens: mixed with all of the layer's."""
    ids = tiny.ids(sequences)
    watch, _ = watched(tiny.reference(source_of(family)), ids)
    own = {name: x.detach().double().T @ x.detach().double() for name, (x, _) in watch.found.items()}
    counts = {name: len(x) for name, (x, _) in watch.found.items()}
    layers: dict[str, tuple[Any, int]] = defaultdict(lambda: (0, 0))
    for name, gram in own.items():
        total, count = layers[name.partition("[")[0]]
        layers[name.partition("[")[0]] = (total + gram, count + counts[name])
    model = open_model(source_of(family), device=CPU, eager=True)
    matrices, seen = model.matrices(()), 0
    for visit in walk(model, batches_of(model, ids, batch_size=4), matrices):
        if visit.matrix.index is None:
            continue
        name, size, seen = visit.matrix.name, visit.matrix.shape[1], seen + 1
        count, few = counts.get(name, 0), FEW_TOKENS * size
        expected = own.get(name, torch.zeros(size, size, dtype=torch.float64))
        assert visit.stats.num_tokens == count
        assert visit.stats.borrowed_tokens == max(few - count, 0)
        if count < few:
            total, of_layer = layers[visit.matrix.parameter]
            expected = (expected + (few - count) * total / of_layer) * max(count, 1) / few
        assert float((visit.stats.gram - expected).norm() / expected.norm()) < 1e-5
    assert seen == 4 * len({name.partition("[")[0] for name in own})


@pytest.mark.parametrize("family", CONFIGS)
def test_fisher_factors_equal_autograd(family, source_of, monkeypatch):
    """Oracle: gradients at the outputs of the eager loop, by autograd, summed over the tokens of an expert in float64.

    The first token of each sequence does not count. No gradient is shortened here.
    """
    monkeypatch.setattr(gradients, "TYPICAL", 1.0)
    ids = tiny.ids(2)
    whole = tiny.reference(source_of(family))
    for parameter in whole.parameters():
        parameter.requires_grad_(True)
    hidden: dict[str, Tensor] = {}
    for name, module in whole.named_modules():
        if hasattr(module, "is_transposed"):
            module.register_forward_pre_hook(lambda _, args, name=name: hidden.__setitem__(name, args[0].detach()))
    watch, losses = watched(whole, ids)
    names = list(watch.found)
    found = torch.autograd.grad(losses.sum(), [watch.found[name][1] for name in names])
    model = open_model(source_of(family), device=CPU, eager=True)
    samples = {s.matrix.name: s.value for s in reverse_walk(model, ids, model.matrices(()), OutputFisher())}
    assert all(not samples[name].any() for name in samples if "[" in name and name not in names)
    for name, gradient in zip(names, found, strict=True):
        owner, index = name.rpartition(".")[0], name.partition("[")[2]
        (first,) = {n for n in names if n.startswith(owner) and n.endswith(index) and "down_proj" not in n}
        rows = watch.found[first][0].detach()
        tokens = torch.cdist(rows.double(), hidden[owner].double()).argmin(1)
        assert torch.equal(hidden[owner][tokens], rows)
        g = gradient[tokens % tiny.LENGTH > 0].double()
        expected = g.T @ g / (2 * (tiny.LENGTH - 1))
        block = torch.block_diag(*samples[name].double())
        torch.testing.assert_close(block, expected, rtol=1e-3, atol=1e-5 * float(expected.diagonal().max()))


@pytest.mark.parametrize("family", MANY)
def test_sensitivities_equal_autograd(family, source_of):
    """Oracle: autograd on the whole model. Hutchinson's estimate is finite and differs between experts."""
    ids, whole = tiny.ids(1), tiny.reference(source_of(family))
    model = open_model(source_of(family), device=CPU, eager=True)
    matrices = [[matrix for matrix in of_block if matrix.index is not None] for of_block in model.matrices(())]
    parameters = {m.parameter: whole.get_parameter(m.parameter).requires_grad_(True) for m in flatten(matrices)}
    found = torch.autograd.grad(tiny.losses(whole, ids).mean(), list(parameters.values()))
    expected = dict(zip(parameters, found, strict=True))
    for sample in reverse_walk(model, ids, matrices, SquaredGradient()):
        mean = float(expected[sample.matrix.parameter][sample.matrix.index].double().square().mean())
        assert float(sample.value) == pytest.approx(mean, rel=1e-4, abs=1e-20)
    traces = [float(sample.value) for sample in reverse_walk(model, ids, matrices, HessianTrace(0))]
    assert np.isfinite(traces).all()
    assert len(set(traces)) > len(traces) // 2


@pytest.mark.parametrize("family", MANY)
def test_experts_are_compressed_exported_and_run(family, source_of, calibration, test_text, tmp_path):
    """Oracles: the verification of each export; logits and tokens of transformers for the dense export."""
    source = source_of(family)
    recipe = {"effort": "fast", "bits": 4, "group_size": 16, "exports": ["dense", "sparse"]}
    artifact = tiny.compress(source, tmp_path / "out", calibration, **recipe)
    dense, sparse = (artifact.path / "exports" / name for name in ("dense", "sparse"))
    rows = {row["name"]: row for row in artifact.manifest["matrices"]}
    experts = {name: row for name, row in rows.items() if row["index"] is not None}
    assert artifact.manifest["sparsity"]["achieved"] == 0.5
    assert all(row["num_tokens"] > 0 for row in experts.values())
    before, after = tiny.tensors(source), tiny.tensors(dense)
    assert before.keys() == after.keys()
    changed = sum(before[key].numel() for key in before if not torch.equal(before[key], after[key]))
    assert changed == sum(row["shape"][0] * row["shape"][1] for row in rows.values())
    weights = sum(file.stat().st_size for file in sparse.glob("*.safetensors"))
    assert weights == artifact.manifest["bytes"]["sparse_export"]
    ids, whole = tiny.ids(2), tiny.reference(dense)
    expected = whole(input_ids=ids, use_cache=False).logits
    prompt = {"max_new_tokens": 6, "do_sample": False}
    for number, path in enumerate((sparse, artifact.path)):
        model = mspc.load(path)
        layers = {name for name, layer in model.named_modules() if isinstance(layer, SparseLinear)}
        assert layers == rows.keys()
        found = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
        assert torch.equal(model.generate(ids[:1], **prompt), whole.generate(ids[:1], **prompt))
        model.save_pretrained(tmp_path / f"saved{number}")
        again = mspc.load(tmp_path / f"saved{number}")
        assert torch.equal(again(input_ids=ids, use_cache=False).logits, found)
    written = []
    for path in (dense, sparse, artifact.path):
        continuation = mspc.generate(path, "the quick", max_new_tokens=6, device="cpu", progress=False)
        "".join(continuation)
        written.append(list(continuation.ids))
    assert written[0] == written[1] == written[2]
    tiny.agreed_perplexity(artifact.path, test_text, dense)
    assert tiny.perplexity(sparse, test_text) == tiny.perplexity(artifact.path, test_text)


def test_a_token_reads_only_the_experts_that_it_is_routed_to(source_of, calibration, tmp_path):
    """Oracle: the router's choice."""
    artifact = tiny.compress(source_of("mixtral"), tmp_path / "out", calibration, effort="fast")
    model, called, chosen = mspc.load(artifact.path), [], []
    for name, layer in model.named_modules():
        if isinstance(layer, SparseLinear) and "experts" in name:
            layer.register_forward_hook(lambda *_, name=name: called.append(name))
        if type(layer).__name__.endswith("Experts"):
            layer.register_forward_pre_hook(lambda _, args, name=name: chosen.append((name, args[1].flatten())))
    model(input_ids=tiny.ids(1, 1), use_cache=False)
    leaves = ("gate_up_proj", "down_proj")
    expected = [f"{name}.{leaf}[{index}]" for name, which in chosen for leaf in leaves for index in which]
    assert sorted(called) == sorted(expected)
    assert len(called) == 8


def test_experts_without_tokens_are_solved_and_said(calibration, tmp_path, caplog):
    """Oracle: 12 tokens choose one of 16 experts each."""
    config = AutoConfig.for_model("mixtral", **CONFIGS["mixtral"] | {"num_local_experts": 16, "num_experts_per_tok": 1})
    source = tiny.save(tiny.randomized(AutoModelForCausalLM.from_config(config), 32), tmp_path / "model")
    options = {"num_sequences": 1, "sequence_length": 12, "solver": "obs", "allocator": "uniform"}
    artifact = tiny.compress(source, tmp_path / "out", calibration, **options)
    experts = [row for row in artifact.manifest["matrices"] if row["index"] is not None]
    assert len(experts) == 64
    for layer in (0, 1):
        for leaf in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts.{leaf}"
            assert sum(row["num_tokens"] for row in experts if row["parameter"] == name) == 12
    without = [row for row in experts if row["num_tokens"] == 0]
    assert len(without) >= 16
    assert all(row["borrowed_tokens"] == 2 * row["shape"][1] for row in without)
    assert all(0 <= row["output_error"] < 1 for row in experts)
    assert "64 matrices of experts saw fewer than 2 tokens per input, fewest" in caplog.text
    assert "Calibrate on more text (--num-sequences" in caplog.text


def test_threads_and_a_cut_change_no_byte(source_of, calibration, tmp_path):
    """Oracle: the same run in one thread and in one go; a size budget, so that experts may differ in bits."""
    config = AutoConfig.for_model("mixtral", **CONFIGS["mixtral"] | {"num_local_experts": 10, "num_hidden_layers": 2})
    source = tiny.save(tiny.randomized(AutoModelForCausalLM.from_config(config), 32), tmp_path / "model")
    given = {"num_sequences": 4, "sequence_length": tiny.LENGTH, "eval": False, "group_size": 16, "effort": "fast"}
    recipe = mspc.Recipe(calibration=str(calibration), bits_per_weight=4.5, allocator="curves", **given)
    one = mspc.compress(source, recipe, out=tmp_path / "one", threads=1, progress=False)
    mspc.compress(source, recipe, out=tmp_path / "three", threads=3, progress=False)

    def goes_on(event: mspc.Event) -> bool:
        return event.stage != "Compressing"

    with pytest.raises(Stopped):
        mspc.compress(source, recipe, out=tmp_path / "cut", threads=1, progress=goes_on)
    mspc.compress(source, recipe, out=tmp_path / "cut", threads=2, progress=False, resume=True)
    assert one.manifest["bits_per_weight"] <= 4.5
    assert len({(row["bits"], row["sparsity"]) for row in one.manifest["matrices"] if row["index"] is not None}) > 1
    for file in sorted((one.path / "matrices").glob("*.safetensors")):
        for other in ("three", "cut"):
            assert file.read_bytes() == (tmp_path / other / "matrices" / file.name).read_bytes()


def test_plans_and_selectors_know_single_experts(source_of, calibration, tmp_path):
    """Oracle: the tensors of the source, and the zeros of the result."""
    source, name = source_of("mixtral"), "model.layers.0.mlp.experts.gate_up_proj"
    first = tiny.compress(source, tmp_path / "a", calibration, effort="fast", only=("layers.0.mlp.experts",))
    assert len(first.manifest["matrices"]) == 8
    plan = json.loads((first.path / "plan.json").read_text())
    for row in plan["matrices"]:
        row["sparsity"] = 0.0 if row["name"] == f"{name}[2]" else 0.75
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    recipe = mspc.Recipe(
        calibration=str(calibration), num_sequences=4, sequence_length=tiny.LENGTH, eval=False, solver="obs",
        only=("layers.0.mlp.experts",), plan=str(tmp_path / "plan.json"),
    )  # fmt: skip
    second = mspc.compress(source, recipe, out=tmp_path / "b", progress=False)
    found = ArtifactSource(second.path)
    before, after = tiny.tensors(source), dict(found.read(found.keys()))
    for index in range(4):
        for part in ("w1", "w3"):
            key = f"model.layers.0.block_sparse_moe.experts.{index}.{part}.weight"
            assert torch.equal(before[key], after[key]) == (index == 2)
        zeros = sum(int((after[key.replace("w3", part)] == 0).sum()) for part in ("w1", "w3"))
        assert zeros == (0 if index == 2 else 0.75 * 128 * 32)
    with pytest.raises(InputError, match=r"gate_up_proj\[2\] is not selected, but .*\[0\] is.*--plan with sparsity 0"):
        tiny.compress(source, tmp_path / "c", calibration, effort="fast", skip=(r"gate_up_proj\[2\]",))


@pytest.mark.parametrize("format_name", [name for name in FORMATS if not FORMATS[name].holds_slices])
def test_formats_without_experts_are_refused_early(format_name, source_of, calibration, tmp_path, monkeypatch):
    monkeypatch.setattr("mspc.pipeline.run.draw", lambda *_: pytest.fail("began"))
    options = {"bits": 4, "group_size": 32, "effort": "fast", "exports": [format_name]}
    with pytest.raises(InputError, match=rf"gate_up_proj\[0\]: {format_name} cannot hold one slice .*--skip"):
        tiny.compress(source_of("mixtral"), tmp_path / "out", calibration, **options)


def test_masks_of_experts_are_refused_by_name(source_of, calibration, tmp_path):
    artifact = tiny.compress(source_of("mixtral"), tmp_path / "out", calibration, effort="fast", only=("experts",))
    sparse = artifact.export("sparse", tmp_path / "sparse", verify=False, progress=False)
    for folder in (artifact.path, sparse):
        with pytest.raises(InputError, match=r"gate_up_proj\[0\] is a slice of a parameter.*--skip experts"):
            mspc.masks(folder)


@pytest.mark.parametrize("option", ["recover", "reconstruct"])
def test_training_of_experts_is_refused_before_any_work(option, source_of, calibration, tmp_path, monkeypatch):
    monkeypatch.setattr("mspc.pipeline.run.draw", lambda *_: pytest.fail("began"))
    with pytest.raises(InputError, match=rf"gate_up_proj\[0\]: --{option} cannot train experts yet.*--skip experts"):
        tiny.compress(source_of("mixtral"), tmp_path / "out", calibration, **{option: 2})


def test_experts_that_compute_something_else_stay_dense(source_of, monkeypatch):
    """Oracle: an activation that is changed in the own code of a module, which the trial must notice."""
    model = tiny.reference(source_of("mixtral"))
    experts = model.model.layers[0].mlp.experts
    assert len(expert_matrices("p", "down_proj", experts)) == 4
    own = type(experts).forward.__wrapped__

    class Other(type(experts)):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return super().forward(hidden_states, top_k_index, top_k_weights)

        forward.__wrapped__ = lambda self, *args: 1.01 * own(self, *args)

    experts.__class__ = Other
    assert not is_understood(experts)
    assert expert_matrices("p", "down_proj", experts) == []


def test_our_experts_equal_those_of_transformers(source_of):
    """Oracle: the eager code of transformers, bit by bit; indices of no expert are ignored, as those of padding are."""
    for family in CONFIGS:
        model, ids = tiny.reference(source_of(family)), tiny.ids(2)
        expected = model(input_ids=ids, use_cache=False).logits
        model.set_experts_implementation(IMPLEMENTATION)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)


def test_rows_of_slices():
    """Oracle: by hand."""
    shapes = {f"{e}.{part}": (3, 5) for e in range(2) for part in ("gate", "up")}

    def fused(tensors, order=("gate", "up")):
        return torch.stack([torch.cat([tensors[f"{e}.{part}"] for part in order]) for e in range(2)])

    assert rows_of_slices(shapes, (2, 6, 5), fused) == [
        (("0.gate", 3), ("0.up", 3)),
        (("1.gate", 3), ("1.up", 3)),
    ]
    swapped = rows_of_slices(shapes, (2, 6, 5), lambda tensors: fused(tensors, ("up", "gate")))
    assert swapped[1] == (("1.up", 3), ("1.gate", 3))
    assert rows_of_slices(shapes, (2, 6, 5), lambda tensors: fused(tensors).flip(1)) is None
    assert rows_of_slices(shapes, (2, 5, 6), lambda tensors: fused(tensors).mT) is None
    assert rows_of_slices(shapes, (2, 3, 5), lambda tensors: fused(tensors)[:, :3]) is None
    stacked = {"gate": (2, 3, 5), "up": (2, 3, 5)}

    def joined(tensors):
        return torch.cat([tensors["gate"], tensors["up"]], dim=1)

    assert rows_of_slices(stacked, (2, 6, 5), joined) == [(("gate", 3), ("up", 3))] * 2
    assert rows_of_slices(stacked, (2, 6, 5), lambda tensors: joined(tensors).flip(0)) is None
    assert rows_of_slices({"both": (2, 6, 5)}, (2, 6, 5), lambda tensors: tensors["both"]) is None
    assert rows_of_slices(dict.fromkeys(stacked, (1, 3, 5)), (1, 6, 5), joined) is None


GOLDEN = {"codes": [[0x79, 0x8F]], "indices": [[0x8D]], "scales": [[0.5]]}
"""The first row by hand of docs/sparse-format.md."""
ROW = [0, 0.5, 0, -0.5, 3.5, 0, 0, 0]
DTYPES = {"codes": torch.uint8, "indices": torch.uint8, "scales": torch.float16}


def golden(folder: Path, version: int, names: list[str], **more: Any) -> Path:
    folder.mkdir()
    tensors = {f"{n}.{part}": torch.tensor(v, dtype=DTYPES[part]) for n in names for part, v in GOLDEN.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    row = {
        "shape": [1, 8], "transposed": False, "dtype": "float32", "pattern": "2:4", "sparsity": 0.5, "bits": 4,
        "group_size": "row", "symmetric": True,
    }  # fmt: skip
    rows = {name: row | {"parameter": f"{name}.weight"} for name in names}
    if more:
        rows = {name: row | more | {"index": i} for i, name in enumerate(names)}
    config = {"quant_method": "mspc", "format_version": version, "matrices": rows}
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


def test_golden_bytes_of_versions_1_and_2(tmp_path):
    """Oracle: the row by hand of the specification."""
    old = golden(tmp_path / "old", 1, ["m"])
    assert [matrix.weight.tolist() for _, _, matrix in read_sparse(old)] == [[ROW]]
    ((_, weight),) = SparseSource(old).read(["m.weight"])
    assert weight.tolist() == [ROW]
    new = SparseSource(golden(tmp_path / "new", 2, ["e.up[0]", "e.up[1]"], parameter="e.up"))
    assert new.keys() == ["e.up"]
    assert new.types() == {"e.up": ("float32", (2, 1, 8))}
    ((_, weight),) = new.read(["e.up"])
    assert weight.tolist() == [[ROW], [ROW]]


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda rows: rows.pop("{}[3]"), "config.json does not describe it"),
    "twice": (lambda rows: rows["{}[3]"].update(index=2), "is slice 2 of"),
    "gap": (lambda rows: rows["{}[3]"].update(index=4), "are not all slices of"),
    "word": (lambda rows: rows["{}[3]"].update(index="3"), "is slice '3' of"),
    "elsewhere": (lambda rows: [rows[f"{{}}[{i}]"].update(parameter="model.up") for i in range(4)], "no parameter"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_descriptions_of_experts_are_refused_by_name(damage, source_of, calibration, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "experts-to-damage"
    if not folder.exists():
        made = tiny.compress(source_of("mixtral"), folder, calibration, effort="fast")
        made.export("sparse", folder / "sparse", verify=False, progress=False)
    copy = Path(shutil.copytree(folder / "sparse", tmp_path_factory.mktemp("damaged") / "copy"))
    config = json.loads((copy / "config.json").read_text())
    name, rows = "model.layers.1.mlp.experts.down_proj", config["quantization_config"]["matrices"]
    short = {key.replace(name, "{}"): row for key, row in rows.items()}
    change, message = DAMAGES[damage]
    change(short)
    config["quantization_config"]["matrices"] = {key.replace("{}", name): row for key, row in short.items()}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=rf"experts\.down_proj\[\d\].*{message}"):
        AutoModelForCausalLM.from_pretrained(copy)
