"""mspc: mixed-sparsity pruning and quantization of large language models in one call.

import mspc
artifact = mspc.compress("path-or-id", mspc.Recipe(sparsity=0.5, bits=4), out="out/")
artifact.manifest; artifact.export("dense", "out/dense"); mspc.evaluate("out/", text="builtin")
model = mspc.load("out/")
"""

import importlib
from typing import TYPE_CHECKING, Any

from mspc.version import __version__ as __version__

if TYPE_CHECKING:
    from mspc.api import Artifact, compress
    from mspc.errors import MspcError
    from mspc.passes.perplexity import Perplexity
    from mspc.pipeline.evaluation import evaluate
    from mspc.recipe import Recipe
    from mspc.runtime.loading import load

__all__ = ["Artifact", "MspcError", "Perplexity", "Recipe", "compress", "evaluate", "load"]

# Loaded when first used: transformers takes seconds, and a Recipe needs none of it.
_HOME = {
    "Artifact": "mspc.api",
    "MspcError": "mspc.errors",
    "Perplexity": "mspc.passes.perplexity",
    "Recipe": "mspc.recipe",
    "compress": "mspc.api",
    "evaluate": "mspc.pipeline.evaluation",
    "load": "mspc.runtime.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mspc' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
