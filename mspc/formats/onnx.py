"""Codes as ONNX holds them: MatMulNBits of ONNX Runtime, and the block-wise DequantizeLinear of the standard.

Both want blocks of a power of two. A longer group is several blocks that share its scale, which changes no value.
"""

import torch
from torch import Tensor

from mspc.formats.bits import pack_rows
from mspc.types import Codes

SMALLEST_BLOCK, LARGEST_BLOCK = 16, 256


def block_size(group_size: int) -> int:
    """The longest block that divides a group: the largest power of two that divides it, up to 256."""
    return min(group_size & -group_size, LARGEST_BLOCK)


def pack_matmul_nbits(codes: Codes, bits: int, *, symmetric: bool) -> dict[str, Tensor]:
    """codes uint8 (O, B, block * bits / 8), scales float32 (O, B) and, unless symmetric, zeros uint8
    (O, ceil(B * bits / 8)): little-endian bit streams along the inputs, with B blocks in a row. `bits` is 2, 4 or 8.
    """
    size, scales, zeros = _in_blocks(codes)
    num_out, num_blocks = scales.shape
    packed = pack_rows(codes.values, bits).view(num_out, num_blocks, size * bits // 8)
    parts = {"codes": packed, "scales": scales}
    return parts if symmetric else parts | {"zeros": pack_rows(zeros, bits)}


def pack_dequantize_linear(codes: Codes, bits: int) -> dict[str, Tensor]:
    """The transpose, in blocks along axis 0: codes (I, O) and zeros (B, O) as unsigned integers of `bits` bits in one
    little-endian stream, uint8 (ceil(numel * bits / 8),); scales float32 (B, O). `bits` is 2, 4 or 8.
    """
    _, scales, zeros = _in_blocks(codes)
    return {
        "codes": pack_rows(codes.values.T.reshape(1, -1), bits)[0],
        "scales": scales.T.contiguous(),
        "zeros": pack_rows(zeros.T.reshape(1, -1), bits)[0],
    }


def _in_blocks(codes: Codes) -> tuple[int, Tensor, Tensor]:
    """The block size, and float32 scales and zeros (O, B) of every block."""
    group_size = codes.values.shape[1] // codes.scales.shape[1]
    size = block_size(group_size)
    scales, zeros = (part.repeat_interleave(group_size // size, 1) for part in (codes.scales, codes.zeros))
    return size, scales.to(torch.float32).contiguous(), zeros.contiguous()
