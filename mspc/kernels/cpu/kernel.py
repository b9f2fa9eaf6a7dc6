"""All formats on a CPU in C++, for a few tokens: the functions of `Kernel`. docs/cpu-kernels.md has the layouts.

    kept      uint8 (n,): lines of kept weights, and 128 bytes more, which may be read ahead
    marks     uint8 (blocks, lines, lanes / 8): the bitmap; 2:4 (blocks, units, 64): two bits a kept weight
    starts    int64 (blocks + 1,), with a bitmap: where in `kept` each block begins, and the end
    scales    float16 (blocks, groups, 16 rows), zeros uint8 of the same shape if asymmetric
    nulls     uint8 (n,), where codes do not tell which weights are pruned: those kept ones that are zero (`gaps_of`)

Zeros of patterns other than 2:4 lie behind a bitmap, or in dense lines where these are faster (`is_faster_dense`).
Codes are multiplied as integers. Inputs are rounded to 16 bits in each group (chunks of 128 at most) as two planes of
8; `planes=1` rounds them to 8. Values are multiplied in float32.
"""

import ctypes
import weakref
from collections.abc import Callable
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from mspc.errors import MspcError
from mspc.formats.bits import pack_bits, pack_rows, unpack_rows
from mspc.formats.decoding import INTEGERS, decode_codes, decode_mask, decode_rows
from mspc.formats.description import StoredMatrix, TensorType, index_bits, types_of
from mspc.kernels.cpu import memory
from mspc.kernels.cpu.library import ISAS, Matrix, fits, isa, library
from mspc.types import NM

FUSED = {"portable": 2, "avx2": 64, "avx512": 128}
"""Tokens from which on the weight is better expanded, by instruction set: measured (LOG.md, "one operator")."""
MAX_TOKENS = max(FUSED.values())
ROWS, UNIT, PADDING = 16, 32, 128
DENSE, TWO_FOUR, BITMAP = 0, 1, 2
PARTS = "kept", "marks", "starts", "scales", "zeros"
VALUES = {torch.bfloat16: 16, torch.float16: 17, torch.float32: 32}
"""Numbers of dtypes in the library, where codes have their bits."""
MOST_BEHIND_BITMAP = {8: 0.7, 4: 0.7, 3: 0.5}
"""By bits, the share of bytes up to which a bitmap is faster than dense codes with AVX-512: measured (LOG.md, "bitmaps
of bytes"). Dense codes of 2 bits are always faster, and without AVX-512 all are."""
STRIP = 2**18
"""Weights that are expanded at a time: one MB in float32, which a cache of the second level holds."""


class Checked(NamedTuple):
    """Tensors that were checked, as the library reads them."""

    kept: Callable[[], Tensor | None]
    """A weak reference."""
    matrix: StoredMatrix
    places: list[Any]
    """Address and shape of each tensor in turn."""
    described: Matrix
    pointer: Any
    """To `described`, as an argument."""
    isa: int
    multiply: Any
    """`mspc_product` of the library."""


_checked: dict[int, Checked] = {}
"""By the id of `kept`, as long as that tensor lives."""


def supports(matrix: StoredMatrix, dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.bfloat16) and min(matrix.shape) > 0 and library() is not None


def is_two_four(matrix: StoredMatrix) -> bool:
    """Tell if a matrix has two bits for each kept weight of 2:4."""
    return matrix.pattern == NM(2, 4) and (matrix.grid is None or group_of(matrix) % 4 == 0)


def has_zeros(matrix: StoredMatrix) -> bool:
    """Tell if the places of the zeros depend on the matrix, and not in the way of 2:4."""
    return (matrix.has_mask or matrix.has_indices) and not is_two_four(matrix)


def group_of(matrix: StoredMatrix) -> int:
    """Inputs that share a scale; all of them where there are values."""
    return matrix.shape[1] // max(matrix.num_groups, 1)


class Layout(NamedTuple):
    """Structure and content of a repacked matrix."""

    structure: int
    content: int
    """Bits of a code, or the number of a dtype."""

    @classmethod
    def of(cls, matrix: StoredMatrix, is_bitmap: bool) -> "Layout":
        structure = TWO_FOUR if is_two_four(matrix) else BITMAP if is_bitmap else DENSE
        content = VALUES[matrix.dtype] if matrix.grid is None else matrix.grid.bits
        return cls(structure, 4 if content == 3 and structure == BITMAP else content)

    def sizes(self, matrix: StoredMatrix) -> tuple[int, int, int, int]:
        """Blocks, positions of a row, entries of a step, and steps of a block."""
        two_four = self.structure == TWO_FOUR
        slots = 4 if self.content <= 8 else 2 if self.content < 32 or two_four else 1
        group = group_of(matrix)
        positions = matrix.shape[1] // group * ceil(group / UNIT) * UNIT
        return ceil(matrix.shape[0] / ROWS), positions, ROWS * slots, positions // (2 * slots if two_four else slots)

    def types(self, matrix: StoredMatrix, kept_bytes: int) -> dict[str, TensorType]:
        """dtype and shape of each repacked tensor but `nulls`."""
        blocks, positions, lanes, steps = self.sizes(matrix)
        found: dict[str, TensorType] = {"kept": (torch.uint8, (kept_bytes + PADDING,))}
        if self.structure == BITMAP:
            found["marks"] = torch.uint8, (blocks, steps * min(self.content, 8) // 8, lanes // 8)
            found["starts"] = torch.int64, (blocks + 1,)
        elif self.structure == TWO_FOUR:
            found["marks"] = torch.uint8, (blocks, positions // UNIT, 64)
        if matrix.grid is not None:
            found["scales"] = torch.float16, (blocks, matrix.num_groups, ROWS)
            if not matrix.grid.symmetric:
                found["zeros"] = torch.uint8, (blocks, matrix.num_groups, ROWS)
        return found

    def bytes_of_lines(self, matrix: StoredMatrix) -> int:
        """Bytes of kept weights where there is no bitmap."""
        blocks, _, lanes, steps = self.sizes(matrix)
        content = self.content
        return blocks * steps * (8 * content if content <= 8 else lanes * (4 if content == 32 else 2))

    def shift(self, matrix: StoredMatrix) -> int:
        """Added to codes, so that the zero point of symmetric grids stays in the middle of wider ones."""
        return 4 if matrix.grid is not None and matrix.grid.symmetric and self.content > matrix.grid.bits else 0

    def has_nulls(self, matrix: StoredMatrix) -> bool:
        """Tell if entries do not say which weights are kept."""
        return has_zeros(matrix) and (self.content <= 8 or self.structure == DENSE)


def layout_of(repacked: dict[str, Tensor], matrix: StoredMatrix) -> Layout:
    return Layout.of(matrix, "starts" in repacked)


def repack(stored: dict[str, Tensor], matrix: StoredMatrix, isa_name: str | None = None) -> dict[str, Tensor]:
    """The tensors above, as they are fastest on an instruction set; None: that in use. All sets read them."""
    isa_name = ISAS[isa()] if isa_name is None else isa_name
    of_grid: dict[str, Tensor] = {}
    if matrix.grid is not None:
        of_grid["scales"] = _by_blocks(stored["scales"])
        if not matrix.grid.symmetric:
            of_grid["zeros"] = _by_blocks(unpack_rows(stored["zeros"], matrix.grid.bits, matrix.num_groups))
    may_be_bitmap = has_zeros(matrix) and not is_faster_dense(matrix, 0.0, isa_name)
    layout, repacked = Layout.of(matrix, may_be_bitmap), dict(of_grid)
    if layout.structure == BITMAP:
        starts = _starts(stored, of_grid, matrix, layout)
        kept_bytes = int(starts[-1])
        if is_faster_dense(matrix, kept_bytes / layout.bytes_of_lines(matrix), isa_name):
            layout = Layout.of(matrix, is_bitmap=False)
        else:
            repacked["starts"] = starts
    if layout.structure != BITMAP:
        kept_bytes = layout.bytes_of_lines(matrix)
    types = layout.types(matrix, kept_bytes)
    for part in {"kept", "marks"} & types.keys():
        shape = types[part][1]
        repacked[part] = memory.zeros(torch.Size(shape).numel()).view(shape)
    repacked = {part: repacked[part] for part in types}
    described, has_nulls = _pointers(repacked, matrix, layout), layout.has_nulls(matrix)
    of_zero, nulls = _zero_entries(of_grid, matrix, layout) if has_nulls else None, [torch.empty(0, dtype=torch.int64)]
    for first, last in _strips(matrix):
        entries, keep = _entries(stored, matrix, layout, first, last), _keep(stored, matrix, first, last)
        _call("pack", described, entries.data_ptr(), keep.data_ptr(), first, last - first)
        if of_zero is not None:
            is_null = (entries.view(of_zero.dtype) == of_zero[first:last]) & keep
            nulls.append(is_null.flatten().nonzero()[:, 0] + first * matrix.shape[1])
    if has_nulls:
        repacked["nulls"] = gaps_of(torch.cat(nulls), matrix.shape[0] * matrix.shape[1])
    check(repacked, matrix)
    return repacked


def is_faster_dense(matrix: StoredMatrix, share: float, isa_name: str) -> bool:
    """Tell if dense lines are faster than a bitmap of this share of their bytes on an instruction set."""
    if matrix.grid is None:
        return False
    return isa_name != "avx512" or share > MOST_BEHIND_BITMAP.get(matrix.grid.bits, -1.0)


def gaps_of(places: Tensor, end: int) -> Tensor:
    """Ascending integers below `end` as uint8: gaps before each and before the end. 255 is a part of a larger gap."""
    gaps = pad(places, (1, 1), value=-1)
    gaps[-1] = end
    gaps = gaps.diff() - 1
    counts = gaps // 255 + 1
    found = torch.full((int(counts.sum()),), 255, dtype=torch.uint8)
    found[counts.cumsum(0) - 1] = (gaps % 255).to(torch.uint8)
    return found


def places_of(gaps: Tensor) -> Tensor:
    """The integers that `gaps_of` was given, and their end."""
    ends = gaps < 255
    return gaps.long().cumsum(0)[ends] + torch.arange(int(ends.sum()))


def _strips(matrix: StoredMatrix) -> list[tuple[int, int]]:
    """`(first, last)` rows of strips of whole blocks."""
    rows = max(1, STRIP // (ROWS * matrix.shape[1])) * ROWS
    return [(first, min(first + rows, matrix.shape[0])) for first in range(0, matrix.shape[0], rows)]


def _entries(stored: dict[str, Tensor], matrix: StoredMatrix, layout: Layout, first: int, last: int) -> Tensor:
    """Values, or codes; those of pruned weights are zero, or the zero point."""
    if matrix.grid is None:
        return decode_rows(stored, matrix, first, last).contiguous()
    return decode_codes(stored, matrix, first, last).values.contiguous() + layout.shift(matrix)


def _keep(stored: dict[str, Tensor], matrix: StoredMatrix, first: int, last: int) -> Tensor:
    return decode_mask(stored, matrix, first, last).contiguous()


def _starts(stored: dict[str, Tensor], of_grid: dict[str, Tensor], matrix: StoredMatrix, layout: Layout) -> Tensor:
    lengths, described = torch.zeros(layout.sizes(matrix)[0], dtype=torch.int64), _pointers(of_grid, matrix, layout)
    for first, last in _strips(matrix):  # names, so that both live during the call
        entries, keep = _entries(stored, matrix, layout, first, last), _keep(stored, matrix, first, last)
        _call("lengths", described, entries.data_ptr(), keep.data_ptr(), first, last - first, lengths.data_ptr())
    return pad(lengths.cumsum(0), (1, 0))


def _zero_entries(of_grid: dict[str, Tensor], matrix: StoredMatrix, layout: Layout) -> Tensor:
    """The entries (O, I) of weights that are zero: zero points, or the bits of the value."""
    if matrix.grid is None:
        return torch.zeros(1, 1, dtype=INTEGERS[matrix.dtype.itemsize]).expand(matrix.shape)
    if matrix.grid.symmetric:
        return torch.full((1, 1), 2 ** (layout.content - 1), dtype=torch.uint8).expand(matrix.shape)
    return _by_rows(of_grid["zeros"], matrix.shape[0]).repeat_interleave(group_of(matrix), 1)


def _by_blocks(of_rows: Tensor) -> Tensor:
    """(O, groups) -> (blocks, groups, 16)."""
    padded = pad(of_rows, (0, 0, 0, -len(of_rows) % ROWS))
    return padded.view(-1, ROWS, of_rows.shape[1]).transpose(1, 2).contiguous()


def unrepack(repacked: dict[str, Tensor], matrix: StoredMatrix) -> dict[str, Tensor]:
    repacked = {part: tensor.cpu() for part, tensor in repacked.items()}
    described, layout = describe(repacked, matrix).described, layout_of(repacked, matrix)
    grid, shape = matrix.grid, matrix.shape
    entries = torch.zeros(shape, dtype=matrix.dtype if grid is None else torch.uint8)
    keep = torch.zeros(shape, dtype=torch.bool)
    _call("unpack", described, 0, shape[0], entries.data_ptr(), keep.data_ptr())
    if layout.has_nulls(matrix):
        of_zero = _zero_entries(repacked, matrix, layout)
        integers = entries.view(of_zero.dtype)
        integers[:] = torch.where(keep, integers, of_zero)
        keep &= integers != of_zero
        keep.view(-1)[places_of(repacked["nulls"])[:-1]] = True
        entries -= layout.shift(matrix)
    kept = entries[keep]
    rows = () if matrix.has_mask else (shape[0], -1)
    stored: dict[str, Tensor] = {}
    if grid is None:
        stored["values"] = kept.view(rows) if rows else kept
    else:
        stored["codes"] = pack_rows(kept.view(rows), grid.bits) if rows else pack_bits(kept, grid.bits)
        stored["scales"] = _by_rows(repacked["scales"], shape[0])
        if not grid.symmetric:
            stored["zeros"] = pack_rows(_by_rows(repacked["zeros"], shape[0]), grid.bits)
    if matrix.has_mask:
        stored["mask"], stored["row_offsets"] = pack_rows(keep.to(torch.uint8), 1), pad(keep.sum(1).cumsum(0), (1, 0))
    elif matrix.has_indices:
        assert isinstance(matrix.pattern, NM)
        indices = (torch.arange(shape[1]) % matrix.pattern.of).to(torch.uint8).expand(shape)[keep]
        stored["indices"] = pack_rows(indices.view(shape[0], -1), index_bits(matrix.pattern))
    return {part: stored[part] for part in matrix.tensors()}


def _by_rows(by_blocks: Tensor, num_rows: int) -> Tensor:
    return by_blocks.transpose(1, 2).flatten(0, 1)[:num_rows].contiguous()


def check(repacked: dict[str, Tensor], matrix: StoredMatrix) -> None:
    """Raises MspcError unless the library reads within these tensors: dtypes, shapes, places, lengths of streams."""
    layout = layout_of(repacked, matrix)
    starts, kept_bytes = repacked.get("starts", torch.empty(0)), layout.bytes_of_lines(matrix)
    if layout.structure == BITMAP:
        kept_bytes = int(starts[-1]) if starts.dtype == torch.int64 and starts.numel() else -PADDING
    types = layout.types(matrix, kept_bytes)
    found = types_of({part: repacked[part] for part in types if part in repacked})
    if layout.has_nulls(matrix):
        nulls = repacked.get("nulls", torch.empty(0))
        types["nulls"] = torch.uint8, (nulls.numel(),)
        found |= types_of({"nulls": nulls})
    plain = all(repacked[p].is_contiguous() and repacked[p].device.type == "cpu" for p in found if p in repacked)
    if found != types or not plain or not _fits(repacked, matrix, layout):
        raise MspcError(
            f"The repacked tensors of a matrix of {matrix.shape} do not fit it: {found}, and it needs {types}. "
            "Load the model again."
        )


def _fits(repacked: dict[str, Tensor], matrix: StoredMatrix, layout: Layout) -> bool:
    """Tell if sizes, the lengths of streams that bitmaps count, and the end of `nulls` agree."""
    if layout.has_nulls(matrix):
        gaps, numel = repacked["nulls"], matrix.shape[0] * matrix.shape[1]
        ends = int(torch.count_nonzero(gaps < 255))
        if not ends or gaps[-1] == 255 or int(gaps.sum()) + ends - 1 != numel:
            return False
    sizes = [repacked[part].nbytes if part in repacked else 0 for part in PARTS]
    return fits(_pointers(repacked, matrix, layout), sizes)


def describe(repacked: dict[str, Tensor], matrix: StoredMatrix) -> Checked:
    """The description that the library reads; checked once for the same tensors, on an instruction set chosen then."""
    known = _checked.get(id(repacked.get("kept")))
    is_known = known is not None and known.kept() is repacked["kept"] and known.places == _places(repacked)
    if known is not None and is_known and (known.matrix is matrix or known.matrix == matrix):
        return known
    check(repacked, matrix)
    kept, described = repacked["kept"], _pointers(repacked, matrix, layout_of(repacked, matrix))
    key = id(kept)

    def forget(reference: object, held: dict[int, Checked] = _checked) -> None:  # globals are gone when Python ends
        if key in held and held[key].kept is reference:
            del held[key]

    loaded, reference = library(), weakref.ref(kept, forget)
    assert loaded is not None
    pointer, multiply = ctypes.byref(described), loaded.mspc_product
    _checked[key] = Checked(reference, matrix, _places(repacked), described, pointer, isa(), multiply)
    return _checked[key]


def _places(repacked: dict[str, Tensor]) -> list[Any]:
    places: list[Any] = []
    for tensor in repacked.values():
        places += tensor.data_ptr(), tensor.shape
    return places


def _pointers(repacked: dict[str, Tensor], matrix: StoredMatrix, layout: Layout) -> Matrix:
    numbers = *matrix.shape, group_of(matrix), *layout
    return Matrix(*numbers, *(repacked[part].data_ptr() if part in repacked else None for part in PARTS))


def _call(name: str, matrix: Matrix, *arguments: int) -> None:
    loaded = library()
    assert loaded is not None
    getattr(loaded, f"mspc_{name}")(ctypes.byref(matrix), *arguments)


def product(x: Tensor, repacked: dict[str, Tensor], matrix: StoredMatrix, planes: int = 2) -> Tensor:
    """x (..., I), float32 or bfloat16 -> x Wᵀ (..., O), on as many threads as torch has, which change no bit of it."""
    (*leading, num_columns), dtype, (num_rows, columns) = x.shape, x.dtype, matrix.shape
    is_bfloat16 = dtype == torch.bfloat16
    if num_columns != columns or not (is_bfloat16 or dtype == torch.float32) or not x.is_cpu:
        raise MspcError(f"Inputs are {dtype} {tuple(x.shape)}, and a matrix of {matrix.shape} cannot take them.")
    x, y, checked = x.contiguous(), x.new_empty(*leading, num_rows), describe(repacked, matrix)
    threads, where, out, num_tokens = torch.get_num_threads(), x.data_ptr(), y.data_ptr(), x.numel() // columns
    checked.multiply(checked.pointer, checked.isa, where, is_bfloat16, num_tokens, out, planes, threads)
    return y


def fused_up_to() -> int:
    """Tokens up to which the compressed weight is read, on the instruction set in use."""
    return FUSED[ISAS[isa()]]


def matmul(x: Tensor, repacked: dict[str, Tensor], matrix: StoredMatrix) -> Tensor:
    """x (T, I) -> x Wᵀ (T, O)."""
    return product(x, repacked, matrix)


def expand_rows(repacked: dict[str, Tensor], matrix: StoredMatrix, first: int, last: int) -> Tensor:
    """The weight of some rows, the first of a block: (R, I) in float32, codes times scales rounded once."""
    out = torch.empty(last - first, matrix.shape[1])
    _call("expand", describe(repacked, matrix).described, first, last - first, out.data_ptr(), torch.get_num_threads())
    return out


def expand(repacked: dict[str, Tensor], matrix: StoredMatrix, out: Tensor) -> None:
    """Write the dense weight to `out` (O, I)."""
    for first, last in _strips(matrix):
        out[first:last] = expand_rows(repacked, matrix, first, last)


def multiply_expanded(x: Tensor, repacked: dict[str, Tensor], matrix: StoredMatrix) -> Tensor:
    """x (..., I) -> x Wᵀ (..., O) for many tokens: strips of the weight, rounded to its dtype, and torch's product."""
    y = x.new_empty(*x.shape[:-1], matrix.shape[0])
    for first, last in _strips(matrix):
        y[..., first:last] = linear(x, expand_rows(repacked, matrix, first, last).to(matrix.dtype).to(x.dtype))
    return y
