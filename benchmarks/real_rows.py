"""The rows of quality_real.py, in the order in which they are run."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """`family` is the tool and method, as tables and pictures name it, and `setting` what was asked of it."""

    family: str
    setting: str
    maker: str
    """A key of MAKERS in real_makers.py; empty for the dense model."""
    options: tuple[str, ...] = ()
    """Command line options of the maker, in which GROUP stands for the group size of the model."""
    continues: str = ""
    """The name of the row whose artifact this one continues, with its options added."""

    @property
    def name(self) -> str:
        """The name of the file with the result."""
        name = f"{self.family} {self.setting}".strip().lower()
        for old, new in ((" ", "-"), ("%", "pc"), (":", "of"), ("+", "-"), (",", ""), ("(", ""), (")", "")):
            name = name.replace(old, new)
        return name


DENSE = Row("dense", "", "")
SWEEP = ("--solver", "obs", "--allocator", "uniform", "--propagation", "0")
SETTINGS = {
    "3.25 bits": ("--bits-per-weight", "3.25"),
    "4.25 bits": ("--bits-per-weight", "4.25"),
    "50%": ("--sparsity", "0.5"),
    "2:4+int4": ("--pattern", "2:4", "--bits", "4"),
    "3.125 bits": ("--bits-per-weight", "3.125"),  # of int3 in groups of 128
    "3.5 bits": ("--bits-per-weight", "3.5"),
    "50%+int4": ("--sparsity", "0.5", "--bits", "4"),
    "2:4": ("--pattern", "2:4"),
    "60%": ("--sparsity", "0.6"),
    "70%": ("--sparsity", "0.7"),
    "4:8": ("--pattern", "4:8"),
    "N:16, 50%": ("--pattern", "N:16", "--sparsity", "0.5"),
    "4.25 bits, int8 embeddings": ("--bits-per-weight", "4.25", "--embedding-bits", "8", "--head-bits", "8"),
    "3.25 bits, int8 embeddings": ("--bits-per-weight", "3.25", "--embedding-bits", "8", "--head-bits", "8"),
}
RECOVER = ("--recover", "100")
LLAMACPP = ("Q4_0", "IQ4_NL", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K")


def _effort(effort: str, setting: str) -> Row:
    return Row(f"mspc {effort}", setting, "mspc", (*SETTINGS[setting], "--effort", effort))


def _grid(bits: int) -> tuple[str, ...]:
    return "--sparsity", "0", "--bits", str(bits), "--group-size", "GROUP", *SWEEP


def _cheap() -> list[Row]:
    """Rows that take minutes: our own sweep as GPTQ and SparseGPT, and llama.cpp's quantizers."""
    return [
        Row("sweep (GPTQ)", "int3", "mspc", _grid(3)),
        Row("sweep (GPTQ)", "int4", "mspc", _grid(4)),
        *(Row("llama.cpp", kind, "llamacpp", (kind,)) for kind in LLAMACPP),
        Row("sweep (SparseGPT)", "50%", "mspc", (*SETTINGS["50%"], "--criterion", "obs", *SWEEP)),
        Row("sweep (SparseGPT)", "2:4", "mspc", (*SETTINGS["2:4"], "--criterion", "obs", *SWEEP)),
        Row("sweep (SparseGPT)", "2:4+int4", "mspc", (*SETTINGS["2:4+int4"], "--criterion", "obs", *SWEEP)),
    ]


def _peers() -> list[Row]:
    return [
        Row("llm-compressor GPTQ", "int3", "llmcompressor", ("gptq", "--bits", "3", "--group-size", "GROUP")),
        Row("llm-compressor GPTQ", "int4", "llmcompressor", ("gptq", "--bits", "4", "--group-size", "GROUP")),
        Row("llm-compressor SparseGPT", "50%", "llmcompressor", ("sparsegpt", "--sparsity", "0.5")),
        Row("llm-compressor SparseGPT", "2:4", "llmcompressor", ("sparsegpt", "--structure", "2:4")),
        Row("llm-compressor Wanda", "50%", "llmcompressor", ("wanda", "--sparsity", "0.5")),
        Row("llm-compressor Wanda", "2:4", "llmcompressor", ("wanda", "--structure", "2:4")),
        Row("GPTQModel FOEM", "int3", "gptqmodel", ("--bits", "3", "--group-size", "GROUP")),
        Row("GPTQModel FOEM", "int4", "gptqmodel", ("--bits", "4", "--group-size", "GROUP")),
        Row("AutoRound", "int3", "autoround", ("--bits", "3", "--group-size", "GROUP")),
        Row("AutoRound", "int2", "autoround", ("--bits", "2", "--group-size", "GROUP")),
    ]


def _ours() -> list[Row]:
    first = [("default", "3.25 bits"), ("default", "4.25 bits"), ("default", "50%"), ("fast", "50%")]
    first += [("default", "2:4+int4"), ("fast", "3.25 bits"), ("default", "3.5 bits")]
    rest = [(effort, setting) for effort in ("default", "fast", "best") for setting in SETTINGS]
    rows = [_effort(*pair) for pair in dict.fromkeys([*first, *rest])]
    recovered = [
        Row("mspc default + recover", setting, "mspc", (*SETTINGS[setting], *RECOVER), _effort("default", setting).name)
        for setting in SETTINGS
    ]
    return [*rows, *recovered]


ROWS = [DENSE, *_cheap(), *_peers(), *_ours()]


def chosen(patterns: list[str], matches: Callable[[str, str], bool]) -> list[Row]:
    """The rows with a name that a pattern matches; all without patterns."""
    return [row for row in ROWS if not patterns or any(matches(row.name, pattern) for pattern in patterns)]
