"""Several linear layers that read the same input, as one."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mspc.runtime.linear import SparseLinear


class ConcatenatedLinear(nn.Module):
    """Several layers of one input, whose outputs are concatenated."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], -1)


class DenseLinear(nn.Module):
    """y = x Wᵀ + bias by the library of the device."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def joined(layers: Sequence[nn.Module]) -> nn.Module:
    """One layer with the rows of several that read the same input.

    Compressed matrices are joined if they have the same pattern and bits and no mask. Behind a mask the kept weights of
    all rows are one stream, which cannot be joined; such layers run one after the other.
    """
    dense = [layer for layer in layers if isinstance(layer, nn.Linear)]
    sparse = [layer for layer in layers if isinstance(layer, SparseLinear)]
    if len(dense) == len(layers):
        return DenseLinear(_rows_of([layer.weight for layer in dense]), _joined_bias(dense))
    kinds = {(layer.matrix.target, layer.matrix.dtype, layer.matrix.has_mask) for layer in sparse}
    if len(layers) == 1:
        return layers[0]
    if len(sparse) < len(layers) or len(kinds) > 1 or sparse[0].matrix.has_mask:
        return ConcatenatedLinear([joined([layer]) for layer in layers])
    num_rows = sum(layer.out_features for layer in sparse)
    matrix = replace(sparse[0].matrix, shape=(num_rows, sparse[0].in_features))
    stored = {part: torch.cat([layer.stored()[part] for layer in sparse]) for part in matrix.tensors()}
    bias = _joined_bias(sparse)
    return SparseLinear.of(stored, matrix, None if bias is None else nn.Parameter(bias, requires_grad=False))


def _rows_of(weights: Sequence[Tensor]) -> Tensor:
    return weights[0].detach() if len(weights) == 1 else torch.cat([weight.detach() for weight in weights])


def _joined_bias(layers: Sequence[nn.Linear] | Sequence[SparseLinear]) -> Tensor | None:
    biases = [layer.bias for layer in layers if layer.bias is not None]
    assert len(biases) in (0, len(layers))
    return _rows_of(biases) if biases else None
