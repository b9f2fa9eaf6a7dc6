"""Rows and columns of a stored matrix as a stored matrix, as tensor parallelism needs them; nothing is rounded again.

Rows are cut between the bytes of their streams, and columns too where they are bytes. Else streams are unpacked and
packed again. Letters: R rows, K kept weights of a row or of the matrix, G groups of a row.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import gcd

import torch
from torch import Tensor
from torch.nn.functional import pad

from mspc.errors import InputError
from mspc.formats.bits import pack_bits, pack_rows, unpack_bits, unpack_rows
from mspc.formats.decoding import decode_mask
from mspc.formats.description import StoredMatrix, index_bits
from mspc.types import NM, Grid, Unstructured

Range = tuple[int, int]
"""The first and one after the last."""
Cut = tuple[dict[str, Tensor], StoredMatrix]


def cut(
    stored: Mapping[str, Tensor], matrix: StoredMatrix, rows: Range, columns: Range, name: str = "the matrix"
) -> Cut:
    """The tensors and the description of W[rows, columns] (R, C), on the CPU. Its dense weight is that slice, bitwise.

    `stored` was checked (`check_types`, `check_indices`). The pattern of a piece that has a mask has its own sparsity.
    N:M becomes such a piece where columns divide a group of M. Groups of a scale that columns divide become smaller.
    Tensors may be views of `stored`. Raises InputError, naming the matrix, for an empty or impossible range.
    """
    for (first, last), count in zip((rows, columns), matrix.shape, strict=True):
        if not 0 <= first < last <= count:
            raise InputError(f"{name}: rows {rows} and columns {columns} are no piece of {matrix.shape}.")
    found: Cut = dict(stored), matrix
    if rows != (0, matrix.shape[0]):
        found = _rows(*found, *rows)
    if columns != (0, matrix.shape[1]):
        found = _columns(*found, *columns)
    tensors, piece = found
    return {part: tensors[part] for part in piece.tensors()}, piece


def _rows(stored: Mapping[str, Tensor], matrix: StoredMatrix, first: int, last: int) -> Cut:
    of_rows = {part: tensor[first:last] for part, tensor in stored.items() if part in ("mask", "scales", "zeros")}
    piece = replace(matrix, shape=(last - first, matrix.shape[1]))
    if not matrix.has_mask:
        return {part: tensor[first:last] for part, tensor in stored.items()}, piece
    offsets = stored["row_offsets"][first : last + 1]
    start, end = int(offsets[0]), int(offsets[-1])
    if matrix.grid is None:
        kept = stored["values"][start:end]
    else:
        bits, eights = matrix.grid.bits, start // 8  # eight codes are whole bytes
        inside = stored["codes"][eights * bits : -(-end * bits // 8)]
        kept = unpack_bits(inside, bits, end - 8 * eights)[start % 8 :]
    return _with_kept(of_rows, piece, kept, decode_mask({"mask": of_rows["mask"]}, matrix, 0, last - first))


def _columns(stored: Mapping[str, Tensor], matrix: StoredMatrix, first: int, last: int) -> Cut:
    piece = replace(matrix, shape=(matrix.shape[0], last - first))
    found, grid = _columns_of_groups(stored, matrix, first, last)
    piece = replace(piece, grid=grid)
    pattern = matrix.pattern
    if matrix.has_mask or (isinstance(pattern, NM) and (first % pattern.of or last % pattern.of)):
        mask = decode_mask(stored, matrix, 0, matrix.shape[0])
        inside = torch.zeros_like(mask)
        inside[:, first:last] = True
        kept = _unpacked_kept(stored, matrix)[inside[mask]]
        return _with_kept(found, piece, kept, mask[:, first:last].contiguous())
    if isinstance(pattern, NM):
        first, last = (end // pattern.of * pattern.keep for end in (first, last))
        if matrix.has_indices:
            found["indices"] = _columns_of_stream(
                stored["indices"], index_bits(pattern), first, last, matrix.kept_per_row
            )
    if matrix.grid is None:
        found["values"] = stored["values"][:, first:last].contiguous()
    else:
        found["codes"] = _columns_of_stream(stored["codes"], matrix.grid.bits, first, last, matrix.kept_per_row)
    return found, piece


def _columns_of_groups(
    stored: Mapping[str, Tensor], matrix: StoredMatrix, first: int, last: int
) -> tuple[dict[str, Tensor], Grid | None]:
    """The scales and zeros of some columns, and their grid."""
    grid = matrix.grid
    if grid is None:
        return {}, None
    parts = [stored["scales"]]
    if not grid.symmetric:
        parts.append(unpack_rows(stored["zeros"], grid.bits, matrix.num_groups))
    if grid.group_size is not None:
        size = gcd(grid.group_size, first, last - first)
        parts = [
            part.repeat_interleave(grid.group_size // size, 1)[:, first // size : last // size].contiguous()
            for part in parts
        ]
        grid = replace(grid, group_size=size)
    found = {"scales": parts[0]}
    if not grid.symmetric:
        found["zeros"] = pack_rows(parts[1], grid.bits)
    return found, grid


def _columns_of_stream(packed: Tensor, bits: int, first: int, last: int, count: int) -> Tensor:
    """The values `first` to `last` - 1 of each row's stream of `count`: uint8 (R, bytes)."""
    if first * bits % 8 == 0 and (last * bits % 8 == 0 or last == count):
        return packed[:, first * bits // 8 : -(-last * bits // 8)].contiguous()
    return pack_rows(unpack_rows(packed, bits, count)[:, first:last].contiguous(), bits)


def _unpacked_kept(stored: Mapping[str, Tensor], matrix: StoredMatrix) -> Tensor:
    """(K,), in row-major order: values, or codes uint8."""
    if matrix.grid is None:
        return stored["values"].flatten()
    if matrix.has_mask:
        return unpack_bits(stored["codes"], matrix.grid.bits, matrix.num_kept)
    return unpack_rows(stored["codes"], matrix.grid.bits, matrix.kept_per_row).flatten()


def _with_kept(found: Mapping[str, Tensor], piece: StoredMatrix, kept: Tensor, mask: Tensor) -> Cut:
    """A piece with kept weights (K,), or their codes, at the places of a mask (R, C); `found` has all else."""
    piece = replace(piece, pattern=Unstructured((mask.numel() - len(kept)) / mask.numel()))
    tensors = {part: tensor for part, tensor in found.items() if part in ("scales", "zeros")}
    if piece.has_mask:
        tensors["mask"] = pack_rows(mask.to(torch.uint8), 1)
        tensors["row_offsets"] = pad(mask.sum(1).cumsum(0), (1, 0))
    else:
        kept = kept.view(mask.shape)
    if piece.grid is None:
        tensors["values"] = kept
    else:
        pack = pack_bits if piece.has_mask else pack_rows
        tensors["codes"] = pack(kept, piece.grid.bits)
    return tensors, piece
