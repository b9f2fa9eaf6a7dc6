"""Small integers as dense little-endian bit streams: value i occupies bits i*b .. i*b + b - 1, low bits first."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """uint8 (R, K), each below 2^bits -> uint8 (R, ceil(K * bits / 8)): a stream for every row, on the same device."""
    if bits == 1 and values.device.type == "cpu":
        return torch.from_numpy(np.packbits(values.numpy(), axis=1, bitorder="little"))
    rows, count = values.shape
    if 8 % bits == 0:
        positions = pad(values, (0, -count % (8 // bits))).view(rows, -1, 8 // bits)
        packed = positions[..., 0].clone()
        for position in range(1, 8 // bits):
            packed |= positions[..., position] << (bits * position)
        return packed
    # Eight values make `bits` whole bytes, so they are gathered in one int64, whose low bytes are kept.
    eights = pad(values, (0, -count % 8)).view(rows, -(-count // 8), 8)
    words = torch.zeros(eights.shape[:2], dtype=torch.int64, device=values.device)
    for position in range(8):
        words |= eights[..., position].long() << (bits * position)
    stream = words.view(torch.uint8).view(*eights.shape)[..., :bits].reshape(rows, eights.shape[1] * bits)
    return stream[:, : -(-count * bits // 8)].contiguous()


def unpack_rows(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse: uint8 (R, count), on the device of `packed`."""
    rows, width = packed.shape
    if bits == 8:
        return packed[:, :count]
    if 8 % bits == 0:
        values = _fields_of(packed, bits, 8)
    elif 12 % bits == 0:
        # Three bytes are two words of 12 bits.
        words = pad(pad(packed, (0, -width % 3)).view(rows, -(-width // 3), 3), (0, 1)).view(torch.int32)
        values = _fields_of(torch.cat([words & 0xFFF, words >> 12], -1), bits, 12)
    else:
        # Eight values are `bits` bytes, so they fit in one int64.
        num_eights = -(-count // 8)
        eights = pad(packed, (0, num_eights * bits - width)).view(rows, num_eights, bits)
        positions = bits * torch.arange(8, device=packed.device)
        values = ((pad(eights, (0, 8 - bits)).view(torch.int64) >> positions) & (2**bits - 1)).to(torch.uint8)
    return values.view(rows, values.numel() // max(rows, 1))[:, :count].contiguous()


def _fields_of(words: Tensor, bits: int, width: int) -> Tensor:
    """Words of `width` bits -> uint8, the fields of each side by side. A table is many times as fast as shifts."""
    all_words = torch.arange(2**width, dtype=torch.int16, device=words.device)[:, None]
    positions = bits * torch.arange(width // bits, dtype=torch.int16, device=words.device)
    fields = ((all_words >> positions) & (2**bits - 1)).to(torch.uint8)
    together = fields.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[width // bits])[:, 0]
    return together.index_select(0, words.flatten().int()).view(torch.uint8)


def take(values: Tensor, indices: Tensor) -> Tensor:
    """`values[indices]` for values (n,) and integers of any shape; twice as fast."""
    return values.index_select(0, indices.flatten()).view(indices.shape)


def take_bits(packed: Tensor, bits: int, indices: Tensor) -> Tensor:
    """The values at `indices` (integers of any shape) of one stream (its bytes,): uint8, of the shape of `indices`."""
    if bits == 8:
        return take(packed, indices)
    if 8 % bits == 0:
        per_byte = 8 // bits
        shift = (indices & (per_byte - 1)).to(torch.uint8) * bits
        return (take(packed, indices >> (per_byte.bit_length() - 1)) >> shift) & (2**bits - 1)
    first_bit = indices * bits
    byte = first_bit >> 3
    second_byte = take(packed, (byte + 1).clamp_(max=len(packed) - 1)).short()
    pair = take(packed, byte).short() | (second_byte << 8)
    return ((pair >> (first_bit & 7).short()) & (2**bits - 1)).to(torch.uint8)


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """uint8 of any shape -> uint8 (ceil(numel * bits / 8),): one stream."""
    return pack_rows(values.reshape(1, -1), bits)[0]


def unpack_bits(packed: Tensor, bits: int, numel: int) -> Tensor:
    """The inverse: uint8 (numel,)."""
    return unpack_rows(packed[None], bits, numel)[0]
