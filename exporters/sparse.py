"""mspc's own sparse checkpoint: kept weights or codes, and their indices. It is smaller than a dense one.

docs/sparse-format.md specifies it. One folder may mix patterns and grids; `quantization_config` in config.json says
what every matrix is, so that a reader needs nothing else.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from exporters.folder import read_config, write_shards
from mspc.errors import InputError
from mspc.formats.decoding import row_offsets
from mspc.model.auto_class import auto_class
from mspc.model.hub import load_config
from mspc.progress import Step
from mspc.storage.artifact import ArtifactSource
from mspc.storage.carrying import carry
from mspc.storage.files import write_json, write_text
from mspc.storage.manifest import MatrixEntry
from mspc.storage.sparse_export import quantization_config, stored_name
from mspc.types import PlannedMatrix

README, README_NEXT_TO_ANOTHER = "README.md", "README.sparse.md"
"""The second is written if the model has a README of its own."""
CLASS = "AutoModelForCausalLM"
"""The auto class in the text, in whose place `readme_of` puts another one."""
README_TEXT = """# A sparse checkpoint of mspc

Its compressed matrices are stored by their kept weights, in a format that transformers does not know by itself:

```python
import mspc.hf  # before the model is loaded
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

Without `import mspc.hf`, transformers only warns (`Unknown quantization type, got mspc`, and weights are `MISSING`),
fills these matrices with random numbers, and the model says nonsense. Without transformers' loader:

```python
import mspc

model = mspc.load("path/to/this/folder")
```

vLLM serves it if mspc is installed in its environment: `vllm serve path/to/this/folder`. Of models with experts, and
of Gemma with quantized embeddings, it needs `--load-format mspc` as well; experts are then dense in memory.

`mspc verify path/to/this/folder` proves that the files are whole. `mspc_export.json` says what every matrix is.
"""


def readme_of(class_name: str) -> str:
    """The text for a model that this auto class of transformers loads."""
    return README_TEXT.replace(CLASS, class_name)


@dataclass(frozen=True)
class Options:
    """No options: the artifact decides everything."""


def check(matrices: Sequence[PlannedMatrix], config: dict[str, Any], options: Options, folder: Path) -> None:
    """Every artifact can be sparse whose experts are all compressed, or none of a parameter."""


def notes(entries: Sequence[MatrixEntry], options: Options) -> list[str]:
    return [
        "Load it with mspc.load, or by transformers after `import mspc.hf`: without this, transformers makes up the "
        f"weights that are missing to it. {README} or {README_NEXT_TO_ANOTHER} says how."
    ]


def export(artifact: ArtifactSource, out: Path, options: Options, step: Step) -> None:
    for entry in artifact.entries:
        if entry.address.index is not None and not entry.num_slices:
            raise InputError(
                f"{entry.name}: sparse cannot hold one slice of a parameter without the others; export dense."
            )
    carry(artifact.folder, out)
    quantization = quantization_config(artifact.entries)
    write_json(out / "config.json", read_config(artifact) | {"quantization_config": quantization})
    text = readme_of(auto_class(load_config(artifact.folder)).__name__)
    write_text(out / (README_NEXT_TO_ANOTHER if (out / README).is_file() else README), text)

    def tensors_of(key: str) -> Iterator[tuple[str, Tensor]]:
        if not artifact.is_compressed(key):
            yield from artifact.read([key])
        for entry in artifact.first_in(key):
            for part, tensor in artifact.stored(entry).items():  # the artifact has the same layout
                yield f"{stored_name(entry)}.{part}", tensor
                if part == "mask":
                    yield f"{stored_name(entry)}.row_offsets", row_offsets(tensor)

    write_shards(artifact, out, tensors_of, step)
