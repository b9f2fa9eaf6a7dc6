"""The cost of a compression: predictions of the compressed model compared with those of the dense one, and bytes.

Both models pass the test text together: each block is loaded once, dense, and then gets the solved weights.
"""

import math
import resource
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
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
from mspc.types import MatricesByBlock

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


def compare(
    model: StreamedModel,
    ids: Tensor,
    begin: int,
    matrices: MatricesByBlock,
    solved: Callable[[int], dict[str, Tensor] | None],
    spill: Path | None,
    progress: Progress,
    recovered: StreamedModel | None = None,
) -> Perplexity | None:
    """The compressed model on windows (N, T), with the dense one as its reference. `solved` gives weights by block.

    `recovered` is the model with other norms and biases, if it has others. None, and a note, if the activations of the
    compressed model overflow.
    """
    changed = recovered or model
    dense, compressed = (batches_of(one, ids, spill) for one in (model, changed))
    try:
        with progress.stage("Evaluating", len(matrices)) as step:
            for index, of_block in enumerate(matrices):
                with model.loaded(index) as block:
                    advance(model, index, block, dense)
                    with nullcontext(block) if recovered is None else recovered.loaded(index) as own:
                        _install(changed, own, index, of_block, solved(index))
                        advance(changed, index, own, compressed)
                step()
            return score(changed, compressed, begin, model, dense)
    except ActivationError as error:
        log.error(f"the cost could not be measured on the test text: {error}")
        return None


def _install(
    model: StreamedModel, block: nn.Module, index: int, of_block: Sequence[Any], weights: Mapping[str, Tensor] | None
) -> None:
    for matrix in of_block:
        assert weights is not None
        install(matrix_of(model, block, index, matrix), weights[matrix.name])


def evaluation_to_dict(found: Perplexity, text: str, ids: Tensor) -> dict[str, Any]:
    """The part `evaluation` of the manifest. JSON knows no infinity: None."""

    def finite(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    def both(mean: float | None, interval: tuple[float, float] | None) -> dict[str, Any]:
        return {"mean": finite(mean), "interval": None if interval is None else [finite(end) for end in interval]}

    return {
        "text": text,
        "windows": found.windows,
        "sequence_length": found.sequence_length,
        "tokens": found.tokens,
        "sha256": Tokens(ids, text).sha256,
        "dense_perplexity": both(found.reference_perplexity, found.reference_perplexity_interval),
        "perplexity": both(found.perplexity, found.perplexity_interval),
        "divergence": both(found.divergence, found.divergence_interval),
    }


def sizes(
    folder: Path, checkpoint: Checkpoint, model: StreamedModel, entries: Sequence[MatrixEntry], unused: Collection[str]
) -> dict[str, int]:
    """The part `bytes` of the manifest. All but `folder` are of weights alone.

    `folder` is all of the output but the manifest, whose own size depends on timings. `unused` files are removed soon.
    """
    removed = sum(bytes_in(folder / name) for name in unused)
    types = checkpoint.types()
    return {
        "dense": sum(bytes_in(checkpoint.folder / shard) for shard in checkpoint.shards()),
        "artifact": sum(bytes_in(folder / name) for name in (MATRICES, UNCHANGED)) - removed,
        "sparse_export": sparse_export_bytes(checkpoint.shards(), types, entries),
        "embeddings": sum(tensor_bytes(types[key]) for key in model.embedding_keys()),
        "folder": sum(
            bytes_in(path) for path in folder.iterdir() if path.name not in (MEASUREMENTS, OWN_TEXT, JOURNAL, MANIFEST)
        )
        - removed,
    }


def peak_memory() -> int:
    """Peak resident memory of the process in bytes (Linux counts in KiB, macOS in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
