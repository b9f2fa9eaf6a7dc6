"""GPTQModel on the CPU, by its own loader."""

import json
import os
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # it compiles kernels when it loads: seconds for every model

import torch
from gptqmodel import GPTQModel

from exporters.manifest import ExportManifest
from exporters.runtimes import HALF, Runner, Unsupported
from exporters.runtimes.transformers import runner_of
from mspc.storage.config_json import corrected
from mspc.storage.files import write_json


def load(folder: Path, manifest: ExportManifest) -> Runner:
    check(folder)
    with TemporaryDirectory(prefix="mspc-gptqmodel-") as links:
        link_without_code(folder, Path(links))
        # Without a dtype it takes bfloat16 on a CPU, whatever the config says; its portable kernel takes every shape.
        loaded = GPTQModel.load(links, device="cpu", backend="gptq_torch", dtype=torch.float16, trust_remote_code=False)
    return runner_of(loaded.model, version("gptqmodel"), HALF)


def check(folder: Path) -> None:
    """Raises Unsupported for folders that its loader is known not to read."""
    if json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") == "phi3":
        raise Unsupported("it looks for gate_proj and up_proj of Phi-3, which the model has as one matrix")


def link_without_code(folder: Path, out: Path) -> None:
    """Fill a folder with links to the files of an export, but for code: GPTQModel 7.6 runs it although it must not."""
    for path in folder.iterdir():
        if path.name.endswith("config.json"):
            config = corrected(json.loads(path.read_text(encoding="utf-8")), lambda file: False)
            write_json(out / path.name, {key: value for key, value in config.items() if key != "attn_implementation"})
        elif path.is_file() and path.suffix != ".py":
            (out / path.name).symlink_to(path.resolve())
