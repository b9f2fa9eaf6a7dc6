"""Sparse models that run: logits against the dense export in plain transformers, tensors against the files."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_runtime_layers import Watch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import mspc
import mspc.hf
from mspc.errors import InputError
from mspc.kernels import product
from mspc.model.open import open_model
from mspc.planning.plan_file import write_plan
from mspc.runtime.linear import SparseLinear
from mspc.storage.artifact import ArtifactSource
from mspc.storage.sparse_export import read_sparse
from mspc.types import NM, Grid, PlannedMatrix, Target, Unstructured


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded matrices stay as they are stored; `test_cpu_kernels` has those that are repacked."""
    monkeypatch.setenv("MSPC_CPU_ISA", "torch")


# Every matrix of a model has another pattern or grid.
CHOICES = [
    *(Target(pattern, grid) for pattern in (Unstructured(0.5), NM(2, 4), NM(8, 16), Unstructured(0.0))
      for grid in (None, Grid(8, 32), Grid(4, 16, False), Grid(3, None), Grid(2, 16), Grid(4, None, False))),
]  # fmt: skip


@dataclass
class Case:
    """A model that was compressed, and exported; and what transformers makes of its dense export."""

    family: str
    artifact: mspc.Artifact
    sparse: Path
    dense: Path
    ids: Tensor
    logits: Tensor


def compress(source: Path, out: Path, calibration: Path, **recipe: Any) -> mspc.Artifact:
    quick = {"num_sequences": 2, "solver": "mask", "allocator": "uniform", "device": "cpu"}
    return tiny.compress(source, out, calibration, **quick | recipe)


def make_case(family: str, source: Path, calibration: Path, folder: Path, offset: int) -> Case:
    model = open_model(source, device=torch.device("cpu"))
    matrices = [matrix for of_block in model.matrices(()) for matrix in of_block]
    plan = [
        PlannedMatrix(matrix.name, matrix.shape, CHOICES[(offset + number) % len(CHOICES)])
        for number, matrix in enumerate(matrices)
    ]
    write_plan(folder / "plan.json", plan)
    asked = {"plan": str(folder / "plan.json"), "allocator": None}
    artifact = compress(source, folder / "artifact", calibration, **asked)
    sparse = artifact.export("sparse", folder / "sparse", verify=False, progress=False)
    dense = artifact.export("dense", folder / "dense", verify=False, progress=False)
    ids = tiny.ids(3)
    logits = logits_of(AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32), ids)
    return Case(family, artifact, sparse, dense, ids, logits)


FAMILIES = {"llama": (0, torch.bfloat16), "gpt2": (14, torch.float32), "opt": (7, torch.float16)}


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, calibration, tmp_path_factory) -> Case:
    """llama in bf16 and sharded; gpt2 with transposed parameters, biases and tied embeddings; opt in float16."""
    folder, (offset, dtype) = tmp_path_factory.mktemp(request.param), FAMILIES[request.param]
    source = tiny.build(folder / "source", request.param, dtype=dtype, sharded=request.param == "llama")
    return make_case(request.param, source, calibration, folder, offset)


def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


LOADERS: dict[str, Callable[[Path, Path], PreTrainedModel]] = {
    "export": lambda artifact, sparse: mspc.load(sparse),
    "artifact": lambda artifact, sparse: mspc.load(artifact),
    "from_pretrained": lambda artifact, sparse: AutoModelForCausalLM.from_pretrained(sparse, dtype=torch.float32),
    "device_map": lambda artifact, sparse: AutoModelForCausalLM.from_pretrained(
        sparse, dtype=torch.float32, device_map={"": "cpu"}
    ),
}


@pytest.mark.usefixtures("unrounded")
@pytest.mark.parametrize("loader", LOADERS)
def test_logits_are_those_of_the_dense_export(loader, case):
    model = LOADERS[loader](case.artifact.path, case.sparse)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert len(sparse_layers(model)) == len(case.artifact.manifest["matrices"])
    torch.testing.assert_close(logits_of(model, case.ids), case.logits, rtol=1e-5, atol=1e-5)


def test_logits_of_the_kernels_are_those_of_the_dense_export_up_to_rounding(case):
    """The kernels round inputs to 16 bits, and do not round the weight to the dtype of the checkpoint."""
    eps = max(5e-4, 2 * torch.finfo(getattr(torch, case.artifact.manifest["matrices"][0]["dtype"])).eps)
    difference = logits_of(mspc.load(case.sparse), case.ids) - case.logits
    assert float(difference.norm()) < eps * float(case.logits.norm())


def test_dense_folders_are_loaded_too(case):
    """Oracle: transformers itself."""
    model = mspc.load(case.dense)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits_of(model, case.ids), case.logits)


PLACEMENTS = {
    "device_map": {"device_map": "cpu"},
    "dict": {"device_map": {"": "cpu"}},
    "auto": {"device_map": "auto"},
    "attention": {"attn_implementation": "eager"},
}


@pytest.mark.parametrize("of", ["artifact", "sparse", "dense", "checkpoint"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_options_of_transformers_are_passed_on(placement, of, pruned, llama, tmp_path):
    """Oracle: `from_pretrained` sets the same attributes."""
    artifact, sparse = pruned[0]
    folder = {"artifact": artifact, "sparse": sparse, "checkpoint": llama}.get(of)
    if folder is None:
        folder = mspc.Artifact(artifact).export("dense", tmp_path / "dense", verify=False, progress=False)
    options = PLACEMENTS[placement]
    model = mspc.load(folder, **options)
    assert model.device.type == "cpu"
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == options.get("attn_implementation", "sdpa")
    assert bool(sparse_layers(model)) == (of in ("artifact", "sparse"))
    torch.testing.assert_close(logits_of(model, tiny.ids(1)), logits_of(mspc.load(folder), tiny.ids(1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"device": "cpu", "device_map": "auto"},
            "load: device='cpu' and device_map='auto' both place the model",
        ),
        ({"prefill": "cusparse"}, "Unknown prefill 'cusparse': did you mean 'cusparselt'?"),
        ({"device": "cpu", "prefill": "cusparselt"}, "'cusparselt' needs a CUDA device .* but cpu is no CUDA device."),
        ({"dtype": "float3"}, "Unknown dtype 'float3'"),
    ],
    ids=str,
)
def test_options_that_cannot_be_obeyed_are_refused(options, message, pruned):
    with pytest.raises(InputError, match=message):
        mspc.load(pruned[0][1], **options)


def test_logits_in_half_precision_are_near(case):
    got = logits_of(mspc.load(case.sparse, dtype=torch.bfloat16), case.ids)
    dense = AutoModelForCausalLM.from_pretrained(case.dense, dtype=torch.bfloat16)
    expected = logits_of(dense, case.ids)
    assert (got - expected).norm() < 0.02 * expected.norm()


def test_generation_is_that_of_the_dense_export(case, in_torch):
    dense = AutoModelForCausalLM.from_pretrained(case.dense, dtype=torch.float32)
    prompt = {"input_ids": case.ids[:, :5], "attention_mask": torch.ones(3, 5, dtype=torch.int64)}
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(mspc.load(case.sparse).generate(**prompt, **settings), dense.generate(**prompt, **settings))


def test_a_model_holds_the_bytes_of_the_file_and_no_more(case, in_torch):
    """No overhead at all: the tensors of the layers are those of the files."""
    stored = tiny.tensors(case.sparse)
    described = json.loads((case.sparse / "config.json").read_text())["quantization_config"]["matrices"]
    packed = {key: tensor for key, tensor in stored.items() if key.rpartition(".")[0] in described}
    packed = {key: tensor for key, tensor in packed.items() if not key.endswith(".bias")}
    held = [buffer for layer in sparse_layers(mspc.load(case.sparse)).values() for buffer in layer.buffers()]
    assert sum(tensor.nbytes for tensor in held) == sum(tensor.nbytes for tensor in packed.values())
    rows = case.artifact.manifest["matrices"]
    offsets = sum(8 * (row["shape"][0] + 1) for row in rows if "mask" in row["stored"])
    assert sum(tensor.nbytes for tensor in held) == sum(row["bytes"] for row in rows) + offsets


@pytest.fixture(scope="module")
def pruned(calibration, tmp_path_factory) -> list[tuple[Path, Path]]:
    """`(artifact, export)` with 2:4 and no grid, and with 50% and int4; no matrix has the shape of anything stored."""
    folder, found = tmp_path_factory.mktemp("pruned"), []
    source = tiny.build(folder / "source", "llama", hidden_size=48, intermediate_size=80)
    for number, changes in enumerate(({"pattern": "2:4"}, {"sparsity": 0.5, "bits": 4, "group_size": 16})):
        artifact = compress(source, folder / f"artifact{number}", calibration, **changes)
        found.append((artifact.path, artifact.export("sparse", folder / f"sparse{number}", progress=False)))
    return found


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("loader", LOADERS)
def test_loading_makes_no_dense_matrix(loader, number, pruned, monkeypatch, in_torch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # other threads would not be watched
    with Watch() as watch:
        model = LOADERS[loader](*pruned[number])
    shapes = {layer.matrix.shape for layer in sparse_layers(model).values()}
    assert len(shapes) == 4
    made = {tuple(tensor.shape) for tensor in watch.made if tensor.is_floating_point() and not tensor.is_meta}
    assert (260, 48) in made
    assert not made & shapes
    with Watch() as watch:
        for layer in sparse_layers(model).values():  # the body of the operator: a watch sees nothing inside of that
            product._weight(list(layer.buffers()), layer.subject)
    assert shapes <= {tuple(tensor.shape) for tensor in watch.made if tensor.is_floating_point()}


def assert_same_export(folder: Path, other: Path) -> None:
    first, second = tiny.tensors(folder), tiny.tensors(other)
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype, key
        assert torch.equal(tensor, second[key]), key
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, other)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("loader", ["from_pretrained", "load"])
@pytest.mark.usefixtures("unrounded")
def test_saving_writes_the_export_again(loader, case, tmp_path):
    """From an export and from an artifact, in the dtype of the checkpoint; in other shards than the export has."""
    saved = tmp_path / "saved"
    if loader == "from_pretrained":
        model = AutoModelForCausalLM.from_pretrained(case.sparse)
    else:
        model = mspc.load(case.artifact.path, dtype=case.artifact.manifest["matrices"][0]["dtype"])
    model.save_pretrained(saved, max_shard_size="20KB")
    assert len(list(saved.glob("*.safetensors"))) > 1
    assert_same_export(case.sparse, saved)
    for again in (mspc.load(saved), AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)):
        torch.testing.assert_close(logits_of(again, case.ids), case.logits, rtol=1e-5, atol=1e-5)


def test_a_model_without_its_head_is_loaded_too(case):
    whole, base = mspc.load(case.sparse), AutoModel.from_pretrained(case.sparse, dtype=torch.float32)
    assert len(sparse_layers(base)) == len(sparse_layers(whole))
    with torch.no_grad():
        expected = whole.base_model(case.ids).last_hidden_state
        torch.testing.assert_close(base(case.ids).last_hidden_state, expected)


@pytest.mark.usefixtures("unrounded")
def test_names_without_the_prefix_of_the_model(calibration, tmp_path):
    """GPT-2 as it is on the hub: `h.0...`, where transformers says, and saves, `transformer.h.0...`."""
    source = tiny.build(tmp_path / "source", "gpt2")
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in tiny.tensors(source).items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    case = make_case("gpt2", source, calibration, tmp_path, 0)
    assert "h.0.mlp.c_fc.row_offsets" in tiny.tensors(case.sparse)
    model = AutoModelForCausalLM.from_pretrained(case.sparse)
    for number in (0, 1):
        model.save_pretrained(tmp_path / f"saved{number}")
        for again in (model, mspc.load(tmp_path / f"saved{number}"), mspc.load(case.artifact.path)):
            torch.testing.assert_close(logits_of(again, case.ids), case.logits, rtol=1e-5, atol=1e-5)
        saved = {name: matrix.weight for name, _, matrix in read_sparse(tmp_path / f"saved{number}")}
        for name, _, matrix in read_sparse(case.sparse):
            assert torch.equal(matrix.weight, saved[f"transformer.{name}"])


def test_attention_of_a_mixture_of_experts(calibration, tmp_path):
    """Its files have other names than its parameters, and experts that transformers fuses, and is saved so."""
    source = tiny.build(tmp_path / "source", "mixtral")
    artifact = compress(source, tmp_path / "artifact", calibration, skip=("experts",))
    sparse = artifact.export("sparse", tmp_path / "sparse", verify=False, progress=False)
    dense = AutoModelForCausalLM.from_pretrained(
        artifact.export("dense", tmp_path / "dense", verify=False, progress=False)
    )
    ids = tiny.ids(2)
    for number, path in enumerate((sparse, artifact.path)):
        model = mspc.load(path)
        assert len(sparse_layers(model)) == 8
        torch.testing.assert_close(logits_of(model, ids), logits_of(dense, ids))
        model.save_pretrained(tmp_path / f"saved{number}")
        assert_same_export(sparse, tmp_path / f"saved{number}")


LOAD_PLAINLY = "from transformers import AutoModelForCausalLM as M; model = M.from_pretrained('path/to/this/folder')"


@pytest.mark.slow
def test_the_readme_of_an_export_says_what_works_and_what_does_not(pruned, tmp_path):
    """Oracle: its own code, and code without its import, in fresh interpreters; logits of the export as it is read."""
    export = Path(shutil.copytree(pruned[0][1], tmp_path / "path" / "to" / "this" / "folder"))
    expected = logits_of(mspc.load(export), tiny.ids(1))
    examples = re.findall(r"```python\n(.*?)```", (export / "README.md").read_text(), re.DOTALL)
    assert len(examples) == 2
    save = f"\nimport torch; torch.save(model(torch.tensor({tiny.ids(1).tolist()})).logits.detach(), '%d.pt')\n"
    scripts = examples[0] + save % 0 + examples[1] + save % 1, LOAD_PLAINLY + save % 2
    for script in scripts:
        ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
    logits = [torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in range(3)]
    are_right = [bool((found - expected).norm() < 1e-4 * expected.norm()) for found in logits]
    assert are_right == [True, True, False]
    assert "Unknown quantization type, got mspc" in ran.stderr
    assert "MISSING" in ran.stderr


# All readers of a damaged export raise the same message.


def spoil(folder: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
    """Change one tensor in its file, or take it away."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            changed = change(tensors.pop(name))
            save_file(
                tensors if changed is None else tensors | {name: changed.contiguous()}, path, metadata={"format": "pt"}
            )


def redescribe(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


NM_MATRIX, MASKED = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def flip_one(mask: Tensor) -> Tensor:
    mask[0, 0] ^= 1
    return mask


def tensor(name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    return lambda folder: spoil(folder, name, change)


def row(name: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: redescribe(folder, lambda config: config["matrices"][name].update(changes))


FIRST, SECOND = f"{NM_MATRIX}:", f"{MASKED}:"
EXPERTS = "model.layers.0.mlp.experts"

DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (tensor(f"{NM_MATRIX}.values", lambda _: None), f"{FIRST} its values are missing"),
    "shape": (tensor(f"{NM_MATRIX}.values", lambda t: t[1:]), f"{FIRST} its values are torch.float32 (47, 24)"),
    "dtype": (tensor(f"{NM_MATRIX}.values", Tensor.half), f"{FIRST} its values are torch.float16"),
    "indices": (tensor(f"{NM_MATRIX}.indices", torch.zeros_like), f"{FIRST} its indices are not 2 ascending"),
    "mask": (tensor(f"{MASKED}.mask", flip_one), f"{SECOND} its row_offsets do not count"),
    "offsets": (tensor(f"{MASKED}.row_offsets", lambda _: None), f"{SECOND} its row_offsets are missing"),
    "version": (lambda folder: redescribe(folder, lambda config: config.update(format_version=4)), "upgrade mspc"),
    "pattern": (row(MASKED, pattern="3:5"), f"{SECOND} pattern 3:5 fixes"),
    "sparsity": (row(MASKED, sparsity=0.25), f"{SECOND} its codes are torch.uint8 (960,)"),
    "layer": (row(NM_MATRIX, parameter=EXPERTS), f"{FIRST} the model has no linear layer {EXPERTS}"),
    "model": (row(NM_MATRIX, transposed=True), f"{FIRST} it is described as (48, 48), transposed"),
    "truncated": (lambda folder: (folder / "model.safetensors").write_bytes(b"12345678"), "cannot be read"),
}


@pytest.mark.parametrize("read", [mspc.load, AutoModelForCausalLM.from_pretrained], ids=["load", "from_pretrained"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_exports_are_refused_by_name(damage, read, pruned, tmp_path):
    spoil_it, message = DAMAGES[damage]
    number = 1 if MASKED in message else 0
    folder = Path(shutil.copytree(pruned[number][1], tmp_path / "copy"))
    spoil_it(folder)
    with pytest.raises(InputError) as caught:
        read(folder)
    assert message in str(caught.value)
    if damage not in ("layer", "model"):  # those are about the model, which `read_sparse` does not look at
        with pytest.raises(InputError) as caught:
            list(read_sparse(folder))
        assert message in str(caught.value)


def test_load_names_what_it_cannot_read(pruned, tmp_path):
    folder = Path(shutil.copytree(pruned[0][1], tmp_path / "copy"))
    spoil(folder, "model.norm.weight", lambda _: None)
    with pytest.raises(InputError, match="holds no model.norm.weight, which the model needs"):
        mspc.load(folder)
    artifact = Path(shutil.copytree(pruned[1][0], tmp_path / "artifact"))
    file = ArtifactSource(artifact).manifest["matrices"][0]["file"]
    name = ArtifactSource(artifact).manifest["matrices"][0]["name"]
    tensors = load_file(artifact / file)
    save_file(tensors | {f"{name}.mask": tensors[f"{name}.mask"][1:].clone()}, artifact / file)
    with pytest.raises(InputError, match=f"{name}: its mask are torch.uint8"):
        mspc.load(artifact, check=False)
