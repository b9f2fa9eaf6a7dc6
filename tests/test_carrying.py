"""All that belongs to a model travels to the artifact and to each export. Oracle: the loaders of transformers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    GenerationConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)  # fmt: skip

import mspc
from exporters.formats import FORMATS
from mspc.errors import InputError
from mspc.storage.carrying import belongs, carry
from mspc.storage.checkpoint import INDEX
from mspc.storage.config_json import corrected, with_dtype
from mspc.storage.manifest import EXPORT_MANIFEST, MANIFEST

TRAVEL = (
    "LICENSE", "NOTICE", "USE_POLICY.md", "README.md", "README.pt.md", "images/plot.png", "images/a plot (1).svg",
    "additional_chat_templates/tool_use.jinja", "qwen.tiktoken", "vocab.bpe", "tekken.json",
    "spiece.model", "sentencepiece.bpe.model", "merges.txt", "vocab/vocabulary.bin", "tokenizer.bin", "dictionary.bin",
    "image_tokenizer/tokenizer.model", "preprocessor_config.json", "video_preprocessor_config.json",
    "speaker_embeddings/en_0.npy", "mel_filters.npz", "modeling_own.py", "tokenization_own.py",
    "custom_generate/generate.py", "original/params.json", "original/tokenizer.model", "sub/plan.json", "eval.csv",
    "modules.json", "1_Pooling/config.json", "weird name\nwith a line.txt", "\udcff.txt", "ünïcödé 模型.txt",
    "[a-b]*?.json", "no_suffix", "-rf", "n" * 251 + ".txt",
)  # fmt: skip
STAY = (
    "model-00001-of-00002.safetensors", "old/model.safetensors", "MODEL.SAFETENSORS", "model.safetensors.bak",
    "pytorch_model.bin", "pytorch_model-00001-of-00003.bin", "sub/pytorch_model.bin", "pytorch_model.bin.index.json",
    "model.safetensors.index.json", "model.safetensors.index.fp16.json", "consolidated.00.pth",
    "original/consolidated.00.pth", "consolidated.safetensors", "tf_model.h5", "flax_model.msgpack",
    "model.ckpt-5.index",
    "model-Q4_K_M.gguf", "ggml-model-q4_0.bin", "onnx/model.onnx", "onnx/model.onnx_data", "onnx/model.onnx.data",
    "rust_model.ot", "openvino/openvino_model.xml", "openvino/openvino_model.bin", "weights.npz", "metal/model.bin",
    "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "optimizer.pt", "scheduler.pt",
    "training_args.bin", "rng_state_0.pth", "random_states_0.pkl", "optimizer.bin", "checkpoint-500/config.json",
    "quantize_config.json", "quant_config.json", "hf_quant_config.json", "quant_log.csv", "imatrix.dat",
    ".git/config", ".gitattributes", ".cache/huggingface/x.json", "sub/.DS_Store", "__pycache__/a.cpython-311.pyc",
    ".svn/entries", "runs/events.out.tfevents.1", "genai_config.json",
    "mspc.json", "mspc_export.json", "plan.json", "recipe.toml", "timings.json", "verification.json",
    "verification.npz", "report.html",
    "matrices/00000.safetensors", "unchanged/x.json", "exports/dense/config.json",
)  # fmt: skip


@pytest.mark.parametrize("name", TRAVEL)
def test_it_belongs_to_a_model(name):
    assert belongs(name)


@pytest.mark.parametrize("name", [*STAY, "model.ckpt-5.data-00000-of-00001", "model.safetensors.part1", "model.pt~"])
def test_it_does_not_belong_to_a_model(name):
    assert not belongs(name)


def fill(folder: Path, *names: str) -> None:
    for name in names:
        if not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            data = "{}" if name.endswith(".json") else f"the bytes of {name}"
            (folder / name).write_bytes(data.encode(errors="replace"))


@pytest.fixture(scope="module")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a processor, three chat templates, the older spelling of the dtype, and files of all kinds."""
    folder = tiny.build(tmp_path_factory.mktemp("awkward") / "model", "llama", hidden_size=64, dtype=torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": config.pop("dtype")}))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate([*alphabet, "th"])}, [("t", "h")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessor(size={"shortest_edge": 30})
    LlavaProcessor(images, tokenizer, patch_size=7, chat_template="P {{ messages }}").save_pretrained(folder)
    images.save_pretrained(folder)
    tokenizer.chat_template = {"default": "D {{ messages }}", "tool_use": "T {{ messages }}", "rag": "R {{ messages }}"}
    tokenizer.save_pretrained(folder)
    GenerationConfig(temperature=0.7, do_sample=True, eos_token_id=[0, 2]).save_pretrained(folder)
    fill(folder, *(name for name in (*TRAVEL, *STAY) if name not in (MANIFEST, EXPORT_MANIFEST, INDEX)))
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def carried(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_of(folder).items() if belongs(name) and name != "config.json"}


@pytest.fixture(scope="module")
def artifact(awkward, calibration, tmp_path_factory) -> mspc.Artifact:
    out = tmp_path_factory.mktemp("travelled") / "out"
    return tiny.compress(awkward, out, calibration, bits=4, group_size=32, allocator="uniform")


@pytest.fixture(scope="module")
def export_of(artifact: mspc.Artifact, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name == "artifact":
            return artifact.path
        if name not in made:
            made[name] = artifact.export(name, tmp_path_factory.mktemp(name) / "out", verify=False, progress=False)
        return made[name]

    return get


MADE = ["artifact", *(pytest.param(name, marks=pytest.mark.slow) if name == "onnx" else name for name in FORMATS)]


@pytest.mark.parametrize("name", MADE)
def test_all_files_that_belong_are_in_the_artifact_and_in_each_export(name, awkward, export_of):
    before, after = carried(awkward), carried(export_of(name))
    assert set(TRAVEL) <= before.keys()
    assert {file: after.get(file) for file in before} == before
    added = {"sparse": {"README.sparse.md"}}
    assert after.keys() - before.keys() <= added.get(name, set())
    here = files_of(export_of(name)).keys()
    of_mspc = {"quantize_config.json"} if name == "gptq" else {"genai_config.json"} if name == "onnx" else set()
    assert not here & ({file for file in STAY if not file.startswith(OUR_OWN)} - of_mspc)


OUR_OWN = ("mspc", "plan.json", "recipe.toml", "timings.json", "verification", "matrices", "unchanged")


@pytest.mark.filterwarnings("ignore:.*unclosed file:ResourceWarning")  # in transformers
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", MADE)
def test_loaders_find_the_same_tokenizer_processor_and_generation_config(name, awkward, export_of):
    folder = export_of(name)
    before, after = AutoTokenizer.from_pretrained(awkward), AutoTokenizer.from_pretrained(folder)
    assert len(before.chat_template) == 3
    assert after.chat_template == before.chat_template
    assert after.special_tokens_map == before.special_tokens_map
    assert after.backend_tokenizer.to_str() == before.backend_tokenizer.to_str()
    assert after("a text <image>") == before("a text <image>")
    processors = [AutoProcessor.from_pretrained(at) for at in (awkward, folder)]
    assert type(processors[1]) is type(processors[0]) is LlavaProcessor
    assert processors[1].to_dict() == processors[0].to_dict()
    assert processors[1].chat_template == processors[0].chat_template
    assert GenerationConfig.from_pretrained(folder) == GenerationConfig.from_pretrained(awkward)
    assert mspc.load(export_of("artifact")).generation_config.temperature == 0.7


def left_out(source: Path, out: Path, caplog: pytest.LogCaptureFixture, **options: Any) -> list[str]:
    """The names in the one line that says what does not travel."""
    caplog.clear()
    with caplog.at_level("INFO", logger="mspc"):
        carry(source, out, **options)
    if not caplog.messages:
        return []
    (line,) = caplog.messages
    head, names = line.rstrip(".").split(": ")
    assert head == "Left out, as no part of the model"
    return names.replace(" and ", ", ").split(", ")


def test_one_line_says_what_is_left_out(tmp_path, caplog):
    fill(
        tmp_path / "a", "config.json", "pytorch_model.bin", ".git/config", ".git/HEAD", "b/c.pt", "LICENSE", "x\ny.gguf"
    )
    fill(tmp_path / "a", "model.safetensors", "plan.json")
    found = left_out(tmp_path / "a", tmp_path / "out", caplog, read=["model.safetensors"])
    assert found == [".git/", "b/c.pt", "plan.json", "pytorch_model.bin", "x?y.gguf"]
    assert sorted(files_of(tmp_path / "out")) == ["LICENSE", "config.json"]
    fill(tmp_path / "a", *(f"{number:02}.pt" for number in range(40)))
    found = left_out(tmp_path / "a", tmp_path / "out", caplog)
    assert found[-2:] == ["28.pt", "16 more"]


def test_nothing_is_said_where_nothing_is_left_out(llama, artifact, tmp_path, caplog):
    """The files of mspc in an artifact are no loss."""
    assert left_out(llama, tmp_path / "a", caplog, read=["model.safetensors"]) == []
    assert left_out(artifact.path, tmp_path / "b", caplog) == []


def torch_file(path: Path, *, old: bool) -> None:
    torch.save({"weight": torch.zeros(2)}, path, _use_new_zipfile_serialization=not old)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: torch_file(path, old=False),
        lambda path: torch_file(path, old=True),
        lambda path: save_file({"x": torch.zeros(2)}, path),
        lambda path: path.write_bytes(b"GGUF\x03\0\0\0"),
        lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n"),
    ],
    ids=["torch", "torch before 1.6", "safetensors", "GGUF", "HDF5"],
)
def test_weights_are_known_by_their_bytes_too(write, tmp_path, caplog):
    """A name may be anything. Oracle: files as their own libraries write them, or the first bytes of the format."""
    fill(tmp_path / "a", "vocab.bin", "words.dat")
    write(tmp_path / "a" / "other.bin")
    assert left_out(tmp_path / "a", tmp_path / "out", caplog) == ["other.bin"]
    assert sorted(files_of(tmp_path / "out")) == ["vocab.bin", "words.dat"]


def test_links_are_followed(tmp_path, caplog):
    """A snapshot of the hub is a folder of links. Links that lead nowhere, or in circles, are named."""
    files = {"blobs/1": b"one", "blobs/2": b"{}", "elsewhere/tool.jinja": b"three"}
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    snapshot = tmp_path / "snapshots" / "0123"
    (snapshot / "sub").mkdir(parents=True)
    (snapshot / "LICENSE").symlink_to("../../blobs/1")
    (snapshot / "sub" / "tokenizer_config.json").symlink_to("../../../blobs/2")
    (snapshot / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    (snapshot / "up").symlink_to("..")
    (snapshot / "sub" / "again").symlink_to(snapshot)
    (snapshot / "gone.json").symlink_to("nothing")
    found = left_out(snapshot, tmp_path / "out", caplog)
    assert files_of(tmp_path / "out") == {
        "LICENSE": b"one", "sub/tokenizer_config.json": b"{}", "additional_chat_templates/tool.jinja": b"three",
    }  # fmt: skip
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert found == ["gone.json", "sub/again/", "up/"]


@pytest.mark.parametrize("part", ["sub", "sub/LICENSE"])
def test_what_cannot_be_read_is_named(part, tmp_path, monkeypatch):
    """Oracle: the system refuses, as it does to other users."""

    def refused(self: Path, *args: object, **options: object) -> object:
        if self == tmp_path / "a" / part:
            raise PermissionError(13, "Permission denied")
        return original(self, *args, **options)

    fill(tmp_path / "a", "sub/LICENSE")
    name = "iterdir" if part == "sub" else "open"
    original = getattr(Path, name)
    monkeypatch.setattr(Path, name, refused)
    with pytest.raises(InputError, match=f"{part} cannot be read .*Permission denied.*Make it readable"):
        carry(tmp_path / "a", tmp_path / "out")


def test_outputs_inside_the_folder_do_not_travel(llama, calibration, tmp_path, caplog):
    """The output may be in the folder of the model, as may older artifacts and exports."""
    source = Path(shutil.copytree(llama, tmp_path / "model"))
    fill(source, "older/mspc.json", "older/config.json", "sub/dense/mspc_export.json", "sub/NOTICE")
    with caplog.at_level("INFO", logger="mspc"):
        artifact = tiny.compress(source, source / "sub" / "out", calibration, allocator="uniform")
    assert any(line.endswith(": older/, sub/dense/, sub/out/.") for line in caplog.messages)
    assert carried(artifact.path).keys() == {*carried(llama), "sub/NOTICE"}


def test_names_that_are_no_text_travel(llama, calibration, tmp_path):
    source = Path(shutil.copytree(llama, tmp_path / "model"))
    fill(source, "\udcff.txt")
    artifact = tiny.compress(source, tmp_path / "out", calibration, allocator="uniform")
    dense = artifact.export("dense", tmp_path / "dense", progress=False)
    assert (dense / "\udcff.txt").read_bytes() == (source / "\udcff.txt").read_bytes()
    mspc.verify(dense, progress=False)
    (dense / "\udcff.txt").write_text("changed")
    with pytest.raises(mspc.VerificationError, match="does not have the bytes that were written"):
        mspc.verify(dense, progress=False)


# A config names only what is there.


CODE = """from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


class MyConfig(LlamaConfig):
    pass


class MyModel(LlamaForCausalLM):
    config_class = MyConfig


class MyTokenizer(PreTrainedTokenizerFast):
    pass
"""
BOTH = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("format_name", ["dense", "gptq"])
@pytest.mark.parametrize("is_there", [True, False], ids=["with its code", "without"])
def test_code_of_the_model_loads_if_it_is_there(is_there, format_name, llama, calibration, tmp_path, monkeypatch):
    """Oracle: transformers, which is allowed to run it here."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    source = tiny.build(tmp_path / "model", "llama", hidden_size=64)
    edit(source / "config.json", auto_map=BOTH)
    edit(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["slow.MySlow", "mine.MyTokenizer"]})
    if is_there:
        (source / "mine.py").write_text(CODE)
    artifact = tiny.compress(source, tmp_path / "out", calibration, bits=4, group_size=32, allocator="uniform")
    out = artifact.export(format_name, tmp_path / "export", verify=False, progress=False)
    for folder in (artifact.path, out):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        assert type(config).__name__ == ("MyConfig" if is_there else "LlamaConfig")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert (type(tokenizer).__name__ == "MyTokenizer") == is_there
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        assert settings.get("auto_map") == ({"AutoTokenizer": [None, "mine.MyTokenizer"]} if is_there else None)
    if format_name == "dense":
        model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
        assert type(model).__name__ == ("MyModel" if is_there else "LlamaForCausalLM")


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("here.A", "here.A"),
        ("gone.A", None),
        ("owner/name--here.A", None),
        ("A", None),
        ("", None),
        (["here.A", None], ["here.A", None]),
        (["gone.A", "here.B"], [None, "here.B"]),
        (["gone.A", None], None),
        ({"AutoConfig": "here.A", "AutoModel": "gone.B"}, {"AutoConfig": "here.A"}),
        ({"AutoTokenizer": ["gone.A", "gone.B"]}, None),
        ({"AutoImageProcessor": {"pil": "here.A", "torchvision": "gone.B"}}, {"AutoImageProcessor": {"pil": "here.A"}}),
        ({"AutoConfig": "../here.A", "AutoModel": "/here.A", "AutoTokenizer": "here\0.A"}, None),
        (7, None),
        ({}, None),
    ],
    ids=str,
)
def test_classes_whose_files_are_not_there_go(value, kept):
    for config in ({"auto_map": value, "x": 1}, {"x": 1, "auto_map": value}):
        assert corrected(config, {"here.py"}.__contains__) == ({"x": 1} if kept is None else {"x": 1, "auto_map": kept})
        inside = corrected({"text_config": config}, {"here.py"}.__contains__)
        assert inside == {"text_config": corrected(config, {"here.py"}.__contains__)}


def test_pipelines_and_weights_that_are_not_there_go():
    pipelines = {"a": {"impl": "here.A", "pt": ["AutoModel"]}, "b": {"impl": "gone.B"}}
    config = {"custom_pipelines": pipelines, "transformers_weights": "other.safetensors", "auto_map": None}
    found = corrected(config, {"here.py"}.__contains__)
    assert found == {"custom_pipelines": {"a": pipelines["a"]}, "auto_map": None}


def dtypes(config: dict[str, Any], folder: Path) -> list[torch.dtype | None]:
    """The dtypes of a config and of the one inside, as transformers reads them."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    found = AutoConfig.from_pretrained(folder)
    return [found.dtype, found.get_text_config().dtype, found.vision_config.dtype]


@pytest.mark.parametrize(
    "top",
    [
        {"dtype": "bfloat16"},
        {"torch_dtype": "bfloat16"},
        {"torch_dtype": "float32", "dtype": "bfloat16"},
        {"torch_dtype": "bfloat16", "dtype": None},
        {"torch_dtype": None, "dtype": None},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "inner",
    [{"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}, {"dtype": "float32", "torch_dtype": "bfloat16"}],
    ids=str,
)
def test_one_dtype_in_one_spelling(top, inner, tmp_path):
    """Oracle: transformers reads the same dtypes before and after, and those of the weights once they are cast."""
    plain = AutoConfig.for_model("llava").to_dict()
    plain |= {name: {k: v for k, v in plain[name].items() if k != "dtype"} for name in ("text_config", "vision_config")}
    config = {key: value for key, value in plain.items() if key != "dtype"} | top
    config["text_config"], config["vision_config"] = config["text_config"] | inner, config["vision_config"] | inner
    found = corrected(config, lambda file: True)
    assert dtypes(found, tmp_path / "a") == dtypes(config, tmp_path / "b")
    cast = with_dtype(found, "float16")
    assert dtypes(cast, tmp_path / "a") == [torch.float16] * 3
    for part in (cast, cast["text_config"], cast["vision_config"]):
        assert [part[key] for key in ("dtype", "torch_dtype") if key in part] == ["float16"]
    assert with_dtype({"x": {"y": 1}}, "float16") == {"x": {"y": 1}, "dtype": "float16"}


@pytest.mark.parametrize("name", FORMATS)
def test_exports_name_the_dtype_of_their_weights(name, export_of):
    """Oracle: the config as transformers reads it, and the weights in the file."""
    out = export_of(name)
    expected = {"gptq": torch.float16, "onnx": torch.float32}.get(name, torch.bfloat16)
    assert {"dtype", "torch_dtype"} & json.loads((out / "config.json").read_text()).keys() == {"torch_dtype"}
    assert AutoConfig.from_pretrained(out).dtype == expected
    if name not in ("onnx", "gguf"):
        assert tiny.tensors(out)["model.embed_tokens.weight"].dtype == expected


def test_a_name_too_long_for_a_file_is_not_there(tmp_path):
    fill(tmp_path / "a", "here.py")
    named = {"AutoConfig": f"{'n' * 300}.A", "AutoModel": "here.A"}
    (tmp_path / "a" / "config.json").write_text(json.dumps({"auto_map": named}))
    carry(tmp_path / "a", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"auto_map": {"AutoModel": "here.A"}}
