"""Calibration, validation and test text of a run: from a source by its name, or as documents or token ids."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mspc.errors import InputError
from mspc.progress import log
from mspc.settings import SEARCH, Settings, check_reconstruct
from mspc.text.reading import Reading
from mspc.text.tokens import SELF, Tokens, calibration_tokens

Calibration = str | Path | Sequence[str] | Tensor
"""A source by its name, a list of documents, or token ids (N, T)."""
CALIBRATION_PER_VALIDATION = 8
"""Calibration sequences per validation sequence."""
TEST_WINDOWS = 16
"""Windows on which the compressed model is compared with the dense one."""


@dataclass(frozen=True)
class Drawn:
    """The text of a run; no two parts share a token."""

    calibration: Tokens
    validation: Tensor | None
    """Ids (N, T) on which plans are compared."""
    test: Tensor | None
    """Ids (`TEST_WINDOWS`, T) that neither calibrate nor choose a plan; None if they are not wanted, or not there."""


def with_ids(settings: Settings, ids: Tensor, asked: dict[str, Any]) -> Settings:
    """The settings for given token ids (N, T). All sequences are used unless the recipe says less."""
    there, length = ids.shape
    if "num_sequences" not in asked:
        share = there // (CALIBRATION_PER_VALIDATION + 1) if settings.needs_validation else 0
        share = max(share, 1) if settings.recover and there > 1 else share
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


def draw(
    settings: Settings,
    given: Calibration | None,
    tokenizer: Callable[[], Any],
    write: Callable[[Sequence[int]], Tokens],
) -> Drawn:
    """The text of a run. Validation and test text are drawn where they are wanted and enough text is left.

    `write` gives text of the model, for the numbers of sequences of the three parts (`Author.write`).
    """
    wanted, more = settings.num_sequences, -(-settings.num_sequences // CALIBRATION_PER_VALIDATION)
    more = more if settings.needs_validation else 0
    reading = Reading(settings.bos, settings.text_column, settings.text_encoding)
    begin: tuple[int, ...] = ()
    if isinstance(given, Tensor):
        reading.check_ids()
        drawn = given
        more = min(more, len(drawn) - wanted)
    elif settings.calibration == SELF:
        found = write((wanted, more, TEST_WINDOWS if settings.eval else 0))
        drawn, begin = found.ids, found.begin
    else:
        source = settings.calibration if given is None or isinstance(given, str | Path) else given
        length, spare = int(settings.sequence_length or 0), more + (TEST_WINDOWS if settings.eval else 0)
        found = calibration_tokens(tokenizer(), source, wanted, length, settings.seed, reading, spare)
        drawn, begin = found.ids, found.begin
        more = more if len(drawn) >= wanted + more else 0
    calibration, validation = Tokens(drawn[:wanted], settings.calibration, begin), drawn[wanted : wanted + more]
    test = drawn[wanted + more :][:TEST_WINDOWS]
    if not len(validation) and settings.allocator == SEARCH and settings.validates_plans:
        raise InputError(
            "The allocator search needs validation text, and none is left. Give more --calibration text, fewer or "
            "shorter sequences (--num-sequences, --sequence-length), or --allocator auto."
        )
    if not len(validation) and settings.recover:
        raise InputError(
            f"recover needs validation text after {wanted} sequences of {drawn.shape[1]} tokens, and none is left. "
            "Give more --calibration text, or fewer or shorter sequences (--num-sequences, --sequence-length)."
        )
    if not len(validation) and settings.validates_plans:
        log.warning("too little text to validate plans; using the plan with the lowest predicted loss.")
    if settings.eval and len(test) < TEST_WINDOWS:
        log.warning(
            f"what the compression costs will not be measured: {TEST_WINDOWS} windows are needed that neither "
            f"calibrate nor validate, and {len(test)} are left. Give more --calibration text, or fewer or shorter "
            "sequences (--num-sequences, --sequence-length); or measure on another text, with `mspc eval`."
        )
    enough = settings.eval and len(test) == TEST_WINDOWS
    return Drawn(calibration, validation if len(validation) else None, test if enough else None)
