"""The goals of a recipe, and which of them exclude each other: sizes, times, sparsities, patterns, plans, zeros."""

from collections.abc import Mapping
from typing import Any

from mspc.errors import InputError
from mspc.types import NM, UNQUANTIZED_BITS

SIZES, TIMES = ("bits_per_weight", "target_size"), ("ms_per_token", "speedup")
"""Budgets: of bytes, and of the time of a token."""


def budget_of(asked: Mapping[str, Any]) -> str | None:
    """The name of the budget that was asked for, if any."""
    return next((name for name in (*TIMES, *reversed(SIZES)) if name in asked), None)


def check_budget(asked: Mapping[str, Any], pattern: NM | None) -> None:
    """Raises InputError for other goals that the budget asked for excludes; without one it is the default size."""
    budgets = [name for name in (*SIZES, *TIMES) if name in asked]
    if len(budgets) > 1:
        raise InputError(f"{' and '.join(budgets)} are both a budget. Give one of them.")
    budget = budget_of(asked) or SIZES[0]
    for name in ("plan",) if budget in TIMES else ("sparsity", "bits", "plan"):
        if name in asked:
            raise InputError(f"{budget} and {name} {asked[name]} exclude each other: the budget decides {name} itself.")
    if budget in TIMES:
        _check_time(budget, asked, pattern)


def _check_time(budget: str, asked: Mapping[str, Any], pattern: NM | None) -> None:
    """A budget of time may have bits fixed, or zeros excluded; then it chooses the other of both."""
    sparsity, bits = asked.get("sparsity"), asked.get("bits")
    if sparsity:
        raise InputError(
            f"{budget} and sparsity {sparsity:g} exclude each other: the budget decides the sparsity itself. Leave "
            "sparsity out, or choose 0 to let it decide bits alone."
        )
    if sparsity == 0 and "pattern" in asked:
        raise InputError(f"pattern {asked['pattern']} has no effect with sparsity 0. Leave one of the two out.")
    if sparsity == 0 and bits is not None:
        raise InputError(f"{budget} with sparsity 0 and bits {bits} has nothing to choose. Leave one of the two out.")
    if bits == UNQUANTIZED_BITS and pattern is not None and pattern.keep == pattern.of:
        raise InputError(f"{budget} with pattern {pattern} and bits {bits} has nothing to choose. Leave bits out.")


def check_fixed(pattern: NM, asked: Mapping[str, Any], mixed: str) -> None:
    """Raises InputError for a sparsity other than that of the pattern; `mixed` is the pattern that has any."""
    sparsity = asked.get("sparsity")
    if sparsity is not None and abs(sparsity - pattern.sparsity) > 5e-5:
        raise InputError(
            f"pattern {pattern} fixes the sparsity at {pattern.sparsity:g}, but sparsity {sparsity:g} was asked for. "
            f"Leave one of the two out, or let N vary with the pattern {mixed}."
        )


def check_kept(asked: Mapping[str, Any]) -> None:
    """Raises InputError for what chooses zeros, where those of the checkpoint are kept."""
    for name in (*SIZES, *TIMES, "plan"):
        if name in asked:
            raise InputError(
                f"keep_zeros and {name} {asked[name]} exclude each other: one takes the zeros of the checkpoint, the "
                "other chooses zeros. Leave one of the two out."
            )
