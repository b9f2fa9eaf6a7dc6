"""The cost of a compression: predictions of the compressed model compared with those of the dense one, and bytes.

Both models pass the test text together: each block is loaded once, dense, and then gets the solved weights.
"""

import math
import resource
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mspc.errors import ActivationError
from mspc.model.streamed import StreamedModel
from mspc.passes.blocks import advance, batches_of
from mspc.passes.perplexity import Perplexity, first_scored, score
from mspc.passes.walk import install, matrix_of
from mspc.progress import Progress, log
from mspc.storage.artifact import MATRICES, MEASUREMENTS, OWN_TEXT, UNCHANGED
from mspc.storage.checkpoint import Checkpoint
from mspc.storage.journal import NAME as JOURNAL
from mspc.storage.manifest import MANIFEST, MatrixEntry
from mspc.storage.sizes import bytes_in, sparse_export_bytes, tensor_bytes
from mspc.text.tokens import Tokens
from mspc.types import EMBEDDINGS, HEAD, MatricesByBlock

CHECKED_TOKENS = 4096
"""Tokens on which the dense model is tried before the work."""


def warn_if_guessing(model: StreamedModel, tokens: Tokens, progress: Progress) -> None:
    """Log an error if the dense model predicts the text no better than the frequencies of its tokens do.

    Frequencies alone, known in hindsight, are the least that a model which fits its tokenizer and text must beat.
    """
    ids = tokens.ids[: max(1, CHECKED_TOKENS // tokens.ids.shape[1])]
    batches = batches_of(model, ids)
    with progress.stage("Trying the dense model", len(model.blocks)) as step:
        for index in range(len(model.blocks)):
            with model.loaded(index) as block:
                advance(model, index, block, batches)
            step()
    loss = score(model, batches, len(tokens.begin)).nll
    frequencies = unigram_loss(tokens.ids, ids, len(tokens.begin))
    if not loss < frequencies:
        vocabulary = model.config.get_text_config().vocab_size
        log.error(
            f"the dense model is close to guessing: its loss on {tokens.source} is {loss:.2f} nats per token, and the "
            f"frequencies of the tokens alone give {frequencies:.2f} (a blind guess: {math.log(vocabulary):.2f}). What "
            "is measured on such a text is noise. Check that the tokenizer belongs to the weights, that the text is in "
            "a language and of a kind that the model knows (--calibration), and that it begins as it should (--bos)."
        )


def unigram_loss(ids: Tensor, part: Tensor, begin: int = 0) -> float:
    """Cross entropy in nats of the scored tokens of `part` (n, T) under their frequencies in `ids` (N, T).

    A short text fits its own frequencies too well, by about (K - 1) / 2N nats for K different tokens among N (Miller,
    1955), which is added.
    """
    first = first_scored(begin) + 1
    counts = torch.bincount(ids[:, first:].flatten()).double()
    total = counts.sum()
    loss = -(counts[part[:, first:]] / total).log().mean()
    return float(loss + (torch.count_nonzero(counts) - 1) / (2 * total))


@dataclass(frozen=True, slots=True)
class Compared:
    """The cost of a compression: the model at the end, and the same before its head and embeddings were quantized."""

    final: Perplexity
    steps: tuple[tuple[tuple[str, ...], Perplexity], ...] = ()
    """The roles that were quantized, none at first, and the model with these."""


def compare(
    model: StreamedModel,
    ids: Tensor,
    begin: int,
    matrices: MatricesByBlock,
    solved: Callable[[int], dict[str, Tensor] | None],
    spill: Path | None,
    progress: Progress,
    recovered: StreamedModel | None = None,
    outer: tuple[StreamedModel, Sequence[MatrixEntry]] | None = None,
) -> Compared | None:
    """The compressed model on windows (N, T), with the dense one as its reference. `solved` gives weights by block.

    `recovered` is the model with other norms and biases, if it has others. `outer` is the one with a quantized head or
    embeddings. None, and a note, if the activations of the compressed model overflow.
    """
    changed = recovered or model
    dense, compressed = (batches_of(one, ids, spill) for one in (model, changed))
    entries = outer[1] if outer else ()
    embedded = any(entry.role == EMBEDDINGS for entry in entries)
    with_embeddings = batches_of(outer[0], ids, spill) if outer and embedded else []
    try:
        with progress.stage("Evaluating", len(matrices)) as step:
            for index, of_block in enumerate(matrices):
                with model.loaded(index) as block:
                    advance(model, index, block, dense)
                    with nullcontext(block) if recovered is None else recovered.loaded(index) as own:
                        _install(changed, own, index, of_block, solved(index))
                        advance(changed, index, own, [*compressed, *with_embeddings])
                step()
            first = score(changed, compressed, begin, model, dense)
            if outer is None:
                return Compared(first)
            steps: list[tuple[tuple[str, ...], Perplexity]] = [((), first)]
            if any(entry.role == HEAD or entry.tied for entry in entries):
                steps.append(((HEAD,), score(outer[0], compressed, begin, model, dense)))
            if embedded:
                done = (*steps[-1][0], EMBEDDINGS)
                steps.append((done, score(outer[0], with_embeddings, begin, model, dense)))
            return Compared(steps[-1][1], tuple(steps))
    except ActivationError as error:
        log.error(f"the cost could not be measured on the test text: {error}")
        return None


def _install(
    model: StreamedModel, block: nn.Module, index: int, of_block: Sequence[Any], weights: Mapping[str, Tensor] | None
) -> None:
    for matrix in of_block:
        assert weights is not None
        install(matrix_of(model, block, index, matrix), weights[matrix.name])


def evaluation_to_dict(compared: Compared, text: str, ids: Tensor) -> dict[str, Any]:
    """The part `evaluation` of the manifest."""
    found = compared.final
    values = {
        "text": text,
        "windows": found.windows,
        "sequence_length": found.sequence_length,
        "tokens": found.tokens,
        "sha256": Tokens(ids, text).sha256,
        "dense_perplexity": _both(found.reference_perplexity, found.reference_perplexity_interval),
        **_costs(found),
    }
    if compared.steps:
        values["outer"] = [{"quantized": list(roles), **_costs(one)} for roles, one in compared.steps]
    return values


def _costs(found: Perplexity) -> dict[str, Any]:
    return {
        "perplexity": _both(found.perplexity, found.perplexity_interval),
        "divergence": _both(found.divergence, found.divergence_interval),
    }


def _both(mean: float | None, interval: tuple[float, float] | None) -> dict[str, Any]:
    """A mean and its interval. JSON knows no infinity: None."""
    return {"mean": _finite(mean), "interval": None if interval is None else [_finite(end) for end in interval]}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def sizes(
    folder: Path, checkpoint: Checkpoint, model: StreamedModel, entries: Sequence[MatrixEntry], unused: Collection[str]
) -> dict[str, int]:
    """The part `bytes` of the manifest. All but `folder` are of weights alone.

    `folder` is all of the output but the manifest, whose own size depends on timings. `unused` files are removed soon.
    """
    removed = sum(bytes_in(folder / name) for name in unused)
    types, whole = checkpoint.types(), {entry.source_key: entry for entry in entries if entry.role}
    return {
        "dense": checkpoint.dense_bytes(),
        "artifact": sum(bytes_in(folder / name) for name in (MATRICES, UNCHANGED)) - removed,
        "sparse_export": sparse_export_bytes(checkpoint.shards(), types, entries),
        "embeddings": sum(
            whole[key].num_bytes if key in whole else tensor_bytes(types[key]) for key in model.embedding_keys()
        ),
        "folder": sum(
            bytes_in(path) for path in folder.iterdir() if path.name not in (MEASUREMENTS, OWN_TEXT, JOURNAL, MANIFEST)
        )
        - removed,
    }


def peak_memory() -> int:
    """Peak resident memory of the process in bytes (Linux counts in KiB, macOS in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
