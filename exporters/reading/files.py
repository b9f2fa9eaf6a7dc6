"""Tensors of a folder of safetensors as numpy arrays."""

import json
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from mspc.errors import InputError


class TensorFiles:
    """All tensors of a folder, found by opening its files. Raises InputError when its index differs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path_of: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            self.path_of |= dict.fromkeys(self._opened(path).keys(), path)
        for index in folder.glob("*.safetensors.index.json"):
            if json.loads(index.read_text())["weight_map"] != {key: path.name for key, path in self.path_of.items()}:
                raise InputError(f"{index} does not name the tensors that the files hold; export again.")

    def __contains__(self, key: str) -> bool:
        return key in self.path_of

    def read(self, key: str) -> tuple[NDArray[Any], str]:
        """The array and its dtype; bfloat16 (which numpy lacks) comes as the float32 of the same values."""
        if key not in self.path_of:
            raise InputError(f"{self.folder} has no tensor {key}; export again.")
        tensor: torch.Tensor = self._opened(self.path_of[key]).get_tensor(key)
        dtype = str(tensor.dtype).removeprefix("torch.")
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy(), dtype

    @staticmethod
    def _opened(path: Path) -> Any:
        try:
            return safe_open(path, framework="pt").__enter__()
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} cannot be read ({error}); it is damaged: export again.") from error
