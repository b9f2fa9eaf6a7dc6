"""Models that mspc cannot take are refused by name before any work; those with other layers than linear ones work."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3OmniMoeForConditionalGeneration

import mspc
from mspc.bench.request import Request
from mspc.bench.run import bench
from mspc.errors import InputError
from mspc.storage.checkpoint import SINGLE


def changed(source: Path, folder: Path, **entries: Any) -> Path:
    """A copy of a model with other entries in its config.json; an entry of ... is deleted."""
    folder.mkdir()
    for path in source.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path)
    config = json.loads((source / "config.json").read_text()) | entries
    kept = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def rewritten(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a model whose tensors are changed."""
    copied = changed(source, folder)
    tensors = load_file(source / SINGLE)
    change(tensors)
    (copied / SINGLE).unlink()
    save_file(tensors, copied / SINGLE, {"format": "pt"})
    return copied


def refusals(model: Path, calibration: Path, out: Path) -> list[str]:
    """The messages of compress, evaluate and load about a model; compress leaves nothing."""
    before = sorted(out.parent.iterdir())
    verbs: list[Callable[[], object]] = [
        lambda: tiny.compress(model, out, calibration),
        lambda: mspc.evaluate(model, str(calibration), sequence_length=16, max_windows=2, device="cpu", progress=False),
        lambda: mspc.load(model, device="cpu"),
    ]
    told = []
    for verb in verbs:
        with pytest.raises(InputError) as caught:
            verb()
        told.append(str(caught.value))
    assert sorted(out.parent.iterdir()) == before
    return told


QUANTIZED = [
    {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float16"},
    {"quant_method": "gptq", "bits": 4},
    {"bits": 4, "group_size": 128},
    {},
    "int4",
    ["gptq"],
    7,
]


@pytest.mark.parametrize("config", QUANTIZED, ids=str)
@pytest.mark.parametrize("where", ["quantization_config", "compression_config", "text_config"])
def test_a_config_that_describes_quantized_weights_is_refused(where, config, llama, calibration, tmp_path):
    entries = {where: {"quantization_config": config} if where == "text_config" else config}
    for told in refusals(changed(llama, tmp_path / "model", **entries), calibration, tmp_path / "out"):
        assert "is not quantized" in told
        assert "gptq' )" in told or "quantized already" in told or "names no quant_method" in told


def test_no_quantization_at_all_is_none(llama, calibration, tmp_path):
    model = changed(llama, tmp_path / "model", quantization_config=None)
    assert mspc.evaluate(model, str(calibration), sequence_length=16, max_windows=2, progress=False).perplexity > 0


OTHER_TASKS = {
    "t5": {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8},
    "vit": {"hidden_size": 32},
    "whisper": {},
    "bart": {},
    "clip": {},
    "bert": {},
    "roberta": {},
    "electra": {},
}


@pytest.mark.parametrize("family", OTHER_TASKS)
def test_other_kinds_of_models_are_refused_with_what_is_supported(family, llama, calibration, tmp_path):
    """The weights are not reached."""
    AutoConfig.for_model(family, **OTHER_TASKS[family]).save_pretrained(tmp_path / family)
    for name in (SINGLE, "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / family / name).symlink_to(llama / name)
    for told in refusals(tmp_path / family, calibration, tmp_path / "out"):
        assert f"is a {family} model" in told
        assert "Llama, Qwen, Mistral" in told
        assert len(told) < 600


def test_a_frame_around_models_is_refused_with_the_one_to_give(llama, calibration, tmp_path):
    """Oracle: the class, whose forward is that of every module of torch."""
    family = "qwen3_omni_moe"
    assert Qwen3OmniMoeForConditionalGeneration.forward is torch.nn.Module.forward
    AutoConfig.for_model(family, enable_audio_output=False).save_pretrained(tmp_path / family)
    for name in (SINGLE, "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / family / name).symlink_to(llama / name)
    for told in refusals(tmp_path / family, calibration, tmp_path / "out"):
        assert "no forward pass of its own. Save its qwen3_omni_moe_thinker to a folder" in told


TASKS = (
    "LlamaForSequenceClassification", "LlamaForTokenClassification", "BertForMaskedLM",
    "ShieldGemma2ForImageClassification",
)  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_a_head_for_another_task_is_refused(task, llama, calibration, tmp_path):
    model = changed(llama, tmp_path / "model", architectures=[task])
    assert all("predicts no next token" in told for told in refusals(model, calibration, tmp_path / "out"))


SIZES = {
    "hidden_size": (64, 48, 10**12, -1, 0),
    "intermediate_size": (32, 128, 10**15),
    "num_hidden_layers": (0, 1, 3, 2**40),
    "num_attention_heads": (2, 3, 8, 10**9),
    "num_key_value_heads": (1, 4, 10**9),
    "vocab_size": (100, 300, 2**50),
    "head_dim": (4, 16, 2**40),
}


@pytest.mark.parametrize(("name", "size"), [(name, size) for name, sizes in SIZES.items() for size in sizes])
def test_sizes_that_do_not_fit_the_weights_are_named(name, size, llama, calibration, tmp_path):
    changes = {name: size} if name in ("head_dim", "num_hidden_layers") else {name: size, "head_dim": 8}
    model = changed(llama, tmp_path / "model", **changes)
    with pytest.raises(InputError) as caught:
        bench(
            Request((str(model),), batches=(1,), contexts=(8,), prefills=(8,), repeats=1, device="cpu"), progress=False
        )
    for told in (str(caught.value), *refusals(model, calibration, tmp_path / "out")):
        assert "config.json" in told or (name == "vocab_size" and f"the model has {size} embeddings" in told)
        assert len(told) < 600
        if name == "num_hidden_layers" and size in (1, 3):
            assert "has 2 blocks" in told
            assert f"by config.json the model has {size}" in told


def test_surplus_blocks_are_refused_in_artifacts_and_exports_too(artifact_of, calibration, tmp_path):
    artifact = artifact_of("llama", bits=4)
    sparse = artifact.export("sparse", tmp_path / "sparse", progress=False)
    for path in (artifact.path, sparse):
        model = changed(path, tmp_path / f"{path.name}-changed", num_hidden_layers=1)
        for verb in (lambda m: mspc.evaluate(m, str(calibration), sequence_length=16, progress=False), mspc.load):
            with pytest.raises(InputError, match=r"has 2 blocks and holds model\.layers\.1\..*the model has 1 blocks"):
                verb(model)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.complex64])
def test_weights_that_need_a_scale_are_refused_by_name(dtype, llama, calibration, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    model = rewritten(llama, tmp_path / "model", lambda found: found.update({name: found[name].to(dtype)}))
    shown = str(dtype).removeprefix("torch.")
    assert all(f"{name} is stored as {shown}" in told for told in refusals(model, calibration, tmp_path / "out"))


@pytest.mark.parametrize("some", ["", "layers.0.mlp.up_proj", "layers.1.self_attn.q_proj"])
def test_float64_is_evaluated_but_not_compressed(some, llama, calibration, tmp_path):
    """Oracle: transformers on the same folder."""

    def widen(found: dict[str, torch.Tensor]) -> None:
        found.update({name: tensor.double() for name, tensor in found.items() if some in name})

    model = rewritten(llama, tmp_path / "model", widen)
    tiny.agreed_perplexity(model, text_of(tmp_path))
    with pytest.raises(InputError, match=r"stored as float64, but mspc .* in float32 first: from_pretrained"):
        tiny.compress(model, tmp_path / "out", calibration)
    assert not (tmp_path / "out").exists()


def test_float64_elsewhere_stays(llama, calibration, tmp_path):
    """Oracle: transformers on the dense export."""
    name = "model.layers.0.input_layernorm.weight"
    model = rewritten(llama, tmp_path / "model", lambda found: found.update({name: found[name].double()}))
    artifact = tiny.compress(model, tmp_path / "out", calibration)
    dense = artifact.export("dense", tmp_path / "dense", progress=False)
    assert tiny.tensors(dense)[name].dtype == torch.float64
    tiny.agreed_perplexity(artifact.path, text_of(tmp_path), dense)


def text_of(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text(tiny.text(20 * tiny.LENGTH, seed=2))
    return path


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_weights_that_are_no_numbers_are_named_by_eval(name, value, llama, calibration, tmp_path):
    model = rewritten(llama, tmp_path / "model", lambda found: found[name][:, 1].fill_(value))
    with pytest.raises(InputError, match=rf"{name} contains NaN or infinity"):
        mspc.evaluate(model, str(calibration), sequence_length=16, progress=False)


def test_a_loss_that_is_too_large_is_an_infinite_perplexity(llama, calibration, tmp_path):
    """Oracle: exp of the mean loss, which is beyond a float."""
    model = rewritten(llama, tmp_path / "model", lambda found: found["lm_head.weight"].mul_(1e5))
    for measured in (model, mspc.load(model, "cpu")):
        result = mspc.evaluate(measured, str(calibration), sequence_length=16, max_windows=4, progress=False)
        assert result.perplexity == float("inf")
        assert 709.8 < result.nll < float("inf")


SMALL = {**tiny.CONFIGS["llama"], "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
LINEAR_ATTENTION = {
    "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
HYBRIDS = {
    "qwen3_5_text": (LINEAR_ATTENTION, "linear_attn.conv1d.weight"),
    "mamba": ({"state_size": 8}, "mixer.A_log, mixer.conv1d.weight, mixer.dt_proj.weight"),
    "mamba2": ({"state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 1}, "mixer.conv1d.weight"),
    "rwkv": ({"attention_hidden_size": 64}, None),
    "recurrent_gemma": ({"head_dim": 16, "lru_width": 64, "num_hidden_layers": 3}, "conv_1d.weight"),
    "bamba": ({"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "attn_layer_indices": [1]}, "mamba.conv1d"),
    "openai-gpt": ({"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}, None),
    "xlstm": ({"num_heads": 4}, None),
}
"""Changes to the config, and what stays dense."""


@pytest.mark.parametrize("family", HYBRIDS)
def test_hybrids_and_states_are_compressed_with_the_default_options(family, calibration, tmp_path, caplog):
    """Oracle: transformers on the dense export; the note has the share, and all that it names is as it was."""
    changes, noted = HYBRIDS[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():  # gates begin so, and then what they gate can go at no cost
                parameter.normal_(std=0.3)
    source = tiny.save(model, tmp_path / "model")
    with caplog.at_level("INFO", "mspc"):
        artifact = tiny.compress(source, tmp_path / "out", calibration, effort="fast", eval=True)
    assert artifact.manifest["evaluation"]["divergence"]["mean"] > 0
    notes = [line for line in caplog.messages if "stay dense" in line]
    assert bool(notes) == bool(noted)
    if noted:
        assert noted in notes[0]
        assert f"{dense_share(model, artifact):.1%} of the weights" in notes[0]
    dense = artifact.export("dense", tmp_path / "dense", verify=False, progress=False)
    tiny.agreed_perplexity(artifact.path, text_of(tmp_path), dense)
    before, after = tiny.tensors(source), tiny.tensors(dense)
    compressed = {row["tensor"] for row in artifact.manifest["matrices"]}
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == compressed


def dense_share(model: torch.nn.Module, artifact: mspc.Artifact) -> float:
    """Share of the weights of the blocks that no row of the manifest has."""
    rows = artifact.manifest["matrices"]
    blocks = rows[0]["name"].split(".0.")[0]
    whole = sum(parameter.numel() for parameter in model.get_submodule(blocks).parameters())
    return 1 - sum(row["shape"][0] * row["shape"][1] for row in rows) / whole


def test_routers_stay_dense(calibration, tmp_path):
    """Jamba routes by a plain linear layer."""
    torch.manual_seed(0)
    changes = {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4}
    config = AutoConfig.for_model("jamba", **SMALL | changes, use_mamba_kernels=False)
    source = tiny.save(AutoModelForCausalLM.from_config(config), tmp_path / "model")
    artifact = tiny.compress(source, tmp_path / "out", calibration, effort="fast")
    names = {row["name"].rpartition(".")[2] for row in artifact.manifest["matrices"]}
    assert "router" not in names
    assert {"in_proj", "q_proj", "gate_proj", "gate_up_proj[3]"} <= names


PER_LAYER = {
    "head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 260, "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
}
WRAPPERS = {
    "gemma3": {"text_config": SMALL | {"head_dim": 16}, "vision_config": VISION | {"patch_size": 14}},
    "gemma4": {"text_config": SMALL | PER_LAYER, "vision_config": VISION | {"patch_size": 14}},
    "gemma4_text": SMALL | PER_LAYER,
    "gemma4_text, shared keys and values": SMALL
    | PER_LAYER
    | {"num_hidden_layers": 6, "num_kv_shared_layers": 2, "layer_types": PER_LAYER["layer_types"] * 3},
    "falcon, one block that returns a tuple": {
        "vocab_size": 260,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    },
    "qwen3_5": {"text_config": SMALL | LINEAR_ATTENTION, "vision_config": VISION},
}


@pytest.mark.parametrize("family", WRAPPERS)
def test_configs_that_are_nested_or_differ_from_layer_to_layer(family, calibration, tmp_path):
    """Oracle: transformers on the dense export."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.partition(",")[0], **WRAPPERS[family]))
    source, text = tiny.save(model, tmp_path / "model"), text_of(tmp_path)
    artifact = tiny.compress(source, tmp_path / "out", calibration, effort="fast")
    dense = artifact.export("dense", tmp_path / "dense", verify=False, progress=False)
    found = tiny.agreed_perplexity(artifact.path, text, dense)
    options = {"sequence_length": tiny.LENGTH, "device": "cpu", "progress": False}
    for measured in (artifact.path, mspc.load(artifact.path, "cpu")):
        result = mspc.evaluate(measured, str(text), against=source, tokenizer=tiny.byte_tokenizer(), **options)
        assert result.perplexity == pytest.approx(found, rel=1e-5)
        assert 0 < result.divergence < 1
