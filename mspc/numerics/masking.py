"""Scores to masks with exact counts. True = kept. Of equal scores, the one in the lower column is kept."""

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from mspc.errors import InputError
from mspc.threads import run
from mspc.types import NM, Pattern

SAMPLE, MARGIN = 2**14, 256
"""Values that say where a threshold lies, and how many of them it may be away: four standard deviations."""
PIECE = 2**18
"""Values that a thread looks at in one piece."""


def num_pruned(numel: int, sparsity: float) -> int:
    """Number of zeros among `numel` weights at a sparsity. Counts are rounded here only."""
    return round(numel * sparsity)


def prune_lowest(score: Tensor, count: int) -> Tensor:
    """Mask (O, I) that drops exactly `count` weights, those of lowest score in the whole matrix."""
    if count == 0:
        return torch.ones_like(score, dtype=torch.bool)
    flat = score.flatten()
    threshold = kth_lowest(flat, count)
    mask = flat > threshold
    tied = (flat == threshold).nonzero().flatten()
    mask[tied[: score.numel() - count - int(mask.sum())]] = True
    return mask.view_as(score)


def kth_lowest(values: Tensor, k: int) -> Tensor:
    """The k-th smallest (from 1) of all values, as a scalar on their device; in linear time.

    A sample says between which two values it lies, so that only those in between are searched. On a CPU, threads
    share the comparisons; on a GPU, torch's own search of all values would run on one of its many processors.
    """
    flat = values.detach().flatten()
    cpu = flat.device.type == "cpu"
    if len(flat) > 4 * SAMPLE:
        ordered = flat[:: len(flat) // SAMPLE | 1].sort().values
        middle = len(ordered) * k // len(flat)
        low, high = ordered[max(middle - MARGIN, 0)], ordered[min(middle + MARGIN, len(ordered) - 1)]

        def near(piece: Tensor) -> tuple[int, Tensor]:
            return int(torch.count_nonzero(piece < low)), piece[(piece >= low) & (piece <= high)]

        below, between = zip(*run(near, flat.split(PIECE) if cpu else [flat]), strict=True)
        if sum(below) < k <= sum(below) + sum(map(len, between)):
            flat, k = torch.cat(between), k - sum(below)
    if not cpu:
        return flat.kthvalue(k).values
    # torch takes eight times as long on the CPU
    return torch.from_numpy(numpy.partition(flat.numpy(), k - 1)[k - 1 : k])[0]


def prune_lowest_per_row(score: Tensor, count: int) -> Tensor:
    """Mask (O, I) that drops exactly `count` weights, the lowest of each row. Row counts differ by at most one."""
    num_rows, num_columns = score.shape
    edges = torch.arange(num_rows + 1, device=score.device) * count // num_rows
    kept_per_row = num_columns - edges.diff()
    order = torch.sort(score, dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(num_columns, device=score.device).expand_as(order))
    return rank < kept_per_row[:, None]


def prune_n_of_m(score: Tensor, pattern: NM) -> Tensor:
    """Mask (O, I) that keeps the `keep` highest of every `of` consecutive columns."""
    check_divides(pattern, score.shape[1], "the matrix")
    groups = score.view(score.shape[0], -1, pattern.of)
    kept = torch.sort(groups, dim=-1, descending=True, stable=True).indices[..., : pattern.keep]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, kept, True).view_as(score)


def select(score: Tensor, pattern: Pattern, *, per_row: bool) -> Tensor:
    """The mask (O, I) of a pattern, by scores compared over the whole matrix, or `per_row`."""
    if isinstance(pattern, NM):
        return prune_n_of_m(score, pattern)
    count = num_pruned(score.numel(), pattern.sparsity)
    return prune_lowest_per_row(score, count) if per_row else prune_lowest(score, count)


def check_divides(pattern: Pattern, num_columns: int, what: str) -> None:
    if isinstance(pattern, NM) and num_columns % pattern.of:
        raise InputError(
            f"{what}: the pattern {pattern} needs in features divisible by {pattern.of}, got {num_columns}. Choose "
            "another pattern, or leave the matrix dense with --skip."
        )


def spread(count: int, capacities: Sequence[int]) -> list[int]:
    """Split `count` over parts in proportion to their capacities. The sum is exact, and no part exceeds its capacity.

    spread(5, [4, 4, 2]) -> [2, 2, 1].
    """
    total = sum(capacities)
    shares, seen, given = [], 0, 0
    for capacity in capacities:
        seen += capacity
        upto = count * seen // total if total else 0
        shares.append(upto - given)
        given = upto
    return shares
