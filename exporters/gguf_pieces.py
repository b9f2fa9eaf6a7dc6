"""SentencePiece vocabularies, which readers join by scores where the tokenizers library has a list of merges."""

from collections.abc import Sequence
from typing import Any

from gguf import TokenType

from mspc.errors import InputError

SPACE = "▁"
NEVER_JOINED = -1e6
"""Score of what is no piece, below that of every merge."""
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND = {"type": "Prepend", "prepend": SPACE}


def piece_scores(described: dict[str, Any], tokens: Sequence[str], kinds: Sequence[int]) -> list[float]:
    """A score for every id: the rank of the first merge that makes the piece, below zero.

    Readers join any two neighbours whose joint text is a piece. Raises InputError where the tokenizer would not, since
    no merge joins them, and where bytes are missing, without which readers fail.
    """
    model = described["model"]
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    if sum(is_byte(text) for text in model["vocab"]) != 256:
        raise refused("it falls back to bytes, and has not all 256 of them")
    known, plain = set(pairs), {text for text, kind in zip(tokens, kinds, strict=True) if kind == TokenType.NORMAL}
    for text in plain:
        for i in range(1, len(text)):
            pair = (text[:i], text[i:])
            if pair[0] in plain and pair[1] in plain and pair not in known:
                raise refused(f"no merge joins {pair[0]!r} and {pair[1]!r}, although {text!r} is a token")
    return [
        -float(ranks.get(text, 0)) if kind == TokenType.NORMAL else NEVER_JOINED
        for text, kind in zip(tokens, kinds, strict=True)
    ]


def space_prefix(described: dict[str, Any]) -> bool:
    """Tell if a space is put before a text. Raises InputError for other ways to treat spaces."""
    normalizer, cut = described.get("normalizer"), described.get("pre_tokenizer")
    parts = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    if cut is None or (cut["type"] == "Split" and cut["pattern"] == {"String": " "}):  # spaces are gone by then
        if parts == [PREPEND, REPLACE]:
            return True
        if parts == [REPLACE]:
            return False
    if normalizer is None and cut and cut["type"] == "Metaspace" and cut["replacement"] == SPACE and not cut["split"]:
        return bool(cut["prepend_scheme"] != "never")
    names = [part["type"] for part in (*parts, cut) if part]
    raise refused(f"it treats spaces in a way that readers have no name for ({', then '.join(names) or 'not at all'})")


def is_byte(text: str) -> bool:
    """Tell if a token stands for a byte."""
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def refused(reason: str) -> InputError:
    """The error for a tokenizer that readers of a GGUF file do not know."""
    return InputError(
        "gguf takes byte-level BPE tokenizers that cut text as those of GPT-2, Llama 3, Qwen 2, SmolLM or StarCoder "
        f"do, and BPE made of SentencePiece vocabularies, and not this one: {reason}. Export dense, gptq or "
        "compressed-tensors."
    )
