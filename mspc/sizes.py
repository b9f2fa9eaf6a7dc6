"""Sizes in bytes: read from what a user writes, and written for a user to read."""

import re
from decimal import Decimal

from mspc.errors import InputError

THOUSANDS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
UNITS = THOUSANDS | BINARY
"""Bytes of each unit, in lower case and without the B."""


def bytes_of(size: str, what: str = "target_size") -> int:
    """`"2.2GB"` -> 2_200_000_000, `"2GiB"` -> 2_147_483_648; in any case, with or without the B, rounded down.

    Raises InputError, naming `what`, for anything else, and for a size below one byte.
    """
    number = r"(\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)"
    match = re.fullmatch(rf"\s*{number}\s*([kmgt]i?)?b?\s*", size, re.IGNORECASE | re.ASCII)
    if not match:
        raise InputError(
            f"{what} must be a number with a unit, such as 800MB or 2.2GB (powers of 1000) or 2GiB (of 1024), not "
            f"{size!r}."
        )
    found = int(Decimal(match[1].replace(",", "")) * UNITS[(match[2] or "").lower()])
    if found < 1:
        raise InputError(f"{what} must be at least 1 byte, not {size!r}.")
    return found


def in_words(num_bytes: float) -> str:
    """`"4,012 KB"` below 10 MB, `"116.4 MB"` below 1 GB, `"2.21 GB"` above: powers of 1000."""
    if num_bytes < 10e6:
        return f"{num_bytes / 1e3:,.{0 if num_bytes >= 10e3 else 1}f} KB"
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:,.2f} GB"


def at_least(num_bytes: int) -> str:
    """The same, rounded up: a size that a user may ask for."""
    step = 10**3 if num_bytes < 10e6 else 10**5 if num_bytes < 1e9 else 10**7
    return in_words(-(-num_bytes // step) * step)
