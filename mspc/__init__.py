"""mspc: mixed-sparsity pruning and quantization of large language models in one call.

import mspc
artifact = mspc.compress("path-or-id", mspc.Recipe(bits_per_weight=3.25), out="small")
artifact.export("dense", "small-hf")
mspc.evaluate("small", text="builtin")
model = mspc.load("small")
"""

import importlib
from typing import TYPE_CHECKING, Any

from mspc.version import __version__

if TYPE_CHECKING:
    from mspc.api import Artifact, compress, evaluate, export, forecast, generate, verify
    from mspc.bench.tasks import TaskResult, TaskScore, evaluate_tasks
    from mspc.errors import (
        ActivationError,
        InputError,
        MspcError,
        SingularGramError,
        Stopped,
        StorageError,
        VerificationError,
    )
    from mspc.kernels.cpu.library import onnx_library
    from mspc.pages.page import report
    from mspc.passes.perplexity import Perplexity
    from mspc.pipeline.forecasting import Forecast
    from mspc.progress import Event
    from mspc.publish.upload import Push, push
    from mspc.recipe import Recipe
    from mspc.runtime.keep_zeros import KeepZeros, masks
    from mspc.runtime.loading import load
    from mspc.runtime.product_times import time_products
    from mspc.runtime.recovery import Recovery, recover

# Imported when first used: transformers takes seconds, and a Recipe needs none of it.
_HOME = {
    "mspc.api": ("Artifact", "compress", "evaluate", "export", "forecast", "generate", "verify"),
    "mspc.bench.tasks": ("TaskResult", "TaskScore", "evaluate_tasks"),
    "mspc.errors": (
        "ActivationError", "InputError", "MspcError", "SingularGramError", "Stopped", "StorageError",
        "VerificationError",
    ),
    "mspc.kernels.cpu.library": ("onnx_library",),
    "mspc.pages.page": ("report",),
    "mspc.passes.perplexity": ("Perplexity",),
    "mspc.pipeline.forecasting": ("Forecast",),
    "mspc.progress": ("Event",),
    "mspc.publish.upload": ("Push", "push"),
    "mspc.recipe": ("Recipe",),
    "mspc.runtime.keep_zeros": ("KeepZeros", "masks"),
    "mspc.runtime.loading": ("load",),
    "mspc.runtime.product_times": ("time_products",),
    "mspc.runtime.recovery": ("Recovery", "recover"),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "ActivationError", "Artifact", "Event", "Forecast", "InputError", "KeepZeros", "MspcError", "Perplexity", "Push",
    "Recipe", "Recovery", "SingularGramError", "Stopped", "StorageError", "TaskResult", "TaskScore",
    "VerificationError", "__version__", "compress", "evaluate", "evaluate_tasks", "export", "forecast", "generate",
    "load", "masks", "onnx_library", "push", "recover", "report", "time_products", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'mspc' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
