"""Exporters: an artifact to the files that one kind of runtime loads. They pack what the solver decided, and no more.

Each format is one module with

    Options                              a frozen dataclass; its fields are the format's options
    notes(rows, options)                 what the user should know of such an export, in sentences
    check(rows, config, options)         raises InputError for what the format cannot hold, before any work; `rows` are
                                         those of a manifest, or of a plan; `config` is the config.json
    export(artifact, out, options, step) fills an empty folder, calling `step` with the name of every tensor

and one reader in `exporters.reading` that shares no code with it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporters.exporting import check, export
    from exporters.formats import FORMATS
    from exporters.verification import failures, in_short, verify

__all__ = ["FORMATS", "check", "export", "failures", "in_short", "verify"]

# Loaded when first used: to show the table of formats takes no transformers.
_HOME = {
    "FORMATS": "exporters.formats",
    "check": "exporters.exporting",
    "export": "exporters.exporting",
    "failures": "exporters.verification",
    "in_short": "exporters.verification",
    "verify": "exporters.verification",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'exporters' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
