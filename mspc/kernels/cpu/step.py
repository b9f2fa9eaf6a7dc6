"""One token through all blocks of a decoder in one call of the C++ library, key-value cache included.

Between its products a block has ten small operations, which take longer in torch than the products of a small model.
Blocks are like Llama's: RMSNorm, rotations, grouped attention, a gated MLP. Those of Gemma 3, Granite and SmolLM3 have
other numbers, or some norms more.

B sequences, H heads of queries, K of keys and values, D dimensions of a head, L tokens of the cache.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mspc.errors import MspcError
from mspc.formats.description import StoredMatrix
from mspc.kernels.cpu.kernel import describe
from mspc.kernels.cpu.library import Matrix, isa, library


class Part(NamedTuple):
    """A matrix as `kernel` holds it, and its bias."""

    repacked: dict[str, Tensor]
    matrix: StoredMatrix
    bias: Tensor | None = None
    """float32 (O,)."""


@dataclass(frozen=True, slots=True)
class Layer:
    """The matrices of a block, and its norms, float32."""

    qkv: Sequence[Part]
    """Queries, keys and values; or one matrix with the rows of all three."""
    out: Part
    gate_up: Sequence[Part]
    """Gates and up; or one matrix with the rows of both."""
    down: Part
    norms: tuple[Tensor, Tensor]
    """(hidden,), before attention and before the MLP."""
    qk_norms: tuple[Tensor, Tensor] | None
    """(D,) each."""
    after_norms: tuple[Tensor, Tensor] | None = None
    """(hidden,), of what attention and MLP add."""
    window: int = 0
    """The most tokens that one attends to, with itself; 0 for any number."""


@dataclass(frozen=True, slots=True)
class Constants:
    """Numbers of a decoder."""

    eps: float
    """The same for all norms."""
    scale: float
    """By which products of queries and keys are multiplied."""
    residual: float = 1.0
    """By which that is multiplied which attention and MLP add."""
    is_gelu: bool = False
    """The activation of gates is the tanh form of GELU, else SiLU."""
    planes: int = 2
    """Inputs of codes are rounded to 16 bits with two planes, and to 8 with one."""


class _Part(ctypes.Structure):
    _fields_ = [("matrix", ctypes.POINTER(Matrix)), ("bias", ctypes.c_void_p)]


class _Layer(ctypes.Structure):
    """`mspc_layer` of step.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("num_qkv", "num_gate_up")),
        ("qkv", _Part * 3), ("out", _Part), ("gate_up", _Part * 2), ("down", _Part),
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "after_attention", "after_mlp")),
        *((name, ctypes.c_void_p) for name in ("q_norm", "k_norm", "cos", "sin", "cache")),
        ("window", ctypes.c_int64),
    ]  # fmt: skip


_SIZES = ("batch", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "length", "num_layers")


class _Decoder(ctypes.Structure):
    """`mspc_decoder` of step.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (*_SIZES, "isa", "planes", "is_gelu")),
        *((name, ctypes.c_double) for name in ("eps", "scale", "residual")),
        ("norm", ctypes.c_void_p), ("layers", ctypes.POINTER(_Layer)),
    ]  # fmt: skip


class Step:
    """Steps of B sequences with one cache; the tensors that it is given are read where they are, and kept."""

    def __init__(
        self, layers: Sequence[Layer], caches: Sequence[Tensor], rotations: Sequence[tuple[Tensor, Tensor]],
        norm: Tensor, constants: Constants,
    ) -> None:  # fmt: skip
        """`caches` (2, B, K, L, D) hold keys and values, and `rotations` are cosines and sines (L, D).
        `norm` is the last one. All are float32 and contiguous. Raises MspcError for sizes that do not fit.
        """
        self._kept: list[object] = [layers, caches, rotations, norm]
        _, batch, kv_heads, length, head_dim = caches[0].shape
        heads, hidden = layers[0].out.matrix.shape[1] // head_dim, layers[0].out.matrix.shape[0]
        intermediate = layers[0].down.matrix.shape[1]
        self.shape, self.length = (batch, hidden), length
        rows = {"qkv": (heads + 2 * kv_heads) * head_dim, "gate_up": 2 * intermediate}
        for layer, cache, rotation in zip(layers, caches, rotations, strict=True):
            _check(layer, rows, hidden, intermediate, heads * head_dim)
            _check_tensors((2, batch, kv_heads, length, head_dim), cache)
            _check_tensors((head_dim,), *(layer.qk_norms or ()))
            _check_tensors((hidden,), *layer.norms, *(layer.after_norms or ()))
            _check_tensors((length, head_dim), *rotation)
        _check_tensors((hidden,), norm)
        described = (_Layer * len(layers))(*map(self._described, layers, caches, rotations))
        sizes = batch, hidden, intermediate, heads, kv_heads, head_dim, length, len(layers)
        own = isa(), constants.planes, constants.is_gelu, constants.eps, constants.scale, constants.residual
        self._decoder = _Decoder(*sizes, *own, norm.data_ptr(), described)
        loaded = library()
        assert loaded is not None
        self._pointer, self._call = ctypes.byref(self._decoder), loaded.mspc_step
        floats = loaded.mspc_step_floats(self._pointer)
        self._workspace = torch.empty(floats, dtype=torch.float32, device="cpu")

    def __call__(self, x: Tensor, first: int) -> Tensor:
        """Embeddings (B, hidden) of the tokens at position `first` -> inputs of the head (B, hidden), float32.

        Keys and values of that position are written to the caches.
        """
        fits = x.shape == self.shape and x.dtype == torch.float32 and x.is_cpu
        if not fits or not 0 <= first < self.length:
            raise MspcError(
                f"A step at {first} with inputs {x.dtype} {tuple(x.shape)} does not fit caches of {self.length} tokens "
                f"and inputs of {self.shape} in float32."
            )
        x = x.clone(memory_format=torch.contiguous_format)
        self._call(self._pointer, x.data_ptr(), first, self._workspace.data_ptr(), torch.get_num_threads())
        return x

    def _described(self, layer: Layer, cache: Tensor, rotation: tuple[Tensor, Tensor]) -> _Layer:
        none = (None, None)
        tensors = (*layer.norms, *(layer.after_norms or none), *(layer.qk_norms or none), *rotation, cache)
        return _Layer(
            len(layer.qkv), len(layer.gate_up),
            (_Part * 3)(*map(self._part, layer.qkv)), self._part(layer.out),
            (_Part * 2)(*map(self._part, layer.gate_up)), self._part(layer.down),
            *(None if tensor is None else tensor.data_ptr() for tensor in tensors), layer.window,
        )  # fmt: skip

    def _part(self, part: Part) -> _Part:
        described = describe(part.repacked, part.matrix).described
        self._kept.append(described)
        return _Part(ctypes.pointer(described), None if part.bias is None else part.bias.data_ptr())


def one_by_one(x: Tensor, copies: Sequence[dict[str, Tensor]], matrix: StoredMatrix) -> Callable[[], None]:
    """A call that multiplies x (I,), float32, by copies of a matrix in turn, with nothing between the products."""
    loaded, y, checked = library(), x.new_empty(matrix.shape[0]), [describe(copy, matrix) for copy in copies]
    assert loaded is not None
    pointers = (ctypes.POINTER(Matrix) * len(checked))(*(ctypes.pointer(one.described) for one in checked))
    call, where, out = loaded.mspc_products, x.data_ptr(), y.data_ptr()
    held = copies, x, y  # what the pointers point to lives as long as the call
    return lambda: call(pointers, len(held[0]), isa(), where, out, 2, torch.get_num_threads())


def _check(layer: Layer, rows: dict[str, int], hidden: int, intermediate: int, mixed: int) -> None:
    """Raises MspcError if matrices do not fit each other."""
    wanted = {
        "qkv": (layer.qkv, (1, 3), (rows["qkv"], hidden)),
        "out": ([layer.out], (1,), (hidden, mixed)),
        "gate_up": (layer.gate_up, (1, 2), (rows["gate_up"], hidden)),
        "down": ([layer.down], (1,), (hidden, intermediate)),
    }
    for name, (parts, counts, (num_rows, num_columns)) in wanted.items():
        shapes = [part.matrix.shape for part in parts]
        fits = sum(shape[0] for shape in shapes) == num_rows and all(shape[1] == num_columns for shape in shapes)
        if len(parts) not in counts or not fits:
            raise MspcError(f"{name} has matrices of {shapes}, and a block needs {(num_rows, num_columns)} in all.")
        for part in parts:
            _check_tensors((part.matrix.shape[0],), *([] if part.bias is None else [part.bias]))


def _check_tensors(shape: tuple[int, ...], *tensors: Tensor) -> None:
    for tensor in tensors:
        plain = tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.device.type == "cpu"
        if tensor.shape != shape or not plain:
            raise MspcError(f"A tensor of a step is {tensor.dtype} {tuple(tensor.shape)}, and must be float32 {shape}.")
