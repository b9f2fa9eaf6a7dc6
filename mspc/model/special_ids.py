"""Special tokens and chat templates of a model, from whoever names them, in the order in which transformers asks.

Ids are those of `generation_config.json`, of `config.json` and the configs inside, and of the tokenizer: the first that
names an id of the vocabulary decides. Which of `tokenizer_config.json`, `special_tokens_map.json` and `tokenizer.json`
the tokenizer follows, transformers decides. Defaults of a family, which no file of the model names, do not count.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mspc.errors import InputError
from mspc.model.hub import load_tokenizer

INNER = ("text_config", "decoder", "generator")
"""Keys of config.json under which transformers looks for the config of the language model."""
DEFAULT = "default"
"""Name of the template of a model with one template only."""
NAMED = {"name", "template"}
"""Keys of a template in a list of them."""
NO_END = (
    "{}: no file of the model names an end of text, so a generation goes on to the limit that the caller sets. Put "
    "eos_token_id into generation_config.json if the model has one."
)


@dataclass(frozen=True)
class SpecialIds:
    """Ids below the size of the vocabulary. What nobody names is None, or empty."""

    bos: int | None = None
    eos: tuple[int, ...] = ()
    """All ids at which a generation ends, in the order of the file."""
    pad: int | None = None
    unk: int | None = None


def special_ids(folder: Path, size: int, tokenizer: Any = None) -> SpecialIds:
    """The special ids of the model in a folder whose vocabulary has `size` ids. A folder may have no tokenizer."""
    if tokenizer is None:
        with suppress(InputError):
            tokenizer = load_tokenizer(folder)
    named = list(_names(folder, tokenizer))

    def ids(role: str) -> tuple[int, ...]:
        return next((found for names in named if (found := _valid(names(role), size))), ())

    bos, pad, unk = (next(iter(ids(role)), None) for role in ("bos", "pad", "unk"))
    return SpecialIds(bos, ids("eos"), pad, unk)


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with what the config of its language model says in its place."""
    return {key: value for part in _configs(config) for key, value in part.items()}


def chat_templates(folder: Path, tokenizer: Any) -> dict[str, str]:
    """Templates by name, as transformers loads them; one that has no name is `DEFAULT`. May be empty."""
    found = getattr(tokenizer, "chat_template", None) or _read(folder / "chat_template.json").get("chat_template")
    if isinstance(found, str):
        return {DEFAULT: found}
    if isinstance(found, list):
        found = {part["name"]: part["template"] for part in found if isinstance(part, dict) and part.keys() >= NAMED}
    return {str(name): text for name, text in (found or {}).items() if isinstance(text, str)}


def _names(folder: Path, tokenizer: Any) -> Iterator[Any]:
    """Functions of a role, first things first, to its id, a list of ids, or None."""
    for config in (_read(folder / "generation_config.json"), *_configs(_read(folder / "config.json"))):
        yield lambda role, config=config: config.get(f"{role}_token_id")
    if tokenizer is not None:  # with what its files name
        yield lambda role: getattr(tokenizer, f"{role}_token_id", None)
        return
    settings = _read(folder / "tokenizer_config.json")
    added = settings.get("added_tokens_decoder")
    ids = {_text(token): int(i) for i, token in added.items() if str(i).isdecimal()} if isinstance(added, dict) else {}
    for names in (settings, _read(folder / "special_tokens_map.json")):
        yield lambda role, names=names: ids.get(_text(names.get(f"{role}_token")) or "")


def _configs(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield config
    for key in INNER:
        if isinstance(config.get(key), dict):
            yield from _configs(config[key])


def _text(token: Any) -> str | None:
    """The text of a token that is a string, or an object with one."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _valid(found: Any, size: int) -> tuple[int, ...]:
    ids: Iterable[Any] = found if isinstance(found, list | tuple) else [found]
    return tuple(dict.fromkeys(i for i in ids if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < size))


def _read(path: Path) -> dict[str, Any]:
    """The object in a file of JSON, or an empty one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
