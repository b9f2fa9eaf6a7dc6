"""Slices of a 3-D parameter that the files hold as tensors of their own, such as the gate and up matrices of an expert.

transformers puts such a parameter together as it is loaded. The place of each row is found by having it put together
tensors of one column, which hold the numbers of their rows.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Rows = tuple[tuple[str, int], ...]
"""The tensors whose rows, one below the other, are a matrix; and the number of rows of each."""


def rows_of_slices(
    shapes: Mapping[str, tuple[int, ...]], expected: Sequence[int], convert: Callable[[Mapping[str, Tensor]], Tensor]
) -> list[Rows] | None:
    """The rows of each slice of a parameter with the shape `expected` (E, O, I) that `convert` makes of 2-D tensors.

    None unless every slice is whole tensors, one below the other, and every tensor is used once.
    """
    if any(len(shape) != 2 or shape[1] != expected[2] for shape in shapes.values()):
        return None
    longest = max(shape[0] for shape in shapes.values())
    numbers = {
        key: torch.arange(number * longest, number * longest + shape[0], dtype=torch.float64)[:, None]
        for number, (key, shape) in enumerate(shapes.items())
    }
    try:
        made = convert(numbers)
    except Exception:  # a conversion of another kind, which needs whole tensors
        return None
    if made.shape != (expected[0], expected[1], 1):
        return None
    keys, found = list(shapes), []
    for of_slice in made[:, :, 0].long().tolist():
        rows, at = list[tuple[str, int]](), 0
        while at < len(of_slice):
            key = keys[of_slice[at] // longest]
            count, first = shapes[key][0], keys.index(key) * longest
            if of_slice[at : at + count] != list(range(first, first + count)):
                return None
            rows.append((key, count))
            at += count
        found.append(tuple(rows))
    used = [key for rows in found for key, _ in rows]
    return found if sorted(used) == sorted(keys) else None
