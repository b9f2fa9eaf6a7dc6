"""Code of a checkpoint is never run, and nobody is asked about it. Oracle: a file that the code would write."""

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

import mspc
from mspc.errors import InputError

CODE = """open({mark!r}, "w").close()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


class MyConfig(LlamaConfig):
    model_type = "my_own"


class MyModel(LlamaForCausalLM):
    config_class = MyConfig


class MyTokenizer(PreTrainedTokenizerFast):
    pass


def generate(model, *args, **options):
    raise AssertionError
"""
CLASSES = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel", "AutoModel": "mine.MyModel"}
TOKENIZER = {"AutoTokenizer": ["mine.MyTokenizer", "mine.MyTokenizer"]}
ELSEWHERE = {name: f"someone/else--{value}" for name, value in CLASSES.items()}
KINDS: dict[str, tuple[dict[str, dict[str, object]], str]] = {
    # changes to files, and the message; none if mspc can do without the code
    "a type of its own": (
        {"config.json": {"model_type": "my_own", "auto_map": CLASSES}}, "it needs code of the checkpoint",
    ),
    "a type that is in another repository": (
        {"config.json": {"model_type": "my_own", "auto_map": ELSEWHERE}}, "its config.json cannot be used",
    ),
    "a tokenizer of its own": (
        {"tokenizer_config.json": {"tokenizer_class": "MyTokenizer", "auto_map": TOKENIZER}},
        "its tokenizer cannot be loaded .it needs code of the checkpoint",
    ),
    "a tokenizer in the old form": (
        {"tokenizer_config.json": {"tokenizer_class": "MyTokenizer", "auto_map": TOKENIZER["AutoTokenizer"]}},
        "its tokenizer cannot be loaded .it needs code of the checkpoint",
    ),
    "a type that transformers knows": ({"config.json": {"auto_map": CLASSES}}, ""),
    "a known type and another repository": ({"config.json": {"auto_map": ELSEWHERE}}, ""),
    "a tokenizer that transformers knows": ({"tokenizer_config.json": {"auto_map": TOKENIZER}}, ""),
    "kernels of the hub": ({"config.json": {"attn_implementation": "someone/kernel"}}, ""),
    "its own way to generate": ({"generation_config.json": {"custom_generate": "."}}, ""),
}  # fmt: skip


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The questions that were put to the user, who says yes to all."""
    asked: list[str] = []

    def yes(question: str = "") -> str:
        asked.append(question)
        return "y"

    monkeypatch.setattr(builtins, "input", yes)
    return asked


def with_code(source: Path, folder: Path, kind: str) -> tuple[Path, Path]:
    """A copy of a checkpoint with code, and the file that the code writes."""
    copy, mark = Path(shutil.copytree(source, folder / "model")), folder / "it ran"
    for name, values in KINDS[kind][0].items():
        path = copy / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | values))
    (copy / "custom_generate").mkdir()
    for name in ("mine.py", "custom_generate/generate.py"):
        (copy / name).write_text(CODE.format(mark=str(mark)))
    return copy, mark


def evaluate(model: Path, folder: Path, text: Path) -> None:
    mspc.evaluate(model, str(text), sequence_length=32, max_windows=2, progress=False)


def load(model: Path, folder: Path, text: Path) -> None:
    mspc.load(model).generate(tiny.ids(1, 4), max_new_tokens=2, do_sample=False)


def compress(model: Path, folder: Path, text: Path) -> None:
    """The whole way: the code travels to the artifact and its exports, and is not run there either."""
    asked = {"bits": 4, "group_size": 32, "allocator": "uniform"}
    artifact = tiny.compress(model, folder / "out", text, exports=["dense", "sparse"], **asked)
    for made in (artifact.path, artifact.path / "exports" / "dense", artifact.path / "exports" / "sparse"):
        assert (made / "mine.py").read_bytes() == (model / "mine.py").read_bytes()
        evaluate(made, folder, text)
        load(made, folder, text)


@pytest.mark.parametrize("verb", [evaluate, load, compress])
@pytest.mark.parametrize("kind", KINDS)
def test_code_of_a_checkpoint_is_not_run(
    kind: str, verb: Callable[[Path, Path, Path], None], llama, calibration, tmp_path, answers
):
    model, mark = with_code(llama, tmp_path, kind)
    message = KINDS[kind][1]
    if message and not (verb is load and "tokenizer" in kind):  # it needs none
        with pytest.raises(InputError, match=message):
            verb(model, tmp_path, calibration)
    else:
        verb(model, tmp_path, calibration)
    assert answers == []
    assert not mark.exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the loaders' own
def test_code_is_not_run_in_the_runtimes_of_packed_weights(calibration, tmp_path, answers):
    """GPTQModel and the model builder of ONNX Runtime GenAI load by the same names."""
    pytest.importorskip("gptqmodel")
    source = tiny.build(tmp_path / "source", "llama", hidden_size=64)
    model, mark = with_code(source, tmp_path, "a type that transformers knows")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attn_implementation": "someone/kernel"}))
    exports = ["gptq", "compressed-tensors"]
    tiny.compress(model, tmp_path / "out", calibration, exports=exports, bits=4, group_size=32, allocator="uniform")
    assert answers == []
    assert not mark.exists()
