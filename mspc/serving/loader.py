"""`--load-format mspc` of vLLM: matrices that none of its layers takes compressed arrive dense.

Experts are such, and the embeddings of models that give them no method. All others stay compressed.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from mspc.model.hub import load_config, resolve
from mspc.model.streamed import built
from mspc.serving.linear import SparseLinearMethod
from mspc.serving.vocabulary import SparseVocabularyMethod
from mspc.storage.sparse_export import SparseSource, descriptions, read_quantization_config, slices_of


class ExpandingLoader(DefaultModelLoader):
    """vLLM's own, with the dense weights of what is left over, one parameter at a time."""

    def __init__(self, load_config: Any) -> None:
        super().__init__(replace(load_config, load_format="safetensors"))

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Names as in the files of the source, and tensors."""
        folder = resolve(str(model_config.model))
        config, where = read_quantization_config(folder), folder / "config.json"
        held = set(_held(model))
        left = {name: matrix for name, matrix in descriptions(config, where).items() if name not in held}
        compressed = {f"{name}.{part}" for name, matrix in left.items() for part in matrix.tensors()}
        for name, tensor in super().get_all_weights(model_config, model):
            if name not in compressed:
                yield name, tensor
        source, slices = SparseSource(folder), slices_of(config, where)
        sliced = {name for names in slices.values() for name in names.values()}
        yield from source.read(f"{name}.weight" for name in left if name not in sliced)
        if slices:
            yield from _in_the_names_of_files(folder, source.read(slices))


def _held(model: nn.Module) -> Iterator[str]:
    """The names in the checkpoint of the matrices that layers hold compressed."""
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(method, SparseLinearMethod):
            yield from (name for name, matrix in method.matrices.values() if matrix is not None)
        elif isinstance(method, SparseVocabularyMethod) and method.matrix is not None:
            yield method.matrix[0]


def _in_the_names_of_files(folder: Path, parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Parameters of the model in transformers -> the tensors that files of its family have, which vLLM knows."""
    model: PreTrainedModel = built(load_config(folder), torch.device("meta"), dtype=torch.bfloat16)
    for name, tensor in parameters:
        yield from revert_weight_conversion(model, {name: tensor}).items()
