"""Exported GGUF files in llama.cpp: logits, greedy tokens, tokens of texts, chat templates, and the end of a text.

    python benchmarks/verify_llamacpp.py [--venv FOLDER] [--json FILE] [--models NAME ...]

llama.cpp gets a virtual environment of its own, with the wheel that llamacpp-requirements.txt names. Models are compressed
and exported here and run there, on the CPU. The reference is the artifact in float32. What transformers makes of the same
file is compared with it too, so all three agree or one is named.

The server gives the logits up to a constant, as logarithms of probabilities. So errors are those of logarithms of
probabilities after their mean is taken off: the norm of all differences by the norm of the reference.

llama.cpp rounds activations to the type of the weights before products: to 8 bits for Q4_0 and Q8_0, to bfloat16, to
float16. So every file is run twice: as it is, within the tolerance of this rounding, and as a copy with every weight
in float32, where a wrong layout cannot hide behind rounding.

At the end, files that are wrong on purpose show that each check can fail. Anything else than that makes the exit code 1.
"""

import argparse
import datetime
import json
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llamacpp
import numpy as np
import torch
from gguf import GGUFReader
from gguf_copies import FAULTS, as_float32, kinds_in
from llamacpp import LlamaCpp, LlamaCppError
from llamacpp_models import ARTIFACTS, MODELS, model_folder
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, GenerationConfig

import mspc
from exporters.gguf import FILE
from exporters.reference import exact_model
from exporters.verification import failures
from mspc.errors import InputError
from mspc.text.tokens import windows_of_test_text

LENGTH, PROMPT, NEW_TOKENS = 48, 8, 16
"""Tokens of the compared sequence, longer than any sliding window of the models; of a prompt; of its continuation."""
FLOAT = 1e-3
"""Relative error of files in float32 and float16, and of copies in float32."""
ROUNDED = 3e-2
"""Relative error where activations are rounded to 8 bits or to bfloat16."""
EXACT_KINDS = {"F32", "F16"}
FLOOR = -80.0
"""Smaller logarithms of probabilities are no normal float32 numbers as probabilities."""
TEXTS = (
    "Hello, world!  It's 2024:\n\n the the déjà vu 1234567, 3.14",
    "def f(x):\n\tif x > 10 and x != 3:\r\n        return [x**2, 'a\"b']  # fine\n\n\n",
    "They'll say WE'RE not I'VE; naïve café, Straße, Ελληνικά, привет, 你好世界, こんにちは, 🙂👍🏽",
    "   leading and trailing   ",
    "",
)  # fmt: skip
CHATS = (
    [{"role": "user", "content": "What is 2 + 2?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi there"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!\nHow are you?"},
        {"role": "user", "content": "Fine, thanks"},
    ],
)


@dataclass(frozen=True)
class Expected:
    """What a file must give: `log_probabilities` (T, V) after each of the tokens `ids` (T)."""

    ids: list[int]
    log_probabilities: NDArray[np.float32]
    tokenizer: Any
    ends: list[int]
    """Ids at which generation ends."""


def expected_of(artifact: Path) -> Expected:
    tokenizer = AutoTokenizer.from_pretrained(artifact, trust_remote_code=False)
    ids = windows_of_test_text(tokenizer, "builtin", LENGTH, 1).ids
    model = exact_model(artifact, torch.float32)
    with model.whole() as loaded, torch.no_grad():
        found = loaded(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    ends = GenerationConfig.from_pretrained(artifact).eos_token_id
    return Expected(ids[0].tolist(), found.numpy(), tokenizer, ends if isinstance(ends, list) else [ends])


def check(model: LlamaCpp, expected: Expected, tolerance: float) -> tuple[dict[str, Any], dict[str, str]]:
    """Measurements, and what is wrong by the name of the check."""
    measured, wrong = check_logits(model, expected, tolerance)
    for name, found in (
        ("greedy", check_greedy(model, expected, measured["largest_error"])),
        ("tokens", check_tokens(model, expected)),
        ("template", check_template(model, expected)),
        ("end of text", check_end(model, expected)),
    ):
        if found:
            wrong[name] = found
    return measured, wrong


def check_logits(model: LlamaCpp, expected: Expected, tolerance: float) -> tuple[dict[str, Any], dict[str, str]]:
    """The same top token is demanded where its lead over the second exceeds the largest error at that place."""
    vocabulary, places = expected.log_probabilities.shape[1], range(1, LENGTH + 1)
    found = np.stack([model.log_probabilities(expected.ids[:place], vocabulary) for place in places])
    error, largest = errors(found, expected.log_probabilities)
    first, second = np.sort(expected.log_probabilities, axis=1)[:, :-3:-1].T
    compared = first - second > largest
    same = found.argmax(1) == expected.log_probabilities.argmax(1)
    measured = {
        "relative_error": error,
        "tolerance": tolerance,
        "largest_error": float(largest.max()),
        "top_tokens_compared": int(compared.sum()),
        "top_tokens_equal": int(same.sum()),
        "places": LENGTH,
    }
    wrong = {}
    if not error <= tolerance:
        wrong["logits"] = f"relative error {error:.1e}, more than {tolerance:.0e}"
    elif not same[compared].all():
        wrong["logits"] = f"another top token at place {int(np.flatnonzero(compared & ~same)[0])}"
    return measured, wrong


def errors(found: NDArray[np.float32], expected: NDArray[np.float32]) -> tuple[float, NDArray[np.float32]]:
    """The relative error of all logits (T, V), each place less its mean, and the largest difference (T) at each place."""
    centred = [np.maximum(values, FLOOR) for values in (found, expected)]
    centred = [values - values.mean(1, keepdims=True) for values in centred]
    difference = centred[0] - centred[1]
    return float(np.linalg.norm(difference) / np.linalg.norm(centred[1])), np.abs(difference).max(1)


def check_greedy(model: LlamaCpp, expected: Expected, error: float) -> str:
    """Every token must be the reference's own choice, or too close to it for such an error to tell apart."""
    prompt = expected.ids[:PROMPT]
    tokens = model.generate(prompt, NEW_TOKENS)
    if not tokens:
        return "nothing is generated"
    sequence = prompt
    for token in tokens:
        found = model_of(expected)(sequence)
        if found.max() - found[token] > 4 * error:
            return f"after {len(sequence)} tokens {token}, not {int(found.argmax())}"
        sequence = [*sequence, token]
    return ""
