"""A warning about experts that see few tokens."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mspc.passes.walk import FEW_TOKENS


def few_tokens_notes(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """A warning about the experts that saw few tokens, given the rows of all matrices."""
    few = [row for row in rows if row.get("borrowed_tokens")]
    if few:
        fewest = min(few, key=lambda row: row["num_tokens"])
        yield (
            f"{len(few)} matrices of experts saw fewer than {FEW_TOKENS} tokens per input, fewest {fewest['name']} "
            f"({fewest['num_tokens']} tokens, {fewest['shape'][1]} inputs). Their statistics are mixed with those of "
            "all experts of their layer; borrowed_tokens in the manifest says how much. Calibrate on more text "
            "(--num-sequences, --sequence-length)."
        )
