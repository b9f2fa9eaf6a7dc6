"""Weights of checkpoints that other tools quantized, from the tensors that hold them.

Each layout is recognised by the ending of one of its tensors. All mean codes, minus their zero points, times their
scales, computed in float32.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mspc.formats.bits import unpack_rows

Shape = tuple[int, ...]
StoredType = tuple[str, Shape]
"""The name of a dtype, and a shape."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the 16 codes of a float of 4 bits (OCP Microscaling Formats, version 1.0)."""
AWQ_COLUMNS = (0, 4, 1, 5, 2, 6, 3, 7)
"""The field of column i of eight in a word of AWQ, from the low bits on."""


@dataclass(frozen=True)
class Scheme:
    """The quantization by config.json, as far as the tensors do not say it."""

    name: str
    """The method, for messages and notes."""
    bits: int = 8
    block: tuple[int, int] | None = None
    """Rows and columns that share a scale; None where the shapes tell."""
    zero_offset: int = 0
    """The number that zero points are stored without."""


@dataclass(frozen=True)
class Layout:
    """A quantized parameter as several tensors: a common beginning, and the endings given here."""

    mark: str
    """The ending of the tensor by which the layout is known."""
    parameter: str
    """The ending of the parameter."""
    needed: tuple[str, ...]
    optional: tuple[str, ...]
    shape: Callable[[Mapping[str, StoredType], Scheme], Shape]
    """Shape of the parameter, from dtypes and shapes of the tensors by their endings. Raises ValueError as `decode`."""
    decode: Callable[[Mapping[str, Tensor], Scheme], Tensor]
    """The parameter in float32. Raises ValueError, RuntimeError or IndexError for shapes that do not fit."""


def scaled_blocks(codes: Tensor, scales: Tensor, block: tuple[int, int] | None) -> Tensor:
    """float32 (..., O, I) from codes of that shape in any float type, and scales (..., o, i), each of a block.

    A last block may be cut off. Scales in uint8 are exponents of 2, stored plus 127. One scale is for all.
    """
    factors = torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()
    if factors.numel() == 1:
        return codes.float() * factors.reshape(())
    if factors.ndim == 1 and codes.ndim > 2:
        raise ValueError(f"{len(factors)} scales for codes of {codes.ndim} dimensions")
    if factors.ndim == 1:  # one for each row
        factors = factors[:, None]
    (rows, columns), (num_rows, num_columns) = codes.shape[-2:], factors.shape[-2:]
    if block is None or (-(-rows // block[0]), -(-columns // block[1])) != (num_rows, num_columns):
        if rows % num_rows or columns % num_columns:
            raise ValueError(f"{num_rows} x {num_columns} scales do not divide {rows} x {columns} codes")
        block = rows // num_rows, columns // num_columns
    factors = factors.repeat_interleave(block[0], -2)[..., :rows, :]
    return codes.float() * factors.repeat_interleave(block[1], -1)[..., :columns]


def unpack_e2m1(packed: Tensor) -> Tensor:
    """int8 or uint8 (..., n) -> float32 (..., 2 n): two floats of 4 bits a byte, the low bits first."""
    table = torch.tensor(E2M1, device=packed.device)
    values = unpack_rows(packed.view(torch.uint8).reshape(1, -1), 4, 2 * packed.numel())[0]
    return table.index_select(0, values.int()).view(*packed.shape[:-1], 2 * packed.shape[-1])


def _fp8(parts: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    codes, scales = parts[""], parts["_scale_inv"]
    if codes.dtype == torch.int8:  # floats of 4 bits, whose blocks are others
        return scaled_blocks(unpack_e2m1(codes), scales, None)
    return scaled_blocks(codes, scales, scheme.block)


def _fp8_shape(types: Mapping[str, StoredType], scheme: Scheme) -> Shape:
    dtype, shape = types[""]
    return (*shape[:-1], 2 * shape[-1]) if dtype == "int8" else shape


def _mxfp4(parts: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """(E, O, G, 16) bytes and (E, O, G) exponents -> (E, 32 G, O), as gpt-oss multiplies."""
    blocks, scales = parts["_blocks"], parts["_scales"]
    values = unpack_e2m1(blocks) * torch.exp2(scales.float() - 127)[..., None]
    return values.flatten(-2).transpose(-1, -2).contiguous()


def _mxfp4_shape(types: Mapping[str, StoredType], scheme: Scheme) -> Shape:
    *experts, rows, groups, width = types["_blocks"][1]
    return (*experts, 2 * groups * width, rows)


def _fields(words: Tensor, bits: int) -> Tensor:
    """int32 (R, W) -> int32 (R, 32 W / bits): a little-endian stream of codes for every row."""
    count = words.shape[1] * 32 // bits
    return unpack_rows(words.clone(memory_format=torch.contiguous_format).view(torch.uint8), bits, count).int()


def _of_groups(codes: Tensor, zeros: Tensor | int, scales: Tensor, group: Tensor | None) -> Tensor:
    """Codes (O, I) with zero points and scales (O, G); `group` is that of each input, otherwise they are in order."""
    if group is None:
        group = torch.arange(codes.shape[1], device=codes.device) // max(codes.shape[1] // scales.shape[1], 1)
    if isinstance(zeros, Tensor):
        zeros = zeros[:, group]
    return (codes - zeros) * scales.float()[:, group]


def _gptq(parts: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """qweight (I b / 32, O), qzeros (G, O b / 32), scales (G, O), g_idx (I,)."""
    codes = _fields(parts[".qweight"].T, scheme.bits)
    zeros = (_fields(parts[".qzeros"], scheme.bits) + scheme.zero_offset) & (2**scheme.bits - 1)
    group = parts.get(".g_idx")
    return _of_groups(codes, zeros.T, parts[".scales"].T, None if group is None else group.long())


def _gptq_shape(types: Mapping[str, StoredType], scheme: Scheme) -> Shape:
    words, rows = types[".qweight"][1]
    return rows, words * 32 // scheme.bits


def _awq(parts: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """qweight (I, O / 8), qzeros (G, O / 8), scales (G, O): words of eight columns in an order of their own."""

    def columns(words: Tensor) -> Tensor:
        return _fields(words, 4).view(len(words), -1, 8)[..., list(AWQ_COLUMNS)].flatten(1)

    return _of_groups(columns(parts[".qweight"]).T, columns(parts[".qzeros"]).T, parts[".scales"].T, None)


def _awq_shape(types: Mapping[str, StoredType], scheme: Scheme) -> Shape:
    inputs, words = types[".qweight"][1]
    return words * 8, inputs


def _packed(parts: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """weight_packed (O, I b / 32), weight_scale (O, G), weight_zero_point (O b / 32, G), weight_g_idx (I,)."""
    codes = _fields(parts[".weight_packed"], scheme.bits)
    rows, columns = parts[".weight_shape"].tolist()
    zeros: Tensor | int = 2 ** (scheme.bits - 1)
    if ".weight_zero_point" in parts:
        zeros = _fields(parts[".weight_zero_point"].T, scheme.bits)[:, :rows].T
    group = parts.get(".weight_g_idx")
    scales = parts[".weight_scale"].reshape(-1, parts[".weight_scale"].shape[-1]).expand(rows, -1)
    return _of_groups(codes[:rows, :columns], zeros, scales, None if group is None else group.long())


def _packed_shape(types: Mapping[str, StoredType], scheme: Scheme) -> Shape:
    rows, words = types[".weight_packed"][1]
    return rows, words * 32 // scheme.bits


def _scaled(parts: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """Integers or floats of 8 bits with scales, and zero points of the same shape as the scales."""
    codes, scales = parts[".weight"].float(), parts[".weight_scale"]
    if ".weight_zero_point" in parts:
        codes = codes - scaled_blocks(torch.ones_like(codes), parts[".weight_zero_point"].float(), scheme.block)
    return scaled_blocks(codes, scales, scheme.block)


def _scaled_shape(types: Mapping[str, StoredType], scheme: Scheme) -> Shape:
    return types[".weight"][1]


FP8 = Layout("_scale_inv", "", ("", "_scale_inv"), (), _fp8_shape, _fp8)
MXFP4 = Layout("_blocks", "", ("_blocks", "_scales"), (), _mxfp4_shape, _mxfp4)
GPTQ = Layout(".qweight", ".weight", (".qweight", ".qzeros", ".scales"), (".g_idx",), _gptq_shape, _gptq)
AWQ = Layout(".qweight", ".weight", (".qweight", ".qzeros", ".scales"), (), _awq_shape, _awq)
PACKED = Layout(
    ".weight_packed", ".weight", (".weight_packed", ".weight_scale", ".weight_shape"),
    (".weight_zero_point", ".weight_g_idx"), _packed_shape, _packed,
)  # fmt: skip
SCALED = Layout(
    ".weight_scale", ".weight", (".weight", ".weight_scale"), (".weight_zero_point",), _scaled_shape, _scaled
)
