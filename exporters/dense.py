"""An ordinary Hugging Face folder with exact zeros in the weights, sharded like the source. Every runtime loads it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.folder import read_config, write_shards
from mspc.progress import Step
from mspc.storage.artifact import ArtifactSource
from mspc.storage.carrying import carry
from mspc.storage.files import write_json
from mspc.storage.manifest import MatrixEntry
from mspc.types import PlannedMatrix


@dataclass(frozen=True)
class Options:
    """No options: the weights keep the dtype of the model."""


def check(matrices: Sequence[PlannedMatrix], config: dict[str, Any], options: Options, folder: Path) -> None:
    """Every artifact can be dense."""


def notes(entries: Sequence[MatrixEntry], options: Options) -> list[str]:
    return []


def export(artifact: ArtifactSource, out: Path, options: Options, step: Step) -> None:
    carry(artifact.folder, out)
    write_json(out / "config.json", read_config(artifact))
    write_shards(artifact, out, lambda key: artifact.read([key]), step)
