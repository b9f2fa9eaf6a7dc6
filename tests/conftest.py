"""Shared by the end-to-end tests: no network, one thread (tiny matrices gain nothing from more), model folders."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import transformers

import mspc
from mspc.kernels.cpu import kernel as cpu

BUNDLED = Path(__file__).parents[1] / "examples" / "tiny_llama"

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products on a CPU expand the weight for any number of tokens: the C++ kernels round their inputs to 16 bits."""
    monkeypatch.setattr(cpu, "FUSED", dict.fromkeys(cpu.FUSED, 0))


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
def test_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another text, to evaluate on: 20 windows of 32 tokens."""
    path = tmp_path_factory.mktemp("text") / "test_text.txt"
    path.write_text(tiny.text(20 * tiny.LENGTH, seed=2))
    return path


@pytest.fixture(scope="session")
def artifact_of(calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., mspc.Artifact]:
    """`artifact_of(family or folder, **recipe)`: int4 in groups of 32 unless the recipe says otherwise, made once.

    All matrices have multiples of 32 features. The family `bundled` is the trained model. Not to be written to.
    """
    made: dict[str, mspc.Artifact] = {}

    def get(family: str | Path, **options: object) -> mspc.Artifact:
        key = f"{family}{sorted(options.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp("artifacts")
            bundled = family == "bundled"
            model = family if isinstance(family, Path) else BUNDLED
            if not bundled and isinstance(family, str):
                model = tiny.build(folder / "model", family, hidden_size=64)
            given = {"bits": 4, "allocator": "uniform", **({} if options.get("bits") == 16 else {"group_size": 32})}
            given["solver"] = "obs"  # in a fifth of the default's time, and files are written and read alike
            text = "builtin" if bundled else calibration
            made[key] = tiny.compress(model, folder / "artifact", text, **given | options)
        return made[key]

    return get


@pytest.fixture(scope="session")
def mixed(artifact_of: Callable[..., mspc.Artifact], tmp_path_factory: pytest.TempPathFactory) -> mspc.Artifact:
    """The first matrix in 8 bits, one left dense, the others in 4 bits."""
    artifact = artifact_of("llama", skip=("layers.0.mlp.down_proj",))
    return tiny.mixed(artifact, artifact.path.parent / "model", tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose matrices take groups of 128."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    return tiny.build(tmp_path_factory.mktemp("bench") / "wide", "llama", **sizes)


@pytest.fixture(scope="session")
def compressed(
    folder_of: Callable[..., Path], calibration: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`compressed(family or folder, **recipe)`: an artifact, with its sparse export in `exports/sparse`."""

    def get(model: str | Path, **settings: object) -> Path:
        out = tmp_path_factory.mktemp("bench") / "artifact"
        folder = folder_of(model) if isinstance(model, str) else model
        quick = {"solver": "mask", "criterion": "magnitude", "allocator": "uniform", "num_sequences": 2}
        return tiny.compress(folder, out, calibration, exports=["sparse"], **quick | settings).path

    return get
