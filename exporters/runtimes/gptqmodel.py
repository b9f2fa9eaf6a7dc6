"""GPTQModel on the CPU, by its own loader."""

import os
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # it compiles kernels when it loads: seconds for every model

import torch
from gptqmodel import GPTQModel

from exporters.manifest import ExportManifest
from exporters.runtimes import HALF, Runner
from exporters.runtimes.transformers import runner_of


def load(folder: Path, manifest: ExportManifest) -> Runner:
    # Without a dtype it takes bfloat16 on a CPU, whatever the config says; its portable kernel takes every shape.
    loaded = GPTQModel.load(
        str(folder), device="cpu", backend="gptq_torch", dtype=torch.float16, trust_remote_code=False
    )
    return runner_of(loaded.model, version("gptqmodel"), HALF)
