"""Text that a model in memory writes after a prompt, token by token: by steps in C++ where the model has them
(`stepping`), and else by `generate` of transformers.

`generate` runs in a greenlet that is suspended at every token, so that its tokens are an iterator without a thread.
"""

import copy
import math
import time
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from greenlet import error as OtherThreadError
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from mspc.errors import InputError
from mspc.model.hub import load_config, load_tokenizer, longest_sequence
from mspc.model.special_ids import DEFAULT, NO_END, chat_templates, special_ids
from mspc.model.vocabulary import check_range, differences
from mspc.passes.blocks import not_finite
from mspc.passes.perplexity import evaluating
from mspc.passes.sampling import draw
from mspc.progress import Progress, log
from mspc.runtime.stepping import stepper_of
from mspc.text.prompts import Pieces, prompt_ids
from mspc.threads import of_torch

DEFAULT_TOKENS = 256
"""Tokens that are written at most, if nobody says how many."""
MOST_SEEDS = 2**63
END, LIMIT, CONTEXT = "end of text", "limit", "context"


def check_options(max_new_tokens: int | None, temperature: float | None, seed: int | None) -> None:
    """Raises InputError for values that make no sense, and for a seed that has no effect."""
    if max_new_tokens is not None and not (_is_whole(max_new_tokens) and max_new_tokens >= 1):
        raise InputError(f"max_new_tokens must be a whole number, at least 1, not {max_new_tokens!r}.")
    is_number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if temperature is not None and not (is_number and math.isfinite(temperature) and temperature >= 0):
        raise InputError(
            f"temperature must be a number, at least 0, not {temperature!r}. Leave it out for the likeliest tokens."
        )
    if seed is not None and not (_is_whole(seed) and 0 <= seed < MOST_SEEDS):
        raise InputError(f"seed must be a whole number from 0 to 2**63 - 1, not {seed!r}.")
    if seed is not None and not temperature:
        raise InputError("seed has no effect without a temperature above 0, as nothing is drawn. Leave it out.")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Request:
    """A prompt in the tokens of a model, and how far its text may go."""

    tokenizer: Any
    prompt_ids: list[int]
    """The tokens of the prompt, with chat template and BOS."""
    ends: tuple[int, ...]
    """Ids at which a text ends."""
    most: int
    """Tokens that are written at most."""
    at_most: str
    """The reason why not more: limit or context."""


def request(source: Path | nn.Module, tokenizer: Any, prompt: str, raw: bool, asked: int | None) -> Request:
    """The request for a model in a folder, whose weights are not read, or in memory.

    The chat template is used where there is one, unless `raw`. Raises InputError for a prompt that leaves no room in
    the context of the model, and if there is no tokenizer that fits.
    """
    config: Any = load_config(source) if isinstance(source, Path) else source.config
    folder = source if isinstance(source, Path) else Path(config.name_or_path or "The model in memory")
    text_config = config.get_text_config()
    tokenizer = tokenizer or _tokenizer(folder)
    for warning in differences(tokenizer, text_config, str(folder)):
        log.warning(warning)
    template = None if raw else chat_templates(folder, tokenizer).get(DEFAULT)
    if template is None and not raw:
        log.info("The tokenizer has no chat template, so the model continues the prompt as it is.")
    ids = prompt_ids(tokenizer, prompt, template)
    check_range(torch.tensor(ids), text_config.vocab_size, "prompt")
    if isinstance(source, Path):
        named = special_ids(folder, text_config.vocab_size, tokenizer).eos
    else:
        generation: Any = source.generation_config
        named = generation.eos_token_id
    ends = _ends(named, tokenizer)
    if not ends:
        log.info(NO_END.format(folder))
    return Request(tokenizer, ids, ends, *_most(len(ids), asked, longest_sequence(config)))


def _tokenizer(folder: Path) -> Any:
    if not folder.is_dir():
        raise InputError("A model in memory needs tokenizer=.")
    try:
        return load_tokenizer(folder)
    except InputError as error:
        raise InputError(
            f"{error} Copy the tokenizer files of the model into the folder, or give tokenizer= in Python."
        ) from error


def _ends(named: Any, tokenizer: Any) -> tuple[int, ...]:
    """The ids that the model names, and that of the tokenizer: a chat may end its turns with another than a text."""
    found = [*(named if isinstance(named, list | tuple) else [named]), getattr(tokenizer, "eos_token_id", None)]
    return tuple(dict.fromkeys(int(token) for token in found if token is not None))


def _most(prompt: int, asked: int | None, context: int | None) -> tuple[int, str]:
    """Tokens that are written at most, and why not more. Raises InputError if a prompt leaves nothing of a context."""
    wanted = DEFAULT_TOKENS if asked is None else asked
    if context is None or prompt + wanted <= context:
        return wanted, LIMIT
    if prompt >= context:
        raise InputError(
            f"The prompt has {prompt:,} tokens, but the context of the model has {context:,}, prompt and text "
            "together. Shorten the prompt."
        )
    if asked is not None:
        log.info(f"The prompt leaves {context - prompt:,} of the {context:,} tokens of the context, so no more follow.")
    return context - prompt, CONTEXT


@dataclass
class Generation:
    """Text that a model writes after a prompt. Iterate over it once, in one thread, to get pieces of text (str).

    Pieces are never empty and hold whole characters; joined, they are the text. Tokens are computed when they are asked
    for, and the time between is not counted. Iterating raises InputError for NaN in weights, and ActivationError for
    predictions that are not finite for another reason.
    """

    model: Any = field(repr=False)
    request: Request = field(repr=False)
    temperature: float
    """0: the likeliest token is taken; else tokens are drawn at this temperature, from the whole vocabulary."""
    seed: int
    threads: int | None
    progress: Progress = field(repr=False)
    ids: list[int] = field(default_factory=list)
    """The tokens that were written so far, with the one that ended the text."""
    prefill_seconds: float = 0.0
    """Time of the prompt, up to the first token."""
    decode_seconds: float = 0.0
    """Time of all other tokens."""
    ended: str = ""
    """The reason why there is no more: end of text, limit (`max_new_tokens`) or context. Empty before."""

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Tokens of the prompt per second, or None before the first token."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second of decoding, or None below two tokens: the first one comes with the prompt."""
        return (len(self.ids) - 1) / self.decode_seconds if self.decode_seconds else None

    def __iter__(self) -> Iterator[str]:
        if self.ids:
            raise InputError("This text is written already. Call generate again for another one.")
        pieces = Pieces(self.request.tokenizer, self.request.prompt_ids)
        with closing(self._tokens()) as tokens, evaluating(self.model):
            for token in tokens:
                if token in self.request.ends:  # where `generate` ends, too
                    self.ended = END
                elif piece := pieces.add(token):
                    yield piece
        if self.ended != END:
            self.ended = self.request.at_most  # a character that this cuts off is left out
        elif rest := pieces.rest():
            yield rest

    def _tokens(self) -> Generator[int, None, None]:
        """Each token as soon as it is written."""
        with closing(self._written()) as written:
            with self.progress.stage("Reading the prompt", 1) as step:
                token, self.prefill_seconds = self._next(written)
                step()
            while token is not None:
                self.ids.append(token)
                yield token
                token, seconds = self._next(written)
                self.decode_seconds += seconds if token is not None else 0.0

    def _next(self, written: Iterator[int]) -> tuple[int | None, float]:
        """The next token, or None after the last one, and the seconds that it took."""
        begin = time.perf_counter()
        # The modes of torch are set here, and not where tokens are written: that is suspended between two of them.
        with of_torch(self.threads), torch.no_grad():
            token = next(written, None)
        return token, time.perf_counter() - begin

    def _written(self) -> Generator[int, None, None]:
        """Tokens by steps in C++ where the model has them, and else by `generate` of transformers."""
        ids = torch.tensor([self.request.prompt_ids], device=self.model.device)
        stepper = stepper_of(self.model, self.prompt_tokens + self.request.most)
        logits = None if stepper is None else stepper.read(ids)
        if stepper is not None and logits is None:
            log.warning(
                f"{type(self.model).__name__} computes other logits than its steps in C++, so transformers writes the "
                "text, more slowly. Please report this, with the config.json of the model."
            )
        if stepper is None or logits is None:
            yield from self._by_generate()
            return
        choosing = Choosing(self.model, self.model.device, self.temperature, self.seed)
        for number in range(self.request.most):
            token = int(choosing(ids, logits).argmax(-1))
            yield token
            if token in self.request.ends or number + 1 == self.request.most:
                return
            logits = stepper.next(token)

    def _by_generate(self) -> Generator[int, None, None]:
        """Tokens of any model, by `generate` of transformers."""
        running = greenlet(self._generate)
        try:
            while (token := running.switch()) is not None and not running.dead:
                yield token
        finally:
            # As it unwinds, `generate` sets the mode that it found when it began, and this sets the caller's again.
            with torch.no_grad(), suppress(OtherThreadError):  # the thread has ended, and what was suspended with it
                if running:
                    running.throw()

    def _generate(self) -> None:
        ends = list(self.request.ends)
        model = copy.copy(self.model)  # the same weights, with a generation config that asks for nothing else
        model.generation_config = type(model.generation_config)(
            eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0
        )
        ids = torch.tensor([self.request.prompt_ids], device=model.device)
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.request.most, do_sample=False,
            streamer=Handing(), logits_processor=[Choosing(self.model, model.device, self.temperature, self.seed)],
        )  # fmt: skip


class Choosing:
    """A logits processor, which `generate` calls with ids (1, T) and logits (1, V) for scores (1, V).

    Its generator is its own, so that a seed gives the same text whatever else draws random numbers. It is a class,
    because `generate` reads the signature of `__call__` for every token, which of a function takes half a millisecond.
    """

    def __init__(self, model: Any, device: torch.device, temperature: float, seed: int) -> None:
        self.model, self.temperature = model, temperature
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        if not bool(logits.max().isfinite()):  # which passes NaN on
            raise not_finite(self.model, "The model", self.model.dtype)
        if not self.temperature:
            return logits
        token = draw((logits / self.temperature).softmax(-1), self.generator)
        return torch.full_like(logits, -torch.inf).scatter_(1, token[:, None], 0.0)


class Handing:
    """A streamer of `generate` that hands each token to the greenlet that waits for it."""

    def __init__(self) -> None:
        self.is_prompt = True

    def put(self, ids: Tensor) -> None:
        """Ids (1, T) of the prompt at first, then those (1,) of each token."""
        if not self.is_prompt:
            getcurrent().parent.switch(int(ids))
        self.is_prompt = False

    def end(self) -> None:
        pass
