"""Greedy continuations of fixed prompts, one model after the other in memory."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mspc.errors import InputError
from mspc.memory import free_memory
from mspc.model.hub import choose_device, load_tokenizer, longest_sequence, resolve
from mspc.model.open import choose_dtype, open_source
from mspc.progress import Progress
from mspc.runtime.loading import load
from mspc.sizes import in_words

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village,",
    "The sky is blue because",
    "Water boils when",
    "To make a good cup of tea, first",
    "She opened the letter and read:",
    "The most important lesson of history is",
    "If all cats are animals and Tom is a cat, then",
    "def fibonacci(n):\n",
    "The function returns a list of",
)
TOKENS = 32
"""Length of a continuation."""
HEADROOM = 1.25
"""Memory that a model takes, relative to its weights: activations, and a layer that is expanded."""
ENDED = " ⟨end of text⟩"


@dataclass(frozen=True)
class Continued:
    """The continuations of each prompt by one model."""

    name: str
    texts: Sequence[str]


def continued(models: Sequence[tuple[str, Path]], device: str, dtype: str, progress: Progress) -> list[Continued]:
    """Continuations by each (name, folder); the tokenizer is that of the first, the dense model.

    Raises InputError if the dense model does not fit in memory. The others are smaller.
    """
    main_device = choose_device(device)
    first = resolve(str(models[0][1]))
    _check_memory(first, main_device, dtype)
    tokenizer = load_tokenizer(first)
    found = []
    with progress.stage("Continuing prompts", len(models)) as step:
        for name, path in models:
            found.append(Continued(name, greedy(load(path, device, dtype), tokenizer, PROMPTS, TOKENS)))
            step()
    return found


def _check_memory(folder: Path, device: torch.device, dtype: str) -> None:
    source = open_source(folder)
    numel = sum(math.prod(shape) for _, shape in source.types().values())
    need, free = HEADROOM * numel * choose_dtype(dtype, source, device).itemsize, free_memory(device)
    if need > free:
        raise InputError(
            f"{folder}: continuations need the whole dense model in memory, {in_words(need)} on {device}, and "
            f"{in_words(free)} are free. Free some, or choose another --dtype."
        )


def greedy(model: Any, tokenizer: Any, prompts: Sequence[str], count: int) -> list[str]:
    """The `count` likeliest next tokens after each prompt as text; it is marked where the text ends before."""
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    longest, device = max(map(len, ids)), next(model.parameters()).device
    most = longest_sequence(model.config)
    if most is not None and longest + count > most:
        raise InputError(f"continuations take {longest + count} tokens, and the model allows {most}")
    tokens = torch.zeros(len(ids), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, own in enumerate(ids):  # padded on the left, so that all of them end together
        tokens[row, longest - len(own) :] = torch.tensor(own)
        mask[row, longest - len(own) :] = 1
    known = model.generation_config
    # A new config, as that of the model may ask for sampling or penalties.
    model.generation_config = type(known)(bos_token_id=known.bos_token_id, eos_token_id=known.eos_token_id)
    ends = known.eos_token_id if isinstance(known.eos_token_id, list) else [known.eos_token_id]
    with torch.no_grad():
        written = model.generate(
            input_ids=tokens.to(device), attention_mask=mask.to(device), max_new_tokens=count, do_sample=False,
            pad_token_id=next((end for end in ends if end is not None), 0),
        ).cpu()  # fmt: skip
    return [
        _text(tokenizer, torch.tensor(own), row[longest:], ends) for own, row in zip(ids, written, strict=True)
    ]  # fmt: skip


def _text(tokenizer: Any, prompt: Tensor, new: Tensor, ends: Sequence[int | None]) -> str:
    """The text of new tokens: decoded after their prompt, as tokenizers drop the space before a first word."""
    stop = next((place for place, token in enumerate(new.tolist()) if token in ends), len(new))
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode(torch.cat([prompt, new[:stop]]), skip_special_tokens=True)
    return str(whole[len(before) :]) + (ENDED if stop < len(new) else "")
