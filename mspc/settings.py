"""The settings of a run: every choice of a recipe with its value, and the check that each value given has an effect."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mspc.errors import InputError, unknown
from mspc.goals import SIZES, TIMES, budget_of, check_budget, check_fixed, check_kept
from mspc.sizes import bytes_of
from mspc.types import NM, UNQUANTIZED_BITS, Grid, parse_nm

MIXED_PATTERN = "N:16"
"""The literal with which N is chosen per matrix."""
MIXED_OF = 16
ROW = "row"
"""A group size of one scale per row, in JSON, in TOML and on the command line."""
AUTO_GROUP_SIZES = (128, 64, 32)
"""Group sizes that `auto` chooses from: the largest that divides the inputs of every matrix."""

SOLVERS = ("kfac", "fisher", "admm", "obs", "mask")
BY_ADMM = ("kfac", "fisher", "admm")
CRITERIA = ("isc", "obs", "wanda", "ria", "magnitude")
PUBLISHED_CRITERIA = ("wanda", "ria", "magnitude")
"""Criteria that need no inverse of the Gram matrix."""
CURVES, AUTO, SEARCH, ESTIMATE = "curves", "auto", "search", "estimate"
"""Allocators that need loss curves: the plan with the lowest predicted loss, the better of two on validation text
(under a size budget `curves`), the best that a search finds there, and the lowest loss by curves in closed form."""
SPREADS = {"alpha": 0.2, "layer-trace-rank": 0.1, "owl": 0.08, "trace-rank": 0.1}
"""Default alpha of each allocator that has one. `owl` and `alpha` have their authors' values for SparseGPT on
LLaMA-7B; for larger models the authors of `alpha` use 0.3."""
ALLOCATORS = (AUTO, CURVES, SEARCH, ESTIMATE, "uniform", *sorted(SPREADS))
SENSITIVITIES = ("hutchinson", "fisher", "gram")
RANKING = ("trace-rank", "layer-trace-rank")
"""Allocators that rank matrices by `sensitivity`."""
OWN_MEASURES = {"alpha": "exponents", "owl": "outliers"}
"""Measure of each allocator that ignores `sensitivity`."""
RECOVER_LR = 1e-4
"""Highest learning rate of a recovery, unless another is given."""
HEAD_BITS, EMBEDDING_BITS = (8, 4), (8,)
BOS = ("auto", "yes", "no")
ROUTED, ALL = ROUTES = ("routed", "all")
DTYPES = ("auto", "bfloat16", "float16", "float32")

GOALS = ("sparsity", "pattern", "bits", *SIZES, *TIMES, "plan", "keep_zeros")
"""Options that say, each alone, what the result is to be."""
DEFAULT_BITS_PER_WEIGHT, DEFAULT_OUTER_BITS = 4.25, 8
"""Bits of a recipe without a goal: of the blocks, and of head and embeddings. The first is what int4 takes with groups
of 64 (4 bits, and 16/64 for scales): small and near the dense model, and 4 bits everywhere is one of the plans."""

EFFORTS: dict[str, dict[str, Any]] = {
    "fast": {
        "solver": "fisher", "iterations": 10, "propagation": 0.0, "allocator": ESTIMATE, "sensitivity_sequences": 8,
    },
    "default": {
        "solver": "kfac", "iterations": 26, "propagation": 1.0, "allocator": AUTO, "sensitivity_sequences": 24,
    },
    "best": {
        "solver": "kfac", "iterations": 60, "propagation": 1.0, "allocator": AUTO, "sensitivity_sequences": 128,
    },
}  # fmt: skip
"""Values that each effort gives to options that were not given."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every choice that decides the bytes of an artifact, with its value; `mspc.recipe.Recipe` documents each."""

    sparsity: float | None
    """None under a budget unless it is to be 0, and with the zeros of the checkpoint if it was not asked for."""
    pattern: str
    bits: int
    fixed_bits: int | None
    """Bits of every matrix under a budget of time, if they were asked for."""
    head_bits: int
    embedding_bits: int
    keep_zeros: bool
    bits_per_weight: float | None
    target_size: str | None
    ms_per_token: float | None
    speedup: float | None
    timings: str | None
    group_size: int | None
    """None: one scale per row."""
    rows_if_needed: bool
    """True if a matrix whose inputs `group_size` does not divide gets one scale per row, and is no error."""
    asymmetric: bool
    effort: str
    solver: str
    iterations: int
    propagation: float
    reconstruct: int
    recover: int
    recover_lr: float | None
    """None if nothing is recovered."""
    criterion: str
    allocator: str
    alpha: float | None
    search_minutes: float
    sensitivity: str
    sensitivity_sequences: int
    sensitivity_probes: int
    calibration: str
    text_column: str | None
    text_encoding: str | None
    bos: str
    num_sequences: int
    route: str
    sequence_length: int | None
    """None until the model is known."""
    seed: int
    skip: tuple[str, ...]
    only: tuple[str, ...]
    """Empty: every matrix, apart from those that `skip` names."""
    include: tuple[str, ...]
    plan: str | None
    damp: float
    activation_order: bool
    device: str
    dtype: str
    eval: bool

    @property
    def has_budget(self) -> bool:
        """True if sparsity and bits of every matrix are chosen to fit a size or a time."""
        return self.bits_per_weight is not None or self.target_size is not None or self.has_time_budget

    @property
    def has_time_budget(self) -> bool:
        return self.ms_per_token is not None or self.speedup is not None

    @property
    def target_bytes(self) -> int:
        """`target_size` in bytes."""
        return bytes_of(self.target_size or "")

    @property
    def fixed_pattern(self) -> NM | None:
        """The N:M pattern of every matrix, if one is fixed."""
        return fixed_pattern(self.pattern)

    @property
    def target_sparsity(self) -> float:
        return self.sparsity or 0.0

    @property
    def quantizes(self) -> bool:
        """True if every matrix gets codes; under a size budget and with a plan, some may."""
        return self.bits != UNQUANTIZED_BITS

    @property
    def quantizes_outer(self) -> bool:
        """True if the head or the embeddings get codes."""
        return min(self.head_bits, self.embedding_bits) < UNQUANTIZED_BITS

    def grid_for(self, num_inputs: int, bits: int | None = None) -> Grid | None:
        """The grid of a matrix with so wide an input; None if it is not quantized."""
        bits = bits or self.bits
        if bits == UNQUANTIZED_BITS:
            return None
        by_row = self.rows_if_needed and self.group_size and num_inputs % self.group_size
        return Grid(bits, None if by_row else self.group_size, not self.asymmetric)

    @property
    def allocates(self) -> bool:
        """True if there is sparsity to allocate: no plan, no fixed pattern or zeros, and not 0."""
        given = self.plan is not None or self.fixed_pattern is not None or self.keep_zeros
        return not given and self.target_sparsity > 0

    @property
    def prunes(self) -> bool:
        """True if some weights are to become zero, as far as the settings say; a plan may say so."""
        return self.plan is not None or self.has_budget or (self.target_sparsity > 0 and not self.keep_zeros)

    @property
    def needs_validation(self) -> bool:
        """True if validation text decides between plans, or between steps of a recovery."""
        return self.validates_plans or self.recover > 0

    @property
    def needs_sensitivity(self) -> bool:
        return self.allocates and self.allocator in SPREADS

    @property
    def measure(self) -> str:
        """The measure that the allocator ranks by."""
        return OWN_MEASURES.get(self.allocator, self.sensitivity)

    @property
    def needs_curves(self) -> bool:
        return self.has_budget or (self.allocates and self.allocator in (CURVES, AUTO, SEARCH, ESTIMATE))

    @property
    def needs_fisher(self) -> bool:
        """True if the solver weighs the errors at outputs by the gradients there: `fisher` where it chooses masks."""
        chooses = self.solver == "fisher" and self.prunes and self.fixed_pattern is None
        return chooses or (self.solver == "kfac" and (self.prunes or self.quantizes))

    @property
    def validates_plans(self) -> bool:
        """True if plans are compared on validation text."""
        return self.needs_curves and not self.has_budget and self.allocator in (AUTO, SEARCH)

    def to_dict(self) -> dict[str, Any]:
        """Plain values by option, without None and `eval`, which changes no weight. No group size is `row`."""
        values = dataclasses.asdict(self) | {"skip": list(self.skip), "group_size": self.group_size or ROW}
        values |= {"only": list(self.only) or None, "include": list(self.include) or None}
        outer = dict.fromkeys(("head_bits", "embedding_bits"), UNQUANTIZED_BITS)
        unset = {"keep_zeros": False, "recover": 0, "route": ROUTED, **outer}
        values |= {name: None for name, value in unset.items() if values[name] == value}
        return {name: value for name, value in values.items() if value is not None and name != "eval"}


def resolve(asked: Mapping[str, Any], defaults: Mapping[str, Any]) -> Settings:
    """The settings for options that were asked for; the effort and `defaults` give the others.

    Raises InputError for an unknown name, for options that contradict each other, and for one without effect.
    """
    if not has_goal(asked):
        outer = dict.fromkeys(("head_bits", "embedding_bits"), DEFAULT_OUTER_BITS)
        defaults = {**defaults, "bits_per_weight": DEFAULT_BITS_PER_WEIGHT, **({} if outer.keys() & asked else outer)}
    _check_name("effort", effort := asked.get("effort", defaults["effort"]), EFFORTS)
    values = {**defaults, **EFFORTS[effort], **asked}
    values["rows_if_needed"] = values["group_size"] == "auto"
    if values["group_size"] in (ROW, "auto"):
        values["group_size"] = None if values["group_size"] == ROW else AUTO_GROUP_SIZES[0]
    if values["keep_zeros"]:
        check_kept(asked)
    values["fixed_bits"] = asked.get("bits") if budget_of(asked) in TIMES else None
    if any(values[name] is not None for name in (*SIZES, *TIMES)):
        measured = {"allocator": AUTO, "sensitivity_sequences": max(24, values["sensitivity_sequences"])}
        values |= {name: asked.get(name, value) for name, value in measured.items()}
        check_budget(asked, fixed_pattern(values["pattern"]))
        _check_allocator(asked, values)
        values["sparsity"] = asked.get("sparsity")
    elif values["keep_zeros"] and fixed_pattern(values["pattern"]) is None:
        values["sparsity"] = asked.get("sparsity")
    elif (pattern := fixed_pattern(values["pattern"])) is not None:
        check_fixed(pattern, asked, MIXED_PATTERN)
        values["sparsity"] = pattern.sparsity
    if values["solver"] == "mask" or (values["keep_zeros"] and values["bits"] == UNQUANTIZED_BITS):
        values["propagation"] = asked.get("propagation", 0.0)
    values["alpha"] = asked.get("alpha", SPREADS.get(values["allocator"]))
    if values["recover"]:
        values["recover_lr"] = asked.get("recover_lr", RECOVER_LR)
    settings = Settings(**values)
    for what, name, known in (
        ("solver", settings.solver, SOLVERS),
        ("criterion", settings.criterion, CRITERIA),
        ("allocator", settings.allocator, ALLOCATORS),
        ("sensitivity", settings.sensitivity, SENSITIVITIES),
        ("bos", settings.bos, BOS),
        ("route", settings.route, ROUTES),
        ("dtype", settings.dtype, DTYPES),
    ):
        _check_name(what, name, known)
    check_reconstruct(settings)
    for name, value in asked.items():
        if (reason := without_effect(name, value, settings)) is not None:
            raise InputError(
                f"{name} {value} has no effect with {reason}. Leave one of the two out, or choose another value."
            )
    return settings


def has_goal(asked: Mapping[str, Any]) -> bool:
    """True if the options say what the result is to be; if not, it gets `DEFAULT_BITS_PER_WEIGHT`."""
    return any(name in asked for name in GOALS if name != "keep_zeros") or bool(asked.get("keep_zeros"))


def without_effect(name: str, value: Any, settings: Settings) -> str | None:
    """The other option, with its value, that leaves this one without effect; None if it has one.

    A value that only states what happens anyway, such as propagation 0 with the solver mask, is let pass.
    """
    reason = NEEDED_BY[name](settings) if name in NEEDED_BY else None
    states_it = not value or value == ROUTED or (name == "allocator" and value == "uniform" and settings.plan is None)
    if name == "sparsity":  # `resolve` has refused one that the pattern contradicts
        states_it = False
    return None if states_it else reason


def _plan(s: Settings) -> str | None:
    return None if s.plan is None else f"plan {s.plan}, which decides this for every matrix"


def _unquantized(s: Settings) -> str | None:
    may = s.has_budget and s.fixed_bits != UNQUANTIZED_BITS
    return None if s.quantizes or may else f"bits {s.bits}, which quantizes nothing"


def _nothing_to_allocate(s: Settings) -> str | None:
    if s.has_budget or s.allocates:
        return None
    if s.keep_zeros:
        return _zeros_of_checkpoint(s)
    return f"pattern {s.pattern}, the same in every matrix" if s.fixed_pattern else f"sparsity {s.target_sparsity:g}"


def _zeros_of_checkpoint(s: Settings) -> str | None:
    return f"keep_zeros {s.keep_zeros}, which takes the masks of the checkpoint" if s.keep_zeros else None


def _as_it_is(s: Settings) -> str | None:
    unchanged = s.keep_zeros and not s.quantizes
    return f"keep_zeros {s.keep_zeros} without bits, which changes no weight" if unchanged else None


def _unless(fits: bool, reason: str) -> str | None:
    return None if fits else reason


def _solver(s: Settings, *names: str) -> str | None:
    nothing = _zeros_of_checkpoint(s) or _unless(s.prunes, f"sparsity {s.target_sparsity:g}, which prunes nothing")
    return nothing or _unless(s.solver in names, f"solver {s.solver} (only {' and '.join(names)} use it)")


def _allocator(s: Settings, *names: str) -> str | None:
    return _plan(s) or _nothing_to_allocate(s) or _unless(s.allocator in names, f"allocator {s.allocator}")


def _sensitivity_sequences(s: Settings) -> str | None:
    used = s.needs_fisher or s.needs_curves or (s.needs_sensitivity and s.measure in ("hutchinson", "fisher"))
    return _unless(used, f"solver {s.solver} and allocator {s.allocator}, which compute no gradient")


def _damp(s: Settings) -> str | None:
    inverts = s.solver != "mask" or s.criterion not in PUBLISHED_CRITERIA or s.needs_curves
    return _as_it_is(s) or _unless(inverts, f"solver mask and criterion {s.criterion}, which invert no Gram matrix")


def _activation_order(s: Settings) -> str | None:
    sweeps = s.solver == "obs" or s.has_budget or (s.solver != "mask" and (s.quantizes or s.plan is not None))
    return _as_it_is(s) or _unless(sweeps, f"solver {s.solver} and bits {s.bits}: no OBS sweep is run")


NEEDED_BY: dict[str, Callable[[Settings], str | None]] = {
    "sparsity": _plan,
    "pattern": _plan,
    "bits": _plan,
    "timings": lambda s: _unless(s.has_time_budget, f"ms_per_token {s.ms_per_token} and speedup {s.speedup}"),
    "group_size": lambda s: None if s.quantizes_outer else _plan(s) or _unquantized(s),
    "asymmetric": lambda s: None if s.quantizes_outer else _plan(s) or _unquantized(s),
    "solver": _as_it_is,
    "reconstruct": _as_it_is,
    "recover": lambda s: _as_it_is(s) or _unless(s.prunes or s.quantizes, "sparsity 0 and bits 16, which keep all"),
    "recover_lr": lambda s: _unless(s.recover > 0, f"recover {s.recover}"),
    "iterations": lambda s: _solver(s, *BY_ADMM),
    "propagation": lambda s: _as_it_is(s) or _unless(s.solver != "mask", "solver mask, which updates no weight"),
    "criterion": lambda s: _solver(s, "obs", "mask"),
    "allocator": lambda s: _plan(s) or _nothing_to_allocate(s),
    "alpha": lambda s: _allocator(s, *SPREADS),
    "search_minutes": lambda s: _allocator(s, SEARCH),
    "sensitivity": lambda s: _allocator(s, *RANKING),
    "sensitivity_probes": lambda s: (
        _allocator(s, *RANKING) or _unless(s.sensitivity == "hutchinson", f"sensitivity {s.sensitivity}")
    ),
    "sensitivity_sequences": _sensitivity_sequences,
    "route": _as_it_is,
    "damp": _damp,
    "activation_order": _activation_order,
}
"""For each option that others can leave without effect: which option does, in the words of the error, or None."""


def _check_name(what: str, name: str, known: Mapping[str, Any] | tuple[str, ...]) -> None:
    if name not in known:
        raise unknown(what, name, known)


def _check_allocator(asked: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    budget, allocator = budget_of(asked) or SIZES[0], values["allocator"]
    if allocator in ALLOCATORS and allocator not in (AUTO, CURVES):
        what = f"{budget} {values[budget]}{'' if has_goal(asked) else ', the default,'}"
        raise InputError(
            f"{what} needs the allocator auto or curves, not {allocator}. Choose one of the two, or ask for zeros and "
            "no size, such as sparsity 0.5."
        )


def check_reconstruct(settings: Settings) -> None:
    """Raises InputError for weights that will be quantized, and for one sequence: a part is validation text."""
    if settings.reconstruct and (settings.quantizes or settings.has_budget):
        size = f"{settings.bits_per_weight:g} bits per weight" if settings.bits_per_weight else settings.target_size
        kind = "budget of time" if settings.has_time_budget else f"size budget, here {size},"
        how = f"a {kind} chooses bits" if settings.has_budget else f"bits is {settings.bits}"
        remedy = "ask for zeros and no size, such as sparsity 0.5" if settings.has_budget else "leave bits out"
        raise InputError(
            f"reconstruct tunes weights that are not quantized, and {how}. Leave reconstruct out, or {remedy}."
        )
    if settings.reconstruct and settings.num_sequences < 2:
        raise InputError("reconstruct needs num_sequences above 1: a part of them is validation text.")


def fixed_pattern(pattern: str) -> NM | None:
    """`"2:4"` -> NM(2, 4); None for a pattern that is not the same in every matrix."""
    return None if pattern in ("unstructured", MIXED_PATTERN) else parse_nm(pattern)
