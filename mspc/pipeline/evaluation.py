"""`evaluate`: how well a model predicts text that it was not calibrated on."""

from pathlib import Path

from mspc.errors import InputError, unknown
from mspc.model.hub import choose_device, choose_sequence_length, load_config, load_tokenizer, resolve
from mspc.model.open import open_model
from mspc.passes import perplexity
from mspc.progress import ConsoleReporter, Reporter
from mspc.recipe import DTYPES
from mspc.text.tokens import windows_of_test_text


def evaluate(
    path: str | Path,
    text: str = "builtin",
    *,
    sequence_length: int | None = None,
    max_windows: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    against: str | Path | None = None,
    reporter: Reporter | None = None,
) -> perplexity.Perplexity:
    """Perplexity of a checkpoint folder, hub id or artifact on the test split of a text.

    With `against`, such as the model before compression, also how far the predictions are from those.
    """
    if max_windows is not None and max_windows < 1:
        raise InputError(f"max_windows must be at least 1, not {max_windows}.")
    if sequence_length is not None and sequence_length < 2:
        raise InputError(f"sequence_length must be at least 2, not {sequence_length}.")
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    folder = resolve(str(path))
    length = choose_sequence_length(load_config(folder), sequence_length)
    tokens = windows_of_test_text(load_tokenizer(folder), text, length, max_windows)
    model = open_model(folder, device=choose_device(device), dtype=dtype)
    reference = None
    if against is not None:
        reference = open_model(resolve(str(against)), device=model.device, dtype=dtype)
        if (len(reference.blocks), reference.config.vocab_size) != (len(model.blocks), model.config.vocab_size):
            raise InputError(f"{path} and {against} differ in blocks or vocabulary, so they cannot be compared.")
    with (reporter or ConsoleReporter()).stage("Perplexity", len(model.blocks)) as step:
        for result in perplexity.measure(model, tokens.ids, reference):
            if result is not None:
                return result
            step("")
    raise AssertionError("a measurement ends with its result")
