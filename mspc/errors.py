"""The errors that mspc raises on purpose, and their exit codes on the command line.

MspcError                 1  a failure that is not the fault of the input
+-- InputError            2  wrong usage or input: options, paths, corrupt files, NaN weights
+-- SingularGramError     1  a Gram matrix stayed singular after the whole damping ladder
+-- ActivationError       1  NaN or infinity appeared in a forward pass
+-- StorageError          1  the disk is full or a write failed
+-- VerificationError     1  an export does not hold or compute what the artifact does
+-- Stopped               1  the progress callable returned False
"""

import difflib
from collections.abc import Iterable

BRIEF = 240
"""Characters of a message of somebody else that are shown."""


class MspcError(Exception):
    exit_code = 1


class InputError(MspcError, ValueError):
    exit_code = 2


class SingularGramError(MspcError):
    pass


class ActivationError(MspcError):
    pass


class StorageError(MspcError):
    pass


class VerificationError(MspcError):
    pass


class Stopped(MspcError):
    @classmethod
    def at(cls, stage: str) -> "Stopped":
        return cls(f"Stopped at {stage!r}, as the progress callable asked.")


def in_brief(error: BaseException) -> str:
    """One line about an exception of somebody else: the beginning of its message, and its type where that says more."""
    first = " ".join(str(error).split())
    first = first if len(first) <= BRIEF else first[:BRIEF].rstrip() + " ..."
    is_plain = isinstance(error, ValueError | OSError | RuntimeError) and first
    return first if is_plain else f"{type(error).__name__}: {first}".removesuffix(": ")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell if memory ran out, which is no fault of the input. Torch has no exception of its own for that on a CPU."""
    words = ("out of memory", "can't allocate memory", "cannot allocate memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(part in str(error).lower() for part in words)
    )


def unknown(what: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that is not in a table, with the closest name, or else all names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(names)}."
    return InputError(f"Unknown {what} {name!r}: {hint}")
