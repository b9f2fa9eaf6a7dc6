"""--route all: Grams of experts over all tokens, outputs of routed ones, and the models that it refuses."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from families import NEEDED
from test_experts import CONFIGS, Watch
from tiny_configs import tiny_config
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import mspc
from mspc.errors import InputError
from mspc.model.experts import holds_experts
from mspc.model.open import open_model
from mspc.passes.blocks import batches_of
from mspc.passes.walk import install, walk
from mspc.pipeline.route_checks import check_route
from mspc.storage.manifest import MatrixEntry
from mspc.types import Matrix, flatten

CPU, F64 = torch.device("cpu"), torch.float64
FAMILIES = ("mixtral", "gpt_oss", "qwen3_moe", "glm4_moe", "dbrx", "longcat_flash")
"""Fused, transposed with biases, with shared experts, rows of 2-D parameters, and slices that no expert has."""
FEW = {"num_sequences": 1, "sequence_length": 12, "solver": "obs", "allocator": "uniform"}


@pytest.fixture(scope="module")
def source_of(tmp_path_factory):
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            known = family in CONFIGS
            config = (
                AutoConfig.for_model(family, **CONFIGS[family])
                if known
                else tiny_config(family, NEEDED.get(family, {}))
            )
            model = tiny.randomized(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), 32)
            made[family] = tiny.save(model, tmp_path_factory.mktemp("models") / family)
        return made[family]

    return get


class Rows(Watch):
    """The same for parts of the rows of 2-D parameters, as DBRX has them."""

    def __init__(self, model: Any, count: int) -> None:
        super().__init__(model)
        self.count = count
        self.names |= {
            p.untyped_storage().data_ptr(): (n, p) for n, p in model.named_parameters() if "experts.mlp." in n
        }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("linear", "matmul", "__matmul__"):
            x, weight = args[:2]
            if (key := weight.untyped_storage().data_ptr()) in self.names:
                name, parameter = self.names[key]
                each = parameter.numel() // (self.count if parameter.ndim == 2 else len(parameter))
                self.found[f"{name}[{weight.storage_offset() // each}]"] = (x, result)
        return result


def shown(model: Any, ids: Tensor) -> tuple[dict[str, Tensor], dict[str, list[int]], Tensor]:
    """Inputs (T, I) of every expert's matrix for all tokens, numbers of routed ones by module, and the losses.

    Each module of transformers is run once more for each expert, with all tokens routed to that one.
    """
    modules = {name: m for name, m in model.named_modules() if holds_experts(m) or type(m).__name__ == "DbrxExperts"}
    modules |= {n: m for n, m in model.named_modules() if type(m).__name__ == "LongcatFlashExperts"}
    given: dict[str, tuple[Any, ...]] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: given.update({name: args}))
        for name, module in modules.items()
    ]
    losses = tiny.losses(model, ids)
    for handle in handles:
        handle.remove()
    inputs, counts = {}, {}
    for name, module in modules.items():
        hidden, chosen, _ = given[name]
        size = len(chosen)
        total = next(p for p in module.parameters() if p.ndim > 1)
        number = len(total) if total.ndim == 3 else module.num_experts
        real = number if total.ndim == 2 else len(module.down_proj)
        for expert in range(real):
            columns = (
                [expert, number - 1] if number > real else [expert]
            )  # LongCat takes two, and the last is no expert
            index = torch.tensor(columns).expand(size, -1)
            with Rows(model, real) as watch:
                module(hidden, index, torch.ones(index.shape, dtype=F64))
            inputs |= {key: x.detach().reshape(size, -1) for key, (x, _) in watch.found.items()}
        counts[name] = torch.bincount(chosen.flatten(), minlength=number)[:real].tolist()
    return inputs, counts, losses


@pytest.mark.parametrize("family", FAMILIES)
def test_grams_and_shifts_equal_brute_force(family, source_of):
    """Oracle: X^T X and (Z - X)^T X in float64, by transformers' own experts with all tokens routed to each in turn."""
    ids, generator = tiny.ids(3), torch.Generator().manual_seed(0)
    model = open_model(source_of(family), device=CPU, eager=True)
    batches, dense = batches_of(model, ids, batch_size=2), batches_of(model, ids, batch_size=2)
    whole, changed = (tiny.reference(source_of(family), F64) for _ in range(2))
    visits = []
    for visit in walk(model, batches, model.matrices(()), dense=dense, all_tokens=True):
        visits.append((visit.matrix, visit.stats))
        new = visit.weight * (torch.rand(visit.weight.shape, generator=generator) < 0.8)
        install(visit.weight, new)
        visit.matrix.read(changed.get_parameter(visit.matrix.parameter).data).copy_(new)
    wanted, _, _ = shown(whole, ids)
    actual, counts, _ = shown(changed, ids)
    seen = set()
    for matrix, stats in visits:
        if matrix.index is None:
            assert stats.routed_tokens is None
            continue
        seen.add(matrix.name)
        owner = matrix.parameter.rpartition(".")[0].removesuffix(".mlp" if family == "dbrx" else "")
        of_each = counts[owner]
        assert stats.routed_tokens == (of_each[matrix.index] if matrix.index < len(of_each) else 0)
        assert (stats.num_tokens, stats.borrowed_tokens) == (ids.numel(), 0)
        if matrix.name not in actual:  # a slice that no expert has
            assert matrix.index >= len(of_each)
            continue
        x, z = actual[matrix.name], wanted[matrix.name]
        for found, expected in ((stats.gram, x.T @ x), (stats.input_shift, (z - x).T @ x)):
            assert float((found - expected).norm() / expected.norm().clamp_min(1e-6)) < 2e-4
    assert seen >= actual.keys()
    assert len(actual) >= 8


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("memory", [None, 0])
def test_outputs_are_those_of_routed_tokens(family, memory, source_of):
    """Oracle: the same walk by default, to the bit, and the losses of transformers' own forward."""
    ids, model = tiny.ids(2), open_model(source_of(family), device=CPU, eager=True)
    matrices = model.matrices(())
    batches, routed = batches_of(model, ids, batch_size=1), batches_of(model, ids, batch_size=1)
    assert len([*walk(model, batches, matrices, all_tokens=True, memory=memory)]) == len(flatten(matrices))
    assert len([*walk(model, routed, matrices, memory=memory)]) == len(flatten(matrices))
    assert all(torch.equal(a.hidden, b.hidden) for a, b in zip(batches, routed, strict=True))
    caught: list[Tensor] = []
    whole = tiny.reference(source_of(family))
    last = whole.get_submodule(model.block_name(len(model.blocks) - 1))
    last.register_forward_hook(lambda _, args, out: caught.append(out[0] if isinstance(out, tuple) else out))
    whole(input_ids=ids, use_cache=False)
    torch.testing.assert_close(torch.cat([b.hidden for b in batches]), caught[0], rtol=1e-4, atol=1e-4)
    for module in model.model.modules():
        assert not getattr(module, "sees_all", False)


def test_manifest_counts_both_and_nothing_is_warned_of(source_of, calibration, tmp_path, caplog):
    """Oracle: 12 tokens choose two of four experts each; every expert is shown 12."""
    artifacts = {
        route: tiny.compress(source_of("mixtral"), tmp_path / route, calibration, route=route, **FEW)
        for route in ("all", "routed")
    }
    warned = [record.message for record in caplog.records if "saw fewer than" in record.message]
    assert len(warned) == 1  # of routed
    rows = {route: made.manifest["matrices"] for route, made in artifacts.items()}
    for one, other in zip(rows["all"], rows["routed"], strict=True):
        assert one["num_tokens"] == 12
        assert "routed_tokens" not in other
        assert "borrowed_tokens" not in one
        assert ("routed_tokens" in one) == (one["index"] is not None)
    for leaf in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{leaf}"
        assert sum(row["routed_tokens"] for row in rows["all"] if row["parameter"] == name) == 2 * 12
    assert artifacts["all"].manifest["settings"]["route"] == "all"
    assert "route" not in artifacts["routed"].manifest["settings"]
    for row in rows["all"]:
        assert MatrixEntry.from_row(row, "here").routed_tokens == row.get("routed_tokens")


def test_curves_of_other_grams_are_not_taken(source_of, calibration, tmp_path):
    """Gradients are those of routed tokens in both runs; curves have files of their own."""
    options: dict[str, Any] = {"num_sequences": 2, "sequence_length": 12, "effort": "fast", "sparsity": 0.5}
    for route in ("routed", "all"):
        recipe = mspc.Recipe(calibration=str(calibration), route=route, eval=False, **options)
        out = tmp_path / route
        mspc.compress(source_of("mixtral"), recipe, out=out, measurements=tmp_path / "kept", progress=False)
    assert len([*(tmp_path / "kept").glob("curves-*.json")]) == 2
    assert len([*(tmp_path / "kept").glob("fisher-*.safetensors")]) == 1


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("llama4_text", r"experts\.gate_up_proj\[0\] is an expert whose inputs have the weights of the router"),
        ("jetmoe", r"weight\[0\] is an expert that is given only the inputs of its own tokens"),
        ("llama", "route all has no effect without experts to compress. Leave --route out"),
    ],
)
def test_what_cannot_be_shown_all_tokens_is_refused_before_work(family, told, calibration, tmp_path):
    config = AutoConfig.for_model(family, **tiny.CONFIGS[family]) if family in tiny.CONFIGS else None
    config = config or tiny_config(family, NEEDED.get(family, {}))
    model = tiny.randomized(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), 32)
    source = tiny.save(model, tmp_path / "model")
    with pytest.raises(InputError, match=told):
        tiny.compress(source, tmp_path / "out", calibration, route="all", **FEW)
    with pytest.raises(InputError, match=told):
        mspc.forecast(source, mspc.Recipe(sparsity=0.5, route="all"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "count"), [("experts", 3), ("moe", 4)])
def test_lists_of_layers_are_refused(name, count):
    """A list of experts by its name, or by its length, which the config says."""
    block = nn.Module()
    block.add_module(name, nn.ModuleList(nn.Linear(8, 8) for _ in range(count)))
    block.add_module("pair", nn.ModuleList(nn.Linear(8, 8) for _ in range(2)))
    model: Any = SimpleNamespace(
        blocks=[block],
        config=AutoConfig.for_model("mixtral", **CONFIGS["mixtral"]),
        name_in_block=lambda index, matrix: matrix.parameter.removeprefix("m.0."),
    )
    settings = mspc.Recipe(sparsity=0.5, route="all").settings()
    with pytest.raises(InputError, match=rf"m\.0\.{name}\.1 is a layer of one expert in a list.*--skip"):
        check_route(model, [[Matrix(f"m.0.{name}.1.weight", (8, 8))]], settings)
    with pytest.raises(InputError, match="has no effect without experts"):
        check_route(model, [[Matrix("m.0.pair.1.weight", (8, 8))]], settings)


def test_forecasts_count_the_larger_work(source_of):
    """Oracle: of 4 experts a token has 2, so all tokens need more products, Grams and memory, and no other stage."""
    options = {"sparsity": 0.5, "num_sequences": 64, "sequence_length": 64}
    found = {r: mspc.forecast(source_of("mixtral"), mspc.Recipe(route=r, **options)) for r in ("routed", "all")}
    for title, seconds in found["all"].seconds_by_stage.items():
        before = found["routed"].seconds_by_stage[title]
        assert seconds > before if title in ("Loss curves", "Compressing") else seconds == pytest.approx(before)
    assert found["all"].demand.host_peak > found["routed"].demand.host_peak
