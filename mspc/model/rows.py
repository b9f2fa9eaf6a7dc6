"""Slices of a 3-D parameter that the files hold as tensors of their own, such as the gate and up matrices of an expert.

transformers puts such a parameter together as it is loaded. The place of each row is found by having it put together
tensors of one column, which hold the numbers of their rows.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Rows = tuple[tuple[str, int], ...]
"""The tensors whose rows, one below the other, are a matrix; and the number of rows of each.

A tensor in the rows of several slices is 3-D: each has the slice of its own number.
"""


def rows_of_slices(
    shapes: Mapping[str, tuple[int, ...]], expected: Sequence[int], convert: Callable[[Mapping[str, Tensor]], Tensor]
) -> list[Rows] | None:
    """The rows of each slice of a parameter with the shape `expected` (E, O, I) that `convert` makes of the tensors.

    None unless every slice is whole 2-D tensors, or slices of its number of two or more 3-D tensors, one below the
    other, and nothing is used twice.
    """
    num_slices, _, width = expected
    uses = {key: 1 if len(shape) == 2 else num_slices for key, shape in shapes.items()}
    stacked = [shape for shape in shapes.values() if len(shape) != 2]
    if any(len(shape) != 3 or shape[0] != num_slices for shape in stacked) or (stacked and min(uses.values()) == 1):
        return None  # of one slice, nothing would tell a 3-D tensor from a 2-D one
    if any(shape[-1] != width for shape in shapes.values()) or (stacked and len(shapes) == 1):
        return None
    longest = max(math.prod(shape[:-1]) for shape in shapes.values())
    numbers = {
        key: torch.arange(number * longest, number * longest + math.prod(shape[:-1]), dtype=torch.float64)
        for number, (key, shape) in enumerate(shapes.items())
    }
    try:
        made = convert({key: rows.view(*shapes[key][:-1], 1) for key, rows in numbers.items()})
    except Exception:  # a conversion of another kind, which needs whole tensors
        return None
    if made.shape != (*expected[:2], 1):
        return None
    keys, found = list(shapes), []
    for index, of_slice in enumerate(made[:, :, 0].long().tolist()):
        rows, at = list[tuple[str, int]](), 0
        while at < len(of_slice):
            key = keys[of_slice[at] // longest]
            count = shapes[key][-2]
            first = keys.index(key) * longest + (index * count if uses[key] > 1 else 0)
            if of_slice[at : at + count] != list(range(first, first + count)):
                return None
            rows.append((key, count))
            at += count
        found.append(tuple(rows))
    return found if Counter(key for rows in found for key, _ in rows) == uses else None
