"""Ten model types of different kinds in whole, images, and tensors of a checkpoint that are several parameters.

`make verify-architectures` tries all types (`architectures.py`, which names the oracles).
"""

import re
import shutil
from pathlib import Path

import architectures
import pytest
import tiny
import torch
import transformers
from families import ACCEPTED, UNMEASURED
from tiny_configs import IMAGE_ID
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import mspc
from mspc.errors import InputError
from mspc.model.open import open_model
from mspc.passes.trial import irregular_layers
from mspc.storage.artifact import ArtifactSource
from mspc.types import flatten

SAMPLE = (
    "gemma3_text",  # windows, tied, scaled embeddings
    "gemma4_text",  # keys and values that blocks share
    "gpt_oss",  # experts with biases, transposed and interleaved
    "deepseek_v3",  # latent attention, experts in groups, a shared one
    "qwen3_next",  # gated delta nets, and experts
    "mamba2",  # no attention
    "jetmoe",  # experts in attention, too, that are given groups of inputs
    "llama4_text",  # experts that are given all tokens, scaled
    "glm_moe_dsa",  # tokens that one block chooses for the next
    "qwen3_vl_moe",  # images, and experts that are transposed in the checkpoint
    "step3p7",  # experts whose gate and up matrices are 3-D tensors of their own
    "kimi_k25",  # a tower whose tensors are several parameters
)


@pytest.mark.parametrize("key", SAMPLE)
def test_a_sample_of_all_kinds_works(key, tmp_path):
    row = architectures.tried(key, tmp_path)
    assert (row["verdict"], row["note"]) == ("works", ""), row.get("trace")


def test_rows_of_3d_tensors_need_version_2(tmp_path):
    """Version 1 would read one expert of each such tensor, and leave out the others."""
    model = open_model(architectures.built("step3p7", tmp_path), device=torch.device("cpu"))
    matrices = flatten(model.matrices((), irregular_layers(model)))
    of_rows = [matrix for matrix in matrices if model.rows_of(matrix)]
    assert of_rows
    assert model.needs_version_2(of_rows)
    assert not model.needs_version_2(matrix for matrix in matrices if matrix.index is None)


def test_no_verdict_of_the_table_is_wrong():
    """Oracle: the mappings of transformers. The target `verify-architectures` fails for types without a verdict."""
    rows = architectures.read_rows(architectures.TABLE)
    assert rows.keys() <= {**architectures.CAUSAL, **architectures.MULTIMODAL}.keys()
    assert sorted(key for key, row in rows.items() if row[0] == "wrong") == []
    assert {key for key, row in rows.items() if row[0] == "not measured"} <= UNMEASURED.keys()
    assert {key: row[0] for key, row in rows.items() if key in SAMPLE} == dict.fromkeys(SAMPLE, "works")


def test_only_faults_that_are_explained_pass():
    """Oracle: the committed table, and rows that are made up."""
    rows, keys = architectures.read_rows(architectures.TABLE), {**architectures.CAUSAL, **architectures.MULTIMODAL}
    assert architectures.unexplained(rows, keys) == []
    assert rows.keys() >= ACCEPTED.keys()
    assert {rows[key][0] for key in ACCEPTED} <= {"not built", "error"}
    made_up = rows | {"llama": ("not built", "", ""), "mixtral": ("error", "", ""), "emu3": ("wrong", "", "")}
    del made_up["gpt2"]
    assert set(architectures.unexplained(made_up, keys)) == {"llama", "mixtral", "emu3", "gpt2"}


def test_a_verdict_that_is_worse_than_before_is_noticed():
    worse = [
        ("works", "in part"), ("works", "refused"), ("works", "error"), ("works", "not built"), ("in part", "wrong"),
        ("refused", "error"), ("error", "wrong"),
    ]  # fmt: skip
    for before, found in worse:
        assert architectures.is_worse(found, before)
        assert not architectures.is_worse(before, found)
    assert not architectures.is_worse("works", "works")


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """Artifacts of models with images, and their sources, by type."""
    made: dict[str, tuple[Path, mspc.Artifact]] = {}

    def get(key: str) -> tuple[Path, mspc.Artifact]:
        if key not in made:
            folder = tmp_path_factory.mktemp(key)
            source = architectures.built(key, folder)
            (source / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
            text = folder / "text.txt"
            text.write_text(tiny.text(2400, seed=1))
            options = {"effort": "fast", "bits": 4, "group_size": 16, "exports": ["dense", "sparse"]}
            made[key] = source, tiny.compress(source, folder / "out", text, **options)
        return made[key]

    return get


FOUR_BITS = {"effort": "fast", "bits": 4, "group_size": 32}
IMAGES = {
    "llava": {"pixel_values": (1, 3, 28, 28)},
    "mistral3": {"pixel_values": (1, 3, 56, 56), "image_sizes": torch.tensor([[56, 56]])},
    "qwen3_vl": {"pixel_values": (16, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 4, 4]])},
}
"""The arguments for one image: shapes of random numbers, and numbers."""


@pytest.mark.parametrize("key", IMAGES)
def test_an_image_gives_the_same_logits_and_its_tower_stays_bit_by_bit(key, compressed):
    """Oracle: the source in transformers, its matrices replaced by hand by those of the artifact."""
    source, artifact = compressed(key)
    dense, sparse = (artifact.path / "exports" / name for name in ("dense", "sparse"))
    expected = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    rows = {row["name"]: row for row in artifact.manifest["matrices"]}
    packed = ArtifactSource(artifact.path)
    for entry in packed.entries:
        expected.get_parameter(f"{entry.name}.weight").data.copy_(packed.matrix(entry).weight)
    given = {
        name: torch.randn(value, generator=torch.Generator().manual_seed(0)) if isinstance(value, tuple) else value
        for name, value in IMAGES[key].items()
    }
    ids = tiny.ids(1)
    ids[0, 3 : 3 + num_image_tokens(expected, given)] = IMAGE_ID
    if key == "qwen3_vl":
        given["mm_token_type_ids"] = (ids == IMAGE_ID).int()
    with torch.no_grad():
        wanted = expected(input_ids=ids, **given).logits
        assert not torch.allclose(wanted, expected(input_ids=tiny.ids(1)).logits)
        for model in (AutoModelForImageTextToText.from_pretrained(dense, dtype=torch.float32), mspc.load(sparse)):
            assert type(model) is type(expected)
            for inputs in ({"input_ids": ids, **given}, {"input_ids": tiny.ids(1)}):
                of_source = expected(**inputs).logits
                architectures.close(model(**inputs).logits, of_source, 1e-3, "logits")
    before, after, stored = tiny.tensors(source), tiny.tensors(dense), tiny.tensors(sparse)
    towers = [name for name in before if name not in {row["tensor"] for row in rows.values()}]
    assert any("vision" in name or "visual" in name for name in towers)
    assert all(torch.equal(before[name], after[name]) and torch.equal(before[name], stored[name]) for name in towers)
    for folder in (artifact.path, dense, sparse):
        assert (folder / "preprocessor_config.json").read_bytes() == (source / "preprocessor_config.json").read_bytes()


def test_formats_of_language_models_are_refused_early(compressed, tmp_path):
    source, artifact = compressed("llava")
    for name in ("gptq", "compressed-tensors", "onnx", "gguf"):
        refused = rf"sees or hears, and {name} would hold its language model alone; export dense or sparse"
        with pytest.raises(InputError, match=refused):
            artifact.export(name, tmp_path / name, progress=False)
        with pytest.raises(InputError, match=refused):
            tiny.compress(source, tmp_path / "out", tmp_path / "none.txt", **FOUR_BITS, exports=[name])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_texts_name_the_class_that_loads_the_model(kind, compressed):
    """Oracle: transformers loads the folder by the one class that a text names."""
    _, artifact = compressed("llava")
    folder = artifact.path / "exports" / kind
    pushed = mspc.push(folder, "me/small", dry_run=True, progress=False)
    own = [(folder / "README.md").read_text()] if kind == "sparse" else []
    for text in (pushed.card, *own):
        (named,) = set(re.findall(r"AutoModel\w+", text))
        assert f"from transformers import {named}" in text
        assert f"model = {named}.from_pretrained(" in text
        assert type(getattr(transformers, named).from_pretrained(folder)) is transformers.LlavaForConditionalGeneration
    assert "README.base.md" not in pushed.files  # the text of an export is no card of the base model


@pytest.mark.parametrize("name", ["gptq", "compressed-tensors"])
def test_packed_formats_refuse_matrices_with_other_names_in_the_checkpoint(name, tmp_path):
    """Oracle: the keys of the file. Loaders would look for `model.language_model.layers.0.self_attn.q_proj.qweight`."""
    source = architectures.built("gemma3", tmp_path)
    assert "model.language_model.layers.0.self_attn.q_proj.weight" not in tiny.tensors(source)
    with pytest.raises(InputError, match=rf"q_proj: the checkpoint has another name .* loader of {name} would find"):
        tiny.compress(source, tmp_path / "out", tmp_path / "none.txt", **FOUR_BITS, exports=[name])


def num_image_tokens(model: torch.nn.Module, given: dict[str, torch.Tensor]) -> int:
    with torch.no_grad():
        features = model.get_image_features(**given)
    found = getattr(features, "pooler_output", features)
    return sum(len(part.flatten(0, -2)) for part in found) if isinstance(found, list | tuple) else found[..., 0].numel()


def test_blocks_are_those_of_the_text_model_even_where_a_tower_is_larger(tmp_path):
    """Oracle: the config, in which the tower has four times as many layers."""
    config = architectures.tiny_config("llava", {"vision_config": {"num_hidden_layers": 8, "intermediate_size": 512}})
    model = AutoModelForImageTextToText.from_config(config)
    found = open_model(tiny.save(model, tmp_path / "model"), device=torch.device("cpu"))
    assert found.blocks_name == "model.language_model.layers"


def test_parts_of_a_tensor_are_read_and_refused_with_the_remedy(tmp_path):
    """Oracles: transformers' own model; the remedy, which is tried."""
    sizes = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    model = AutoModelForCausalLM.from_config(architectures.tiny_config("lara_mini", sizes))
    source = tiny.save(architectures.randomized(model), tmp_path / "model")
    oracle = architectures.whole("lara_mini", source)
    with open_model(source, device=torch.device("cpu")).whole() as model, torch.no_grad():
        architectures.close(model(tiny.ids(2)).logits, oracle(tiny.ids(2)).logits, 1e-5, "logits")
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(2400, seed=1))
    options = {"effort": "fast"}
    with pytest.raises(InputError, match=r"in_proj_qkv.* is one of several parts of .*in_proj.*save_original_format"):
        tiny.compress(source, tmp_path / "out", text, **options)
    again = tmp_path / "again"
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(again, save_original_format=False)
    for file in source.glob("*token*"):
        shutil.copy(file, again)
    artifact = tiny.compress(again, tmp_path / "out", text, **options)
    assert any(re.search(r"in_proj_qkv$", row["name"]) for row in artifact.manifest["matrices"])


def test_rows_in_another_order_are_refused_with_the_remedy(tmp_path):
    """Oracle: the remedy, which is tried. The checkpoint has rows of gate and up matrices in turns."""
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(2400, seed=1))
    source = architectures.built("inkling2_loop_text", tmp_path)
    with pytest.raises(
        InputError, match=r"experts\.gate_up_proj has other rows than .*w13.*save_original_format=False"
    ):
        tiny.compress(source, tmp_path / "out", text, effort="fast")
    again = architectures.built("inkling2_loop_text", tmp_path / "again", save_original_format=False)
    artifact = tiny.compress(again, tmp_path / "out", text, effort="fast")
    assert any("experts.gate_up_proj[" in row["name"] for row in artifact.manifest["matrices"])


@pytest.mark.parametrize("key", ["glmga", "qwen3_omni_moe_thinker"])
def test_artifacts_of_classes_with_habits_of_their_own_are_loaded(key, tmp_path):
    """Oracle: transformers, on the dense export.

    The class of GLM-GA has configs of another type as well, and that of Qwen3-Omni fills experts when it is loaded.
    """
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(2400, seed=1))
    source = architectures.built(key, tmp_path)
    artifact = tiny.compress(source, tmp_path / "out", text, effort="fast", exports=["dense", "sparse"])
    dense, sparse = (artifact.path / "exports" / name for name in ("dense", "sparse"))
    expected = architectures.whole(key, dense, None)(input_ids=tiny.ids(2), use_cache=False).logits
    for folder in (artifact.path, sparse):
        architectures.close(
            mspc.load(folder)(input_ids=tiny.ids(2), use_cache=False).logits, expected, 1e-3, folder.name
        )


def test_heads_without_a_rotated_part_are_taken(tmp_path):
    """Oracle: transformers' own model. Its head_dim, the size of that part, is 0."""
    source = architectures.built("glm5_next", tmp_path)
    expected = architectures.whole("glm5_next", source)(tiny.ids(2), use_cache=False).logits
    with open_model(source, device=torch.device("cpu")).whole() as model, torch.no_grad():
        assert model.config.get_text_config().head_dim == 0
        architectures.close(model(tiny.ids(2), use_cache=False).logits, expected, 1e-4, "logits")


def test_layers_that_text_does_not_use_stay_dense_in_a_line_of_their_own(tmp_path, caplog):
    """Oracles: hooks on transformers' own model, and the tensors of the source, bit by bit."""
    source = architectures.built("bart", tmp_path)
    oracle = architectures.whole("bart", source)
    linear = [name for name, module in oracle.named_modules() if isinstance(module, torch.nn.Linear)]
    called = set(tiny.inputs_of(oracle, tiny.ids(1), linear))
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(2400, seed=1))
    with caplog.at_level("INFO", logger="mspc"):
        artifact = tiny.compress(source, tmp_path / "out", text, effort="fast", exports=["dense"])
    names = {row["name"] for row in artifact.manifest["matrices"]}
    inside = {name for name in linear if ".layers." in name}
    assert names == inside & called
    unused = inside - called
    assert {name.rpartition(".")[2] for name in unused} == {"k_proj", "v_proj", "q_proj", "out_proj"}
    (line,) = [record.getMessage() for record in caplog.records if "text alone does not use" in record.getMessage()]
    assert "encoder_attn.k_proj, encoder_attn.v_proj, encoder_attn.q_proj, encoder_attn.out_proj" in line
    of_blocks = sum(parameter.numel() for name, parameter in oracle.named_parameters() if ".layers." in name)
    share = sum(oracle.get_parameter(f"{name}.weight").numel() for name in unused) / of_blocks
    assert f"They stay dense, {share:.1%} of the weights of the blocks." in line
    before, after = tiny.tensors(source), tiny.tensors(artifact.path / "exports" / "dense")
    assert all(torch.equal(before[f"{name}.weight"], after[f"{name}.weight"]) for name in unused)
