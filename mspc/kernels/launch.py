"""Tells where Triton runs, and imports the modules that need it when a kernel is first launched."""

import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from mspc.errors import MspcError


def launches(tensor: Tensor) -> bool:
    """Tell if products with this tensor run in Triton; elsewhere `reference` computes the same in torch."""
    return tensor.is_cuda or interpreted()


def compiles_for(device: torch.device) -> bool:
    """Tell if Triton compiles the kernels for a device: an NVIDIA GPU of compute capability 8.0 (Ampere) or later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def interpreted() -> bool:
    """Tell if Triton's interpreter runs the kernels, for tests on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def has_ptx() -> bool:
    """Tell if kernels may hold PTX: Triton's interpreter has no inline assembly, and that of ROCm differs."""
    return not interpreted() and torch.version.hip is None


def on_gpu(name: str) -> ModuleType:
    """The module of `mspc.kernels.gpu` with this name.

    Call it within `torch.cuda.device_of` a tensor: Triton launches on the current device, which may be another one.
    """
    try:
        return importlib.import_module(f"mspc.kernels.gpu.{name}")
    except ModuleNotFoundError as error:
        if str(error.name).startswith("mspc"):
            raise
        raise MspcError(
            f"Sparse matrices on a GPU need {error.name}: the extra gpu of mspc (pip install '.[gpu]' in its folder)."
        ) from error
