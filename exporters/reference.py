"""The results of an artifact in float32: logits on fixed tokens and a greedy continuation, for runtimes to match.

One longer sequence exceeds the windows and original contexts that the config names, up to USUAL tokens of it.
"""

import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporters.limits import Limit, depends_on_later, limits_of, permitted, switches_of
from mspc.errors import InputError
from mspc.model.hub import load_config, load_tokenizer
from mspc.model.streamed import StreamedModel
from mspc.progress import log
from mspc.storage.artifact import REFERENCE, ArtifactSource
from mspc.storage.files import write_atomically
from mspc.storage.manifest import MatrixEntry
from mspc.text.tokens import windows_of_test_text

SEQUENCES, LENGTH, PROMPT, NEW_TOKENS = 2, 16, 8, 16
USUAL = 2048
"""Tokens of the longest sequence that is run unless longer ones are asked for."""
COMPARED, DECODED = 32, 16
"""Positions at the end of a long sequence whose logits are compared, and how many of them go through the cache."""


@dataclass(frozen=True)
class Beyond:
    """One long sequence `ids` (1, T) and the logits (1, K, V) float32 of its last K positions.

    The last `decoded` tokens are those that a runtime adds one by one to its cache; those before them exceed the
    limits already. `exceeded` says in words which those are.
    """

    ids: NDArray[np.int64]
    logits: NDArray[np.float32]
    decoded: int
    exceeded: str


@dataclass(frozen=True)
class Reference:
    """`ids` (B, T) and their `logits` (B, T, V) float32; the greedy `tokens` (N) after the first PROMPT tokens of the
    first sequence, and by what `margins` (N) each led the second choice."""

    ids: NDArray[np.int64]
    logits: NDArray[np.float32]
    tokens: NDArray[np.int64]
    margins: NDArray[np.float32]
    beyond: Beyond | None = None
    missed: str = ""
    """The limits of the config that no sequence exceeds, in words."""
    artifact: str = ""
    """The digest of all matrices of the artifact (`digest_of`)."""

    @property
    def prompt(self) -> list[int]:
        return [int(i) for i in self.ids[0, :PROMPT]]

    def save(self, path: Path) -> None:
        values = {"ids": self.ids, "logits": self.logits, "tokens": self.tokens, "margins": self.margins}
        values |= {"missed": np.array(self.missed), "artifact": np.array(self.artifact)}
        if self.beyond:
            values |= {f"beyond.{name}": np.array(value) for name, value in vars(self.beyond).items()}

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:  # to a path numpy would add its own ending
                np.savez(file, **values)  # type: ignore[arg-type]

        write_atomically(path, write)


def digest_of(entries: Sequence[MatrixEntry]) -> str:
    return hashlib.sha256(json.dumps({entry.name: entry.digest for entry in entries}).encode()).hexdigest()


def reference_of(folder: Path) -> Path:
    """The file next to an export, which ships without it, where `--reference` puts the results of its artifact."""
    place = folder.resolve()
    return place.with_name(f"{place.name}.{REFERENCE}")


def load_reference(folder: Path, entries: Sequence[MatrixEntry]) -> Reference | None:
    """The results that were kept next to an export of `entries`; None without them, or if they are of others."""
    path = reference_of(folder)
    if not path.is_file():
        return None
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            parts = file["ids"], file["logits"], file["tokens"], file["margins"]
            beyond = None
            if "beyond.ids" in file:
                exceeded = str(file["beyond.exceeded"])
                beyond = Beyond(file["beyond.ids"], file["beyond.logits"], int(file["beyond.decoded"]), exceeded)
            found = Reference(*parts, beyond, str(file["missed"]), str(file["artifact"]))
    except (OSError, ValueError, TypeError, KeyError, EOFError, BadZipFile) as error:  # TypeError: one array, as .npy
        raise InputError(f"{path} cannot be read ({error}). Give --against ARTIFACT, or delete it.") from error
    if found.artifact != digest_of(entries):
        log.warning(f"{path} is of another artifact, so it is not compared with.")
        return None
    return found


def exact_model(artifact: Path, dtype: torch.dtype) -> StreamedModel:
    """The artifact's model on the CPU, in `dtype` without casting to the checkpoint's on the way."""
    source = ArtifactSource(artifact, exact=True)
    return StreamedModel(source, load_config(artifact), torch.device("cpu"), dtype, eager=False)


def compute_reference(artifact: Path, *, long: bool = False) -> Reference:
    """The whole model is in memory, as it is in the runtimes that are compared with it.

    With `long`, limits of more than USUAL tokens are exceeded as well.
    """
    model = exact_model(artifact, torch.float32)
    config = model.config
    switches = switches_of(config)
    length = min(LENGTH, (permitted(config) or LENGTH + NEW_TOKENS) - NEW_TOKENS)
    length -= length - 1 in switches  # or the last token, which goes through the cache, would be the first beyond
    ids = _ids(artifact, config, SEQUENCES, length)
    limits = limits_of(config)
    reached = limits if long else [limit for limit in limits if limit.tokens < USUAL]
    missed = in_words([limit for limit in limits if limit not in reached])
    with model.whole() as loaded, torch.no_grad():
        logits = loaded(input_ids=ids, use_cache=False).logits.float()
        sequence, tokens, margins = ids[:1, :PROMPT], [], []
        for _ in range(NEW_TOKENS):
            best = loaded(input_ids=sequence, use_cache=False).logits[0, -1].float().topk(2)
            tokens.append(int(best.indices[0]))
            switched = any(PROMPT <= switch < sequence.shape[1] for switch in switches)
            margins.append(0.0 if switched else float(best.values[0] - best.values[1]))  # 0 is not compared
            sequence = torch.cat([sequence, best.indices[None, :1]], 1)
        beyond = _beyond(artifact, loaded, reached, None if long else USUAL) if reached else None
    kept = np.array(tokens), np.array(margins, np.float32)
    digest = digest_of(ArtifactSource(artifact).entries)
    return Reference(ids.numpy(), logits.numpy(), *kept, beyond, missed, digest)


def _ids(artifact: Path, config: Any, sequences: int, length: int) -> Tensor:
    """Tokens (sequences, length) of the built-in text, from its beginning again where it is too short."""
    if any(artifact.glob("*token*")) or any(artifact.glob("vocab*")):
        tokenizer = load_tokenizer(artifact)
        try:
            return windows_of_test_text(tokenizer, "builtin", length, sequences).ids
        except InputError:
            part = windows_of_test_text(tokenizer, "builtin", LENGTH, None).ids.flatten()
            return part.repeat(-(-sequences * length // len(part)))[: sequences * length].view(sequences, length)
    # a model that came without a tokenizer, and was calibrated on token ids
    vocabulary = config.get_text_config().vocab_size
    return torch.randint(vocabulary, (sequences, length), generator=torch.Generator().manual_seed(0))


def _beyond(artifact: Path, loaded: Any, reached: Sequence[Limit], most: int | None) -> Beyond:
    """The last logits of a sequence longer than every limit in `reached`, in one pass without a cache."""
    config, limit = loaded.config, reached[-1].tokens
    length = min(size for size in (limit + COMPARED, permitted(config), most) if size is not None)
    decoded = 0 if depends_on_later(config) else min(DECODED, length - limit - 1)
    ids = _ids(artifact, config, 1, length)
    logits = last_logits(loaded, ids, COMPARED).logits.float()
    return Beyond(ids.numpy(), logits.numpy(), decoded, in_words(reached))


def last_logits(model: Any, ids: Tensor, count: int, **options: Any) -> Any:
    """The output of a model of transformers for `ids`, with the logits of the last `count` positions only."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = count
    out = model(input_ids=ids, **({"use_cache": False} | options))
    out.logits = out.logits[:, -count:]
    return out


def in_words(limits: Sequence[Limit]) -> str:
    return " and ".join(map(str, limits))
