"""Where Triton runs, and the modules that need it: it is imported when a kernel is first launched, and not before."""

import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from mspc.errors import MspcError


def launches(tensor: Tensor) -> bool:
    """Whether kernels on this tensor are launched; elsewhere their twins in torch compute the same."""
    return tensor.is_cuda or interpreted()


def compiles_for(device: torch.device) -> bool:
    """Whether the kernels can be compiled for a device: of NVIDIA's for those from Ampere on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a device, for tests on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def has_ptx() -> bool:
    """Whether kernels may hold PTX: the interpreter has no inline assembly, ROCm another one."""
    return not interpreted() and torch.version.hip is None


def on_gpu(name: str) -> ModuleType:
    """The module of `mspc.kernels.gpu` with this name. Call it within `torch.cuda.device_of` a tensor: Triton launches
    on the current device, which need not be where the tensors are."""
    try:
        return importlib.import_module(f"mspc.kernels.gpu.{name}")
    except ModuleNotFoundError as error:
        if str(error.name).startswith("mspc"):
            raise
        raise MspcError(f"Sparse matrices on a GPU need {error.name}: pip install 'mspc[gpu]'.") from error
