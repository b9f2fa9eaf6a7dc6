"""The `quantization_config` of a sparse export as vLLM asks it: a method for each of its layers."""

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from mspc.errors import InputError
from mspc.formats.description import StoredMatrix
from mspc.model.open import check_folder
from mspc.runtime.hf_quantizer import check_files
from mspc.serving.linear import SparseLinearMethod
from mspc.serving.vocabulary import SparseVocabularyMethod
from mspc.storage.checkpoint import Checkpoint
from mspc.storage.sparse_export import QUANT_METHOD, descriptions

WHERE = "quantization_config"
LOAD_FORMAT = "mspc"
"""The option of vLLM by which `loader` makes dense what no layer takes compressed."""


class SparseConfig(QuantizationConfig):
    """The matrices that an export describes."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises InputError for a description that is not valid."""
        super().__init__()
        self.matrices = {name: (name, matrix) for name, matrix in descriptions(config, WHERE).items()}
        """Name in the checkpoint, and description, by the name that vLLM has for it."""
        rows = config["matrices"]
        self.is_tied = any(row.get("tied") for row in rows.values())
        self.sliced = [name for name, row in rows.items() if row.get("index") is not None]

    def __repr__(self) -> str:
        return f"SparseConfig({len(self.matrices)} matrices)"

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """8.0, the least that the kernels were compiled for."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SparseConfig":
        return cls(config)

    def maybe_update_config(self, model_name: str, *args: Any, **kwargs: Any) -> None:
        """Raises InputError, naming what is missing, for a local folder that is not whole: vLLM does not look."""
        folder = Path(model_name)
        if not folder.is_dir():  # of the hub, perhaps not downloaded yet
            return
        files = [folder / shard for shard in Checkpoint(folder).shards()]
        check_files(dict(self.matrices.values()), files)
        check_folder(folder)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.matrices = hf_to_vllm_mapper.apply_dict(self.matrices)

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """The method of a layer of vLLM, by its name; None where it has one of its own.

        Raises InputError for compressed experts, unless the loader makes them dense.
        """
        if self.sliced and get_current_vllm_config().load_config.load_format != LOAD_FORMAT:
            raise InputError(
                f"{self.sliced[0]}: vLLM multiplies by no compressed experts. Give --load-format {LOAD_FORMAT} (in "
                f"Python load_format={LOAD_FORMAT!r}), which makes them dense, or export the artifact dense."
            )
        if isinstance(layer, ParallelLMHead):
            found = self.matrices.get(prefix)
            return None if found is None and not self.is_tied else SparseVocabularyMethod(found, False, True)
        if isinstance(layer, VocabParallelEmbedding):
            found = self._embeddings(layer, prefix)
            return None if found is None else SparseVocabularyMethod(found, True, self.is_tied)
        if not isinstance(layer, LinearBase):
            return None
        names = self._names(prefix)
        if not any(name in self.matrices for name in names):
            return UnquantizedLinearMethod()
        ids = _shard_ids(layer, names)
        return SparseLinearMethod(
            {i: self.matrices.get(name, (name, None)) for i, name in zip(ids, names, strict=True)}
        )

    def _names(self, prefix: str) -> list[str]:
        """The matrices that make this layer."""
        owner, _, leaf = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(leaf, [leaf])
        return [f"{owner}.{part}" if owner else part for part in parts]

    def _embeddings(self, layer: Any, prefix: str) -> tuple[str, StoredMatrix] | None:
        """Those of the checkpoint. Models of vLLM may give the layer no name."""
        shape = (layer.org_vocab_size, layer.embedding_dim)
        for name, (stored_name, matrix) in self.matrices.items():
            leaf = name.rpartition(".")[2]
            if name == prefix or (not prefix and matrix.shape == shape and ("emb" in leaf or leaf == "wte")):
                return stored_name, matrix
        return None


def _shard_ids(layer: Any, names: list[str]) -> list[Hashable]:
    """The ids by which vLLM loads each of the matrices of a layer."""
    if len(names) == 1:
        return [None]
    if isinstance(layer, QKVParallelLinear) and len(names) == 3:
        return ["q", "k", "v"]
    if isinstance(layer, MergedColumnParallelLinear):
        return list(range(len(names)))
    raise InputError(
        f"{', '.join(names)}: vLLM makes one {type(layer).__name__} of them, which mspc does not know. Serve a dense "
        "export instead (mspc export ARTIFACT dense)."
    )
