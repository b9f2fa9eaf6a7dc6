"""Small integers as dense little-endian bit streams: value i occupies bits i*b .. i*b + b - 1, low bits first."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """uint8 (R, K), each below 2^bits -> uint8 (R, ceil(K * bits / 8)): a stream for every row."""
    if bits == 1:
        return torch.from_numpy(np.packbits(values.numpy(), axis=1, bitorder="little"))
    rows, count = values.shape
    if 8 % bits == 0:
        places = pad(values, (0, -count % (8 // bits))).view(rows, -1, 8 // bits)
        packed = places[..., 0].clone()
        for place in range(1, 8 // bits):
            packed |= places[..., place] << (bits * place)
        return packed
    # Eight values make `bits` whole bytes, so they are gathered in one int64, whose low bytes are kept.
    eights = pad(values, (0, -count % 8)).view(rows, -(-count // 8), 8)
    words = torch.zeros(eights.shape[:2], dtype=torch.int64)
    for place in range(8):
        words |= eights[..., place].long() << (bits * place)
    stream = words.view(torch.uint8).view(*eights.shape)[..., :bits].reshape(rows, eights.shape[1] * bits)
    return stream[:, : -(-count * bits // 8)].contiguous()


def unpack_rows(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse: uint8 (R, count)."""
    if bits == 1:
        return torch.from_numpy(np.unpackbits(packed.numpy(), axis=1, count=count, bitorder="little"))
    if 8 % bits == 0:
        places = [(packed >> (bits * place)) & (2**bits - 1) for place in range(8 // bits)]
        return torch.stack(places, -1).view(len(packed), -1)[:, :count].contiguous()
    rows, num_eights = len(packed), -(-count // 8)
    bytes_ = torch.zeros(rows, num_eights, 8, dtype=torch.uint8)
    bytes_[..., :bits] = pad(packed, (0, num_eights * bits - packed.shape[1])).view(rows, num_eights, bits)
    words = bytes_.view(torch.int64).view(rows, num_eights)
    values = torch.empty(rows, num_eights, 8, dtype=torch.uint8)
    for place in range(8):
        values[..., place] = (words >> (bits * place)) & (2**bits - 1)
    return values.view(rows, num_eights * 8)[:, :count].contiguous()


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """uint8 of any shape -> uint8 (ceil(numel * bits / 8),): one stream."""
    return pack_rows(values.reshape(1, -1), bits)[0]


def unpack_bits(packed: Tensor, bits: int, numel: int) -> Tensor:
    """The inverse: uint8 (numel,)."""
    return unpack_rows(packed[None], bits, numel)[0]
