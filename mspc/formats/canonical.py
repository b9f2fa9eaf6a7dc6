"""One compressed matrix as the tensors that the artifact and the sparse export store: what its target needs, no more.

K is the number of kept weights of a row (of N:M, and without pruning, where every row keeps as many).

    values   (O, K), or (nnz,) when unstructured: kept weights in row-major order, in the checkpoint's dtype   (no grid)
    codes    uint8 (O, ceil(K b / 8)), or (ceil(nnz b / 8),): kept codes, a bit stream of b bits each          (grid)
    scales   float16 (O, G)                                                                                   (grid)
    zeros    uint8 (O, ceil(G b / 8)): zero points, a bit stream of b bits each                    (asymmetric grid)
    mask     uint8 (O, ceil(I / 8)) bits, 1 = kept                                 (unstructured, sparsity above 0)
    indices  uint8 (O, ceil(K c / 8)): place of each kept weight in its group, c = ceil(log2 M) bits  (N:M, N below M)

Every row begins at a byte, but for the kept weights of an unstructured matrix, which are one stream. So 2:4 + int4 with
groups of 128 takes 2 + 1 + 0.125 bits per weight, and 50% + int4 takes the same.
"""

import hashlib

import torch
from torch import Tensor

from mspc.errors import InputError
from mspc.formats.bits import pack_bits, pack_rows, unpack_bits, unpack_rows
from mspc.masks import num_pruned
from mspc.quant import dequantize, groups_of
from mspc.types import NM, Codes, CompressedLinear, Target


def index_bits(pattern: NM) -> int:
    return (pattern.of - 1).bit_length()


def pack(matrix: CompressedLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    mask = matrix.mask.cpu()
    pattern, grid = matrix.target.pattern, matrix.target.grid
    rows = () if has_mask(matrix.target) else (len(mask), -1)  # kept weights of a row, where all keep as many
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
        places = (torch.arange(mask.shape[1]) % pattern.of).to(torch.uint8).expand_as(mask)
        tensors["indices"] = pack_rows(_kept(places, mask).view(len(mask), -1), index_bits(pattern))
    elif has_mask(matrix.target):
        tensors["mask"] = pack_rows(mask.to(torch.uint8), 1)
    return tensors


def num_bytes(shape: tuple[int, int], target: Target, dtype: torch.dtype) -> int:
    """What `pack` makes of a matrix of this shape and target."""
    (num_rows, num_columns), pattern, grid = shape, target.pattern, target.grid
    kept = num_rows * num_columns - num_pruned(num_rows * num_columns, pattern.sparsity)
    if grid is None:
        total = kept * dtype.itemsize
    else:
        groups = num_columns // groups_of(num_columns, grid)
        in_rows = num_rows * _bytes(kept // num_rows, grid.bits)
        total = (_bytes(kept, grid.bits) if has_mask(target) else in_rows) + num_rows * groups * 2
        total += 0 if grid.symmetric else num_rows * _bytes(groups, grid.bits)
    if has_mask(target):
        total += num_rows * _bytes(num_columns, 1)
    elif isinstance(pattern, NM) and pattern.keep < pattern.of:
        total += num_rows * _bytes(kept // num_rows, index_bits(pattern))
    return total


def _kept(values: Tensor, mask: Tensor) -> Tensor:
    """`values[mask]`, by numpy, which is twice as fast at it; it does not know bfloat16."""
    as_integers = values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize])
    return torch.from_numpy(as_integers.numpy()[mask.numpy()]).view(values.dtype)


def has_mask(target: Target) -> bool:
    return not isinstance(target.pattern, NM) and target.pattern.sparsity > 0


def unpack(
    tensors: dict[str, Tensor], shape: tuple[int, int], target: Target, dtype: torch.dtype, name: str = "the matrix"
) -> CompressedLinear:
    """The matrix (O, I) as the model uses it: `weight` has the checkpoint's dtype, whatever the solver worked in.

    Raises InputError, naming the matrix, for tensors that are not those of this shape and target. Nothing is allocated
    that the size of the tensors does not justify.
    """
    mask = _unpack_mask(tensors, shape, target, name)
    kept, grid = int(mask.sum()), target.grid
    rows = () if has_mask(target) else (shape[0], kept // shape[0])
    if grid is None:
        values = _expect(tensors, "values", None, rows or (kept,), name)
        weight = torch.zeros(shape, dtype=dtype).masked_scatter_(mask, values.flatten().to(dtype))
        return CompressedLinear(weight, mask, target)
    size = groups_of(shape[1], grid, name)
    scales = _expect(tensors, "scales", torch.float16, (shape[0], shape[1] // size), name)
    zeros = torch.full(scales.shape, 2 ** (grid.bits - 1), dtype=torch.uint8)
    if not grid.symmetric:
        num_groups = scales.shape[1]
        packed = _expect(tensors, "zeros", torch.uint8, (shape[0], _bytes(num_groups, grid.bits)), name)
        zeros = unpack_rows(packed, grid.bits, num_groups)
    if rows:
        packed = _expect(tensors, "codes", torch.uint8, (rows[0], _bytes(rows[1], grid.bits)), name)
        codes = unpack_rows(packed, grid.bits, rows[1]).flatten()
    else:
        packed = _expect(tensors, "codes", torch.uint8, (_bytes(kept, grid.bits),), name)
        codes = unpack_bits(packed, grid.bits, kept)
    values = zeros.repeat_interleave(size, 1).masked_scatter_(mask, codes)
    all_codes = Codes(values, scales, zeros)
    return CompressedLinear(dequantize(all_codes).to(dtype), mask, target, all_codes)


def digest(matrix: CompressedLinear) -> str:
    """sha256 of what every export must hold: codes, scales and zeros of a grid, else the weights."""
    codes = matrix.codes
    parts = [matrix.weight] if codes is None else [codes.values, codes.scales, codes.zeros]
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(part.cpu().flatten().view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def _unpack_mask(tensors: dict[str, Tensor], shape: tuple[int, int], target: Target, name: str) -> Tensor:
    pattern, (num_rows, num_columns) = target.pattern, shape
    if has_mask(target):
        packed = _expect(tensors, "mask", torch.uint8, (num_rows, _bytes(num_columns, 1)), name)
        return unpack_rows(packed, 1, num_columns).bool()
    if isinstance(pattern, NM) and pattern.keep < pattern.of:
        if num_columns % pattern.of:
            raise InputError(f"{name}: its {num_columns} in features are no whole groups of {pattern}.")
        kept = num_columns // pattern.of * pattern.keep
        packed = _expect(tensors, "indices", torch.uint8, (num_rows, _bytes(kept, index_bits(pattern))), name)
        places = unpack_rows(packed, index_bits(pattern), kept).view(-1, pattern.keep)
        if int(places.max()) >= pattern.of or not bool((places[:, 1:] > places[:, :-1]).all()):
            raise InputError(f"{name}: its indices are not {pattern.keep} ascending places below {pattern.of} a group.")
        return _mask_of_places(places, pattern.of).view(shape)
    # All weights are kept: what holds them must be there before a mask of that size is made.
    part = "values" if target.grid is None else "codes"
    columns = num_columns if target.grid is None else _bytes(num_columns, target.grid.bits)
    _expect(tensors, part, None, (num_rows, columns), name)
    return torch.ones(shape, dtype=torch.bool)


def _mask_of_places(places: Tensor, of: int) -> Tensor:
    """uint8 (groups, N), each below M -> bool (groups, M). Up to 16 places are bits of one word, which is fast."""
    if of > 16:
        return torch.zeros(len(places), of, dtype=torch.bool).scatter_(1, places.long(), True)
    words = torch.zeros(len(places), dtype=torch.int16)
    for column in places.T:
        words |= torch.ones_like(words) << column
    return unpack_rows(words.view(torch.uint8).view(len(words), 2), 1, of).bool()


def _bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def _expect(
    tensors: dict[str, Tensor], part: str, dtype: torch.dtype | None, shape: tuple[int, ...], name: str
) -> Tensor:
    if part not in tensors:
        raise InputError(f"{name}: its {part} are missing.")
    tensor = tensors[part]
    if tuple(tensor.shape) != shape or tensor.dtype != (dtype or tensor.dtype):
        raise InputError(
            f"{name}: its {part} are {tensor.dtype} {tuple(tensor.shape)}, and its shape and target need "
            f"{dtype or 'values'} {shape}."
        )
    return tensor
