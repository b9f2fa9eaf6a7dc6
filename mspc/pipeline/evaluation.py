"""`evaluate`: how well a model predicts test text. `mspc.api.evaluate` documents the arguments."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mspc.errors import InputError, unknown
from mspc.model.hub import choose_device, choose_sequence_length, load_config, load_tokenizer, resolve
from mspc.model.open import open_model
from mspc.passes import perplexity
from mspc.progress import Progress
from mspc.settings import DTYPES
from mspc.text.given import check_ids
from mspc.text.tokens import windows_of_test_text

Text = str | Sequence[str] | Tensor


def evaluate_folder(
    path: str | Path,
    text: Text,
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
    ids = test_ids(text, tokenizer, folder, load_config(folder), sequence_length, max_windows)
    model = open_model(folder, device=choose_device(device), dtype=dtype)
    reference = None
    if against is not None:
        reference = open_model(resolve(str(against)), device=model.device, dtype=dtype)
        sizes = [(len(one.blocks), one.config.get_text_config().vocab_size) for one in (reference, model)]
        if sizes[0] != sizes[1]:
            raise InputError(f"{path} and {against} differ in blocks or vocabulary, so they cannot be compared.")
    with progress.stage("Perplexity", len(model.blocks)) as step:
        for result in perplexity.measure(model, ids, reference):
            if result is not None:
                return result
            step()
    raise AssertionError("a measurement ends with its result")


def evaluate_module(
    model: nn.Module,
    text: Text,
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
    ids = test_ids(text, tokenizer, Path(name), config, sequence_length, max_windows)
    if against is not None:
        other: Any = against.config
        if other.get_text_config().vocab_size != config.get_text_config().vocab_size:
            raise InputError("The two models differ in their vocabulary, so they cannot be compared.")
    with progress.stage("Perplexity", len(ids)) as step:
        return perplexity.measure_module(model, ids, against, step)


def test_ids(
    text: Text, tokenizer: Any, folder: Path, config: Any, sequence_length: int | None, max_windows: int | None
) -> Tensor:
    """Windows (N, T) of the test text."""
    if max_windows is not None and max_windows < 1:
        raise InputError(f"max_windows must be at least 1, not {max_windows}.")
    if sequence_length is not None and sequence_length < 2:
        raise InputError(f"sequence_length must be at least 2, not {sequence_length}.")
    if isinstance(text, Tensor):
        ids = check_ids(text, config.get_text_config().vocab_size)
        if sequence_length not in (None, ids.shape[1]):
            raise InputError(f"sequence_length is {sequence_length}, but the token ids have {ids.shape[1]} per window.")
        choose_sequence_length(config, ids.shape[1])
        return ids[:max_windows]
    length = choose_sequence_length(config, sequence_length)
    return windows_of_test_text(tokenizer or load_tokenizer(folder), text, length, max_windows).ids
