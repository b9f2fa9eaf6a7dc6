"""Adds to Triton's interpreter the PTX instructions of the kernels, after the PTX manual, and rounding.

`install()` makes `tl.inline_asm_elementwise` run its assembly, one register for every element. Conversions to bfloat16
round to nearest even as on devices, where the interpreter truncates.
"""

import re
from collections.abc import Callable

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Registers = np.ndarray
"""uint32, one for every element."""


def _lop3(a: Registers, b: Registers, c: Registers, table: Registers) -> Registers:
    """Bit by bit: the bit of the table at index 4 a + 2 b + c."""
    found = np.zeros_like(a)
    for index in range(8):
        if int(table.flat[0]) >> index & 1:
            chosen = [x if index >> shift & 1 else ~x for x, shift in ((a, 2), (b, 1), (c, 0))]
            found |= chosen[0] & chosen[1] & chosen[2]
    return found


def _prmt(a: Registers, b: Registers, selector: Registers) -> Registers:
    """Byte i of the result is the byte of (b, a) that nibble i of the selector names; its bit 3 repeats the sign."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    found = np.zeros_like(a)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = (both >> (8 * (nibble & np.uint32(7))).astype(np.uint64) & np.uint64(255)).astype(np.uint32)
        sign = np.where(byte >> np.uint32(7) == 1, np.uint32(255), np.uint32(0))
        found |= np.where(nibble >> np.uint32(3) == 1, sign, byte) << np.uint32(8 * i)
    return found


def _of_halves(function: Callable[..., np.ndarray], dtype: torch.dtype) -> Callable[..., Registers]:
    """A function of float64 on both 16-bit halves, rounded once."""

    def apply(*operands: Registers) -> Registers:
        halves = [
            torch.from_numpy(np.ascontiguousarray(x).view(np.int16)).view(dtype).double().numpy() for x in operands
        ]
        rounded = torch.from_numpy(function(*halves)).to(dtype)
        return rounded.view(torch.int16).numpy().view(np.uint32)

    return apply


def _popc(a: Registers) -> Registers:
    return sum(a >> np.uint32(i) & np.uint32(1) for i in range(32)).astype(np.uint32)


INSTRUCTIONS: dict[str, Callable[..., Registers]] = {
    "mov.b32": lambda a: a,
    "shr.u32": lambda a, b: a >> b,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "popc.b32": _popc,
    "add.rn.f16x2": _of_halves(lambda a, b: a + b, torch.float16),
    "fma.rn.f16x2": _of_halves(lambda a, b, c: a * b + c, torch.float16),
    "fma.rn.bf16x2": _of_halves(lambda a, b, c: a * b + c, torch.bfloat16),
}


def run(assembly: str, num_outputs: int, inputs: list[Registers]) -> list[Registers]:
    """The output registers of assembly whose inputs are $num_outputs and following."""
    registers = {f"${num_outputs + i}": x for i, x in enumerate(inputs)}
    shape = inputs[0].shape
    for line in re.findall(r"[^;{}]+;", assembly):
        name, _, operands = line.strip().rstrip(";").partition(" ")
        if name == ".reg":
            continue
        to, *sources = (operand.strip() for operand in operands.split(","))
        values = [registers[s] if s in registers else np.full(shape, int(s, 0), np.uint32) for s in sources]
        registers[to] = INSTRUCTIONS[name](*values)
    return [registers[f"${i}"] for i in range(num_outputs)]


def _inline_asm_elementwise(asm, constraints, args, dtype, is_pure, pack, **_):
    assert pack == 1, "elements that share a register are not modelled"
    operands = [np.asarray(arg.handle.data if isinstance(arg, tl.tensor) else int(arg)) for arg in args]
    inputs = [np.ascontiguousarray(x).astype(np.int32).view(np.uint32) for x in np.broadcast_arrays(*operands)]
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    outputs = run(getattr(asm, "value", asm), len(dtypes), inputs)
    shape = list(outputs[0].shape)
    tensors = tuple(
        tl.tensor(interpreter.TensorHandle(output.view(np.int32), tl.int32), tl.block_type(tl.int32, shape))
        for output in outputs
    )
    return tensors if isinstance(dtype, tuple) else tensors[0]


def install() -> None:
    truncate = interpreter.InterpreterBuilder.cast_impl

    def round_to_nearest(builder, source, dst_type):
        if source.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16)
            return interpreter.TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)
        return truncate(builder, source, dst_type)

    interpreter.InterpreterBuilder.cast_impl = round_to_nearest
    tl.inline_asm_elementwise = _inline_asm_elementwise
