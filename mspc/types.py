"""The values that flow through mspc. Letters: O out features, I in features, G quantization groups of a row."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from mspc.errors import InputError

BITS = (8, 4, 3, 2)
"""The bits that a grid may have."""
UNQUANTIZED_BITS = 16
"""What files say of a matrix without a grid, whatever its dtype is."""


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
    """At most `keep` of every `of` consecutive weights of a row are nonzero: 2:4 is NM(2, 4). A place is one byte."""

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
    """How kept weights are rounded: `bits`, one scale per `group_size` inputs (None: per row), symmetric or not."""

    bits: int
    group_size: int | None = 128
    symmetric: bool = True


@dataclass(frozen=True, slots=True)
class Target:
    """What the solver must deliver for one matrix."""

    pattern: Pattern
    grid: Grid | None = None


@dataclass(frozen=True, slots=True)
class GramStats:
    """Statistics of one input: `gram` (I, I) float32 is the *sum* of x x^T over `num_tokens` tokens. They add.

    `drift` (I, I), where it is known, is the sum of (z - x) x^T, with z the input in the dense model. `fisher`
    (K, B, B), of one matrix that reads the input, is a mean of g g^T over tokens, with g the gradient of a sequence's
    summed loss at K groups of B outputs.
    """

    gram: Tensor
    num_tokens: int
    drift: Tensor | None = None
    fisher: Tensor | None = None

    def __add__(self, other: "GramStats") -> "GramStats":
        drift = None if self.drift is None or other.drift is None else self.drift + other.drift
        return GramStats(self.gram + other.gram, self.num_tokens + other.num_tokens, drift, self.fisher)


@dataclass(frozen=True, slots=True)
class Codes:
    """A rounded matrix: weight = (values - zeros) * scales, group by group.

    `values` (O, I) uint8 in 0..2^bits - 1; `scales` (O, G) float16; `zeros` (O, G) uint8, integers on the same range
    (2^(bits-1) everywhere when the grid is symmetric), so that 0.0 has a code in every group.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor


@dataclass(frozen=True, slots=True)
class CompressedLinear:
    """The canonical, unpacked result of a solver.

    `weight` (O, I) float32 with exact zeros, `mask` (O, I) bool (True = kept), `codes` when the target has a grid (the
    weight is then exactly their product), the `damp` (share of the mean diagonal) and `precision` that the inverse
    needed.
    """

    weight: Tensor
    mask: Tensor
    target: Target
    codes: Codes | None = None
    damp: float = 0.0
    precision: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True)
class Matrix:
    """The address of one weight matrix: a parameter of the model, or one slice of a 3-D parameter (an expert).

    `shape` is (O, I) whatever the storage; `transposed` marks parameters stored as (I, O), as GPT-2's Conv1D does.
    """

    parameter: str
    shape: tuple[int, int]
    index: int | None = None
    transposed: bool = False

    @property
    def name(self) -> str:
        """`model.layers.0.mlp.down_proj`, or `model.layers.0.mlp.experts.down_proj[3]` for a slice."""
        name = self.parameter.removesuffix(".weight")
        return name if self.index is None else f"{name}[{self.index}]"

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def read(self, parameter: Tensor) -> Tensor:
        """The matrix (O, I), a view of its parameter."""
        view = parameter if self.index is None else parameter[self.index]
        return view.T if self.transposed else view


@dataclass(frozen=True, slots=True)
class PlannedMatrix:
    """One line of a plan: a matrix, its target, and the sensitivity that the target was chosen by (if any)."""

    name: str
    shape: tuple[int, int]
    target: Target
    sensitivity: float | None = None

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]
