"""One artifact as a page shows it: its manifest, and what was measured of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from mspc.pipeline.summary import number
from mspc.settings import AUTO, CURVES, ESTIMATE, SEARCH
from mspc.storage.manifest import read_manifest

Mean = Mapping[str, Any]
"""`mean` and `interval`, as in the manifest."""


@dataclass(frozen=True)
class Subject:
    """An artifact under the name that the page gives it."""

    name: str
    manifest: Mapping[str, Any]
    evaluation: Mapping[str, Any] | None
    """The part `evaluation` of the manifest, or the same part measured afresh."""
    place: int
    """Its number on the page, from 1."""

    @property
    def rows(self) -> Sequence[Mapping[str, Any]]:
        """The matrices, as the manifest has them."""
        rows: Sequence[Mapping[str, Any]] = self.manifest["matrices"]
        return rows

    @property
    def bytes(self) -> Mapping[str, int] | None:
        """Sizes; None in manifests of older versions."""
        found: Mapping[str, int] | None = self.manifest.get("bytes")
        return found

    @property
    def text(self) -> tuple[Any, ...] | None:
        """The identity of the test text; artifacts that share it can be compared."""
        found = self.evaluation
        if found is None:
            return None
        return tuple(found.get(key) for key in ("text", "sha256", "windows", "sequence_length", "tokens"))

    @property
    def predicted(self) -> float | None:
        """The loss in nats per token that the curves predict for the plan; None if no curves made it."""
        settings, values = self.manifest["settings"], [row["sensitivity"] for row in self.rows]
        by_curves = settings.get("plan") is None and settings.get("allocator") in (AUTO, CURVES, SEARCH, ESTIMATE)
        return sum(values) if by_curves and None not in values else None

    @property
    def validated(self) -> float | None:
        """KL divergence of the plan on validation text with approximate weights; None if no plans were compared."""
        allocation = self.manifest.get("allocation") or {}
        found: float | None = (allocation.get("tried") or {}).get(allocation.get("chosen"))
        return found

    @property
    def gap(self) -> float | None:
        """Log-perplexity above the dense model, in nats per token."""
        if not self.evaluation:
            return None
        after, before = (self.evaluation[key]["mean"] for key in ("perplexity", "dense_perplexity"))
        return math.log(after / before) if after and before else None


def subjects_of(paths: Sequence[Path]) -> list[Subject]:
    """The artifacts, by the names of their folders, or by their paths where names are the same.

    Raises InputError for a path that is no artifact.
    """
    manifests = [read_manifest(path) for path in paths]
    names = [path.resolve().name for path in paths]
    chosen = names if len(set(names)) == len(names) else [str(path) for path in paths]
    evaluations = [manifest.get("evaluation") for manifest in manifests]
    return [Subject(*parts) for parts in zip(chosen, manifests, evaluations, count(1))]


def interval_in_words(found: Mean) -> str:
    """`13.2 to 14.1`, or nothing for a single window."""
    interval = found["interval"]
    return "" if interval is None else f"{number(interval[0])} to {number(interval[1])}"


def signed(value: float) -> str:
    """A number that may be negative: a compressed model may predict a short text better than the dense one."""
    return number(value) if value >= 0 else f"-{number(-value)}"
