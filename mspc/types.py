"""The values that flow through mspc. Letters: O out features, I in features, G quantization groups per row."""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from mspc.errors import InputError

BITS = (8, 4, 3, 2)
"""The bits that a grid may have."""
HEAD, EMBEDDINGS = "head", "embeddings"
"""Roles of matrices outside of the blocks. One that is both has the second."""
UNQUANTIZED_BITS = 16
"""Bits in recipes, plans and manifests of weights that are not quantized. In memory their grid is None."""


@dataclass(frozen=True, slots=True)
class Unstructured:
    """Any weight may be zero; `sparsity` is the share of zeros, in [0, 1]."""

    sparsity: float

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1:
            raise InputError(f"A sparsity must lie in [0, 1], not {self.sparsity}.")

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True, slots=True)
class NM:
    """At most `keep` of every `of` consecutive weights of a row are nonzero: 2:4 is NM(2, 4).

    An index within a group is one byte, so M is at most 256.
    """

    keep: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.keep <= self.of <= 256:
            raise InputError(f"An N:M pattern needs 1 <= N <= M <= 256, not {self.keep}:{self.of}.")

    @property
    def sparsity(self) -> float:
        return 1 - self.keep / self.of

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"


Pattern = Unstructured | NM


def parse_nm(text: str) -> NM:
    """`"2:4"` -> NM(2, 4)."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match:
        raise InputError(f"Unknown pattern {text!r}: use unstructured, N:M such as 2:4 or 8:16, or the literal N:16.")
    return NM(int(match[1]), int(match[2]))


@dataclass(frozen=True, slots=True)
class Grid:
    """The codes of quantized weights: `bits` each, one scale per `group_size` inputs (None: per row)."""

    bits: int
    group_size: int | None = 128
    symmetric: bool = True


@dataclass(frozen=True, slots=True)
class Target:
    """The pattern and the grid of one matrix; without a grid, kept weights are not quantized."""

    pattern: Pattern
    grid: Grid | None = None

    @property
    def bits(self) -> int | None:
        """Bits of a code; None if weights are not quantized."""
        return None if self.grid is None else self.grid.bits


@dataclass(frozen=True, slots=True)
class GramStats:
    """Statistics of the input of a matrix. `gram` (I, I) float32 is the *sum* of x x^T over `num_tokens` tokens.

    `input_shift` (I, I) is the sum of (z - x) x^T, with z the input in the dense model, or None if it is not known.
    `output_fisher` (K, B, B) is the mean of g g^T over tokens, with g the gradient of a sequence's summed loss at K
    groups of B outputs of the matrix. `borrowed_tokens` is how many of an expert's layer `gram` has, scaled to
    `num_tokens` (to one, if it has none).
    """

    gram: Tensor
    num_tokens: int
    input_shift: Tensor | None = None
    output_fisher: Tensor | None = None
    borrowed_tokens: int = 0
    routed_tokens: int | None = None
    """Tokens that are routed to an expert whose `gram` is of all tokens; None where that is of the routed ones."""
    scaled_by_damp: dict[float, Any] = field(default_factory=dict, repr=False, compare=False)
    """The scaled Grams of `solvers.quadratic`: matrices with the same input share their preconditioner."""
    inverses_by_damp: dict[float, Any] = field(default_factory=dict, repr=False, compare=False)
    """The factors of `numerics.linalg.inverse_factor`, which they share, too."""
    lock: AbstractContextManager[Any] = field(default_factory=RLock, repr=False, compare=False)
    """Held while one of both is made, so that it is made once."""


@dataclass(frozen=True, slots=True)
class Codes:
    """A quantized matrix: weight = (values - zeros) * scales, group by group.

    `values` (O, I) uint8 in 0..2^bits - 1; `scales` (O, G) float16; `zeros` (O, G) uint8, integers on the same range
    (2^(bits-1) everywhere when the grid is symmetric), so that 0.0 has a code in every group.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor


@dataclass(frozen=True, slots=True)
class CompressedLinear:
    """The unpacked result of a solver.

    `weight` (O, I) is float32 with exact zeros; `mask` (O, I) is bool, True = kept. `codes` is set when the target has
    a grid, and the weight is then exactly their product. `damp` (share of the mean diagonal) and `precision` are those
    of the inverse.
    """

    weight: Tensor
    mask: Tensor
    target: Target
    codes: Codes | None = None
    damp: float = 0.0
    precision: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True)
class Matrix:
    """The address of one weight matrix: a parameter of the model, or one slice of it (an expert).

    `shape` is (O, I) whatever the storage; `transposed` marks parameters stored as (I, O), as GPT-2's Conv1D does.
    Slices of a 2-D parameter are stacked: slice i is the i-th part of its rows.
    """

    parameter: str
    shape: tuple[int, int]
    index: int | None = None
    transposed: bool = False

    @property
    def name(self) -> str:
        """`model.layers.0.mlp.down_proj`, or `model.layers.0.mlp.experts.down_proj[3]` for a slice."""
        return self.parameter.removesuffix(".weight") if self.index is None else f"{self.parameter}[{self.index}]"

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def read(self, parameter: Tensor) -> Tensor:
        """The matrix (O, I), a view of its parameter."""
        view = parameter if self.index is None else self.slices(parameter)[self.index]
        return view.T if self.transposed else view

    def slices(self, parameter: Tensor) -> Tensor:
        """The parameter of a slice as (E, O, I), or (E, I, O) where it is transposed; a view."""
        return parameter.unflatten(0, (-1, self.shape[self.transposed])) if parameter.ndim == 2 else parameter


MatricesByBlock = Sequence[Sequence[Matrix]]
"""The matrices of each block, in the order of the module tree."""


def flatten(matrices: MatricesByBlock) -> list[Matrix]:
    return [matrix for block in matrices for matrix in block]


@dataclass(frozen=True, slots=True)
class PlannedMatrix:
    """One matrix of a plan: its target, and the sensitivity by which the target was chosen (if any).

    Its meaning depends on the allocator. Curves, auto and search: the predicted loss of the target in nats per token.
    Alpha: the exponent of the spectrum, where less is more sensitive. The others: a mean per weight, such as the mean
    trace, or the share of outliers, where more is more sensitive.
    """

    name: str
    shape: tuple[int, int]
    target: Target
    sensitivity: float | None = None
    role: str = ""
    """HEAD or EMBEDDINGS for a matrix outside of the blocks, which is in no plan."""

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]
