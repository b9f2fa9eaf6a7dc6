"""Embeddings and heads of vLLM whose matrix stays compressed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import pad
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from mspc.errors import InputError
from mspc.formats.description import StoredMatrix
from mspc.runtime.embedding import SparseEmbedding
from mspc.runtime.linear import SparseLinear
from mspc.serving.linear import dense_weight, expect, finish
from mspc.serving.shards import Loading, Place, Shard


class Vocabulary(Module):
    """The matrix of some tokens for its uses, each with tensors of its own, because products repack them."""

    def __init__(self, piece: Module, dtype: torch.dtype, looks_up: bool, is_head: bool) -> None:
        super().__init__()
        assert isinstance(piece, SparseLinear)
        self.lookup: SparseEmbedding | None = None
        if looks_up:
            self.lookup = SparseEmbedding(piece.matrix, dtype)
            for part, tensor in piece.stored().items():
                setattr(self.lookup, part, tensor)
        self.head = SparseLinear.of(piece.stored(), piece.matrix) if is_head else None


class SparseVocabularyMethod(QuantizeMethodBase):
    """A lookup, a product with the same matrix, or both, of the tokens of this rank."""

    def __init__(self, matrix: tuple[str, StoredMatrix] | None, looks_up: bool, is_head: bool) -> None:
        """`matrix` is its name in the checkpoint and its description, or None for a head that is tied to embeddings."""
        self.matrix, self.looks_up, self.is_head = matrix, looks_up, is_head

    def create_weights(
        self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
        output_size: int, params_dtype: torch.dtype, **attributes: Any,
    ) -> None:  # fmt: skip
        """Register an empty parameter for each tensor that may come."""
        if self.matrix is None:
            return
        name, matrix = self.matrix
        if matrix.shape != (layer.org_vocab_size, layer.embedding_dim) or layer.num_added_embeddings:
            raise InputError(
                f"{name}: it is described as {matrix.shape}, and the model has {layer.num_embeddings} tokens of "
                f"{layer.embedding_dim}. Export the artifact again."
            )
        if self.looks_up and matrix.has_mask:
            raise InputError(f"{name}: embeddings with a mask cannot be looked up by rows. Export the artifact again.")
        rows = layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index
        shard = Shard(name, matrix, (Place(rows, (0, matrix.shape[1])),))

        def together(pieces: Sequence[Module]) -> Module:
            return Vocabulary(pieces[0], params_dtype, self.looks_up, self.is_head)

        expect(layer, Loading({None: shard}, params_dtype, torch.empty(0).device, together))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raises InputError, naming the matrix, if a tensor of it was not in the checkpoint."""
        if self.matrix is None:
            raise InputError(
                "The head is tied to compressed embeddings, but this model of vLLM did not tie it. Serve a dense "
                "export instead (mspc export ARTIFACT dense)."
            )
        finish(layer)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """The embeddings, which are a head as well."""
        return embed_tokens

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        """(...) -> (..., D)."""
        rows: Tensor = layer.compressed.lookup(ids)
        return rows

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., D) -> (..., tokens of this rank), with zeros for those that pad the vocabulary."""
        y: Tensor = layer.compressed.head(x)
        y = pad(y, (0, layer.num_embeddings_per_partition - y.shape[-1]))
        return y if bias is None else y + bias

    def dequantize_weight(self, layer: Any) -> Tensor:
        """The dense weight of this rank."""
        return dense_weight(layer)
