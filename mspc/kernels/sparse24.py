"""2:4 matrices of 16-bit values or int4 codes, for 1 to 32 tokens.

Layout (`tiles`): the bytes of the file, with O padded to 16 and I to 128. A group of four columns is two kept weights,
a pair, and two places of two bits, a and b (`gpu.sparse24`).

    places   int32 (tiles, blocks, 2 halves of 8 rows, 8, 4 quarters): places of the 8 groups of a quarter, a of group
             g at bit 8 (g mod 4) + 2 (g div 4), b four bits higher
    kept     codes: int32 (tiles, blocks, 2, 8, 4, 2 halves of a quarter), the first code of group g of four at bit 4 g,
             the second 16 higher; values: pairs as int32 (tiles, blocks, 2, 2 halves of a quarter, 8, 4, 4 groups)
    scales, zeros: as in `mspc.kernels.codes`

Cost: 0.391 bytes a weight with int4 at groups of 128, 1.125 with values. Thread instructions a dense position on sm_90,
counted (tests): with int4 2.4 for float16 inputs, 2.6 for bfloat16, 2.7 asymmetric, and 1.8 with values, whether for 1
token or 8, because the products run on tensor cores (3.4 and 2.4 up to 32 tokens). They are dense products, with the
zeros put in by `prmt`: sparse tensor cores (`mma.sp`) would halve their number, which is not what limits. Sums as in
`mspc.kernels.codes`.
"""

import torch
from torch import Tensor
from torch.cuda import device_of

from mspc.formats.bits import pack_rows, unpack_rows
from mspc.formats.description import StoredMatrix
from mspc.kernels import plain
from mspc.kernels.launch import launches, on_gpu
from mspc.kernels.tiles import (
    MAX_TOKENS,
    arrange_grid,
    from_tiles,
    group_size,
    join_fields,
    num_blocks,
    num_tiles,
    restore_grid,
    split_fields,
    tiles_fit,
    to_tiles,
)
from mspc.types import NM

__all__ = ["MAX_TOKENS", "arrange", "expand", "matmul", "restore", "supports", "twin"]

# Of the columns kept (first, second): places a and b, and whether the second weight is the first of the pair.
KEPT_COLUMNS = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
PLACES_A, PLACES_B = [0, 2, 0, 1, 3, 1], [0, 2, 1, 0, 3, 1]
SWAPPED = [False, False, False, True, False, False]
PLACE_BITS = [place + high for high in (0, 2) for place in range(0, 32, 4)]
"""First bit of a and b of each group of a quarter, in turn."""
CODE_BITS = [4 * group + 16 * which for group in range(4) for which in range(2)]
"""First bit of the first and the second code of each of four groups, in turn."""


def supports(description: StoredMatrix, dtype: torch.dtype) -> bool:
    target = description.target
    with_values = target.grid is None and dtype == description.dtype
    return (
        target.pattern == NM(2, 4)
        and dtype in (torch.bfloat16, torch.float16)
        and (with_values or (target.grid is not None and target.grid.bits == 4))
        and tiles_fit(description)
    )


def arrange(stored: dict[str, Tensor], description: StoredMatrix) -> dict[str, Tensor]:
    num_rows, num_kept = description.shape[0], description.shape[1] // 2
    columns = unpack_rows(stored["indices"], 2, num_kept).view(num_rows, -1, 2).long()
    which = _kept_columns()[columns[..., 0] * 4 + columns[..., 1]]
    swapped = torch.tensor(SWAPPED)[which][..., None]
    places = torch.stack([torch.tensor(PLACES_A)[which], torch.tensor(PLACES_B)[which]], -1).to(torch.uint8)
    arranged = {"places": _places(to_tiles(places.view(num_rows, num_kept), description, 4))}
    if description.target.grid is None:
        pairs = stored["values"].view(num_rows, -1, 2).view(torch.int16)
        pairs = torch.where(swapped, pairs.flip(-1), pairs).view(num_rows, num_kept)
        tiled = to_tiles(pairs, description, 4).unflatten(4, (4, 2, 2))  # quarter, half of it, word
        arranged["kept"] = _blocks(tiled.permute(0, 3, 1, 5, 2, 4, 6, 7).contiguous().view(torch.int32), description)
        return arranged
    codes = unpack_rows(stored["codes"], 4, num_kept).view(num_rows, -1, 2)
    codes = torch.where(swapped, codes.flip(-1), codes).view(num_rows, num_kept)
    of_half = to_tiles(codes, description, 4).unflatten(4, (4, 2, 2)).flatten(-2)
    words = join_fields(of_half, CODE_BITS).permute(0, 3, 1, 2, 4, 5)
    arranged["kept"] = _blocks(words.contiguous(), description)
    return {**arranged, **arrange_grid(stored, description)}


def restore(arranged: dict[str, Tensor], description: StoredMatrix) -> dict[str, Tensor]:
    tiles, blocks = num_tiles(description), num_blocks(description)
    num_rows, num_kept = description.shape[0], description.shape[1] // 2
    words = arranged["places"].cpu().view(tiles, blocks, 2, 8, 4).permute(0, 2, 3, 1, 4)
    fields = split_fields(words, PLACE_BITS, 2).unflatten(-1, (4, 4)).flatten(4, 5)
    places = from_tiles(fields, description, num_kept).reshape(num_rows, -1, 2).long()
    which = _by_places()[places[..., 0] * 4 + places[..., 1]]
    swapped = torch.tensor(SWAPPED)[which][..., None]
    columns = torch.tensor(KEPT_COLUMNS)[which].to(torch.uint8).view(num_rows, num_kept)
    stored = {"indices": pack_rows(columns, 2)}
    kept = arranged["kept"].cpu()
    if description.target.grid is None:
        tiled = kept.view(torch.int16).view(tiles, blocks, 2, 2, 8, 4, 2, 4).permute(0, 2, 4, 1, 5, 3, 6, 7)
        pairs = from_tiles(tiled.flatten(4, 6), description, num_kept).reshape(num_rows, -1, 2)
        values = torch.where(swapped, pairs.flip(-1), pairs).view(num_rows, num_kept)
        return {**stored, "values": values.view(description.dtype)}
    words = kept.view(tiles, blocks, 2, 8, 4, 2).permute(0, 2, 3, 1, 4, 5)
    tiled = split_fields(words, CODE_BITS, 4).to(torch.uint8).unflatten(-1, (2, 4)).flatten(4, 6)
    codes = from_tiles(tiled, description, num_kept).reshape(num_rows, -1, 2)
    codes = torch.where(swapped, codes.flip(-1), codes).view(num_rows, num_kept)
    return {**stored, "codes": pack_rows(codes, 4), **restore_grid(arranged, description)}


def _places(tiled: Tensor) -> Tensor:
    """(tiles, 2, 8, blocks, 16 words, a b a b) -> int32 (tiles, blocks, 64)."""
    of_quarter = tiled.unflatten(4, (4, 4)).flatten(-2)
    return join_fields(of_quarter, PLACE_BITS).permute(0, 3, 1, 2, 4).flatten(2).contiguous()


def _blocks(kept: Tensor, description: StoredMatrix) -> Tensor:
    return kept.view(num_tiles(description), num_blocks(description), -1)


def _kept_columns() -> Tensor:
    """Which of the six choices, by 4 first + second."""
    choices = torch.zeros(16, dtype=torch.long)
    for which, (first, second) in enumerate(KEPT_COLUMNS):
        choices[4 * first + second] = which
    return choices


def _by_places() -> Tensor:
    """Which of the six choices, by 4 a + b."""
    choices = torch.zeros(16, dtype=torch.long)
    choices[torch.tensor(PLACES_A) * 4 + torch.tensor(PLACES_B)] = torch.arange(6)
    return choices


def matmul(x: Tensor, arranged: dict[str, Tensor], description: StoredMatrix) -> Tensor:
    """x (T, I) -> (T, O)."""
    if not launches(x):
        return twin(x, arranged, description)
    kept, places, num_rows = arranged["kept"], arranged["places"], description.shape[0]
    return _matmul(x, kept, places, arranged.get("scales"), arranged.get("zeros"), num_rows, group_size(description))


def twin(x: Tensor, arranged: dict[str, Tensor], description: StoredMatrix) -> Tensor:
    return plain.matmul(x, restore(arranged, description), description)


def expand(arranged: dict[str, Tensor], description: StoredMatrix, out: Tensor) -> None:
    """The dense weight, to `out` (O, I)."""
    if not launches(out):
        out.copy_(plain.weight(restore(arranged, description), description))
        return
    kept, places = arranged["kept"], arranged["places"]
    _expand(kept, places, arranged.get("scales"), arranged.get("zeros"), group_size(description), out)


@torch.library.custom_op("mspc::sparse24_matmul", mutates_args=())
def _matmul(
    x: Tensor,
    kept: Tensor,
    places: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    num_rows: int,
    group_size: int,
) -> Tensor:
    with device_of(x):
        y: Tensor = on_gpu("sparse24").matmul(x, kept, places, scales, zeros, num_rows, group_size)
    return y


@_matmul.register_fake
def _(
    x: Tensor,
    kept: Tensor,
    places: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    num_rows: int,
    group_size: int,
) -> Tensor:
    return x.new_empty(len(x), num_rows)


@torch.library.custom_op("mspc::sparse24_expand", mutates_args=("out",))
def _expand(
    kept: Tensor, places: Tensor, scales: Tensor | None, zeros: Tensor | None, group_size: int, out: Tensor
) -> None:
    with device_of(out):
        on_gpu("sparse24").expand(kept, places, scales, zeros, group_size, out)
