"""One compressed matrix as the tensors that the artifact stores: nothing but what its target needs.

    values   kept weights in row-major order, in the checkpoint's dtype         (no grid)
    codes    kept codes in row-major order, a bit stream of `bits` each         (grid)
    scales   (O, G) float16                                                     (grid)
    zeros    (O, G) integers as a bit stream of `bits` each                     (asymmetric grid)
    mask     (O * I) bits, 1 = kept                                             (unstructured, sparsity above 0)
    indices  place of each kept weight in its group, ceil(log2 M) bits each     (N:M, N below M)

So 2:4 + int4 with groups of 128 takes 2 + 1 + 0.125 bits per weight, and 50% + int4 takes the same.
"""

import hashlib

import torch
from torch import Tensor

from mspc.formats.bits import pack_bits, unpack_bits
from mspc.quant import dequantize, groups_of
from mspc.types import NM, Codes, CompressedLinear, Target


def index_bits(pattern: NM) -> int:
    return (pattern.of - 1).bit_length()


def pack(matrix: CompressedLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    mask = matrix.mask.cpu()
    pattern, grid = matrix.target.pattern, matrix.target.grid
    if matrix.codes is None or grid is None:
        tensors["values"] = matrix.weight.cpu()[mask].to(dtype)
    else:
        tensors["codes"] = pack_bits(matrix.codes.values.cpu()[mask], grid.bits)
        tensors["scales"] = matrix.codes.scales.cpu().contiguous()
        if not grid.symmetric:
            tensors["zeros"] = pack_bits(matrix.codes.zeros, grid.bits)
    if isinstance(pattern, NM):
        if pattern.keep < pattern.of:
            columns = torch.arange(mask.shape[1]).expand_as(mask)[mask]
            tensors["indices"] = pack_bits((columns % pattern.of).to(torch.uint8), index_bits(pattern))
    elif pattern.sparsity > 0:
        tensors["mask"] = pack_bits(mask.to(torch.uint8), 1)
    return tensors


def unpack(tensors: dict[str, Tensor], shape: tuple[int, int], target: Target, dtype: torch.dtype) -> CompressedLinear:
    """The matrix (O, I) as the model uses it: `weight` has the checkpoint's dtype, whatever the solver worked in."""
    mask = _unpack_mask(tensors, shape, target)
    kept, grid = int(mask.sum()), target.grid
    if grid is None:
        weight = torch.zeros(shape, dtype=dtype)
        weight[mask] = tensors["values"]
        return CompressedLinear(weight, mask, target)
    scales = tensors["scales"]
    middle = torch.full(scales.shape, 2 ** (grid.bits - 1), dtype=torch.uint8)
    zeros = middle if grid.symmetric else unpack_bits(tensors["zeros"], grid.bits, scales.numel()).view(scales.shape)
    values = zeros.repeat_interleave(groups_of(shape[1], grid), 1)
    values[mask] = unpack_bits(tensors["codes"], grid.bits, kept)
    codes = Codes(values, scales, zeros)
    return CompressedLinear(dequantize(codes).to(dtype), mask, target, codes)


def digest(matrix: CompressedLinear) -> str:
    """sha256 of what every export must hold: codes, scales and zeros of a grid, else the weights."""
    codes = matrix.codes
    parts = [matrix.weight] if codes is None else [codes.values, codes.scales, codes.zeros]
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(part.cpu().flatten().view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def _unpack_mask(tensors: dict[str, Tensor], shape: tuple[int, int], target: Target) -> Tensor:
    pattern, numel = target.pattern, shape[0] * shape[1]
    if isinstance(pattern, NM) and pattern.keep < pattern.of:
        kept = numel // pattern.of * pattern.keep
        places = unpack_bits(tensors["indices"], index_bits(pattern), kept).view(-1, pattern.keep)
        groups = torch.zeros(numel // pattern.of, pattern.of, dtype=torch.bool)
        return groups.scatter_(1, places.long(), True).view(shape)
    if "mask" in tensors:
        return unpack_bits(tensors["mask"], 1, numel).bool().view(shape)
    return torch.ones(shape, dtype=torch.bool)
