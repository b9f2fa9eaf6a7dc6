"""A linear layer that computes from the tensors of the sparse export (docs/sparse-format.md) and holds nothing else."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mspc.formats.decoding import STRIP, check_indices, decode_rows, strips
from mspc.formats.description import StoredMatrix, check_types, types_of
from mspc.kernels import dispatch, fp8, kernel_for
from mspc.kernels.launch import compiles_for

DEVICE_STRIP = 2**21
"""Weights decoded at a time where launches cost more than memory: about 50 MB on the way."""


class SparseLinear(nn.Module):
    """y = x Wᵀ + bias, with W (O, I) as `matrix` describes it.

    Its buffers are the stored tensors under their stored names, on meta until it is loaded; or, once `prepare` was
    called or the layer was moved to a GPU, what a kernel makes of them. A state dict is what the export holds, either
    way. Buffers move with the module, and are never cast.
    """

    bias: nn.Parameter | None
    prepared_for: torch.dtype | None = None
    """The dtype of inputs that the buffers are arranged for."""
    prefill: str | None = None
    """What multiplies many tokens, where it was chosen (see `prefill_by`)."""

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
        if self.prepared_for is None:
            return {part: getattr(self, part) for part in self.matrix.tensors()}
        kernel = kernel_for(self.matrix, self.prepared_for)
        assert kernel is not None
        arranged = self.arranged()
        device = next(iter(arranged.values())).device
        return {part: tensor.to(device) for part, tensor in kernel.restore(arranged, self.matrix).items()}

    def arranged(self) -> dict[str, Tensor]:
        """The tensors as a kernel has arranged them."""
        return dict(self.named_buffers(recurse=False))

    def prepare(self, dtype: torch.dtype) -> None:
        """Arrange the tensors for the kernel for inputs of this dtype, if there is one, where they are now."""
        kernel = kernel_for(self.matrix, dtype)
        if kernel is None or self.prepared_for == dtype:
            return
        if self.prepared_for is None:  # codes are arranged alike for every dtype, and values have kernels for one only
            stored = self.stored()
            arranged = kernel.arrange({part: tensor.cpu() for part, tensor in stored.items()}, self.matrix)
            device = next(iter(stored.values())).device
            self._hold({name: tensor.to(device) for name, tensor in arranged.items()})
        self.prepared_for = dtype
        if self.prefill is None:
            self.rows = dispatch.schedule(self.arranged(), self.matrix, dtype)
        else:
            self.prefill_by(self.prefill)

    def prefill_by(self, method: str) -> None:
        """Multiply many tokens by a method of `dispatch.COPIES`, where it fits the matrix and the device of what is
        arranged, with the copy that it needs. Of these, `fp8` rounds, in the layer as it is stored too."""
        self.prefill = method
        if self.prepared_for is not None:
            self._hold(dispatch.with_copies(self.arranged(), self.matrix, self.prepared_for, (method,)))
            self.rows = dispatch.schedule(self.arranged(), self.matrix, self.prepared_for)

    def tune(self) -> None:
        """Measure what is fastest for which numbers of tokens, unless this device has of such a matrix."""
        if self.prepared_for is not None:
            self.rows = dispatch.tuned(self.arranged(), self.matrix, self.prepared_for)

    @property
    def rounds(self) -> bool:
        """Whether products of more than `fp8.FEW_TOKENS` tokens are of rounded numbers."""
        return self.prefill == "fp8" and fp8.fits(self.matrix)

    def copied_bytes(self) -> int:
        """Of copies beside the stored tensors, which only products of many tokens read."""
        held = self.arranged()
        return sum(held[name].nbytes for names in dispatch.COPIES.values() for name in names if name in held)

    def _hold(self, tensors: dict[str, Tensor]) -> None:
        """Buffers in place of those that there are."""
        for name in self.arranged():
            delattr(self, name)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def check(self, name: str) -> None:
        """Raises InputError, naming the matrix, when what was loaded is no matrix of this description."""
        check_types(types_of(self.stored()), self.matrix, name)
        check_indices(self.stored(), self.matrix, name)

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew at every access: (O, I), or (I, O) where the model's own parameter is."""
        weight = self._dense()
        return weight.T if self.matrix.transposed else weight

    def _dense(self) -> Tensor:
        """(O, I), made on the device."""
        if self.prepared_for is None:
            return decode_rows(self.stored(), self.matrix, 0, self.out_features)
        kernel, arranged = kernel_for(self.matrix, self.prepared_for), self.arranged()
        assert kernel is not None
        weight = torch.empty(self.matrix.shape, dtype=self.matrix.dtype, device=next(iter(arranged.values())).device)
        kernel.expand(arranged, self.matrix, weight)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), in the dtype of `x`."""
        flat = x.reshape(-1, self.in_features)
        if x.dtype == self.prepared_for:
            y = dispatch.matmul(flat, self.arranged(), self.matrix, self.rows)
        elif self.prepared_for is not None:  # the model was cast since
            y = linear(flat, self._dense().to(x.dtype))
        else:
            y = matmul(flat, self.stored(), self.matrix, self.rounds and len(flat) > fp8.FEW_TOKENS)
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

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        for part, tensor in self.stored().items():
            destination[prefix + part] = tensor
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, *args: Any) -> None:
        dtype = self.prepared_for
        if dtype is not None:
            self._hold(self.stored())
            self.prepared_for = None
        super()._load_from_state_dict(*args)
        if dtype is not None:
            self.prepare(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseLinear":
        buffers = {id(buffer) for buffer in self.buffers(recurse=False)}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            cast_too = id(tensor) in buffers and moved.dtype != tensor.dtype
            return tensor.to(moved.device) if cast_too else moved

        inputs = next(self.buffers(recurse=False)).new_empty(0, dtype=self.prepared_for or self.matrix.dtype)
        super()._apply(move, recurse)
        prepare(self, fn(inputs).dtype)
        return self


def prepare(model: nn.Module, dtype: torch.dtype) -> None:
    """Arrange all layers of a model on a GPU for the kernels, if it can run them (see `SparseLinear.prepare`)."""
    for layer in model.modules():
        if isinstance(layer, SparseLinear) and compiles_for(next(layer.buffers(recurse=False)).device):
            layer.prepare(dtype)


def matmul(x: Tensor, stored: Mapping[str, Tensor], matrix: StoredMatrix, rounds: bool = False) -> Tensor:
    """x (T, I) -> x Wᵀ (T, O), decoding a strip of rows of W at a time; `rounds` as in `SparseLinear`."""
    multiply = fp8.twin if rounds else linear
    num_weights = STRIP if x.device.type == "cpu" else DEVICE_STRIP
    parts = [
        multiply(x, decode_rows(stored, matrix, first, last).to(x.dtype))
        for first, last in strips(matrix.shape, num_weights)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
