"""Downloads from the hub. The oracle is the real client, against a hub on this machine that counts its downloads."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import hub
import pytest

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"
CARRIED = [
    "config.json", "tokenizer.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "qwen.tiktoken",
    "LICENSE", "modeling_own.py", "vocab/vocabulary.bin", "original/params.json", "odd [1]? name.txt",
]  # fmt: skip
OTHERS = [
    ".gitattributes", ".cache/x.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors",
    "model.fp16.safetensors", "unet/diffusion_pytorch_model.safetensors", "original/consolidated.00.pth",
    "onnx/model.onnx", "onnx/model.onnx_data", "model.Q4_K_M.gguf", "tf_model.h5", "adapter_config.json",
    "adapter_model.safetensors", "training_args.bin", "optimizer.pt", "quantize_config.json",
]  # fmt: skip
ARTIFACT = ["mspc.json", "plan.json", "recipe.toml", "matrices/00000.safetensors", "unchanged/model.safetensors"]
REPOSITORIES = {  # name -> (what is downloaded, what is not)
    "someone/sharded": ([*CARRIED, INDEX, *SHARDS], [*OTHERS, "model.safetensors"]),
    "someone/single": ([*CARRIED, "model.safetensors"], [*OTHERS, SHARDS[0]]),
    "someone/plain": (["config.json", "model.safetensors"], []),
    "someone/artifact": ([*CARRIED, *ARTIFACT], [".gitattributes", "exports/dense/model.safetensors"]),
}
RESOLVE = """
import json, sys
from mspc.errors import InputError
from mspc.model.hub import resolve
found = {}
for name in sys.argv[1:]:
    try:
        folder = resolve(name)
        found[name] = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    except InputError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


def resolving(cache: Path, address: str, names: list[str], **environment: str) -> subprocess.Popen[str]:
    variables = {
        "HF_ENDPOINT": address,
        "NO_PROXY": "127.0.0.1",
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),  # tokenicer, which GPTQModel imports, sets its own
        "HF_XET_CACHE": str(cache / "xet"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    environment = os.environ | variables | {"HF_HUB_OFFLINE": "0"} | environment
    command = [sys.executable, "-c", RESOLVE, *names]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(process: subprocess.Popen[str]) -> dict[str, list[str] | str]:
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    found: dict[str, list[str] | str] = json.loads(out)
    return found


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory) -> tuple[list[dict[str, list[str] | str]], Counter[str], str, Path]:
    """The results of two processes at once, all downloads, the address of the hub, which is gone, and the cache."""
    folder, cache = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("cache")
    for name, (wanted, others) in REPOSITORIES.items():
        for file in [*wanted, *others]:
            path = folder / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}" if file == "config.json" else f"{name} {file}")
    index = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}
    (folder / "someone/sharded" / INDEX).write_text(json.dumps(index))
    for name, weight_map in {"bad/star": {"a": "*"}, "bad/outside": {"a": "../x.safetensors"}, "bad/kind": 1}.items():
        for file in ("config.json", *SHARDS):
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / file).write_text("{}")
        (folder / name / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    names = [*REPOSITORIES, "bad/star", "bad/outside", "bad/kind"]
    with hub.served(folder, seconds=0.05) as (address, downloads):
        found = [result(process) for process in [resolving(cache, address, names) for _ in range(2)]]
    return found, downloads, address, cache


@pytest.mark.parametrize("name", REPOSITORIES)
def test_weights_of_the_index_and_all_else_that_belongs(name, downloaded):
    found, downloads, *_ = downloaded
    assert [sorted(of_process[name]) for of_process in found] == [sorted(REPOSITORIES[name][0])] * 2
    assert {file for file in downloads if file.startswith(name)} == {f"{name}/{file}" for file in REPOSITORIES[name][0]}


def test_one_process_of_a_machine_downloads_a_file(downloaded):
    assert set(downloaded[1].values()) == {1}


@pytest.mark.parametrize(
    ("name", "message"),
    [("bad/outside", "points outside its folder"), ("bad/kind", "is not a valid safetensors index")],
)
def test_an_index_that_cannot_be_right_is_refused(name, message, downloaded):
    found, downloads, *_ = downloaded
    assert all(message in of_process[name] for of_process in found)
    assert sorted(file for file in downloads if file.startswith(name)) == [f"{name}/config.json", f"{name}/{INDEX}"]


def test_names_in_an_index_are_no_patterns(downloaded):
    """A file named `*` is not there, and does not stand for all files."""
    assert [sorted(of_process["bad/star"]) for of_process in downloaded[0]] == [["config.json", INDEX]] * 2


def test_offline_the_cache_is_used(downloaded):
    """A cache with weights and configs alone, as other programs leave it, will do too."""
    *_, address, cache = downloaded
    for path in cache.rglob("LICENSE"):
        path.unlink()
    names = list(REPOSITORIES)[:3]
    found = result(resolving(cache, address, [*names, "someone/unknown"], HF_HUB_OFFLINE="1"))
    for name in names:
        assert sorted(found[name]) == sorted(set(REPOSITORIES[name][0]) - {"LICENSE"})
    assert "could not be fetched from the hub" in found["someone/unknown"]
