"""All formats on a CPU in C++, for a few tokens: the functions of `Kernel`. docs/cpu-kernels.md has the layouts.

    kept      uint8 (n,): lines of kept weights, and 128 bytes more, which may be read ahead
    marks     uint8 (blocks, steps, lanes / 8): the bitmap; 2:4 (blocks, units, 64): two bits a kept weight
    starts    int64 (2 blocks + 1,), with a bitmap: where in `kept` each block and its high bits begin, and the end
    scales    float16 (blocks, groups, 16 rows), zeros uint8 of the same shape if asymmetric

N:M patterns other than 2:4 become a bitmap. Codes are multiplied as integers. Inputs are rounded to 16 bits in each
group (chunks of 128 at most) as two planes of 8; `planes=1` rounds them to 8. Values are multiplied in float32.
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
from mspc.formats.decoding import decode_codes, decode_mask, decode_rows
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


def structure_of(matrix: StoredMatrix) -> int:
    if matrix.has_indices:
        fours = matrix.grid is None or group_of(matrix) % 4 == 0
        return TWO_FOUR if matrix.pattern == NM(2, 4) and fours else BITMAP
    return BITMAP if matrix.has_mask else DENSE


def group_of(matrix: StoredMatrix) -> int:
    """Inputs that share a scale; all of them where there are values."""
    return matrix.shape[1] // max(matrix.num_groups, 1)


def content_of(matrix: StoredMatrix) -> int:
    return VALUES[matrix.dtype] if matrix.grid is None else matrix.grid.bits


def sizes_of(matrix: StoredMatrix) -> tuple[int, int, int, int]:
    """Blocks, positions of a row, entries of a step, and steps of a block."""
    content, two_four = content_of(matrix), structure_of(matrix) == TWO_FOUR
    slots = 4 if content <= 8 else 2 if content < 32 or two_four else 1
    group = group_of(matrix)
    positions = matrix.shape[1] // group * ceil(group / UNIT) * UNIT
    return ceil(matrix.shape[0] / ROWS), positions, ROWS * slots, positions // (2 * slots if two_four else slots)


def types_in(matrix: StoredMatrix, kept_bytes: int) -> dict[str, TensorType]:
    """dtype and shape of each repacked tensor."""
    blocks, positions, lanes, steps = sizes_of(matrix)
    found: dict[str, TensorType] = {"kept": (torch.uint8, (kept_bytes + PADDING,))}
    if structure_of(matrix) == BITMAP:
        found["marks"] = torch.uint8, (blocks, steps, lanes // 8)
        found["starts"] = torch.int64, (2 * blocks + 1,)
    elif structure_of(matrix) == TWO_FOUR:
        found["marks"] = torch.uint8, (blocks, positions // UNIT, 64)
    if matrix.grid is not None:
        found["scales"] = torch.float16, (blocks, matrix.num_groups, ROWS)
        if not matrix.grid.symmetric:
            found["zeros"] = torch.uint8, (blocks, matrix.num_groups, ROWS)
    return found


def bytes_of_lines(matrix: StoredMatrix) -> int:
    """Bytes of kept weights where there is no bitmap."""
    blocks, _, lanes, steps = sizes_of(matrix)
    content = content_of(matrix)
    return blocks * steps * (8 * content if content <= 8 else lanes * (4 if content == 32 else 2))


def repack(stored: dict[str, Tensor], matrix: StoredMatrix) -> dict[str, Tensor]:
    repacked: dict[str, Tensor] = {}
    kept_bytes = 0
    if structure_of(matrix) == BITMAP:
        repacked["starts"] = _starts(stored, matrix)
        kept_bytes = int(repacked["starts"][-1])
    else:
        kept_bytes = bytes_of_lines(matrix)
    types = types_in(matrix, kept_bytes)
    for part in {"kept", "marks"} & types.keys():
        shape = types[part][1]
        repacked[part] = memory.zeros(torch.Size(shape).numel()).view(shape)
    if matrix.grid is not None:
        repacked["scales"] = _by_blocks(stored["scales"])
        if not matrix.grid.symmetric:
            repacked["zeros"] = _by_blocks(unpack_rows(stored["zeros"], matrix.grid.bits, matrix.num_groups))
    repacked = {part: repacked[part] for part in types}
    described = _pointers(repacked, matrix)
    for first, last in _strips(matrix):
        entries, keep = _entries(stored, matrix, first, last), _keep(stored, matrix, first, last)
        _call("pack", described, entries.data_ptr(), keep.data_ptr(), first, last - first)
    check(repacked, matrix)
    return repacked


def _strips(matrix: StoredMatrix) -> list[tuple[int, int]]:
    """`(first, last)` rows of strips of whole blocks."""
    rows = max(1, STRIP // (ROWS * matrix.shape[1])) * ROWS
    return [(first, min(first + rows, matrix.shape[0])) for first in range(0, matrix.shape[0], rows)]


def _entries(stored: dict[str, Tensor], matrix: StoredMatrix, first: int, last: int) -> Tensor:
    if matrix.grid is None:
        return decode_rows(stored, matrix, first, last).contiguous()
    return decode_codes(stored, matrix, first, last).values.contiguous()


def _keep(stored: dict[str, Tensor], matrix: StoredMatrix, first: int, last: int) -> Tensor:
    return decode_mask(stored, matrix, first, last).contiguous()


def _starts(stored: dict[str, Tensor], matrix: StoredMatrix) -> Tensor:
    blocks = sizes_of(matrix)[0]
    lengths, described = torch.zeros(2 * blocks, dtype=torch.int64), _pointers({}, matrix)
    for first, last in _strips(matrix):
        keep = _keep(stored, matrix, first, last)  # a name, so that it lives during the call
        _call("lengths", described, keep.data_ptr(), first, last - first, lengths.data_ptr())
    return pad(lengths.cumsum(0), (1, 0))


def _by_blocks(of_rows: Tensor) -> Tensor:
    """(O, groups) -> (blocks, groups, 16)."""
    padded = pad(of_rows, (0, 0, 0, -len(of_rows) % ROWS))
    return padded.view(-1, ROWS, of_rows.shape[1]).transpose(1, 2).contiguous()


def unrepack(repacked: dict[str, Tensor], matrix: StoredMatrix) -> dict[str, Tensor]:
    repacked = {part: tensor.cpu() for part, tensor in repacked.items()}
    described = describe(repacked, matrix).described
    grid, shape = matrix.grid, matrix.shape
    entries = torch.zeros(shape, dtype=matrix.dtype if grid is None else torch.uint8)
    keep = torch.zeros(shape, dtype=torch.bool)
    _call("unpack", described, 0, shape[0], entries.data_ptr(), keep.data_ptr())
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
    is_bitmap = structure_of(matrix) == BITMAP
    starts = repacked.get("starts", torch.empty(0))
    kept_bytes = int(starts[-1]) if is_bitmap and starts.dtype == torch.int64 and starts.numel() else -PADDING
    types = types_in(matrix, kept_bytes if is_bitmap else bytes_of_lines(matrix))
    found = types_of({part: repacked[part] for part in types if part in repacked})
    plain = all(repacked[part].is_contiguous() and repacked[part].device.type == "cpu" for part in found)
    if found != types or not plain or not _fits(repacked, matrix):
        raise MspcError(
            f"The repacked tensors of a matrix of {matrix.shape} do not fit it: {found}, and it needs {types}. "
            "Load the model again."
        )


def _fits(repacked: dict[str, Tensor], matrix: StoredMatrix) -> bool:
    """Tell if sizes, and the lengths of streams that bitmaps count, agree."""
    return fits(_pointers(repacked, matrix), [repacked[part].nbytes if part in repacked else 0 for part in PARTS])


def describe(repacked: dict[str, Tensor], matrix: StoredMatrix) -> Checked:
    """The description that the library reads; checked once for the same tensors, on an instruction set chosen then."""
    known = _checked.get(id(repacked.get("kept")))
    is_known = known is not None and known.kept() is repacked["kept"] and known.places == _places(repacked)
    if known is not None and is_known and (known.matrix is matrix or known.matrix == matrix):
        return known
    check(repacked, matrix)
    kept, described = repacked["kept"], _pointers(repacked, matrix)
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


def _pointers(repacked: dict[str, Tensor], matrix: StoredMatrix) -> Matrix:
    numbers = *matrix.shape, group_of(matrix), structure_of(matrix), content_of(matrix)
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
