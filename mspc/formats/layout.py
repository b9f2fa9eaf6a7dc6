"""The layout of a compressed matrix: the tensors by which the artifact and the sparse export store it.

K is the number of kept weights of a row, where every row keeps the same number: with N:M, and without pruning.

    values   (O, K), or (nnz,) when unstructured: kept weights in row-major order, in the checkpoint's dtype   (no grid)
    codes    uint8 (O, ceil(K b / 8)), or (ceil(nnz b / 8),): kept codes, a bit stream of b bits each          (grid)
    scales   float16 (O, G)                                                                                   (grid)
    zeros    uint8 (O, ceil(G b / 8)): zero points, a bit stream of b bits each                    (asymmetric grid)
    mask     uint8 (O, ceil(I / 8)) bits, 1 = kept                                 (unstructured, sparsity above 0)
    indices  uint8 (O, ceil(K c / 8)): index of each kept weight in its group, c = ceil(log2 M) bits  (N:M, N below M)

Every row begins at a byte. Only the kept weights of an unstructured matrix are one stream. So 2:4 + int4 with
groups of 128 takes 2 + 1 + 0.125 bits per weight, and 50% + int4 takes the same.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from mspc.formats.bits import pack_bits, pack_rows
from mspc.formats.decoding import STRIP, check_indices, decode_codes, decode_mask, decode_rows, row_offsets, strips
from mspc.formats.description import StoredMatrix, check_types, index_bits, types_of
from mspc.numerics.quant import dequantize
from mspc.types import NM, Codes, CompressedLinear, Target

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(matrix: CompressedLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    """The stored tensors of a matrix, on the CPU; `dtype` is that of values without a grid."""
    tensors: dict[str, Tensor] = {}
    mask = matrix.mask.cpu()
    pattern, grid = matrix.target.pattern, matrix.target.grid
    has_mask = _describe((mask.shape[0], mask.shape[1]), matrix.target, dtype).has_mask
    rows = () if has_mask else (len(mask), -1)  # without a mask, all rows keep the same number
    if matrix.codes is None or grid is None:
        kept = _kept(matrix.weight.cpu().to(dtype), mask)
        tensors["values"] = kept.view(rows) if rows else kept
    else:
        codes = _kept(matrix.codes.values.cpu(), mask)
        tensors["codes"] = pack_rows(codes.view(rows), grid.bits) if rows else pack_bits(codes, grid.bits)
        tensors["scales"] = matrix.codes.scales.cpu().contiguous()
        if not grid.symmetric:
            tensors["zeros"] = pack_rows(matrix.codes.zeros.cpu(), grid.bits)
    if isinstance(pattern, NM) and pattern.keep < pattern.of:
        indices = (torch.arange(mask.shape[1]) % pattern.of).to(torch.uint8).expand_as(mask)
        tensors["indices"] = pack_rows(_kept(indices, mask).view(len(mask), -1), index_bits(pattern))
    elif has_mask:
        tensors["mask"] = pack_rows(mask.to(torch.uint8), 1)
    return tensors


def num_bytes(shape: tuple[int, int], target: Target, dtype: torch.dtype, *, exported: bool = False) -> int:
    """Bytes that `pack` makes of a matrix of this shape and target; if `exported`, with the row offsets."""
    tensors = _describe(shape, target, dtype).tensors()
    if not exported:
        tensors.pop("row_offsets", None)
    return sum(dtype.itemsize * prod(shape) for dtype, shape in tensors.values())


def _kept(values: Tensor, mask: Tensor) -> Tensor:
    """`values[mask]`, by numpy, which is twice as fast. As integers, since numpy has no bfloat16."""
    integers = values.view(INTEGERS[values.itemsize])
    return torch.from_numpy(integers.numpy()[mask.numpy()]).view(values.dtype)


def _describe(shape: tuple[int, int], target: Target, dtype: torch.dtype) -> StoredMatrix:
    return StoredMatrix(shape, target.pattern, target.grid, dtype)


def unpack(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], target: Target, dtype: torch.dtype, name: str = "the matrix"
) -> CompressedLinear:
    """The matrix (O, I) as the model uses it: `weight` has `dtype`, that of the checkpoint.

    Raises InputError, naming the matrix, for tensors that do not fit this shape and target. Nothing is allocated
    that the size of the tensors does not justify.
    """
    matrix = _describe(shape, target, dtype)
    return decode(with_offsets(tensors, matrix, name), matrix, name)


def with_offsets(tensors: Mapping[str, Tensor], matrix: StoredMatrix, name: str) -> dict[str, Tensor]:
    """The tensors of a matrix as the sparse export has them: with the row offsets, which an artifact leaves out.

    Raises InputError, naming the matrix, for tensors of another dtype or shape than it needs.
    """
    if not matrix.has_mask:
        check_types(types_of(tensors), matrix, name)
        return dict(tensors)
    check_types(types_of(tensors) | {"row_offsets": matrix.tensors()["row_offsets"]}, matrix, name)
    return {**tensors, "row_offsets": row_offsets(tensors["mask"])}


def decode(stored: Mapping[str, Tensor], matrix: StoredMatrix, name: str) -> CompressedLinear:
    """The matrix of tensors whose types were checked. Raises InputError when their values do not fit together."""
    check_indices(stored, matrix, name)
    weight, mask = torch.empty(matrix.shape, dtype=matrix.dtype), torch.empty(matrix.shape, dtype=torch.bool)
    if matrix.grid is None:
        for first, last in strips(matrix.shape):
            mask[first:last] = decode_mask(stored, matrix, first, last)
            weight[first:last] = decode_rows(stored, matrix, first, last)
        return CompressedLinear(weight, mask, matrix.target)
    scales = stored["scales"]
    codes = Codes(torch.empty(matrix.shape, dtype=torch.uint8), scales, torch.empty(scales.shape, dtype=torch.uint8))
    for first, last in strips(matrix.shape):
        part = decode_codes(stored, matrix, first, last)
        mask[first:last] = decode_mask(stored, matrix, first, last)
        codes.values[first:last], codes.zeros[first:last] = part.values, part.zeros
        weight[first:last] = dequantize(part)
    return CompressedLinear(weight, mask, matrix.target, codes)


def digest(matrix: CompressedLinear) -> str:
    """sha256 of the content that every export must hold: codes, scales and zeros of a grid, else the weights."""
    codes = matrix.codes
    parts = [matrix.weight] if codes is None else [codes.values, codes.scales, codes.zeros]
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(part.cpu().flatten().view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def as_stored(matrix: CompressedLinear, dtype: torch.dtype) -> CompressedLinear:
    """Round a solver's result to what `pack` stores, on its device: a weight (O, I) of the checkpoint's `dtype`.

    Weight, mask and codes are bitwise those of `unpack(pack(matrix, dtype), ...)`, without the detour through bits:
    pruned weights are +0.0, and pruned codes are the code of zero.
    """
    mask, grid = matrix.mask.contiguous(), matrix.target.grid
    weight = torch.empty(mask.shape, dtype=dtype, device=mask.device)
    rows = strips((mask.shape[0], mask.shape[1]), STRIP if mask.device.type == "cpu" else mask.numel())
    if matrix.codes is None or grid is None:
        integers = weight.view(INTEGERS[weight.itemsize])  # which times 0 are 0 even where the weight is infinite
        for first, last in rows:
            weight[first:last] = matrix.weight[first:last]
            integers[first:last] *= mask[first:last]
        return replace(matrix, weight=weight, mask=mask, codes=None)
    scales, zeros = matrix.codes.scales.contiguous(), matrix.codes.zeros.contiguous()
    if grid.symmetric:
        zeros = torch.full_like(zeros, 2 ** (grid.bits - 1))
    codes = Codes(torch.empty_like(mask, dtype=torch.uint8), scales, zeros)
    for first, last in rows:
        code_of_zero = zeros[first:last].repeat_interleave(mask.shape[1] // zeros.shape[1], 1)
        # Modulo 256, as uint8 is: several times as fast as choosing by a mask.
        kept = (matrix.codes.values[first:last] - code_of_zero) * mask[first:last]
        codes.values[first:last] = kept + code_of_zero
        weight[first:last] = dequantize(Codes(codes.values[first:last], scales[first:last], zeros[first:last]))
    return replace(matrix, weight=weight, mask=mask, codes=codes)
