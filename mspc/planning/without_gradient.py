"""Matrices that the loss has no gradient for, such as indexers, whose outputs only select. They are measured otherwise.

The layer's own error stands for the loss: an output Fisher factor that is a multiple of the identity. Its size is the
median of the others, as zero would mean that nothing in such a matrix matters.
"""

from collections.abc import Collection, Mapping, Sequence
from statistics import median

import torch
from torch import Tensor

BY_GRADIENT = ("hutchinson", "fisher")


def with_layer_errors(fisher: Mapping[str, Tensor], without: Collection[str]) -> dict[str, Tensor]:
    """Output Fisher factors (K, B, B) by name, in which those named `without` are multiples of the identity."""
    if not without:
        return dict(fisher)
    size = _middle([float(_diagonal(factor).mean()) for name, factor in fisher.items() if name not in without])
    return {
        name: torch.diag_embed(torch.full_like(_diagonal(factor), size)) if name in without else factor
        for name, factor in fisher.items()
    }


def with_medians(sensitivities: Mapping[str, float], measure: str) -> tuple[dict[str, float], list[str]]:
    """Sensitivities in which those by gradients that are 0 are the median of the others; and their names."""
    without = [name for name, value in sensitivities.items() if value == 0 and measure in BY_GRADIENT]
    size = _middle([value for name, value in sensitivities.items() if name not in without])
    return {name: size if name in without else value for name, value in sensitivities.items()}, without


def without_gradient_note(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"the loss has no gradient for {shown}. Their own error stands for it, as if their outputs mattered like those "
        "of the median matrix. --skip leaves them dense."
    )


def _diagonal(factor: Tensor) -> Tensor:
    return factor.diagonal(dim1=-2, dim2=-1)


def _middle(values: Sequence[float]) -> float:
    return median(values) if values else 1.0
