"""Small integers as a dense little-endian bit stream: value i occupies bits i*b .. i*b + b - 1, low bits first."""

import numpy as np
import torch
from torch import Tensor


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """uint8 of any shape, each below 2^bits -> uint8 (ceil(numel * bits / 8),)."""
    flat = values.reshape(-1, 1).cpu().numpy()
    stream = np.unpackbits(flat, axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(stream.reshape(-1), bitorder="little"))


def unpack_bits(packed: Tensor, bits: int, numel: int) -> Tensor:
    """The inverse: uint8 (numel,)."""
    stream = np.unpackbits(packed.cpu().numpy(), count=numel * bits, bitorder="little")
    return torch.from_numpy(np.packbits(stream.reshape(numel, bits), axis=1, bitorder="little").reshape(-1))
