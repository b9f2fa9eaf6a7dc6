"""`evaluate`: how well a model predicts test text. `mspc.api.evaluate` documents the arguments."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mspc.errors import InputError, unknown
from mspc.model.hub import choose_device, choose_sequence_length, load_config, resolve
from mspc.model.open import open_model
from mspc.model.vocabulary import check_range, tokenizer_for
from mspc.passes import perplexity
from mspc.progress import Progress, log
from mspc.settings import DTYPES
from mspc.storage.artifact import ArtifactSource
from mspc.storage.dequantized import origin_note
from mspc.storage.manifest import is_artifact
from mspc.text.given import check_ids
from mspc.text.reading import Reading
from mspc.text.tokens import Tokens, windows_of_test_text

Text = str | Sequence[str] | Tensor


def evaluate_folder(
    path: str | Path,
    text: Text,
    reading: Reading,
    tokenizer: Any,
    sequence_length: int | None,
    max_windows: int | None,
    device: str,
    dtype: str,
    against: str | Path | None,
    progress: Progress,
) -> perplexity.Perplexity:
    """The perplexity of a model in a folder, a block at a time in memory."""
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    folder = resolve(str(path))
    _check_artifact(folder)
    windows = test_windows(text, reading, tokenizer, folder, load_config(folder), sequence_length, max_windows)
    model = open_model(folder, device=choose_device(device), dtype=dtype)
    reference = None
    if against is not None:
        other = resolve(str(against))
        _check_artifact(other)
        reference = open_model(other, device=model.device, dtype=dtype)
        sizes = [(len(one.blocks), one.config.get_text_config().vocab_size) for one in (reference, model)]
        if sizes[0] != sizes[1]:
            raise InputError(f"{path} and {against} differ in blocks or vocabulary, so they cannot be compared.")
    if note := origin_note((reference or model).config):
        log.info(note)
    with progress.stage("Perplexity", len(model.blocks)) as step:
        for result in perplexity.measure(model, windows.ids, reference, len(windows.begin)):
            if result is not None:
                return replace(result, text=windows.source)
            step()
    raise AssertionError("a measurement ends with its result")


def _check_artifact(folder: Path) -> None:
    if is_artifact(folder):
        ArtifactSource(folder).check_files()


def evaluate_module(
    model: nn.Module,
    text: Text,
    reading: Reading,
    tokenizer: Any,
    sequence_length: int | None,
    max_windows: int | None,
    against: nn.Module | None,
    progress: Progress,
) -> perplexity.Perplexity:
    """The perplexity of a model that is in memory."""
    config: Any = model.config
    name = config.name_or_path
    if tokenizer is None and not isinstance(text, Tensor) and not (name and Path(name).is_dir()):
        raise InputError("A model in memory needs tokenizer=, or text as token ids (N, T).")
    windows = test_windows(text, reading, tokenizer, Path(name), config, sequence_length, max_windows)
    if against is not None:
        other: Any = against.config
        if other.get_text_config().vocab_size != config.get_text_config().vocab_size:
            raise InputError("The two models differ in their vocabulary, so they cannot be compared.")
    with progress.stage("Perplexity", len(windows.ids)) as step:
        found = perplexity.measure_module(model, windows.ids, against, step, len(windows.begin))
    return replace(found, text=windows.source)


def test_windows(
    text: Text,
    reading: Reading,
    tokenizer: Any,
    folder: Path,
    config: Any,
    sequence_length: int | None,
    max_windows: int | None,
) -> Tokens:
    """Windows (N, T) of the test text."""
    if max_windows is not None and max_windows < 1:
        raise InputError(f"max_windows must be at least 1, not {max_windows}.")
    if sequence_length is not None and sequence_length < 2:
        raise InputError(f"sequence_length must be at least 2, not {sequence_length}.")
    if isinstance(text, Tensor):
        reading.check_ids()
        ids = check_ids(text, config.get_text_config().vocab_size)
        if sequence_length not in (None, ids.shape[1]):
            raise InputError(f"sequence_length is {sequence_length}, but the token ids have {ids.shape[1]} per window.")
        choose_sequence_length(config, ids.shape[1])
        return Tokens(ids[:max_windows], "token ids")
    length = choose_sequence_length(config, sequence_length)
    windows = windows_of_test_text(tokenizer_for(config, folder, tokenizer), text, length, max_windows, reading)
    if windows.note:
        log.info(windows.note)
    check_range(windows.ids, config.get_text_config().vocab_size, windows.source)
    return windows
