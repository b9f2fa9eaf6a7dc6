"""The results of an artifact in float32: logits on fixed tokens and a greedy continuation, for runtimes to match."""

from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray

from mspc.errors import InputError
from mspc.model.hub import load_config, load_tokenizer, longest_sequence
from mspc.model.streamed import StreamedModel
from mspc.storage.artifact import REFERENCE, ArtifactSource
from mspc.text.tokens import windows_of_test_text

SEQUENCES, LENGTH, PROMPT, NEW_TOKENS = 2, 16, 8, 16


@dataclass(frozen=True)
class Reference:
    """`ids` (B, T) and their `logits` (B, T, V) float32; the greedy `tokens` (N) after the first PROMPT tokens of the
    first sequence, and by what `margins` (N) each led the second choice."""

    ids: NDArray[np.int64]
    logits: NDArray[np.float32]
    tokens: NDArray[np.int64]
    margins: NDArray[np.float32]

    @property
    def prompt(self) -> list[int]:
        return [int(i) for i in self.ids[0, :PROMPT]]

    def save(self, path: Path) -> None:
        np.savez(path, ids=self.ids, logits=self.logits, tokens=self.tokens, margins=self.margins)


def reference_of(folder: Path) -> Path:
    """The file next to an export, which ships without it, where `--reference` puts the results of its artifact."""
    place = folder.resolve()
    return place.with_name(f"{place.name}.{REFERENCE}")


def load_reference(folder: Path) -> Reference | None:
    """The results that were kept next to an export; None without them."""
    path = reference_of(folder)
    if not path.is_file():
        return None
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return Reference(file["ids"], file["logits"], file["tokens"], file["margins"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise InputError(f"{path} cannot be read ({error}). Give --against ARTIFACT, or delete it.") from error


def exact_model(artifact: Path, dtype: torch.dtype) -> StreamedModel:
    """The artifact's model on the CPU, in `dtype` without casting to the checkpoint's on the way."""
    source = ArtifactSource(artifact, exact=True)
    return StreamedModel(source, load_config(artifact), torch.device("cpu"), dtype, eager=False)


def compute_reference(artifact: Path) -> Reference:
    """The whole model is in memory, as it is in the runtimes that are compared with it."""
    model = exact_model(artifact, torch.float32)
    config = model.config
    length = min(LENGTH, (longest_sequence(config) or LENGTH + NEW_TOKENS) - NEW_TOKENS)
    if any(artifact.glob("*token*")) or any(artifact.glob("vocab*")):
        ids = windows_of_test_text(load_tokenizer(artifact), "builtin", length, SEQUENCES).ids
    else:  # a model that came without one, and was calibrated on token ids
        vocabulary = config.get_text_config().vocab_size
        ids = torch.randint(vocabulary, (SEQUENCES, length), generator=torch.Generator().manual_seed(0))
    with model.whole() as loaded, torch.no_grad():
        logits = loaded(input_ids=ids, use_cache=False).logits.float()
        sequence, tokens, margins = ids[:1, :PROMPT], [], []
        for _ in range(NEW_TOKENS):
            best = loaded(input_ids=sequence, use_cache=False).logits[0, -1].float().topk(2)
            tokens.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
            sequence = torch.cat([sequence, best.indices[None, :1]], 1)
    return Reference(ids.numpy(), logits.numpy(), np.array(tokens), np.array(margins, np.float32))
