"""Stored tensors to weights, some rows at a time, in plain torch.

It runs on any device and reads no value on the host, so that it can be compiled and captured in CUDA graphs. Letters:
R rows, I in features, K kept weights of a row, G quantization groups of a row.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mspc.errors import InputError
from mspc.formats.bits import take, take_bits, unpack_rows
from mspc.formats.description import StoredMatrix, index_bits
from mspc.numerics.quant import dequantize
from mspc.types import NM, Codes

INTEGERS = {2: torch.int16, 4: torch.int32}
STRIP = 2**18
"""Weights to decode at a time on a CPU: the intermediate results, about 24 bytes a weight, then stay in its caches."""


def strips(shape: tuple[int, int], num_weights: int = STRIP) -> Iterator[tuple[int, int]]:
    """`(first, last)` rows of strips of about `num_weights` weights."""
    num_rows = max(1, num_weights // shape[1])
    return ((first, min(first + num_rows, shape[0])) for first in range(0, shape[0], num_rows))


def decode_rows(stored: Mapping[str, Tensor], matrix: StoredMatrix, first: int, last: int) -> Tensor:
    """The weights (R, I) of the rows `first` to `last` - 1, in the dtype of the matrix."""
    if matrix.grid is not None:
        return dequantize(decode_codes(stored, matrix, first, last)).to(matrix.dtype)
    values = stored["values"]
    zeros = values.new_zeros(last - first, matrix.shape[1])
    if not matrix.has_mask:
        return _place(values[first:last], zeros, stored, matrix, first, last)
    if not matrix.num_kept:
        return zeros
    kept, indices = _kept_indices(stored, matrix, first, last)
    # As integers, which times 0 are 0 even where the weight is infinite.
    integers = values.view(INTEGERS[values.itemsize])
    return (take(integers, indices) * kept).view(values.dtype)


def decode_codes(stored: Mapping[str, Tensor], matrix: StoredMatrix, first: int, last: int) -> Codes:
    """Codes, scales and zero points of the rows `first` to `last` - 1; pruned weights have the code of zero."""
    assert matrix.grid is not None
    bits, num_columns = matrix.grid.bits, matrix.shape[1]
    scales = stored["scales"][first:last]
    if matrix.grid.symmetric:
        zeros = torch.full_like(scales, 2 ** (bits - 1), dtype=torch.uint8)
    else:
        zeros = unpack_rows(stored["zeros"][first:last], bits, matrix.num_groups)
    codes = stored["codes"]
    if not matrix.has_mask and not matrix.has_indices:
        return Codes(unpack_rows(codes[first:last], bits, num_columns), scales, zeros)
    of_zero = zeros.repeat_interleave(num_columns // matrix.num_groups, 1)
    if not matrix.has_mask:
        kept_codes = unpack_rows(codes[first:last], bits, matrix.kept_per_row)
        return Codes(_place(kept_codes, of_zero, stored, matrix, first, last), scales, zeros)
    if not matrix.num_kept:
        return Codes(of_zero, scales, zeros)
    kept, indices = _kept_indices(stored, matrix, first, last)
    # Modulo 256, as uint8 is: several times as fast as choosing by a mask.
    return Codes((take_bits(codes, bits, indices) - of_zero) * kept + of_zero, scales, zeros)


def decode_mask(stored: Mapping[str, Tensor], matrix: StoredMatrix, first: int, last: int) -> Tensor:
    """bool (R, I), True = kept."""
    num_rows, num_columns = last - first, matrix.shape[1]
    if matrix.has_mask:
        return unpack_rows(stored["mask"][first:last], 1, num_columns).view(torch.bool)
    some = next(iter(stored.values()))
    kept = torch.ones(num_rows, matrix.kept_per_row, dtype=torch.bool, device=some.device)
    return _place(kept, kept.new_zeros(num_rows, num_columns), stored, matrix, first, last)


def row_offsets(mask: Tensor) -> Tensor:
    """Mask bits uint8 (O, ceil(I / 8)) -> int64 (O + 1): the first kept weight of each row, and the end. So
    rows can be read on their own."""
    num_bits = unpack_rows(torch.arange(256, dtype=torch.uint8, device=mask.device)[:, None], 1, 8).sum(1)
    counts = num_bits[mask.int()].sum(1)
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def check_indices(stored: Mapping[str, Tensor], matrix: StoredMatrix, name: str = "the matrix") -> None:
    """Raises InputError, naming the matrix, when the values in its mask, offsets or indices are impossible."""
    if matrix.has_mask:
        offsets = row_offsets(stored["mask"])
        if not torch.equal(offsets, stored["row_offsets"]):
            raise InputError(f"{name}: its row_offsets do not count the bits of its mask.")
        if int(offsets[-1]) != matrix.num_kept:
            raise InputError(
                f"{name}: its mask keeps {int(offsets[-1])} weights, and its sparsity means {matrix.num_kept}."
            )
    elif matrix.has_indices:
        assert isinstance(matrix.pattern, NM)
        indices = _indices_in_groups(stored, matrix, 0, matrix.shape[0])
        if int(indices.max()) >= matrix.pattern.of or not bool((indices[:, 1:] > indices[:, :-1]).all()):
            keep, of = matrix.pattern.keep, matrix.pattern.of
            raise InputError(f"{name}: its indices are not {keep} ascending numbers below {of} in every group.")


def check_finite(stored: Mapping[str, Tensor], name: str) -> None:
    """Raises InputError, naming the matrix, for a scale or weight of a file that is NaN or infinite."""
    for part in ("scales", "values"):
        if part in stored and not bool(stored[part].isfinite().all()):
            raise InputError(f"{name}: its {part} contain NaN or infinity; the file is damaged. Restore it.")


def _place(
    kept: Tensor, others: Tensor, stored: Mapping[str, Tensor], matrix: StoredMatrix, first: int, last: int
) -> Tensor:
    """`others` (R, I) with the kept weights (R, K) of an N:M pattern at their indices; `kept` itself if K is I."""
    if not matrix.has_indices:
        return kept
    assert isinstance(matrix.pattern, NM)
    indices = _indices_in_groups(stored, matrix, first, last).long()
    groups = others.view(len(indices), matrix.pattern.of)
    return groups.scatter_(1, indices, kept.reshape(indices.shape)).view(others.shape)


def _indices_in_groups(stored: Mapping[str, Tensor], matrix: StoredMatrix, first: int, last: int) -> Tensor:
    """Indices of the kept weights in their groups, uint8 (groups of the rows, N)."""
    assert isinstance(matrix.pattern, NM)
    indices = unpack_rows(stored["indices"][first:last], index_bits(matrix.pattern), matrix.kept_per_row)
    return indices.view(-1, matrix.pattern.keep)


def _kept_indices(stored: Mapping[str, Tensor], matrix: StoredMatrix, first: int, last: int) -> tuple[Tensor, Tensor]:
    """The mask, uint8 (R, I), and the index of each kept weight among all kept weights, (R, I).

    Pruned weights have some index in range.
    """
    kept = unpack_rows(stored["mask"][first:last], 1, matrix.shape[1])
    # 32 bits are faster; the furthest bit of the stream must be within them.
    integers = torch.int32 if 8 * matrix.num_kept < 2**31 else torch.int64
    before = stored["row_offsets"][first:last, None].to(integers) - 1
    return kept, kept.cumsum(1, dtype=integers).add_(before).clamp_(min=0)
