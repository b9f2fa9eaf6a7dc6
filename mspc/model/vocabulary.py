"""A tokenizer against the model that it is used with: its ids have embeddings, and config.json agrees with it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from mspc.errors import InputError
from mspc.model.hub import load_tokenizer
from mspc.progress import log

NEEDED = ("bos", "eos", "unk")
"""Special tokens that a text or a generation can meet. mspc never pads, and some old models have no such embedding."""
COMPARED = ("bos", "eos", "pad")
"""Special tokens whose ids config.json names."""


def tokenizer_for(config: Any, folder: Path, given: Any = None) -> Any:
    """The given tokenizer, or else that of a folder; logs where config.json disagrees.

    Raises InputError if the model has fewer embeddings than the tokenizer has ids.
    """
    tokenizer = given or load_tokenizer(folder)
    for warning in differences(tokenizer, config.get_text_config(), str(folder) if given is None else "tokenizer"):
        log.warning(warning)
    return tokenizer


def check_tokenizer_of(folder: Path) -> list[str]:
    """The differences between the tokenizer of a folder and its config.json. A folder without one of the two is fine.

    Raises InputError if the model has fewer embeddings than the tokenizer has ids.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tokenizer = load_tokenizer(folder)
        text = SimpleNamespace(**(config.get("text_config") or config))
    except (OSError, ValueError, TypeError, AttributeError):  # InputError is a ValueError
        return []
    return differences(tokenizer, text, str(folder))


def differences(tokenizer: Any, config: Any, where: str) -> list[str]:
    """The differences between a tokenizer and the text config of a model, as sentences.

    Raises InputError if the tokenizer has more ids than the model has embeddings. Special tokens that no text holds may
    be more: text-only models such as Gemma 3 carry the image token of their relatives. `check_range` refuses texts
    that do hold one.
    """
    size = getattr(config, "vocab_size", None)
    if not hasattr(tokenizer, "get_vocab") or not isinstance(size, int):
        return []
    ids = tokenizer.get_vocab()
    count = 1 + max(ids.values(), default=-1)
    needed = {getattr(tokenizer, f"{name}_token_id", None) for name in NEEDED}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    spared = {i for i, token in added.items() if token.special} - needed
    beyond = sorted((i, token) for token, i in ids.items() if i >= size)
    if any(i not in spared for i, _ in beyond):
        raise InputError(
            f"{where}: the tokenizer has {count:,} ids, but the model has {size:,} embeddings, so {beyond[0][1]!r} "
            f"({beyond[0][0]}) has none. Give the tokenizer that belongs to the model."
        )
    found = []
    if count != size:
        padded = " That is right if the embeddings are padded." if count < size else ""
        found.append(f"{where}: the tokenizer has {count:,} ids, but vocab_size is {size:,} in config.json.{padded}")
    for name in COMPARED:
        own, said = getattr(tokenizer, f"{name}_token_id", None), getattr(config, f"{name}_token_id", None)
        if own is not None and said is not None and own not in (said if isinstance(said, list | tuple) else [said]):
            found.append(
                f"{where}: {name}_token_id is {own} in the tokenizer, but {said} in config.json. One of the two may be "
                "of another model."
            )
    return found


def check_range(ids: Tensor, vocab_size: int, source: str) -> None:
    """Raises InputError if a token of a text has no embedding."""
    if (highest := int(ids.max())) >= vocab_size:
        raise InputError(
            f"Text {source!r} holds the token {highest}, but the model has {vocab_size} embeddings. Remove it from the "
            "text, or give the tokenizer that belongs to the model."
        )
