"""`mspc::product`, the one operator by which compressed matrices are multiplied, on every device and in every runtime.

    mspc::product(Tensor x, Tensor[] tensors, str what) -> Tensor      x (..., I) -> x Wᵀ (..., O)
    mspc::weight(Tensor[] tensors, str what) -> Tensor                 the dense weight (O, I)

`what` is a `Subject` as text. A text is the same in every process, so that graphs that were compiled can be kept, and
tensors are arguments, so that they can be moved, captured and shared. The choice by the number of tokens (`dispatch`)
is inside: whoever traces the operator at one length may call it at any other, even without guards.

The dispatcher of torch costs ten times what the body needs in Python. `product` therefore calls the body itself where
nothing but time tells the difference.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from mspc.errors import MspcError
from mspc.formats.description import StoredMatrix
from mspc.formats.targets import target_from_dict, target_to_dict
from mspc.kernels import KERNELS, ON_CPU, Kernel, dispatch, reference
from mspc.kernels.cpu import kernel as cpu
from mspc.kernels.timings import Choice

ALL_KERNELS: dict[str, Kernel] = KERNELS | ON_CPU
MOST_SUBJECTS = 2**14
"""Subjects that are kept parsed; models have some thousand matrices at most."""


@dataclass(frozen=True, slots=True)
class Subject:
    """All that a product depends on but the numbers in its tensors."""

    matrix: StoredMatrix
    parts: tuple[str, ...]
    """Names of the tensors, in order."""
    kernel_name: str | None = None
    """The kernel that they are repacked for; None if they are as stored."""
    dtype: torch.dtype | None = None
    """The dtype of inputs that the kernel multiplies. For others the dense weight is made."""
    schedule: tuple[Choice, ...] = ()
    """The methods by numbers of tokens; with a kernel, the last one is for any number."""
    planes: int = 2
    """On a CPU: inputs of codes are rounded to 16 bits with two planes, and to 8 with one."""

    @property
    def kernel(self) -> Kernel | None:
        return None if self.kernel_name is None else ALL_KERNELS[self.kernel_name]

    def text(self) -> str:
        row = target_to_dict(self.matrix.target) | {
            "shape": self.matrix.shape,
            "dtype": _name(self.matrix.dtype),
            "parts": self.parts,
            "kernel": self.kernel_name,
            "inputs": None if self.dtype is None else _name(self.dtype),
            "schedule": self.schedule,
            "planes": self.planes,
        }
        return json.dumps(row, separators=(",", ":"))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@lru_cache(maxsize=MOST_SUBJECTS)
def parsed(what: str) -> Subject:
    """The inverse of `Subject.text`."""
    row: dict[str, Any] = json.loads(what)
    target, (num_rows, num_columns) = target_from_dict(row), row["shape"]
    return Subject(
        StoredMatrix((num_rows, num_columns), target.pattern, target.grid, getattr(torch, row["dtype"])),
        tuple(row["parts"]), row["kernel"], None if row["inputs"] is None else getattr(torch, row["inputs"]),
        tuple(Choice(*choice) for choice in row["schedule"]), row["planes"],
    )  # fmt: skip


def product(x: Tensor, tensors: list[Tensor], what: str) -> Tensor:
    """x (..., I) -> x Wᵀ (..., O) in the dtype and on the device of x, with gradients for x.

    Raises MspcError for an x that does not fit.
    """
    if torch.compiler.is_compiling() or _is_watched(x):
        y: Tensor = torch.ops.mspc.product.default(x, tensors, what)
        return y
    return _product(x, tensors, what)


def weight(tensors: list[Tensor], what: str) -> Tensor:
    """The dense weight (O, I) on the device of the tensors, in the dtype of the matrix."""
    dense: Tensor = torch.ops.mspc.weight.default(tensors, what)
    return dense


def _is_watched(x: Tensor) -> bool:
    """Tell if gradients, a mode (fake tensors), a transform (vmap) or a trace has to see the operator."""
    return (
        type(x) is not Tensor
        or (x.requires_grad and torch.is_grad_enabled())
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


def _product(x: Tensor, tensors: Sequence[Tensor], what: str) -> Tensor:
    subject = parsed(what)
    num_rows, num_columns = subject.matrix.shape
    if x.shape[-1] != num_columns:
        raise MspcError(f"Inputs are {tuple(x.shape)}, and a matrix of {subject.matrix.shape} cannot take them.")
    named, kernel = dict(zip(subject.parts, tensors, strict=True)), subject.kernel
    if kernel is not None and x.dtype != subject.dtype:  # the model was cast after it was prepared
        return linear(x, _weight(tensors, what).to(x.dtype))
    if kernel is cpu:  # it takes x as it is
        return dispatch.matmul(x, kernel, named, subject.matrix, subject.schedule, subject.planes)
    flat = x.reshape(-1, num_columns)
    if kernel is None:
        y = reference.in_strips(flat, named, subject.matrix)
    else:
        y = dispatch.matmul(flat, kernel, named, subject.matrix, subject.schedule)
    return y.view(*x.shape[:-1], num_rows)


def _weight(tensors: Sequence[Tensor], what: str) -> Tensor:
    subject = parsed(what)
    named = dict(zip(subject.parts, tensors, strict=True))
    if subject.kernel is None:
        return reference.decoded(named, subject.matrix)
    return dispatch.expand(subject.kernel, named, subject.matrix, subject.matrix.dtype)


def _fake_product(x: Tensor, tensors: Sequence[Tensor], what: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], parsed(what).matrix.shape[0])


def _fake_weight(tensors: Sequence[Tensor], what: str) -> Tensor:
    matrix = parsed(what).matrix
    return tensors[0].new_empty(matrix.shape, dtype=matrix.dtype)


def _remember(ctx: Any, inputs: tuple[Tensor, list[Tensor], str], output: Tensor) -> None:
    x, tensors, ctx.what = inputs
    ctx.num_tensors, ctx.dtype = len(tensors), x.dtype
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, of_y: Tensor) -> tuple[Tensor, list[None], None]:
    """(..., O) -> (..., I): the rounding of inputs counts as none."""
    dense = weight(list(ctx.saved_tensors), ctx.what)
    return of_y @ dense.to(of_y.dtype), [None] * ctx.num_tensors, None


def _register() -> torch.library.Library:
    # torch.library.custom_op does the same at four times the cost of a call.
    library = torch.library.Library("mspc", "FRAGMENT")
    library.define("product(Tensor x, Tensor[] tensors, str what) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
    library.define("weight(Tensor[] tensors, str what) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
    library.impl("product", _product, "CompositeExplicitAutograd")
    library.impl("weight", _weight, "CompositeExplicitAutograd")
    torch.library.register_fake("mspc::product", _fake_product, lib=library)
    torch.library.register_fake("mspc::weight", _fake_weight, lib=library)
    torch.library.register_autograd("mspc::product", _gradient, setup_context=_remember, lib=library)
    return library


_LIBRARY = _register()
"""Operators are there as long as this."""
