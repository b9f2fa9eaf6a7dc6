"""Calibration and validation text of a run: from a named source, or documents or token ids that the caller holds."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mspc.errors import InputError
from mspc.progress import log
from mspc.settings import SEARCH, Settings, check_reconstruct
from mspc.text.reading import Reading
from mspc.text.tokens import Tokens, calibration_tokens

Calibration = str | Path | Sequence[str] | Tensor
"""A source by its name, a list of documents, or token ids (N, T)."""
CALIBRATION_PER_VALIDATION = 8
"""Calibration sequences per validation sequence."""


def with_ids(settings: Settings, ids: Tensor, asked: dict[str, Any]) -> Settings:
    """The settings for given token ids (N, T). All sequences are used unless the recipe says less."""
    there, length = ids.shape
    if "num_sequences" not in asked:
        share = there // (CALIBRATION_PER_VALIDATION + 1) if settings.validates_plans else 0
        settings = replace(settings, num_sequences=there - share)
    if settings.num_sequences > there:
        raise InputError(
            f"num_sequences is {settings.num_sequences}, but the token ids have the shape {(there, length)}."
        )
    if settings.sequence_length not in (None, length):
        raise InputError(
            f"sequence_length is {settings.sequence_length}, but the token ids have {length} per sequence."
        )
    settings = replace(settings, sequence_length=length, calibration="token ids")
    check_reconstruct(settings)
    return settings


def draw(settings: Settings, given: Calibration | None, tokenizer: Callable[[], Any]) -> tuple[Tokens, Tensor | None]:
    """Calibration tokens, and validation ids (N, T) if plans are to be compared and enough text is left."""
    wanted, more = settings.num_sequences, -(-settings.num_sequences // CALIBRATION_PER_VALIDATION)
    reading = Reading(settings.bos, settings.text_column, settings.text_encoding)
    begin: tuple[int, ...] = ()
    if isinstance(given, Tensor):
        reading.check_ids()
        drawn = given
    else:
        source = settings.calibration if given is None or isinstance(given, str | Path) else given
        length = int(settings.sequence_length or 0)
        tokens = partial(
            calibration_tokens, tokenizer(), source, sequence_length=length, seed=settings.seed, reading=reading
        )
        try:
            found = tokens(num_sequences=wanted + (more if settings.validates_plans else 0))
        except InputError:
            if not settings.validates_plans:
                raise
            found = tokens(num_sequences=wanted)
        drawn, begin = found.ids, found.begin
    calibration, validation = Tokens(drawn[:wanted], settings.calibration, begin), drawn[wanted : wanted + more]
    if not settings.validates_plans or len(validation):
        return calibration, validation if settings.validates_plans else None
    if settings.allocator == SEARCH:
        raise InputError(
            "The allocator search needs validation text, and none is left. Give more --calibration text, fewer or "
            "shorter sequences (--num-sequences, --sequence-length), or --allocator auto."
        )
    log.warning("too little text to validate plans; using the plan with the lowest predicted loss.")
    return calibration, None
