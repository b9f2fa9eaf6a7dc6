"""Folders and hub ids of models, their configs and tokenizers, and the device to run on."""

import difflib
import glob
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from mspc.errors import InputError, in_brief
from mspc.model.config_checks import check_task, setting_of
from mspc.model.gguf_file import as_folder, is_gguf
from mspc.storage.artifact import EXPORTS
from mspc.storage.carrying import HIDDEN, LEFT_OUT, NEVER, VOCABULARIES
from mspc.storage.checkpoint import INDEX, SINGLE, files_of_index
from mspc.storage.dequantized import ORIGIN, scheme_of
from mspc.storage.manifest import MANIFEST
from mspc.storage.sparse_export import is_sparse_export


def resolve(model: str) -> Path:
    """The local folder of a path or hub id, which is downloaded. A GGUF file is made dense in a cache."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not any(path.glob("*.safetensors")) and (file := next(path.glob("*.gguf"), None)):
            raise InputError(f"{path} holds a GGUF file. Give the file itself: {file}.")
        return path
    if is_gguf(path):
        return as_folder(path)
    return _fetched(model, _downloaded)


def config_folder(model: str) -> Path:
    """The local folder of a path or hub id. Of a hub id only config.json is downloaded."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    return _fetched(model, _config_of)


def _config_of(model: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, allow_patterns=[MANIFEST, "config.json"]))


def _fetched(model: str, download: Callable[[str], Path]) -> Path:
    """The folder of a hub id, by a function that downloads it. Raises InputError for all that goes wrong."""
    path = Path(model).expanduser()
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise InputError(
            f"Model {model!r} is not a folder. Give a Hugging Face checkpoint folder, a .gguf file or a hub id."
        )
    try:
        return download(model)
    except InputError:
        raise
    except Exception as error:  # whatever the hub client raises: offline, unknown id, gated, network
        names = [folder.name for folder in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, names, n=1)
        meant = f"; did you mean {path.with_name(close[0])}?" if close else ""
        first, *_ = str(error).splitlines() or [""]
        raise InputError(
            f"Model {model!r} is no folder here ({path.absolute()}{meant}) and could not be fetched from the hub "
            f"({first}). Check the name, the network, and for gated models `hf auth login`."
        ) from error


def _downloaded(model: str) -> Path:
    """The folder of a hub id in the cache, with the weights that its index names and all else that belongs to it.

    Without an index the weights are `model.safetensors`, or else all safetensors files. Processes that want the same
    file wait for each other in huggingface_hub, so that one downloads it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder = Path(snapshot_download(model, allow_patterns=[INDEX, MANIFEST, "config.json"]))
    version = folder.name
    if (folder / MANIFEST).is_file():  # an artifact
        return Path(snapshot_download(model, revision=version, ignore_patterns=[*HIDDEN, f"{EXPORTS}/*"]))
    weights = files_of_index(folder / INDEX) if (folder / INDEX).is_file() else [SINGLE]
    with suppress(LocalEntryNotFoundError):  # offline, the weights and what else is in the cache must do
        snapshot_download(model, revision=version, ignore_patterns=LEFT_OUT)
    wanted = [*(glob.escape(name) for name in weights), *VOCABULARIES]
    folder = Path(snapshot_download(model, revision=version, allow_patterns=wanted, ignore_patterns=NEVER))
    if weights == [SINGLE] and not (folder / SINGLE).is_file():  # files of other names, as they are read from a folder
        snapshot_download(model, revision=version, allow_patterns="*.safetensors", ignore_patterns=[*NEVER, "*/*"])
    return folder


def load_config(folder: Path) -> PreTrainedConfig:
    """The config of a causal language model. That of a sparse export is as if its weights were dense.

    Raises InputError for a config.json that is damaged, or of a model that mspc cannot take.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} has no config.json, so it holds no model. Give a Hugging Face checkpoint folder."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{folder}: its config.json cannot be used ({in_brief(error)}). Get it again.") from error
    if not isinstance(raw, dict):
        raise InputError(f"{folder}: its config.json cannot be used (it is no object). Get it again.")
    scheme = None if is_sparse_export(folder) else scheme_of(raw, folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # an unknown model type, wrong values, remote code that is not allowed
        raise InputError(f"{folder}: its config.json cannot be used ({_in_words(error)}).") from error
    if not isinstance(config, PreTrainedConfig):
        raise InputError(f"{path} describes no model. Give a Hugging Face checkpoint folder.")
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # weights are read dense
    if scheme is not None:
        setattr(config, ORIGIN, scheme.name)
    check_task(config, folder)
    return config


def with_defaults(raw: dict[str, Any]) -> PreTrainedConfig:
    """The config of a known `model_type`, with the defaults of its family and one form of what versions differ in."""
    values = {key: value for key, value in raw.items() if key != "model_type"}
    try:
        return AutoConfig.for_model(raw["model_type"], **values)
    except Exception as error:  # wrong values
        raise InputError(f"config.json cannot be used ({in_brief(error)}). Correct or complete it.") from error


def load_tokenizer(folder: Path) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer("a")  # some wrong values show only when it is used
    except Exception as error:  # missing files, unknown classes, damaged JSON
        raise InputError(f"{folder}: its tokenizer cannot be loaded ({_in_words(error)}).") from error
    return tokenizer


def _in_words(error: Exception) -> str:
    """The message of transformers, unless it advises to run code of the checkpoint."""
    if "trust_remote_code" in str(error):
        return "it needs code of the checkpoint, which mspc never runs; give one whose classes are in transformers"
    return in_brief(error)


def longest_sequence(config: PreTrainedConfig) -> int | None:
    """Maximum sequence length in tokens by the config, or None."""
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length"):
        if isinstance(longest := setting_of(config, name), int):
            return longest
    return None


def choose_sequence_length(config: PreTrainedConfig, asked: int | None) -> int:
    longest = longest_sequence(config)
    if asked is None:
        return min(2048, longest or 2048)
    if longest is not None and asked > longest:
        raise InputError(f"A sequence length of {asked} is longer than the model allows ({longest}); lower it.")
    return asked


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"Device {name!r} cannot be used ({error}). Choose cpu, or leave it at auto.") from error
    return torch.device(name)


@contextmanager
def without_progress() -> Iterator[None]:
    """Hide the progress bars of transformers inside; the setting is restored on exit."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
