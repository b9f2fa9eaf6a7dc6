"""A model by its config.json alone: all shapes, and no weight.

Of a hub id only config.json is downloaded, and of a .gguf file only the header is read. A folder that has its weights
already is described by their headers, which know their dtypes better than the config does.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mspc.errors import InputError, in_brief
from mspc.model.config_checks import setting_of
from mspc.model.gguf_file import is_gguf, outline_of
from mspc.model.hub import config_folder, load_config
from mspc.model.open import open_model
from mspc.model.streamed import StreamedModel, built
from mspc.storage.checkpoint import INDEX, SINGLE, StoredType
from mspc.storage.manifest import is_artifact
from mspc.storage.sparse_export import is_sparse_export

META = torch.device("meta")


class Outline:
    """The tensors that a model would have, as one weight file without content."""

    def __init__(self, types: Mapping[str, StoredType]) -> None:
        self._types = dict(types)

    def keys(self) -> list[str]:
        return list(self._types)

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        raise InputError(f"{', '.join(keys)}: only the shapes are known, by config.json.")

    def shards(self) -> dict[str, list[str]]:
        return {SINGLE: self.keys()}

    def types(self) -> dict[str, StoredType]:
        return self._types


def outlined(model: str) -> StreamedModel:
    """The model of a folder, a hub id or a .gguf file on the meta device, whose `source` knows shapes alone.

    Raises InputError for what `compress` cannot take.
    """
    path = Path(model).expanduser()
    if is_gguf(path):
        return _of_config(*outline_of(path))
    folder = config_folder(model)
    if is_artifact(folder) or is_sparse_export(folder):
        raise InputError(f"{folder} is compressed already. Give the original checkpoint instead.")
    if path.is_dir() and has_weights(folder):
        return open_model(folder, device=META)
    config = load_config(folder)
    dtype = setting_of(config, "dtype")
    return _of_config(config, dtype if isinstance(dtype, torch.dtype) else torch.float32)


def has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (SINGLE, INDEX)) or any(folder.glob("*.safetensors"))


def _of_config(config: Any, dtype: torch.dtype) -> StreamedModel:
    """The model of a config whose weights would all have this dtype; tied ones are stored once."""
    whole = built(config, META, dtype=dtype)
    name_of = {id(tensor): name for name, tensor in reversed(list(whole.state_dict(keep_vars=True).items()))}
    types = {
        name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in whole.state_dict(keep_vars=True).items()
        if name_of[id(tensor)] == name
    }
    try:
        return StreamedModel(Outline(types), config, META, dtype, eager=False)
    except (KeyError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"The model of this config.json cannot be outlined ({in_brief(error)}).") from error
