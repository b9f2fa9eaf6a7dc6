"""Quantized embeddings: a lookup that decodes only the rows it needs, and a head with the same matrix."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from mspc.formats.decoding import decode_rows
from mspc.formats.description import StoredMatrix
from mspc.runtime.linear import SparseLinear


class SparseEmbedding(nn.Module):
    """Rows of W (V, D), as `matrix` describes it, times `scale` if it has one.

    Its buffers are the stored tensors under their stored names, on meta until it is loaded. They move with the module,
    and are never cast. `dtype` is that of the rows that it gives.
    """

    def __init__(self, matrix: StoredMatrix, dtype: torch.dtype, scale: float | None = None) -> None:
        super().__init__()
        self.matrix, self.dtype, self.scale = matrix, dtype, scale
        self.num_embeddings, self.embedding_dim = matrix.shape
        for part, (kind, shape) in matrix.tensors().items():
            self.register_buffer(part, torch.empty(shape, dtype=kind, device="meta"))

    def stored(self) -> dict[str, Tensor]:
        """The tensors of the matrix, by the names of `StoredMatrix.tensors`."""
        return {part: getattr(self, part) for part in self.matrix.tensors()}

    def check(self, name: str) -> None:
        """Nothing but types can be wrong in a matrix without mask and indices."""

    @property
    def weight(self) -> Tensor:
        """The dense weight (V, D), decoded at every access."""
        return decode_rows(self.stored(), self.matrix, 0, self.num_embeddings).to(self.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., D), in `dtype`."""
        flat = ids.flatten()
        rows = {part: tensor.index_select(0, flat) for part, tensor in self.stored().items()}
        matrix = replace(self.matrix, shape=(len(flat), self.embedding_dim))
        found = decode_rows(rows, matrix, 0, len(flat)).to(self.dtype).view(*ids.shape, self.embedding_dim)
        return found if self.scale is None else found * torch.tensor(self.scale).to(self.dtype)

    def extra_repr(self) -> str:
        grid = self.matrix.grid
        bits = "" if grid is None else f", bits={grid.bits}, group_size={grid.group_size or 'row'}"
        return f"{self.num_embeddings}, {self.embedding_dim}{bits}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseEmbedding":
        device = next(self.buffers()).device
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor.new_empty(0) if not tensor.is_meta else tensor).device)

        super()._apply(move if device.type != "meta" else fn, recurse)
        return self


class TiedHead(SparseLinear):
    """A head whose matrix is that of the embeddings, which are saved for both."""

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()
