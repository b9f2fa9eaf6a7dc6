"""Reader of the operator `ai.mspc::MatMul`, from docs/cpu-kernels.md alone: numpy, one loop over blocks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.reading import Decoded, from_grid
from mspc.errors import InputError

ROWS, UNIT, PADDING = 16, 32, 128
DENSE, TWO_FOUR, BITMAP = 0, 1, 2
FLOATS: dict[int, tuple[type[np.generic], str]] = {
    16: (np.uint16, "bfloat16"), 17: (np.uint16, "float16"), 32: (np.uint32, "float32"),
}  # fmt: skip
"""Contents that are no codes: their bits, and the dtype of the weight."""
Part = Callable[[str], NDArray[Any]]
"""The array of an initializer, by the name of the input."""


@dataclass(frozen=True)
class Panel:
    """Attributes of the operator, and the sizes that follow from them. `bits` are those of the grid of the codes."""

    rows: int
    columns: int
    group: int
    structure: int
    content: int
    bits: int

    @property
    def is_codes(self) -> bool:
        return self.content not in FLOATS

    @property
    def blocks(self) -> int:
        return -(-self.rows // ROWS)

    @property
    def groups(self) -> int:
        return self.columns // self.group

    @property
    def padded(self) -> int:
        """Positions of a group."""
        return -(-self.group // UNIT) * UNIT

    @property
    def slots(self) -> int:
        """Entries of a row in a step."""
        if self.is_codes:
            return 4
        return 2 if self.content != 32 or self.structure == TWO_FOUR else 1

    @property
    def steps(self) -> int:
        return self.groups * self.padded // (self.slots * (2 if self.structure == TWO_FOUR else 1))


def decoded(attributes: Mapping[str, int], part: Part) -> Decoded:
    """The matrix of a node. Raises InputError, or an error of numpy, for tensors that do not fit."""
    if attributes["layout"] != 1:
        raise InputError(f"its layout is {attributes['layout']}, and this mspc reads 1")
    panel = Panel(*(attributes[name] for name in ("rows", "columns", "group", "structure", "content", "bits")))
    if panel.structure == BITMAP:
        kept_lines, marked = _behind_bitmap(panel, part("kept"), part("starts"), part("marks"))
        lines, present = _lines(panel, kept_lines), _lines(panel, marked) != 0
    else:
        lines = _lines(panel, part("kept")[:-PADDING].reshape(panel.blocks, -1))
        present = np.ones(lines.shape, bool)
    entries, kept = _by_rows(panel, lines), _by_rows(panel, present)
    if panel.structure == TWO_FOUR:
        entries, kept = _spread(panel, entries, part("marks"))
    entries, kept = _without_padding(panel, entries), _without_padding(panel, kept)
    if not panel.is_codes:
        return _values(panel, np.where(kept, entries, 0))
    scales = _of_groups(panel, part("scales"))
    if attributes["has_zeros"]:
        zeros = _of_groups(panel, part("zeros"))
    else:
        zeros = np.full(scales.shape, 2 ** (panel.content - 1), np.uint8)
        shift = np.uint8(zeros.flat[0] - 2 ** (panel.bits - 1))  # the middle of wider codes is that of the grid
        entries, zeros = np.where(kept, entries - shift, 0), zeros - shift
    codes = np.where(kept, entries, np.repeat(zeros, panel.group, axis=1)).astype(np.uint8)
    return from_grid(codes, scales, zeros)


def _lines(panel: Panel, kept: NDArray[np.uint8]) -> NDArray[Any]:
    """Entries (blocks, steps, lanes) of lines (blocks, bytes)."""
    if not panel.is_codes:
        return kept.view(FLOATS[panel.content][0]).reshape(panel.blocks, panel.steps, -1)
    field = 2 if panel.content == 3 else panel.content
    line = kept.reshape(panel.blocks, -1, 96 if panel.content == 3 else 64)
    shifts = np.arange(0, 8, field, dtype=np.uint8)[:, None]
    entries = (line[:, :, None, :64] >> shifts) & (2**field - 1)
    if panel.content == 3:
        high = np.unpackbits(line[:, :, 64:], axis=2, bitorder="little").reshape(entries.shape)
        entries |= high << 2
    return entries.reshape(panel.blocks, panel.steps, 64)


def _behind_bitmap(
    panel: Panel, kept: NDArray[np.uint8], starts: NDArray[np.int64], marks: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Lines (blocks, bytes) with the bytes of codes, or the values, that the bitmap marks; and with ones there."""
    unit: type[Any] = np.uint8 if panel.is_codes else FLOATS[panel.content][0]
    marked = np.unpackbits(marks.reshape(panel.blocks, -1), axis=1, bitorder="little").astype(bool)
    lines: NDArray[Any] = np.zeros(marked.shape, unit)
    for block, mask in enumerate(marked):
        num_bytes = int(mask.sum()) * lines.itemsize
        lines[block, mask] = kept[starts[block] : starts[block + 1]][:num_bytes].view(unit)
    return lines.view(np.uint8), np.where(marked, np.iinfo(unit).max, 0).astype(unit).view(np.uint8)


def _by_rows(panel: Panel, lines: NDArray[Any]) -> NDArray[Any]:
    """(blocks, steps, lanes) -> (blocks, 16, entries of a row)."""
    if panel.content == 32:
        by_slot = lines.reshape(panel.blocks, panel.steps, panel.slots, ROWS).transpose(0, 3, 1, 2)
    else:
        by_slot = lines.reshape(panel.blocks, panel.steps, ROWS, panel.slots).transpose(0, 2, 1, 3)
    return by_slot.reshape(panel.blocks, ROWS, -1)


def _spread(panel: Panel, entries: NDArray[Any], marks: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Kept weights of 2:4 at their positions, and where they are: (blocks, 16, positions)."""
    words = marks.reshape(panel.blocks, -1, ROWS, 4)
    number = np.arange(16)
    places = words[..., number % 4] >> (2 * (number // 4)).astype(np.uint8) & 3  # (blocks, units, 16, kept of a unit)
    units = np.arange(words.shape[1])[:, None, None] * UNIT
    at = (units + number // 2 * 4 + places).transpose(0, 2, 1, 3).reshape(entries.shape)
    found = np.zeros((panel.blocks, ROWS, panel.groups * panel.padded), entries.dtype)
    kept = np.zeros(found.shape, bool)
    np.put_along_axis(found, at, entries, axis=2)
    np.put_along_axis(kept, at, True, axis=2)
    return found, kept


def _without_padding(panel: Panel, of_blocks: NDArray[Any]) -> NDArray[Any]:
    """(blocks, 16, positions) -> (rows, columns)."""
    in_groups = of_blocks.reshape(panel.blocks * ROWS, panel.groups, panel.padded)
    return in_groups[: panel.rows, :, : panel.group].reshape(panel.rows, panel.columns)


def _of_groups(panel: Panel, of_blocks: NDArray[Any]) -> NDArray[Any]:
    """(blocks, groups, 16) -> (rows, groups)."""
    by_row = of_blocks.reshape(panel.blocks, panel.groups, ROWS).transpose(0, 2, 1)
    return np.ascontiguousarray(by_row.reshape(-1, panel.groups)[: panel.rows])


def _values(panel: Panel, bits: NDArray[Any]) -> Decoded:
    name = FLOATS[panel.content][1]
    if name == "bfloat16":
        return Decoded((bits.astype(np.uint32) << 16).view(np.float32), name)
    floats = bits.astype(FLOATS[panel.content][0]).view(name)
    return Decoded(floats.astype(np.float32), name)
