"""What the end-to-end tests share: no network, one thread (tiny matrices gain nothing from more), model folders."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import transformers

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`folder_of(family)`: the checkpoint folder of a tiny float32 model, made once. Not to be written to."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tiny.build(tmp_path_factory.mktemp("models") / family, family)
        return made[family]

    return get


@pytest.fixture(scope="session")
def llama(folder_of: Callable[..., Path]) -> Path:
    return folder_of("llama")


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to calibrate on: 3000 tokens of the tiny tokenizer."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(tiny.text(3000, seed=1))
    return path


@pytest.fixture(scope="session")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another text, to evaluate on: 20 windows of 32 tokens."""
    path = tmp_path_factory.mktemp("text") / "heldout.txt"
    path.write_text(tiny.text(20 * tiny.LENGTH, seed=2))
    return path
