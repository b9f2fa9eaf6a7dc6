"""The model that lm-evaluation-harness asks: one that mspc loaded, with the progress of mspc. It imports lm_eval.

The harness knows models of transformers that are in memory. All that reads from a folder of mspc is therefore done
before, and every kind of folder is asked in the same way.
"""

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
import lm_eval.api.task
import numpy as np
import torch
from lm_eval.models.huggingface import HFLM

from mspc.errors import InputError
from mspc.progress import Progress


class Asked(HFLM):
    """A model in memory that answers requests; each answer is a step of a stage.

    The tokenizer is copied, as the harness gives it a token for padding.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, progress: Progress) -> None:
        super().__init__(
            pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, trust_remote_code=False,
            prefix_token_id=_first_token(model, tokenizer),
        )  # fmt: skip
        self.progress = progress

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        with self._counted("Comparing answers", requests):
            return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        with self._counted("Reading texts", requests):
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        with self._counted("Writing answers", requests):
            return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    @contextmanager
    def _counted(self, title: str, requests: Sequence[Any]) -> Iterator[None]:
        with self.progress.stage(title, len(requests)) as step:
            self.set_cache_hook(_Steps(step))
            yield


def _first_token(model: Any, tokenizer: Any) -> int | None:
    """The token that an empty prompt becomes, of the config if the tokenizer has no BOS and no end of text.

    None leaves it to the harness, which takes those of the tokenizer. Raises InputError if nobody names one.
    """
    if tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None:
        return None
    config = model.config.get_text_config()
    for found in (config.bos_token_id, config.eos_token_id):
        if found is not None and found != []:
            return int(found[0] if isinstance(found, list) else found)
    raise InputError(
        "Neither the tokenizer nor config.json names a token that begins or ends a text, which stands for an empty "
        "prompt. Set bos_token or eos_token in tokenizer_config.json."
    )


class _Steps:
    """Gets each answer, as the harness's cache would."""

    def __init__(self, step: Any) -> None:
        self.step = step

    def add_partial(self, kind: str, request: object, answer: object) -> None:
        self.step()


@contextmanager
def alone() -> Iterator[None]:
    """Leave the random numbers of the process as they were, which the harness seeds, and hide bars of its libraries."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    hidden, bar = datasets.are_progress_bars_disabled(), getattr(lm_eval.api.task, "tqdm", None)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = lambda items, **options: items
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        lm_eval.api.task.tqdm = bar
        if not hidden:
            datasets.enable_progress_bars()
