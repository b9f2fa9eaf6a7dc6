"""Text and token ids that the caller holds already."""

import reprlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mspc.errors import InputError


def check_ids(ids: Tensor, vocab_size: int) -> Tensor:
    """The ids (N, T) as int64 on the CPU. Raises InputError if they are no sequences of tokens of the vocabulary."""
    shape = tuple(ids.shape)
    if ids.ndim != 2 or shape[0] < 1 or shape[1] < 2:
        raise InputError(f"Token ids must have the shape (N, T) with N >= 1 and T >= 2, not {shape}.")
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise InputError(f"Token ids must be integers, not {ids.dtype}.")
    ids = ids.detach().to("cpu", torch.int64)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"Token ids must lie in 0 .. {vocab_size - 1}, the model's vocabulary, but they lie in {low} .. {high}."
        )
    return ids


def check_given(text: object, name: str) -> None:
    """Raises InputError, with the argument's name, for what is no source of text."""
    if text is not None and not isinstance(text, str | Path | Tensor | Sequence):
        raise InputError(
            f"{name} must be the name of a text source, a list of documents (strings), or token ids, an integer tensor "
            f"(N, T), not {reprlib.repr(text)}."
        )
