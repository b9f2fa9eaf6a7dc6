"""A linear layer that computes from the tensors of the sparse export (docs/sparse-format.md) and holds nothing else."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mspc.formats.decoding import check_indices
from mspc.formats.description import StoredMatrix, check_types, types_of
from mspc.kernels import KERNELS, ON_CPU, Kernel, dispatch, kernel_for, product
from mspc.kernels.launch import compiles_for
from mspc.kernels.timings import Choice


class SparseLinear(nn.Module):
    """y = x Wᵀ + bias, with W (O, I) as `matrix` describes it.

    Its buffers are the stored tensors under their stored names, on meta until it is loaded. `prepare`, or moving the
    layer to a GPU, replaces them by the tensors that a kernel repacks them to. A state dict holds what the export
    holds, either way. Buffers move with the module, and are never cast. The product is the operator `mspc::product`.
    """

    bias: nn.Parameter | None
    prepared_for: torch.dtype | None
    """The dtype of inputs that the buffers are repacked for; None while they are as stored."""
    kernel_name: str | None
    """The kernel that they are repacked for."""
    schedule: tuple[Choice, ...]
    """The methods of its products by numbers of tokens (`dispatch`)."""
    wants_cusparselt: bool
    """Keep a copy of the weight for cuSPARSELt where it can be used."""
    wants_int8: bool
    """Round the inputs of codes to 8 bits on a CPU."""
    subject: str
    """The description of the buffers that the operator reads (`product.Subject`)."""

    def __init__(self, matrix: StoredMatrix, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.matrix = matrix
        self.out_features, self.in_features = matrix.shape
        self.prepared_for, self.kernel_name, self.schedule = None, None, ()
        self.wants_cusparselt, self.wants_int8 = False, False
        for part, (dtype, shape) in matrix.tensors().items():
            self.register_buffer(part, torch.empty(shape, dtype=dtype, device="meta"))
        self.register_parameter("bias", bias)
        self._describe()

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
        repacked = self.repacked()
        device = dispatch.device_of(repacked)
        return {part: tensor.to(device) for part, tensor in self.kernel.unrepack(repacked, self.matrix).items()}

    @property
    def kernel(self) -> Kernel:
        """The kernel of a prepared layer. The layer holds its name, because a module cannot be copied or pickled."""
        assert self.kernel_name is not None
        return (KERNELS | ON_CPU)[self.kernel_name]

    def repacked(self) -> dict[str, Tensor]:
        """The tensors of a prepared layer, as its kernel reads them."""
        return dict(self.named_buffers(recurse=False))

    def prepare(self, dtype: torch.dtype, device: str = "cuda") -> None:
        """Repack the tensors, where they are, for a kernel of a type of device and inputs of this dtype, if any."""
        kernel_name = kernel_for(self.matrix, dtype, device)
        for_other_device = self.kernel_name is not None and (self.kernel_name in ON_CPU) != (device == "cpu")
        if kernel_name is None or self.prepared_for == dtype or for_other_device:
            return
        if self.prepared_for is None:  # codes are repacked alike for every dtype, and values have kernels for one only
            stored = self.stored()
            kernel = (KERNELS | ON_CPU)[kernel_name]
            repacked = kernel.repack({part: t.cpu() for part, t in stored.items()}, self.matrix)
            where = next(iter(stored.values())).device
            self._hold({name: tensor.to(where) for name, tensor in repacked.items()})
        self.prepared_for, self.kernel_name = dtype, kernel_name
        self._add_copy_and_schedule(measured=False)

    def use_cusparselt(self, measured: bool = False) -> None:
        """Multiply many tokens on sparse tensor cores, from a copy of the weight, where matrix and device allow it.

        `measured` measures which method is fastest for each number of tokens, unless this GPU has done so before.
        """
        self.wants_cusparselt = True
        if self.prepared_for is not None:
            self._add_copy_and_schedule(measured)

    def use_int8_inputs(self) -> None:
        """Round the inputs to 8 bits, for any number of tokens, where codes are multiplied in C++ on a CPU."""
        self.wants_int8 = True
        if self.prepared_for is not None:
            self._add_copy_and_schedule(measured=False)

    @property
    def has_int8_inputs(self) -> bool:
        return self.wants_int8 and self.kernel_name in ON_CPU and self.matrix.grid is not None

    def _add_copy_and_schedule(self, measured: bool) -> None:
        assert self.prepared_for is not None
        if self.wants_cusparselt and not self.copied_bytes():
            copy = dispatch.copy_for_cusparselt(self.kernel, self.repacked(), self.matrix, self.prepared_for)
            if copy is not None:
                self.register_buffer(dispatch.COPY, copy)
        self.schedule = dispatch.schedule(self.kernel, self.repacked(), self.matrix, self.prepared_for, measured)
        if self.has_int8_inputs:
            self.schedule = (Choice(dispatch.ANY_NUMBER, "fused", 0),)
        self._describe()

    def _describe(self) -> None:
        """Set `subject`, after a change of the buffers."""
        parts, planes = tuple(self._buffers), 1 if self.has_int8_inputs else 2
        prepared = (self.kernel_name, self.prepared_for, self.schedule, planes) if self.kernel_name else ()
        self.subject = product.Subject(self.matrix, parts, *prepared).text()

    def copied_bytes(self) -> int:
        """Bytes of the copy for cuSPARSELt, which only products of many tokens read."""
        copy = self.repacked().get(dispatch.COPY)
        return 0 if copy is None else copy.nbytes

    def held_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self._tensors())

    def stored_bytes(self) -> int:
        """Bytes of the matrix as it is stored, whatever it is repacked to."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in self.matrix.tensors().values())

    def _hold(self, tensors: dict[str, Tensor]) -> None:
        """Replace all buffers by these tensors."""
        for name in self.repacked():
            delattr(self, name)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def check(self, name: str) -> None:
        """Raises InputError, naming the matrix, if the loaded tensors do not fit its description."""
        check_types(types_of(self.stored()), self.matrix, name)
        check_indices(self.stored(), self.matrix, name)

    @property
    def weight(self) -> Tensor:
        """The dense weight, decoded at every access: (O, I), or (I, O) where the model's parameter is transposed."""
        weight = product.weight(self._tensors(), self.subject)
        return weight.T if self.matrix.transposed else weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), in the dtype of `x`."""
        y = product.product(x, self._tensors(), self.subject)
        return y if self.bias is None else y + self.bias

    def _tensors(self) -> list[Tensor]:
        return list(self._buffers.values())  # type: ignore[arg-type]  # none of them is None

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
        dtype, device = self.prepared_for, "cpu" if self.kernel_name in ON_CPU else "cuda"
        self.unprepare()
        super()._load_from_state_dict(*args)
        if dtype is not None:
            self.prepare(dtype, device)

    def unprepare(self) -> None:
        """Hold the tensors as they are stored."""
        if self.prepared_for is not None:
            self._hold(self.stored())
            self.prepared_for, self.kernel_name = None, None
            self._describe()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseLinear":
        buffers = {id(buffer) for buffer in self.buffers(recurse=False)}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            cast_too = id(tensor) in buffers and moved.dtype != tensor.dtype
            return tensor.to(moved.device) if cast_too else moved

        inputs = next(self.buffers(recurse=False)).new_empty(0, dtype=self.prepared_for or self.matrix.dtype)
        moved = fn(inputs)
        if moved.device.type != inputs.device.type and "cpu" in (moved.device.type, inputs.device.type):
            self.unprepare()
            buffers = {id(buffer) for buffer in self.buffers(recurse=False)}
        super()._apply(move, recurse)
        prepare(self, moved.dtype, on_cpu=self.kernel_name in ON_CPU)
        return self


def prepare(model: nn.Module, dtype: torch.dtype, on_cpu: bool = False) -> None:
    """Prepare every layer of a model on a GPU that runs the kernels, or on a CPU if asked (`SparseLinear.prepare`)."""
    for layer in model.modules():
        if isinstance(layer, SparseLinear):
            device = next(layer.buffers(recurse=False)).device
            if compiles_for(device):
                layer.prepare(dtype)
            elif on_cpu and device.type == "cpu":
                layer.prepare(dtype, "cpu")
