"""Beginnings of text that a model writes by itself: a document, or a chat whose turns are still empty."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from mspc.errors import InputError
from mspc.progress import log
from mspc.text.reading import Beginning
from mspc.text.rows import document_of
from mspc.text.tokens import tokens_of

SEPARATOR = "<|endoftext|>"
"""A token between documents in the training of many models, also of those whose BOS token begins a turn of a chat."""
TURNS = ("Userturnofmspc", "Replyturnofmspc")
"""Words that a chat template writes into the turns, to find where they are."""


@dataclass(frozen=True, slots=True)
class Script:
    """The tokens that are given, in parts, and those that end a document. The model writes after each part.

    The model's first token of the next part is where that one begins. A document that has ended is followed by another
    one, which begins with the first part.
    """

    parts: tuple[tuple[int, ...], ...]
    """May be empty: then any token of the vocabulary begins a document."""
    ends: frozenset[int]


def document_script(tokenizer: Any, begin: Beginning, bos: int | None, ends: Iterable[int]) -> Script:
    """A document begins as the tokenizer begins a text, else after a separator, a BOS token or the end of another."""
    ends = tuple(ends)
    separator = tokenizer.get_vocab().get(SEPARATOR)
    first = next((token for token in (separator, bos, *ends) if token is not None), None)
    start = begin.wanted or (() if first is None else (first,))
    return Script((start,) if start else (), frozenset(ends))


def chat_script(tokenizer: Any, begin: Beginning, ends: Iterable[int]) -> Script | None:
    """A chat by the template of a tokenizer, up to the turn of the user. None if it has none that can be used.

    The reply follows where a token of its own ends the turn of the user; otherwise the model writes that end, too.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    user, reply = TURNS
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
    try:
        text = document_of(messages, "messages", tokenizer, partial(str, "calibration self"))
    except InputError as error:
        log.info(f"{error} The model writes no chats.")
        return None
    head, found, rest = text.partition(user)
    middle, replied, tail = rest.partition(reply)
    if not (found and replied) or user in rest or reply in tail:
        log.info("calibration self: the chat template does not write turns as they are, so the model writes no chats.")
        return None
    opening, turn, end = (tuple(tokens_of(tokenizer, part, add_special_tokens=False)) for part in (head, middle, tail))
    own = getattr(tokenizer, "added_tokens_decoder", {})
    first = tuple(begin.before(list(opening)))
    parts = (first, turn) if turn and turn[0] in own else (first,)
    return Script(parts, frozenset(ends) | {token for token in end[:1] if token in own}) if first else None
