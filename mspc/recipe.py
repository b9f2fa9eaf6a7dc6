"""What the user asks of `compress`: one frozen dataclass, the same on the command line, in Python and in TOML."""

import dataclasses
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import tomli_w

from mspc.errors import InputError, unknown
from mspc.types import NM, Grid, parse_nm

MIXED_PATTERN = "N:16"  # the allocator chooses N per matrix
MIXED_OF = 16
ROW = "row"  # a group size of None, in TOML and on the command line
DTYPES = ("auto", "bfloat16", "float16", "float32")
CURVES, AUTO, SEARCH = "curves", "auto", "search"
"""The allocators that need loss curves: the plan of least predicted loss, the best of several when tried, and the best
that is found from there by search."""


EFFORTS: dict[str, dict[str, Any]] = {
    "fast": {
        "solver": "admm", "iterations": 10, "propagation": 0.0, "allocator": "uniform", "sensitivity_sequences": 24,
    },
    "default": {
        "solver": "kfac", "iterations": 20, "propagation": 1.0, "allocator": "auto", "sensitivity_sequences": 24,
    },
    "best": {
        "solver": "kfac", "iterations": 60, "propagation": 1.0, "allocator": "auto", "sensitivity_sequences": 128,
    },
}  # fmt: skip
"""What a recipe leaves open."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every choice that decides the bytes of an artifact. Raises InputError for values that cannot be meant."""

    sparsity: float | None = None
    """Share of zeros over all pruned weights, in [0, 1). None: 0.5, or what a fixed N:M pattern implies."""
    pattern: str = "unstructured"
    """`unstructured`; N:M such as `2:4`, the same in every matrix; or the literal `N:16`, N chosen per matrix."""
    bits: int = 16
    """16 keeps the checkpoint's precision; 8, 4, 3 and 2 round the kept weights to a grid in the same pass."""
    bits_per_weight: float | None = None
    """Of everything that the pruned matrices need, masks and scales too: chooses sparsity and bits of each matrix."""
    target_size: str | None = None
    """The same for the weights of the `sparse` export, such as 2.2GB (1 GB is 10^9 bytes)."""
    group_size: int | None = 128
    """Inputs that share a scale; None (`row` on the command line): one scale per row."""
    asymmetric: bool = False
    """Give every group an integer zero point of its own."""
    effort: str = "default"
    """`fast`, `default` or `best`: decides what is None of the fields that `EFFORTS` names."""
    solver: str | None = None
    """`kfac` searches for what to keep by the loss of the model, `admm` by the error of the layer; `obs` sweeps once
    and corrects the kept weights for the removed ones; `mask` only removes."""
    iterations: int | None = None
    """Of the search of kfac and admm."""
    propagation: float | None = None
    """In [0, 1]: how far each matrix makes good what the matrices before it have lost. 0 with the mask solver."""
    reconstruct: int = 0
    """So many steps of tuning the kept weights of each attention and MLP towards what it returns in the dense model."""
    criterion: str = "isc"
    """What decides which weights go: isc, obs, wanda, ria, magnitude."""
    allocator: str | None = None
    """How sparsity is shared out: auto (the best of several plans on text that was held out), curves (least predicted
    loss), search (goes on from there on text that was held out), uniform, trace-rank, layer-trace-rank, owl,
    alpha."""
    alpha: float | None = None
    """Half-width of the other allocators but uniform: sparsities lie within about sparsity +- alpha, or sparsity
    (1 +- alpha) with the allocator alpha. None: the allocator's own."""
    search_minutes: float = 10.0
    """Of the allocator search, which stops by the clock: its plan, not its recipe, makes the same artifact again."""
    sensitivity: str = "hutchinson"
    """What trace-rank ranks by: hutchinson (Hessian trace), fisher (squared gradient), gram (no gradient)."""
    sensitivity_sequences: int | None = None
    """At most so many calibration sequences measure sensitivities, gradients and curves."""
    sensitivity_probes: int = 1
    """Random probes per sequence of the Hutchinson estimate."""
    calibration: str = "builtin"
    """Text: builtin, c4, wikitext2, a file or folder (.txt, .jsonl, .parquet), or a dataset id on the hub."""
    num_sequences: int = 128
    """Calibration sequences."""
    sequence_length: int | None = None
    """Tokens of a calibration sequence; None: 2048 or what the model allows, whichever is less."""
    seed: int = 0
    """Decides the choice of calibration text and the probes."""
    skip: tuple[str, ...] = ()
    """Regular expressions; a matrix whose name one of them matches anywhere stays dense and is not counted."""
    plan: str | None = None
    """A plan file to obey; it then decides pattern, sparsity and grid of every matrix."""
    damp: float = 0.01
    """Added to the diagonal of every Gram, as a share of its mean."""
    activation_order: bool = False
    """Settle the columns with the largest inputs first."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    dtype: str = "auto"
    """Of the forward passes: auto (the checkpoint's on a GPU, float32 on a CPU), float32, bfloat16 or float16."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(field.name, field.type, getattr(self, field.name))
        object.__setattr__(self, "skip", tuple(self.skip))
        if self.effort not in EFFORTS:
            raise unknown("effort", self.effort, EFFORTS)
        if self.solver == "mask":
            object.__setattr__(self, "propagation", 0.0)
        chosen = EFFORTS[self.effort] | ({"allocator": AUTO} if self.has_budget else {})
        for name, value in chosen.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise InputError(f"sparsity must lie in [0, 1), not {self.sparsity}: it is the share of zeros (0.5 = 50%).")
        if self.fixed_pattern and self.sparsity is not None and abs(self.sparsity - self.fixed_pattern.sparsity) > 5e-5:
            raise InputError(
                f"pattern {self.pattern} fixes the sparsity at {self.fixed_pattern.sparsity:g}, but sparsity "
                f"{self.sparsity:g} was asked for; leave one of the two out, or let N vary with the pattern N:16."
            )
        if self.has_budget:
            self._check_budget()
        if self.bits not in (16, 8, 4, 3, 2):
            raise InputError(f"bits must be 16 (no rounding), 8, 4, 3 or 2, not {self.bits}.")
        self._check_reconstruct()
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        for name in ("num_sequences", "sensitivity_sequences", "sensitivity_probes", "group_size", "iterations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, not {value}.")
        if self.sequence_length is not None and self.sequence_length < 2:
            raise InputError(f"sequence_length must be at least 2, not {self.sequence_length}.")
        for name in ("alpha", "propagation"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"{name} must lie in [0, 1], not {value}.")
        if not 0 < self.search_minutes < float("inf"):
            raise InputError(f"search_minutes must be a number above 0, not {self.search_minutes}.")
        if not 0 <= self.damp < float("inf"):
            raise InputError(f"damp must be a number >= 0, not {self.damp}.")
        for pattern in self.skip:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"skip: {pattern!r} is not a regular expression ({error}).") from error

    def _check_reconstruct(self) -> None:
        if self.reconstruct < 0:
            raise InputError(f"reconstruct must be at least 0, not {self.reconstruct}: it is a number of steps.")
        if self.reconstruct and (self.bits != 16 or self.has_budget):
            how = "a budget chooses bits" if self.has_budget else f"bits is {self.bits}"
            raise InputError(f"reconstruct tunes weights that are not rounded, and {how}; leave one of the two out.")
        if self.reconstruct and self.num_sequences < 2:
            raise InputError("reconstruct holds back a part of the calibration text, so num_sequences must be above 1.")

    def _check_budget(self) -> None:
        given = {"sparsity": self.sparsity is not None, "bits": self.bits != 16, "plan": self.plan is not None}
        for name, is_given in given.items():
            if is_given:
                raise InputError(f"bits_per_weight and target_size decide {name} themselves; leave one of the two out.")
        if self.bits_per_weight is not None and self.target_size is not None:
            raise InputError("bits_per_weight and target_size are both a budget; give one of them.")
        if self.bits_per_weight is not None and not 0 < self.bits_per_weight <= 32:
            raise InputError(f"bits_per_weight must lie in (0, 32], not {self.bits_per_weight}.")
        if self.target_size is not None:
            _ = self.target_bytes
        if self.allocator not in (AUTO, CURVES):
            raise InputError(
                f"bits_per_weight and target_size need the allocator auto or curves, not {self.allocator}."
            )

    @property
    def has_budget(self) -> bool:
        """Whether sparsity and bits of every matrix are chosen to fit a size."""
        return self.bits_per_weight is not None or self.target_size is not None

    @property
    def target_bytes(self) -> int:
        """`target_size` in bytes."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]?)B?\s*", self.target_size or "")
        if not match:
            raise InputError(f"target_size must be a number with a unit, such as 2.2GB, not {self.target_size!r}.")
        return int(float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[match[2]])

    @property
    def fixed_pattern(self) -> NM | None:
        """The pattern of every matrix, when one is fixed."""
        if self.pattern in ("unstructured", MIXED_PATTERN):
            return None
        return parse_nm(self.pattern)

    @property
    def target_sparsity(self) -> float:
        if self.fixed_pattern is not None:
            return self.fixed_pattern.sparsity
        return 0.5 if self.sparsity is None else self.sparsity

    @property
    def grid(self) -> Grid | None:
        return None if self.bits == 16 else Grid(self.bits, self.group_size, not self.asymmetric)

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the field names; a None becomes what it stands for, or is left out."""
        values = dataclasses.asdict(self) | {"sparsity": self.target_sparsity, "skip": list(self.skip)}
        values["group_size"] = values["group_size"] or ROW
        if self.has_budget:
            values["sparsity"] = None
        return {name: value for name, value in values.items() if value is not None}

    def to_toml(self) -> str:
        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """Raises InputError for unknown keys, with the name that was probably meant."""
        known = {field.name for field in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise unknown("recipe key", name, known)
        if values.get("group_size") == ROW:
            values = values | {"group_size": None}
        return cls(**values)

    @classmethod
    def from_toml(cls, path: Path) -> "Recipe":
        try:
            return cls.from_dict(tomllib.loads(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InputError(f"Recipe {path} cannot be read: {error}.") from error


def _check_type(name: str, kind: Any, value: object) -> None:
    if kind == tuple[str, ...]:
        fits = isinstance(value, tuple | list) and all(isinstance(item, str) for item in value)
    else:
        whole_number_too = kind | int if float in (kind, *get_args(kind)) else kind
        fits = isinstance(value, whole_number_too) and (kind is bool) == isinstance(value, bool)
    if not fits:
        wanted = getattr(kind, "__name__", kind)
        raise InputError(f"{name} must be of type {wanted}, not {value!r}.")
