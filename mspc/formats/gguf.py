"""Blocks of GGUF: 32 weights of a row and the float16 scale that they share.

Q4_0 is the scale and 16 bytes, with weight i in the low and weight i + 16 in the high half of byte i, as codes with
zero point 8. Q8_0 is the scale and 32 signed bytes. Both are symmetric grids with groups of 32, bit for bit.
"""

import torch
from torch import Tensor

from mspc.types import Codes

BLOCK = 32
HALF = BLOCK // 2
SCALE_BYTES = 2


def block_bytes(bits: int) -> int:
    """Bytes of one block of 32 weights: 18 of Q4_0 (4 bits), 34 of Q8_0 (8 bits)."""
    return SCALE_BYTES + BLOCK * bits // 8


def pack_blocks(codes: Codes, bits: int) -> Tensor:
    """Symmetric codes (O, I) of 4 or 8 bits with scales (O, I / 32) -> uint8 (O, I / 32 * block_bytes(bits))."""
    num_rows, num_blocks = codes.scales.shape
    values = codes.values.view(num_rows, num_blocks, BLOCK)
    # Flipping its highest bit makes a code the byte of code - 128 in two's complement.
    packed = values[..., :HALF] | (values[..., HALF:] << 4) if bits == 4 else values ^ 0x80
    scales = codes.scales.contiguous().view(torch.uint8).view(num_rows, num_blocks, SCALE_BYTES)
    return torch.cat([scales, packed], 2).view(num_rows, -1)
