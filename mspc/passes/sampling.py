"""Sequences that a model writes by itself: sampled at temperature 1, many at once, with a key-value cache."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mspc.errors import ActivationError, InputError
from mspc.text.scripts import Script


class Row:
    """A sequence by a script: the tokens that come next whatever the model says, and the part that it is in."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.begin()

    def begin(self) -> None:
        """Begin a document."""
        self.part, self.given = 0, list(self.script.parts[0]) if self.script.parts else []

    def next(self, sampled: int) -> int:
        """The token that comes next, where the model says `sampled`."""
        if self.given:
            return self.given.pop(0)
        following = self.script.parts[self.part + 1 : self.part + 2]
        if following and sampled == following[0][0]:
            self.part, self.given = self.part + 1, list(following[0][1:])
        elif sampled in self.script.ends:
            self.begin()
            if self.given[:1] == [sampled]:  # what ends a document also begins one
                self.given.pop(0)
        return sampled


class Writer:
    """Sequences (B, T) that a model in memory writes, as far as `advance` was told.

    A document that follows another in a sequence sees that one, as in sequences of text. Only tokens `allowed` (V,) are
    written. The seed decides the tokens, on one device.
    """

    def __init__(self, model: nn.Module, scripts: Sequence[Script], length: int, seed: int, allowed: Tensor) -> None:
        self.model, self.allowed = model, allowed
        self.rows = [Row(script) for script in scripts]
        self.generator = torch.Generator(allowed.device).manual_seed(seed)
        self.ids = torch.empty(len(scripts), length, dtype=torch.int64)
        self.done = 0
        self.keyword = cache_keyword(model)
        self.cache: Any = None

    def advance(self, tokens: int) -> None:
        """Write `tokens` more of every sequence, or what is left."""
        with torch.inference_mode():
            for place in range(self.done, min(self.done + tokens, self.ids.shape[1])):
                sampled = draw(self._shares(place), self.generator).tolist()
                written = [row.next(token) for row, token in zip(self.rows, sampled, strict=True)]
                self.ids[:, place] = torch.tensor(written)
                self.done = place + 1

    def _shares(self, place: int) -> Tensor:
        """Probabilities (B, V) of the next token, float32; those of the first one are equal."""
        logits = torch.zeros(len(self.rows), len(self.allowed), device=self.allowed.device)
        if place:
            last = self.ids[:, place - 1 : place].to(self.allowed.device)
            cache = {self.keyword: self.cache} if place > 1 else {}
            output = self.model(input_ids=last, use_cache=True, **cache)
            self.cache, logits = getattr(output, self.keyword), output.logits[:, -1].float()
        if logits.isnan().any():
            raise ActivationError(
                f"NaN in the logits of token {place} that the model writes (calibration self). Compute in another "
                "--dtype, or give another --calibration text."
            )
        return logits.masked_fill(~self.allowed, -torch.inf).softmax(-1)


def draw(shares: Tensor, generator: torch.Generator) -> Tensor:
    """An index (B,) of each row of probabilities (B, V), by one random number each; `multinomial` takes V of them."""
    sums = shares.double().cumsum(-1)
    at = torch.rand(len(shares), 1, dtype=torch.float64, device=shares.device, generator=generator) * sums[:, -1:]
    return torch.searchsorted(sums, at, right=True)[:, 0].clamp_(max=shares.shape[1] - 1)


def cache_keyword(model: nn.Module) -> str:
    """The name of a key-value cache among arguments and results. Raises InputError for a model that has none."""
    arguments = inspect.signature(model.forward).parameters
    for name in ("cache", "past_key_values"):  # transformers 5.24 renamed it
        if name in arguments:
            return name
    raise InputError(
        f"calibration self needs a model with a key-value cache, and {type(model).__name__} has none. Give another "
        "--calibration text."
    )
