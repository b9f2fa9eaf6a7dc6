"""A prompt to tokens, and tokens that a model writes back to text, piece by piece."""

from typing import Any

from mspc.errors import InputError, in_brief
from mspc.text.reading import beginning
from mspc.text.rows import sound
from mspc.text.tokens import tokens_of

BROKEN = "\ufffd"
"""The character that tokenizers write in place of bytes that are no text, or not yet."""


def prompt_ids(tokenizer: Any, prompt: str, template: str | None) -> list[int]:
    """The ids of a prompt: of a chat that asks it by this template, or else of a text that begins with it.

    A text begins as in `mspc eval`, with BOS where the tokenizer adds it. Raises InputError for a prompt without text,
    and for one that the tokenizer or the template refuses.
    """
    if not prompt.strip():
        raise InputError("The prompt is empty. Give a text.")
    sound(prompt, lambda: "prompt")
    if template is None:
        text, begin = prompt, list(beginning(tokenizer, "auto").wanted)
    else:
        text, begin = _asked(tokenizer, prompt, template), []
    ids = begin + list(tokens_of(tokenizer, text, add_special_tokens=False))
    if len(ids) == len(begin):
        raise InputError("The tokenizer makes no token of this prompt. Give another text, or the model's tokenizer.")
    return ids


def _asked(tokenizer: Any, prompt: str, template: str) -> str:
    """A chat up to where the reply begins."""
    chat = [{"role": "user", "content": prompt}]
    try:
        return str(
            tokenizer.apply_chat_template(chat, chat_template=template, add_generation_prompt=True, tokenize=False)
        )
    except Exception as error:  # whatever a template raises
        raise InputError(
            f"The chat template of the model refuses this prompt ({in_brief(error)}). Give --raw (raw=True) to have "
            "the prompt continued as it is."
        ) from error


class Pieces:
    """The text of tokens that follow given ones, handed out as soon as its characters are whole.

    Tokens are decoded together with those before them, as tokenizers drop the space before a first word. Special tokens
    are left out, and spaces stay as the tokens have them. All pieces together are the text.
    """

    def __init__(self, tokenizer: Any, before: list[int]) -> None:
        self.tokenizer = tokenizer
        self.ids = list(before)
        """The tokens that are decoded together: some that were handed out, and all that were not."""
        self.known = len(before)
        """Number of tokens among them that were handed out."""
        self.given = len(self._text())
        """Number of characters of their text that were handed out."""

    def add(self, token: int) -> str:
        """The text that is whole now and was not before; may be empty."""
        self.ids.append(token)
        text = self._text()
        whole = text.rstrip(BROKEN)
        piece, self.given = whole[self.given :], max(self.given, len(whole))
        if piece and whole == text:  # what comes next needs only these tokens before it
            self.ids, self.known = self.ids[self.known :], len(self.ids) - self.known
            self.given = len(self._text())
        return piece

    def rest(self) -> str:
        """The bytes that never became a character, as the tokenizer writes them."""
        return self._text()[self.given :]

    def _text(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
