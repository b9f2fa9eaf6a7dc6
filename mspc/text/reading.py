"""Options for reading text: the column and encoding of its files, and the tokens that windows begin with."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mspc.encoding import check_encoding
from mspc.errors import InputError, unknown
from mspc.settings import BOS


@dataclass(frozen=True, slots=True)
class Reading:
    """The options of a text; None was not asked for. Raises InputError for values that make no sense."""

    bos: str = "auto"
    """auto: texts begin as the tokenizer begins them; yes, no: with or without a BOS token."""
    column: str | None = None
    """Field of each row that is read; None: the first of `text`, `messages` and `conversations` that it has."""
    encoding: str | None = None
    """Encoding of .txt files; None: UTF-8."""

    def __post_init__(self) -> None:
        if self.bos not in BOS:
            raise unknown("bos", str(self.bos), BOS)
        if self.encoding is not None:
            check_encoding(self.encoding)

    def check_columns(self, used: bool, source: str) -> None:
        """Raises InputError if a column was asked for, but the source has none."""
        if self.column is not None and not used:
            raise InputError(
                f"text_column {self.column} has no effect with {source}, which has no columns. Leave it out."
            )

    def check_encodings(self, used: bool, source: str) -> None:
        """Raises InputError if an encoding was asked for, but the source has no file that it counts for."""
        if self.encoding is not None and not used:
            raise InputError(
                f"text_encoding {self.encoding} has no effect with {source}, which has no .txt files. Leave it out."
            )

    def check_ids(self) -> None:
        """Raises InputError for options that have no effect on given token ids."""
        self.check_columns(False, "token ids")
        self.check_encodings(False, "token ids")
        if self.bos == "yes":
            raise InputError("bos yes has no effect with token ids, which are used as they are. Leave it out.")


@dataclass(frozen=True, slots=True)
class Beginning:
    """The tokens at the beginning of a text."""

    added: tuple[int, ...] = ()
    """Those that the tokenizer puts there itself."""
    wanted: tuple[int, ...] = ()
    """Those that every document and every window begins with."""

    def stripped(self, ids: list[int]) -> list[int]:
        """The ids without what the tokenizer has put before them."""
        return ids[len(self.added) :] if ids[: len(self.added)] == list(self.added) else ids

    def before(self, ids: list[int]) -> list[int]:
        """The ids, with the beginning that is wanted unless they have it."""
        wanted = list(self.wanted)
        return ids if ids[: len(wanted)] == wanted else wanted + ids

    def cut(self, stream: list[int], length: int) -> list[list[int]]:
        """The stream as windows of `length` tokens, each with the beginning. The last one may be shorter."""
        wanted, windows, at = list(self.wanted), [], 0
        while at < len(stream):
            # A beginning that the cut would part in two goes to the next window.
            starts = [i for i in range(at, max(at - len(wanted), -1), -1) if wanted == stream[i : i + len(wanted)]]
            at = starts[0] if starts else at
            left = length if starts else length - len(wanted)
            windows.append(stream[at : at + left] if starts else wanted + stream[at : at + left])
            at += left
        return windows


def beginning(tokenizer: Any, bos: str) -> Beginning:
    """The beginning of texts. Raises InputError if a BOS token is asked for and the tokenizer has none."""
    if not hasattr(tokenizer, "bos_token_id"):
        return Beginning()
    added = _added(tokenizer)
    own = () if tokenizer.bos_token_id is None else (int(tokenizer.bos_token_id),)
    if bos == "no":
        return Beginning(added)
    if bos == "yes" and not (added or own):
        raise InputError("bos is yes, but the tokenizer has no BOS token. Leave bos at auto, or give it one.")
    if added or bos == "yes" or _declared(tokenizer):
        return Beginning(added, added or own)
    return Beginning()


def _added(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that a tokenizer puts before a text. What it puts after one does not count."""
    whole = list(tokenizer("a", verbose=False)["input_ids"])
    text = list(tokenizer("a", verbose=False, add_special_tokens=False)["input_ids"])
    if not text:  # an alphabet without this letter
        return tuple(whole[:1]) if whole and whole[0] == tokenizer.bos_token_id else ()
    places = range(len(whole) - len(text) + 1)
    return tuple(whole[: next((i for i in places if whole[i : i + len(text)] == text), 0)])


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer of transformers, which by itself forgets that one is said to add a BOS token."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    if _declared(tokenizer) and file.is_file():
        config = json.loads(file.read_text(encoding="utf-8")) | {"add_bos_token": True}
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _declared(tokenizer: Any) -> bool:
    """Tell if a tokenizer is said to add a BOS token. transformers ignores this entry if there is a tokenizer.json."""
    if getattr(tokenizer, "add_bos_token", False):
        return True
    folder = getattr(tokenizer, "name_or_path", None)
    if not folder:
        return False
    try:
        file = Path(folder) / "tokenizer_config.json"
        return json.loads(file.read_text(encoding="utf-8")).get("add_bos_token") is True
    except (OSError, ValueError, AttributeError):
        return False
