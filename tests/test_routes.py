"""Models that run their blocks otherwise than one after the other: right by the whole model, or refused by name.

Oracles: hooks and one autograd pass on transformers' own model; models made by hand that break one rule each.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_walk import assert_gram
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import mspc
from mspc.errors import InputError
from mspc.model.matrices import LINEAR, is_plain
from mspc.model.open import open_model
from mspc.model.streamed import StreamedModel
from mspc.passes import perplexity
from mspc.passes.blocks import batches_of
from mspc.passes.gradients import OutputFisher, SquaredGradient, reverse_walk
from mspc.passes.trial import irregular_layers
from mspc.passes.walk import walk
from mspc.planning.without_gradient import with_layer_errors, with_medians
from mspc.text.tokens import calibration_tokens

CPU = torch.device("cpu")
GATED = tiny.CONFIGS["llama"] | {"head_dim": 16, "num_hidden_layers": 4, "sliding_window": 8}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2}
SHARED = {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": 260, "hidden_size_per_layer_input": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma4_text": GATED | MIXED | SHARED | {"global_head_dim": 16, "num_global_key_value_heads": 2},
    "gemma3n_text": GATED | MIXED | SHARED | {"laurel_rank": 16, "activation_sparsity_pattern": [0.5] + [0.0] * 3},
    "dory": GATED | MIXED | {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "xlm": {"vocab_size": 260, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "causal": True, "pad_token_id": 0},
    "prophetnet": {
        "vocab_size": 260, "hidden_size": 32, "decoder_ffn_dim": 64, "num_decoder_layers": 2, "pad_token_id": 0,
        "num_decoder_attention_heads": 4, "is_decoder": True, "is_encoder_decoder": False, "bos_token_id": 0,
        "add_cross_attention": False, "eos_token_id": 0,
    },
    "blt": {"patch_in_forward": False, "encoder_hash_byte_group_vocab": 50, "vocab_size": 260} | {
        f"{part}_config": {**GATED, "head_dim": 8, "num_hidden_layers": 2, "hidden_size_global": 64, **changes}
        for part, changes in (("encoder", {}), ("decoder", {}), ("patcher", {}), ("global", {"hidden_size": 64}))
    },
    "qwen2_moe": GATED | EXPERTS | {"shared_expert_intermediate_size": 32, "num_hidden_layers": 2},
    "deepseek_v4": GATED | {
        "num_hidden_layers": 2, "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["moe", "moe"], "n_routed_experts": 4, "num_experts_per_tok": 2, "o_groups": 2,
        "moe_intermediate_size": 32, "q_lora_rank": 32, "o_lora_rank": 32, "index_n_heads": 2, "index_head_dim": 32,
        "index_topk": 8, "qk_rope_head_dim": 8, "partial_rotary_factor": 0.5, "n_shared_experts": 1, "hc_mult": 2,
        "num_key_value_heads": 1,
        "compress_rates": {"heavily_compressed_attention": 8, "compressed_sparse_attention": 4},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def source_of(tmp_path_factory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def source(family: str) -> Path:
        if family not in made:
            config = AutoConfig.for_model(family, **CONFIGS[family])
            model = tiny.randomized(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), size=32)
            made[family] = tiny.save(model, tmp_path_factory.mktemp(family) / "model")
        return made[family]

    return source


def opened(folder: Path) -> StreamedModel:
    return open_model(folder, device=CPU, eager=True)


SHARING = ["gemma4_text", "gemma3n_text"]


@pytest.mark.parametrize("family", SHARING)
def test_grams_and_perplexity_with_shared_keys_and_several_hidden_states(family, source_of):
    model, ids = opened(source_of(family)), tiny.ids(3)
    matrices = model.matrices((), irregular_layers(model))
    whole = tiny.reference(source_of(family))
    expected = tiny.inputs_of(whole, ids, [matrix.name for of_block in matrices for matrix in of_block])
    visits = list(walk(model, batches_of(model, ids, batch_size=2), matrices))
    assert {visit.matrix.name for visit in visits} == expected.keys()
    for visit in visits:
        assert_gram(visit, expected[visit.matrix.name])
    with torch.no_grad():
        loss = float(tiny.losses(whole, ids).double().mean())
    *_, found = perplexity.measure(model, ids)
    assert found.nll == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("family", SHARING)
def test_gradients_pass_what_blocks_share(family, source_of):
    """Mean squares at the outputs, without the first token of each sequence, and at the weights."""
    model, ids = opened(source_of(family)), tiny.ids(2)
    matrices = model.matrices((), irregular_layers(model))
    flat = [matrix for of_block in matrices for matrix in of_block]
    whole = tiny.reference(source_of(family))
    weights = [whole.get_parameter(matrix.parameter).requires_grad_(True) for matrix in flat]
    outputs: dict[str, Tensor] = {}
    for matrix in flat:
        module = whole.get_submodule(matrix.name)
        module.register_forward_hook(lambda _, args, output, name=matrix.name: outputs.update({name: output}))
    loss = tiny.losses(whole, ids).sum()
    at_outputs = torch.autograd.grad(loss, [outputs[matrix.name] for matrix in flat], retain_graph=True)
    traces = {s.matrix.name: float(s.value.diagonal(dim1=-2, dim2=-1).sum()) for s in reverse_walk(
        model, ids, matrices, OutputFisher()
    )}  # fmt: skip
    for matrix, gradient in zip(flat, at_outputs, strict=True):
        trace = float(gradient[:, 1:].double().square().sum(-1).mean())
        assert traces[matrix.name] == pytest.approx(trace, rel=1e-4), matrix.name
    single = torch.autograd.grad(tiny.losses(whole, ids[:1]).mean(), weights)
    squares = {s.matrix.name: float(s.value) for s in reverse_walk(model, ids[:1], matrices, SquaredGradient())}
    for matrix, gradient in zip(flat, single, strict=True):
        assert squares[matrix.name] == pytest.approx(float(gradient.double().square().mean()), rel=1e-4), matrix.name


@pytest.mark.parametrize(
    ("family", "named"),
    [
        ("dory", "it runs model.layers.1, model.layers.2 more than once"),
        ("xlm", "layers outside of transformer.ffns run there, such as transformer.attentions.1.q_lin"),
        ("prophetnet", "prophetnet.decoder.layers take hidden states (3, 21, 32) for tokens (3, 7)"),
        (
            "blt",
            "model.global_transformer.layers take hidden states (3, 8, 64) for tokens (3, 7), after other layers such",
        ),
    ],
)
def test_other_routes_are_refused_by_name(family, named, source_of, calibration, tmp_path):
    """Dory runs blocks in a loop, XLM has two lists, ProphetNet has n-grams in hidden states, BLT has towers."""
    source = source_of(family)
    for verb in (
        lambda: batches_of(opened(source), tiny.ids(2)),
        lambda: tiny.compress(source, tmp_path / "out", calibration),
    ):
        with pytest.raises(InputError, match=r"cannot be run one block at a time.*" + re.escape(named)):
            verb()
    assert not (tmp_path / "out").exists()


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Grouped(nn.Linear):
    """Two groups of inputs, each with half of the outputs."""

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weight.view(2, -1, self.in_features)
        return torch.cat([x[..., i, :] @ weights[i].T for i in range(2)], -1)


class Wrapped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.view_as(self.weight), self.bias)


@pytest.mark.parametrize(
    ("kind", "plain"), [(nn.Linear, True), (Wrapped, True), (Scaled, False), (Grouped, False)]
)  # fmt: skip
@pytest.mark.parametrize("bias", [False, True])
def test_linear_layers_are_known_by_what_they_compute(kind, plain, bias):
    with torch.device("meta"):
        layer = kind(16, 8, bias=bias)
    assert is_plain(layer) == plain
    assert layer.weight.is_meta


def test_matrices_of_few_inputs_stay_dense(source_of):
    """Oracle: the shapes of transformers' own model. A group of 16 weights would not fit in a row of 4."""
    model, whole = opened(source_of("gemma3n_text")), tiny.reference(source_of("gemma3n_text"))
    few = {name for name, p in whole.named_parameters() if ".layers." in name and p.ndim == 2 and p.shape[1] < 8}
    irregular = irregular_layers(model)
    blocks = model.sorted_blocks((), irregular)
    assert few
    assert few <= {f"{model.block_name(block.index)}.{name}" for block in blocks for name in block.others}
    assert few.isdisjoint(matrix.parameter for of_block in model.matrices((), irregular) for matrix in of_block)


def said_dense(model: StreamedModel, irregular: set[str]) -> set[str]:
    """The linear layers that a note names."""
    blocks = model.sorted_blocks((), irregular)
    return set(model.route.outside) | {
        f"{model.block_name(block.index)}.{name}".removesuffix(".weight")
        for block in blocks
        for name in (*block.others, *block.selectors, *block.unread)
    }


@pytest.mark.parametrize("family", [*SHARING, "qwen2_moe", "deepseek_v4"])
def test_every_linear_layer_is_compressed_or_said_to_be_dense(family, source_of):
    """Oracle: the modules of transformers' model, and the calls of one forward pass."""
    model = opened(source_of(family))
    irregular = irregular_layers(model)
    blocks = model.sorted_blocks((), irregular)
    compressed = {matrix.name for block in blocks for matrix in block.matrices}
    whole = tiny.reference(source_of(family))
    head = whole.get_output_embeddings()
    linear = {
        name for name, module in whole.named_modules() if isinstance(module, LINEAR) and module is not head
    }  # fmt: skip
    assert linear - compressed - said_dense(model, irregular) == set()
    assert compressed & said_dense(model, irregular) == set()
    assert compressed
    dense = {re.sub(r".*\.layers\.\d+\.", "", name) for name in linear - compressed}
    assert (
        dense
        >= {
            "gemma4_text": {"model.per_layer_model_projection"},
            "gemma3n_text": {"altup.modality_router", "model.altup_projections.0"},
            "qwen2_moe": {"mlp.shared_expert_gate"},
            "deepseek_v4": {"self_attn.o_a_proj"},
        }[family]
    )


def test_selectors_are_compressed_if_they_are_asked_for(source_of, calibration, tmp_path, caplog):
    """Oracle: the tensors of the source. `--skip` wins, and what names no selector is refused."""
    source = source_of("qwen2_moe")
    options: dict[str, Any] = {"effort": "fast", "skip": ("experts",)}
    gates = {f"model.layers.{block}.mlp.shared_expert_gate.weight" for block in (0, 1)}
    before = tiny.tensors(source)
    for include, skip in (((), ()), (("shared_expert_gate",), ()), (("shared_expert_gate",), (r"\.0\..*gate$",))):
        caplog.clear()
        with caplog.at_level("INFO", "mspc"):
            artifact = tiny.compress(source, tmp_path / "out", calibration, **options | {
                "include": include, "skip": ("experts", *skip),
            })  # fmt: skip
        after = tiny.tensors(artifact.export("dense", tmp_path / "dense", progress=False, verify=False))
        changed = {key for key in gates if not torch.equal(before[key], after[key])}
        assert changed == ({key for key in gates if ".1." in key or not skip} if include else set())
        noted = "of the weights of the blocks: mlp.shared_expert_gate. --include compresses them." in caplog.text
        assert noted == (not include)
        assert artifact.manifest["settings"].get("include", []) == list(include)
        for folder in ("out", "dense"):
            shutil.rmtree(tmp_path / folder)
    for changes, message in (
        (
            {"include": ("q_proj",)},
            r"--include q_proj matches no linear layer of a router.*, such as model\.layers\.0\.mlp\.shared_expert_g",
        ),
        (
            {"include": ("expert_gate",), "only": ("q_proj",)},
            r"--include expert_gate matches no linear layer of a router.*--only win over",
        ),
        ({"only": ("expert_gate",)}, r"--only expert_gate matches no matrix .* need --include"),
    ):
        with pytest.raises(InputError, match=message):
            tiny.compress(source, tmp_path / "out", calibration, **options | changes)


def test_matrices_without_a_gradient_are_said_and_get_the_error_of_their_layer(
    llama, calibration, tmp_path, monkeypatch, caplog
):
    """Oracle: identity factors by hand. A gate that no gradient passes, as that of an indexer."""

    def forward(self: LlamaMLP, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x) * self.gate_proj(x).detach())

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    names = [f"model.layers.{block}.mlp.gate_proj" for block in (0, 1)]
    manifest = tiny.compress(llama, tmp_path / "out", calibration).manifest
    assert manifest["allocation"]["without_gradient"] == names
    assert f"the loss has no gradient for {', '.join(names)}." in caplog.text
    rows = {row["name"]: row for row in manifest["matrices"]}
    assert all(0 < rows[name]["sparsity"] < 1 and rows[name]["sensitivity"] > 0 for name in names)
    fisher = {"a": torch.diag_embed(torch.full((1, 4), 3.0)), "b": torch.ones(2, 2, 2), "c": torch.zeros(2, 3, 3)}
    found = with_layer_errors(fisher, {"c"})
    assert torch.equal(found["c"], 2 * torch.eye(3).expand(2, 3, 3))
    assert found["a"] is fisher["a"]
    assert with_medians({"a": 1.0, "b": 3.0, "c": 0.0}, "fisher") == ({"a": 1.0, "b": 3.0, "c": 2.0}, ["c"])
    assert with_medians({"a": 1.0, "c": 0.0}, "outliers")[1] == []


@pytest.mark.parametrize("family", SHARING)
def test_recovery_of_blocks_that_share_is_refused_before_any_work(family, source_of, calibration, tmp_path):
    with pytest.raises(
        InputError,
        match="recover: blocks of Gemma.* share keys and values, hand states to the next one, or pass several hidden",
    ):
        tiny.compress(source_of(family), tmp_path / "out", calibration, effort="fast", recover=2)
    assert not (tmp_path / "out").exists()


def test_recovery_in_memory_of_several_hidden_states_is_refused(source_of, calibration):
    model, dense = (tiny.reference(source_of("gemma3n_text")) for _ in range(2))
    model.get_parameter("model.layers.0.mlp.up_proj.weight")[:, ::2] = 0
    with pytest.raises(InputError, match=r"recover: blocks of Gemma3nForCausalLM pass hidden states \(4, 4, 16, 32\)"):
        mspc.recover(model, dense, str(calibration), tokenizer=tiny.byte_tokenizer(), sequence_length=16, steps=1)


@pytest.mark.parametrize("family", SHARING)
def test_an_artifact_of_blocks_that_share(family, source_of, calibration, tmp_path):
    """Oracle: transformers on the dense export, and on hooked inputs of a model whose earlier matrices are replaced."""
    source = source_of(family)
    artifact = tiny.compress(source, tmp_path / "out", calibration, num_sequences=8)
    dense = artifact.export("dense", tmp_path / "dense", progress=False)
    (tmp_path / "text.txt").write_text(tiny.text(20 * tiny.LENGTH, seed=2))
    tiny.agreed_perplexity(artifact.path, tmp_path / "text.txt", dense)
    whole, result = tiny.reference(source), tiny.reference(dense)
    ids = calibration_tokens(tiny.byte_tokenizer(), str(calibration), 8, tiny.LENGTH, seed=0).ids
    for row in artifact.manifest["matrices"]:
        weight, solved = whole.get_submodule(row["name"]).weight, result.get_submodule(row["name"]).weight
        inputs = tiny.inputs_of(whole, ids, [row["name"]])[row["name"]]
        error = float((inputs @ (weight - solved).T).square().sum() / (inputs @ weight.T).square().sum())
        assert row["output_error"] == pytest.approx(error, rel=1e-3, abs=1e-6), row["name"]
        weight.copy_(solved)
