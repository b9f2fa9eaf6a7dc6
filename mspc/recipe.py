"""The options of `compress`: one frozen dataclass, the same on the command line, in Python and in TOML.

A recipe holds what was asked for, and None for what was not; `settings` gives every option its value.
"""

import dataclasses
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import tomli_w

from mspc.encoding import check_encoding
from mspc.errors import InputError, unknown
from mspc.goals import TIMES
from mspc.settings import (
    DEFAULT_BITS_PER_WEIGHT,
    DEFAULT_OUTER_BITS,
    EFFORTS,
    EMBEDDING_BITS,
    HEAD_BITS,
    RECOVER_LR,
    ROUTED,
    ROW,
    SPREADS,
    Settings,
    fixed_pattern,
    has_goal,
    resolve,
)
from mspc.sizes import bytes_of
from mspc.types import BITS, UNQUANTIZED_BITS

OUTER_SHOWN = f"{UNQUANTIZED_BITS}; {DEFAULT_OUTER_BITS} if no goal is given"
"""The defaults of `head_bits` and `embedding_bits`, as help texts show them."""


def option(default: Any, text: str, *, advanced: bool = True, **cli: Any) -> Any:
    """A field of `Recipe`: its default, the help text, and whether the command line shows it under Advanced."""
    return dataclasses.field(default=None, metadata={"default": default, "help": text, "advanced": advanced, **cli})


def common(default: Any, text: str, **cli: Any) -> Any:
    return option(default, text, advanced=False, **cli)


def repeatable(text: str) -> Any:
    """A field that holds regular expressions."""
    metadata = {"default": (), "help": text, "advanced": False, "metavar": "REGEX"}
    return dataclasses.field(default=(), metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The options of `compress` that decide the content of an artifact. None: not asked for.

    Without a goal (`GOALS` of `mspc.settings`) the result has 4.25 bits per weight, the size of int4 in groups of 64.
    Head and embeddings have 8 bits then.

    Raises InputError for values that make no sense, and for an option that has no effect with the others given.
    """

    sparsity: float | None = common(
        0.5, "Share of zeros in the compressed matrices, 0 <= S < 1.", shown="0.5 with --pattern or --bits"
    )
    pattern: str | None = common(
        "unstructured",
        "unstructured; N:M such as 2:4 (N of M are kept), the same in every matrix; or N:16, with N chosen per matrix.",
    )
    bits: int | None = common(
        UNQUANTIZED_BITS,
        "Bits of each kept weight: 8, 4, 3 or 2, or 16 for the checkpoint's dtype.",
        shown=f"{UNQUANTIZED_BITS} with --sparsity or --pattern",
    )
    head_bits: int | None = common(
        UNQUANTIZED_BITS,
        "Bits of the output head: 8 or 4, or 16 for the checkpoint's dtype. No size but --target-size counts it.",
        shown=OUTER_SHOWN,
    )
    embedding_bits: int | None = common(
        UNQUANTIZED_BITS,
        "Bits of the embeddings: 8, or 16 for the checkpoint's dtype. Where head and embeddings are one matrix, one of "
        "both options is enough.",
        shown=OUTER_SHOWN,
    )
    keep_zeros: bool | None = common(
        False,
        "Take the zeros that the checkpoint has as its masks, prune nothing more, and only round (--bits).",
        flags="--keep-zeros",
        shown="off",
    )
    bits_per_weight: float | None = common(
        None,
        "Size budget in bits per weight, masks and scales included. Chooses sparsity and bits of each matrix.",
        shown=f"{DEFAULT_BITS_PER_WEIGHT:g}, if no other goal is given",
    )
    target_size: str | None = common(
        None, "Size budget for all weights of the sparse export, such as 800MB, 2.2GB or 2GiB."
    )
    ms_per_token: float | None = common(
        None,
        "Budget in time: milliseconds of a token (batch 1, context 128) on this CPU, measured first. Chooses sparsity "
        "and bits of each matrix.",
    )
    speedup: float | None = common(
        None, "The same budget, as a multiple of the speed of bfloat16 on this CPU, with torch or with mspc."
    )
    effort: str | None = common(
        "default", "Preset for the options marked *: fast, default or best.", metavar="fast|default|best"
    )
    calibration: str | None = common(
        "builtin",
        "Calibration text: builtin (Python's own documentation), self (the model writes it), c4, wikitext2, a .txt, "
        ".jsonl, .json or .parquet file, a folder of them, or a dataset id.",
    )
    skip: tuple[str, ...] = repeatable(
        "Leave matrices dense if their name matches this regular expression anywhere. Repeatable."
    )
    only: tuple[str, ...] = repeatable(
        "Compress only matrices whose name matches this regular expression anywhere; --skip wins over it. Repeatable."
    )
    include: tuple[str, ...] = repeatable(
        "Compress routers, indexers and gates of experts, too, if their name matches this regular expression anywhere; "
        "--skip wins over it. Repeatable."
    )
    device: str | None = common("auto", "Device to compute on: auto, cpu, cuda, cuda:1, ...")
    timings: str | None = option(
        None,
        "Timings of the machine that will serve the model (`mspc timings`), for --ms-per-token and --speedup.",
        metavar="FILE.json",
        shown="measured here, and kept",
    )
    group_size: int | str | None = option(
        "auto",
        "Number of inputs that share a scale; row: one scale per row; auto: the largest of 128, 64 and 32 that divides "
        "the inputs of every matrix.",
        metavar="N|row|auto",
    )
    asymmetric: bool | None = option(
        False, "Give each group an integer zero point.", flags="--asymmetric/--symmetric", shown="symmetric"
    )
    text_column: str | None = option(
        None,
        "Field or column of the calibration text. One that holds chats goes through the chat template of the model.",
        shown="text, messages or conversations",
        metavar="NAME",
    )
    text_encoding: str | None = option(
        None, "Encoding of .txt files. A byte order mark wins over it.", shown="utf-8", metavar="NAME"
    )
    bos: str | None = option(
        "auto",
        "Whether texts begin with a BOS token: auto (as the tokenizer begins a text), yes or no.",
        metavar="auto|yes|no",
    )
    solver: str | None = option(
        None,
        "kfac (ADMM on the model's loss), fisher (the same with errors at outputs apart), admm (ADMM on the layer's "
        "error), obs (one OBS sweep) or mask (zeros only, no update of kept weights).",
    )
    iterations: int | None = option(None, "Number of ADMM iterations (solvers kfac, fisher and admm).")
    propagation: float | None = option(
        None, "Strength of error compensation for earlier layers, from 0 (off) to 1 (full)."
    )
    reconstruct: int | None = option(
        0, "Number of steps that tune the kept weights of each attention and MLP module. Not with --bits."
    )
    recover: int | None = option(
        0,
        "Number of steps that train kept weights, scales, norms and biases towards the predictions of the dense model.",
    )
    recover_lr: float | None = option(None, "Highest learning rate of --recover.", shown=f"{RECOVER_LR:g}")
    criterion: str | None = option(
        "isc", "Score that decides which weights are pruned (solvers obs and mask): isc, obs, wanda, ria or magnitude."
    )
    allocator: str | None = option(
        None,
        "How sparsity is divided among matrices: auto (as curves; without a size budget, the better of two plans on "
        "validation text), curves (lowest predicted loss), estimate (the same, by curves in closed form), search "
        "(evolutionary search from curves), uniform; "
        "published: trace-rank, layer-trace-rank, owl, alpha (AlphaPruning).",
    )
    alpha: float | None = option(
        None,
        "Maximum deviation of a matrix's sparsity from the target (allocators trace-rank, layer-trace-rank, owl and "
        "alpha).",
        shown=", ".join(f"{name} {value:g}" for name, value in SPREADS.items()),
    )
    search_minutes: float | None = option(
        10.0, "Minutes for --allocator search, which stops by the clock. The same plan.json gives the same bytes."
    )
    sensitivity: str | None = option(
        "hutchinson",
        "Measure that trace-rank ranks by: hutchinson (Hessian trace), fisher (squared gradient), gram (no gradient).",
    )
    sensitivity_sequences: int | None = option(
        None, "Maximum number of calibration sequences for gradients, loss curves and sensitivities."
    )
    sensitivity_probes: int | None = option(1, "Number of random probes per sequence (sensitivity hutchinson).")
    num_sequences: int | None = option(128, "Number of calibration sequences.")
    sequence_length: int | None = option(
        None, "Number of tokens per sequence.", shown="2048, or the model's maximum if that is less"
    )
    route: str | None = option(
        ROUTED,
        "Tokens that experts are calibrated on: routed (those that the router gives them) or all. Layers after them "
        "see the outputs of routed tokens in both.",
        metavar="routed|all",
    )
    seed: int | None = option(0, "Seed for the choice of calibration text and for probes.")
    plan: str | None = option(
        None, "Plan to follow instead of allocating: a plan.json, edited or not.", metavar="FILE.json"
    )
    damp: float | None = option(0.01, "Number added to the diagonal of a Gram matrix, as a share of its mean.")
    activation_order: bool | None = option(
        False,
        "Process the columns with the largest inputs first (OBS sweep).",
        flags="--activation-order/--column-order",
        shown="column order",
    )
    dtype: str | None = option(
        "auto",
        "Dtype of the forward passes: auto, float32, bfloat16 or float16. auto is float32 on a CPU, where bfloat16 may "
        "take less time, else the checkpoint's.",
    )
    eval: bool | None = option(
        True,
        "Compare the compressed model with the dense one on test text: perplexity and KL divergence.",
        flags="--eval/--no-eval",
        shown="eval",
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(field.name, field.type, getattr(self, field.name))
        for name in REPEATABLE:
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, value in self.asked().items():
            _check_value(name, value)
        self.settings()

    def asked(self) -> dict[str, Any]:
        """The options that were asked for, by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None and value != ()}

    @property
    def has_goal(self) -> bool:
        """True if it says what the result is to be: a size, a sparsity, a pattern, bits, a plan or zeros to keep."""
        return has_goal(self.asked())

    def settings(self) -> Settings:
        """Every option with its value: as asked for, else by the effort, else its default."""
        defaults = {field.name: field.metadata["default"] for field in dataclasses.fields(self)}
        return resolve(self.asked(), defaults)

    def to_dict(self) -> dict[str, Any]:
        """The options that were asked for, as plain values for TOML and JSON."""
        return {name: list(value) if name in REPEATABLE else value for name, value in self.asked().items()}

    def to_toml(self) -> str:
        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """Raises InputError for unknown keys, with the name that was probably meant."""
        known = {field.name for field in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise unknown("recipe key", name, known)
        return cls(**values)

    @classmethod
    def from_toml(cls, path: Path) -> "Recipe":
        """The recipe of a file. A plan and timings are looked for next to the file first."""
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
            for name in ("plan", "timings"):
                if isinstance(file := values.get(name), str) and (path.parent / file).is_file():
                    values[name] = str(path.parent / file)
            return cls.from_dict(values)
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InputError(f"Recipe {path} cannot be read: {error}.") from error


def default_of(field: dataclasses.Field[Any]) -> str:
    """The default of an option as the help shows it; * marks one that the effort decides."""
    if field.name in EFFORTS["default"]:
        return f"{EFFORTS['default'][field.name]}*"
    default = field.metadata["default"]
    return str(field.metadata.get("shown", "none" if default in (None, ()) else default))


REPEATABLE = ("skip", "only", "include")
"""Options that hold regular expressions."""
AT_LEAST = {
    "num_sequences": 1, "sensitivity_sequences": 1, "sensitivity_probes": 1, "group_size": 1, "iterations": 1,
    "sequence_length": 2, "reconstruct": 0, "recover": 0,
}  # fmt: skip


def _check_value(name: str, value: Any) -> None:
    """Raises InputError for a value outside the range of its option."""
    if name == "group_size" and isinstance(value, str):
        if value not in (ROW, "auto"):
            raise InputError(f"group_size must be a number, 'auto' or {ROW!r}, not {value!r}.")
    elif name in AT_LEAST and value < AT_LEAST[name]:
        raise InputError(f"{name} must be at least {AT_LEAST[name]}, not {value}.")
    elif name == "sparsity" and not 0 <= value < 1:
        raise InputError(f"sparsity must lie in [0, 1), not {value}: it is the share of zeros (0.5 = 50%).")
    elif name == "pattern":
        fixed_pattern(value)
    elif name == "bits" and value not in (UNQUANTIZED_BITS, *BITS):
        raise InputError(f"bits must be {UNQUANTIZED_BITS} (not quantized), 8, 4, 3 or 2, not {value}.")
    elif name == "head_bits" and value not in (UNQUANTIZED_BITS, *HEAD_BITS):
        raise InputError(f"head_bits must be {UNQUANTIZED_BITS} (not quantized), 8 or 4, not {value}.")
    elif name == "embedding_bits" and value not in (UNQUANTIZED_BITS, *EMBEDDING_BITS):
        raise InputError(f"embedding_bits must be {UNQUANTIZED_BITS} (not quantized) or 8, not {value}.")
    elif name == "bits_per_weight" and not 0 < value <= 32:
        raise InputError(f"bits_per_weight must lie in (0, 32], not {value}.")
    elif name in TIMES and not 0 < value < float("inf"):
        raise InputError(f"{name} must be a number above 0, not {value}.")
    elif name == "target_size":
        bytes_of(value)
    elif name == "text_encoding":
        check_encoding(value)
    elif name in ("alpha", "propagation") and not 0 <= value <= 1:
        raise InputError(f"{name} must lie in [0, 1], not {value}.")
    elif name == "recover_lr" and not 0 < value < float("inf"):
        raise InputError(f"recover_lr must be a number above 0, not {value}.")
    elif name == "search_minutes" and not 0 < value < float("inf"):
        raise InputError(f"search_minutes must be a number above 0, not {value}.")
    elif name == "damp" and not 0 <= value < float("inf"):
        raise InputError(f"damp must be a number >= 0, not {value}.")
    elif name in REPEATABLE:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"{name}: {pattern!r} is not a regular expression ({error}).") from error


def _check_type(name: str, kind: Any, value: object) -> None:
    if kind == tuple[str, ...]:
        fits = isinstance(value, tuple | list) and all(isinstance(item, str) for item in value)
    else:
        whole_number_too = kind | int if float in (kind, *get_args(kind)) else kind
        fits = isinstance(value, whole_number_too) and (bool in get_args(kind) or not isinstance(value, bool))
    if not fits:
        wanted = getattr(kind, "__name__", kind)
        raise InputError(f"{name} must be of type {wanted}, not {value!r}.")
