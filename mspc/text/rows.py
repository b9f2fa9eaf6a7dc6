"""Rows of files and datasets as documents. A row holds a text, or a chat that the model's chat template writes out."""

import re
from collections.abc import Callable, Mapping
from datetime import date
from typing import Any

from mspc.errors import InputError

TEXT, CHATS = "text", ("messages", "conversations")
"""The fields that are read if no other is named."""
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
"""Role for each speaker that chats with `from` and `value` name in another way."""
DAY = date(2024, 7, 26)
"""The day that chat templates write instead of today, so that a text has the same tokens tomorrow."""
TODAY = re.compile(r"""\bstrftime_now\(\s*(["'])(.*?)\1\s*\)""")

Where = Callable[[], str]
"""The place of a row in words, such as the file and the line."""


def column_of(names: Any, asked: str | None) -> str | None:
    """The field to read, out of those that there are, or None."""
    wanted = (TEXT, *CHATS) if asked is None else (asked,)
    return next((name for name in wanted if name in names), None)


def document(row: Any, column: str | None, tokenizer: Any, where: Where) -> str:
    """The document of a row of a JSON file. Raises InputError if it has none."""
    if not isinstance(row, Mapping):
        raise InputError(f"{where()}: expected a JSON object with a `{column or TEXT}` field.")
    name = column_of([name for name, value in row.items() if value is not None], column)
    if name is None:
        names = ", ".join([str(name) for name, value in row.items() if value is not None][:8]) or "nothing"
        raise InputError(
            f"{where()}: expected a JSON object with a `{column or TEXT}` field, but it holds {names}. Name the field "
            "of the text with --text-column."
        )
    return document_of(row[name], name, tokenizer, where)


def document_of(value: Any, column: str, tokenizer: Any, where: Where) -> str:
    """The document that a field holds. Raises InputError for what is neither a text nor a chat.

    A chat is a list of messages, or, as some datasets store it, the lists of their roles and contents.
    """
    if isinstance(value, str):
        return sound(value, where)
    if isinstance(value, Mapping) and _is_table(value):
        value = [dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=True)]
    if not isinstance(value, list | tuple) or not all(isinstance(message, Mapping) for message in value):
        raise InputError(
            f"{where()}: the `{column}` field is not a string and no chat. Name another with --text-column."
        )
    return sound(_chat(value, tokenizer, where), where) if value else ""


def _is_table(value: Mapping[str, Any]) -> bool:
    """Tell if an object holds lists of one length."""
    lists = all(isinstance(part, list | tuple) for part in value.values())
    return lists and len({len(part) for part in value.values()}) == 1


def sound(text: str, where: Where) -> str:
    """The text. Raises InputError if it cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise InputError(
            f"{where()}: the text holds {half}, half of a surrogate pair. Remove or replace it."
        ) from error
    return text


def _chat(messages: Any, tokenizer: Any, where: Where) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{where()}: a chat needs the chat template of the model, and the tokenizer has none. Name a field of "
            "plain text with --text-column, or give the tokenizer a chat template."
        )
    chat = [_message(message, where) for message in messages]
    try:
        template = TODAY.sub(lambda call: repr(DAY.strftime(call[2])), tokenizer.get_chat_template())
        return str(tokenizer.apply_chat_template(chat, tokenize=False, chat_template=template))
    except Exception as error:  # whatever a template raises
        raise InputError(
            f"{where()}: the chat template of the model refuses this chat ({error}). Change or remove it."
        ) from error


def _message(message: Mapping[str, Any], where: Where) -> dict[str, Any]:
    """A message with `role` and `content`, from one that has them or `from` and `value`."""
    if message.get("role") is not None:
        return {name: value for name, value in message.items() if value is not None}
    if isinstance(message.get("from"), str) and "value" in message:
        return {"role": ROLES.get(message["from"], message["from"]), "content": message["value"]}
    names = ", ".join(map(str, list(message)[:8])) or "nothing"
    raise InputError(f"{where()}: a message must have `role` and `content`, or `from` and `value`, but has {names}.")
