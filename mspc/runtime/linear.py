"""A linear layer that computes from the tensors of the sparse export (docs/sparse-format.md) and holds nothing else."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mspc.formats.decoding import STRIP, check_places, decode_rows, strips
from mspc.formats.description import StoredMatrix, check_types, types_of

DEVICE_STRIP = 2**21
"""Weights decoded at a time where launches cost more than memory: about 50 MB on the way."""


class SparseLinear(nn.Module):
    """y = x Wᵀ + bias, with W (O, I) as `matrix` describes it.

    Its buffers are the stored tensors under their stored names, so that a state dict is what the export holds; they are
    on meta until it is loaded. They move with the module, and are never cast.
    """

    bias: nn.Parameter | None

    def __init__(self, matrix: StoredMatrix, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.matrix = matrix
        self.out_features, self.in_features = matrix.shape
        for part, (dtype, shape) in matrix.tensors().items():
            self.register_buffer(part, torch.empty(shape, dtype=dtype, device="meta"))
        self.register_parameter("bias", bias)

    @classmethod
    def of(cls, stored: Mapping[str, Tensor], matrix: StoredMatrix, bias: nn.Parameter | None = None) -> "SparseLinear":
        """The layer as it is after loading."""
        layer = cls(matrix, bias)
        for part in matrix.tensors():
            setattr(layer, part, stored[part])
        return layer

    def stored(self) -> dict[str, Tensor]:
        """The tensors of the matrix, by the names of `StoredMatrix.tensors`."""
        return {part: getattr(self, part) for part in self.matrix.tensors()}

    def check(self, name: str) -> None:
        """Raises InputError, naming the matrix, when what was loaded is no matrix of this description."""
        check_types(types_of(self.stored()), self.matrix, name)
        check_places(self.stored(), self.matrix, name)

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew at every access: (O, I), or (I, O) where the model's own parameter is."""
        weight = decode_rows(self.stored(), self.matrix, 0, self.out_features)
        return weight.T if self.matrix.transposed else weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), in the dtype of `x`."""
        y = matmul(x.reshape(-1, self.in_features), self.stored(), self.matrix)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        grid = self.matrix.grid
        size = None if grid is None else grid.group_size or "row"
        bits = "" if grid is None else f", bits={grid.bits}, group_size={size}, symmetric={grid.symmetric}"
        pattern, sparsity = self.matrix.pattern, self.matrix.pattern.sparsity
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"pattern={pattern}, sparsity={sparsity:.4g}{bits}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseLinear":
        buffers = {id(buffer) for buffer in self.buffers(recurse=False)}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            cast_too = id(tensor) in buffers and moved.dtype != tensor.dtype
            return tensor.to(moved.device) if cast_too else moved

        super()._apply(move, recurse)
        return self


def matmul(x: Tensor, stored: Mapping[str, Tensor], matrix: StoredMatrix) -> Tensor:
    """x (T, I) -> x Wᵀ (T, O), decoding a strip of rows of W at a time."""
    num_weights = STRIP if x.device.type == "cpu" else DEVICE_STRIP
    parts = [
        linear(x, decode_rows(stored, matrix, first, last).to(x.dtype))
        for first, last in strips(matrix.shape, num_weights)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
