"""Corrections of config.json and its like, which name only files that are there, and one dtype; and its digest."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Config = dict[str, Any]
CODE = ("auto_map", "custom_pipelines")
"""Keys of classes in files of code, as `file.Class`; in other repositories, `owner/name--file.Class`."""


def corrected(config: Config, is_there: Callable[[str], bool]) -> Config:
    """The config with one spelling of the dtype, and without code and weights that are not there.

    `is_there` tells if a file of code travels, by its path. Code in other repositories does not. The same holds for
    configs inside, such as `text_config`.
    """
    found = {}
    for key, value in config.items():
        if key == "transformers_weights" or _is_second_spelling(key, config):
            continue
        if key in CODE and value is not None:
            value = _existing(value, is_there)
            if value is None:
                continue
        elif isinstance(value, dict) and key != "quantization_config":
            value = corrected(value, is_there)
        found[key] = value
    return found


def with_dtype(config: Config, dtype: str) -> Config:
    """The config of a model whose weights all have one dtype, in each config inside too. Spellings stay as they are."""
    found = _with_dtype(config, dtype)
    return found | {"torch_dtype" if "torch_dtype" in found.keys() - {"dtype"} else "dtype": dtype}


def _with_dtype(config: Config, dtype: str) -> Config:
    found = {}
    for key, value in config.items():
        if isinstance(value, dict) and key != "quantization_config":
            value = _with_dtype(value, dtype)
        elif key in ("dtype", "torch_dtype") and value is not None:
            value = dtype
        found[key] = value
    return found


def _is_second_spelling(key: str, config: Config) -> bool:
    """Tell if the dtype is there as `dtype` too, which transformers prefers unless it is null."""
    if not {"dtype", "torch_dtype"} <= config.keys():
        return False
    prefers_old = config["dtype"] is None and config["torch_dtype"] is not None
    return key == ("dtype" if prefers_old else "torch_dtype")


def _existing(value: Any, is_there: Callable[[str], bool]) -> Any:
    """The classes whose files are there, in the same form, or None where no file is."""
    if isinstance(value, str):
        *modules, name = value.split(".")  # the name of another repository is no identifier
        are_names = bool(modules) and all(part.isidentifier() for part in (*modules, name))
        return value if are_names and is_there("/".join(modules) + ".py") else None
    if isinstance(value, list):
        kept = [_existing(part, is_there) for part in value]
        return kept if any(part is not None for part in kept) else None
    if isinstance(value, dict) and "impl" in value:  # a pipeline: the class with its defaults
        return value if _existing(value["impl"], is_there) is not None else None
    if isinstance(value, dict):
        found = {name: kept for name, part in value.items() if (kept := _existing(part, is_there)) is not None}
        return found or None
    return None


def config_digest(folder: Path) -> str:
    """sha256 of config.json, without the fields that only say where it comes from."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in ("transformers_version", "_name_or_path")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
