"""Run a model block by block: embed a text, pass it through one block, and read logits after the last block.

Activations live in host memory, or in files of a folder for models and texts that do not fit.
"""

import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mspc import ranks
from mspc.errors import ActivationError, InputError, MspcError, in_brief, is_out_of_memory
from mspc.model.config_checks import largest_setting
from mspc.model.experts import experts_per_token, matrix_shapes
from mspc.model.streamed import Route, StreamedModel
from mspc.passes.route import MOST_OUTPUTS, EarlyExit, as_outputs, find_route, replaced_forwards
from mspc.threads import run_all

TOKENS_PER_BATCH = 4096
BUFFERS = 6
"""Activations, each as wide as the widest matrix, that a pass through a block holds at most, estimated."""
SCORES = 3
"""Copies of the scores that eager attention holds at most, estimated."""


@dataclass(frozen=True)
class Call:
    """The arguments that the model passes to one block after the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def given(self, values: Mapping[int | str, Any]) -> "Call":
        """The call with other arguments, by position or name."""
        args = tuple(values.get(position, value) for position, value in enumerate(self.args))
        return Call(args, self.kwargs | {name: value for name, value in values.items() if isinstance(name, str)})


@dataclass
class Batch:
    """Some sequences on their way through the blocks: `hidden` (B, T, D) is the input of the next one."""

    ids: Tensor
    hidden: Tensor
    calls: list[Call]
    axis: int = 0
    """The axis of the sequences in `hidden`: 1 where it is (K, B, T, D)."""
    chunk: int = 0
    """The number of the chunk of the text that the sequences belong to (see `mspc.ranks`)."""

    def sequences(self) -> Iterator["Batch"]:
        """Each sequence as a batch of its own."""
        for ids, hidden in zip(self.ids.split(1), self.hidden.split(1, self.axis), strict=True):
            yield Batch(ids, hidden, self.calls, self.axis)

    def parts(self, size: int) -> Iterator["Batch"]:
        """The batch in parts of `size` tokens, once it has passed all blocks: each token has its own logits."""
        for ids, hidden in zip(self.ids.split(size, 1), self.hidden.split(size, self.axis + 1), strict=True):
            yield Batch(ids, hidden, self.calls, self.axis)


def batches_of(
    model: StreamedModel, ids: Tensor, spill: Path | None = None, batch_size: int | None = None
) -> list[Batch]:
    """Embed sequences (N, T) and record how the model calls each block.

    A batch has `batch_size` sequences (None: as many as make about 4096 tokens). With `spill`, activations live in
    unlinked files of that folder.
    """
    size = batch_size or max(1, TOKENS_PER_BATCH // ids.shape[1])
    with model.loaded_outer():
        return embedded(model, ids.split(size), spill)


def own_batches(
    model: StreamedModel, ids: Tensor, spill: Path | None = None, batch_size: int | None = None
) -> list[Batch]:
    """`batches_of` for the chunks of the text that this rank has. No batch has sequences of two chunks."""
    parts = own_parts(ids, batch_size)
    with model.loaded_outer():
        batches = embedded(model, [part for _, part in parts], spill)
    for batch, (chunk, _) in zip(batches, parts, strict=True):
        batch.chunk = chunk
    return batches


def own_parts(ids: Tensor, batch_size: int | None = None) -> list[tuple[int, Tensor]]:
    """The chunk and the ids (B, T) of each batch of this rank, of sequences (N, T)."""
    size, sequences = batch_size or max(1, TOKENS_PER_BATCH // ids.shape[1]), ranks.chunks(len(ids))
    cut = ((chunk, ids[sequences[chunk].start : sequences[chunk].stop]) for chunk in ranks.own_chunks())
    return [(chunk, part) for chunk, of_chunk in cut if len(of_chunk) for part in of_chunk.split(size)]


def batches_of_parts(model: StreamedModel, parts: Sequence[Tensor]) -> list[Batch]:
    """A batch of each of some ids (B, T)."""
    with model.loaded_outer():
        return embedded(model, parts)


def embedded(model: StreamedModel, parts: Sequence[Tensor], spill: Path | None = None) -> list[Batch]:
    """A batch of each of some ids (B, T), for a model whose outer part is loaded."""
    batches: list[Batch] = []
    with torch.no_grad():
        for part in parts:
            hidden, calls = _capture(model, part)
            if not _is_finite(hidden):
                raise not_finite(model.model, "The embeddings", model.dtype)
            if batches:
                calls = [_shared(call, first) for call, first in zip(calls, batches[0].calls, strict=True)]
            batches.append(Batch(part, stored(hidden, spill), calls, route_of(model).axis))
    return batches


def _capture(model: StreamedModel, ids: Tensor) -> tuple[Tensor, list[Call]]:
    """The first block's input and the calls of all blocks, from a forward pass in which blocks return their input."""
    route = route_of(model)
    order = [index for index in range(len(model.blocks)) if index not in route.skipped]
    first: list[Tensor] = []
    calls: dict[int, Call] = {}

    def record(index: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(calls) == len(order) or index != order[len(calls)]:
            raise InputError(
                f"{model.block_name(index)} runs after {len(calls)} blocks, but not for another text. Give a model "
                "that runs its blocks in one order."
            )
        if first and not _is_same(hidden, first[0]):
            raise InputError(
                f"{model.block_name(index)} is not given what the block before it returns, but is for another text. "
                "Give a model whose blocks pass hidden states on from one to the next."
            )
        first.append(hidden)
        calls[index] = Call(args, kwargs)
        if len(calls) == len(order) and all(later < index for later in route.skipped):
            raise EarlyExit
        return as_outputs(hidden, route.num_outputs)

    what = f"{type(model.model).__name__} cannot be run one block at a time, as mspc does"
    with replaced_forwards(model.blocks, record), suppress(EarlyExit), _in_words(what):
        model.model(input_ids=ids.to(model.device), use_cache=False)
    if len(calls) < len(order):
        raise InputError(
            f"{model.block_name(order[len(calls)])} is not run for every text. Give a model that runs the same blocks "
            "for each."
        )
    return first[0], [calls.get(index, Call((), {})) for index in range(len(model.blocks))]


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Tell if two tensors are the same one, views of all of it, or equal: Gemma 4 cuts its hidden states at 0."""
    return a.shape == b.shape and ((a.stride(), a.data_ptr()) == (b.stride(), b.data_ptr()) or torch.equal(a, b))


def route_of(model: StreamedModel) -> Route:
    """The route of a model. Its outer part is loaded unless the route is known."""
    if model.route is None:
        model.route = find_route(model)
    return model.route


@contextmanager
def _in_words(what: str) -> Iterator[None]:
    """Make an InputError of whatever the code of a model raises."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MspcError | EarlyExit) or is_out_of_memory(error):
            raise
        raise InputError(
            f"{what} ({in_brief(error)}). Try another version of transformers, or another model."
        ) from error


def run_block(model: StreamedModel, block: nn.Module, batch: Batch, index: int) -> Tensor:
    """Hidden states (B, T, D) of a batch after block `index`, which is loaded."""
    if index in route_of(model).skipped:
        return batch.hidden.to(model.device)
    call = batch.calls[index]
    with _in_words(f"{model.block_name(index)} cannot be run by itself, as mspc does"):
        output = block(batch.hidden.to(model.device), *call.args, **call.kwargs)
    hand_over(model, batch, index, output)
    return hidden_of(model, batch, output)


def hand_over(model: StreamedModel, batch: Batch, index: int, output: Any) -> None:
    """Give the next block what this one returned for it, such as the tokens that an indexer chose, or router states.

    Blocks before this one are done with the batch, and what they were given is dropped. The next block has a copy, as
    hidden states are written over, and a view would keep all of its tensor.
    """
    handed = tree_map_only(Tensor, Tensor.clone, handed_over(route_of(model), output))
    if handed and index + 1 < len(batch.calls):
        batch.calls[index + 1] = batch.calls[index + 1].given(handed)
    if handed and index > 0:
        batch.calls[index - 1] = batch.calls[index - 1].given(dict.fromkeys(handed))


def handed_over(route: Route, output: Any) -> dict[int | str, Any]:
    """Values that a block returned for the next one alone, by the position or name of the argument."""
    if not isinstance(output, tuple | list) or len(output) != route.num_outputs:
        return {}
    return {argument: output[place] for place, argument in route.to_next}


def hidden_of(model: StreamedModel, batch: Batch, output: Any) -> Tensor:
    """The hidden states in what a block returned for a batch. Raises InputError for anything else."""
    several = isinstance(output, tuple | list) and len(output) > 0
    if several and any(value is not None for value in output[1:]):
        route = route_of(model)
        known = handed_over(route, output)
        if (len(output) in route.handed_on and not known) or len(output) > MOST_OUTPUTS:
            raise InputError(
                f"A block of {type(model.model).__name__} returns {len(output)} values, and later blocks may read more "
                "than the first, which are the hidden states. Give another model: this one is not supported."
            )
    hidden = output[0] if several else output
    if not isinstance(hidden, Tensor) or hidden.shape != batch.hidden.shape:
        shape = f" {tuple(hidden.shape)}" if isinstance(hidden, Tensor) else ""
        raise InputError(
            f"A block returns a {type(output).__name__}{shape} where mspc expects hidden states "
            f"{tuple(batch.hidden.shape)}, alone or first in a tuple. Give another model: this one is not supported."
        )
    return hidden


def advance(model: StreamedModel, index: int, block: nn.Module, batches: Sequence[Batch]) -> None:
    """Move all batches through block `index`. Raises ActivationError if an output is not finite."""

    def pass_on(batch: Batch) -> None:
        arrive(model, index, batch, run_block(model, block, batch, index))

    with torch.no_grad():
        run_all(pass_on, batches, pass_bytes(model, block, batches))


def pass_bytes(model: StreamedModel, block: nn.Module, batches: Sequence[Batch], all_tokens: bool = False) -> int:
    """Bytes of one batch in a block: activations, estimated from its widest matrix, and attention scores.

    `all_tokens`: every expert is shown all tokens.
    """
    if not batches:
        return 0
    shapes = list(matrix_shapes(block))
    width = max((max(shape) for shape in shapes if shape), default=0)
    if counts := [shape[0] for shape in shapes if len(shape) == 3]:
        width *= max(counts) if all_tokens else experts_per_token(model.config)
    ids, hidden = batches[0].ids, batches[0].hidden
    return BUFFERS * width * ids.numel() * hidden.itemsize + SCORES * scores_bytes(model, ids)


def scores_bytes(model: StreamedModel, ids: Tensor) -> int:
    """Bytes of the attention scores of sequences (B, T) in float32. Only eager attention has them all at once."""
    if model.model.config._attn_implementation != "eager":
        return 0
    heads = largest_setting(model.config, "num_attention_heads")
    return torch.float32.itemsize * heads * ids.numel() * ids.shape[1]


def arrive(model: StreamedModel, index: int, batch: Batch, output: Tensor) -> None:
    """Make the output of block `index` the hidden states of a batch. Raises ActivationError if it is not finite."""
    if not _is_finite(output):
        raise not_finite(model.blocks[index], model.block_name(index), model.dtype)
    batch.hidden.copy_(output)


def _is_finite(output: Tensor) -> bool:
    """NaN is passed on by aminmax, which is ten times as fast as isfinite."""
    return bool(torch.stack(output.aminmax()).isfinite().all())


def not_finite(module: nn.Module, name: str, dtype: torch.dtype) -> MspcError:
    """The error for a loaded part of a model whose output is not finite: it names a damaged weight if there is one."""
    for parameter_name, parameter in module.named_parameters():
        if not parameter.is_meta and not bool(parameter.isfinite().all()):
            where = parameter_name if name.startswith("The ") else f"{name}.{parameter_name}"
            return InputError(f"{where} contains NaN or infinity; the weights are damaged. Get them again.")
    remedy = "Try --dtype float32" if dtype != torch.float32 else "Check what the model gives in transformers"
    return ActivationError(
        f"{name}: its output contains NaN or infinity in {dtype}; the model overflows in this precision. {remedy}."
    )


Logits = Callable[[Batch], Tensor]
"""Logits (B, T, V) of a batch that has passed all blocks, by the model's own final norm and head."""


@contextmanager
def without_blocks(model: StreamedModel) -> Iterator[Logits]:
    """The outer part of a model, loaded, as a function that threads may call at the same time."""
    with model.loaded_outer(), handed_through(model) as logits:
        yield logits


@contextmanager
def handed_through(model: StreamedModel) -> Iterator[Logits]:
    """The same for a model whose outer part is loaded. Its blocks cannot be run meanwhile."""
    given, route = threading.local(), route_of(model)

    def hand_through(*args: Any, **kwargs: Any) -> Any:
        return as_outputs(given.hidden, route.num_outputs)

    def logits(batch: Batch) -> Tensor:
        given.hidden = batch.hidden.to(model.device)
        with _in_words(f"{type(model.model).__name__} cannot be run without its blocks, as mspc does"):
            return model.model(input_ids=batch.ids.to(model.device), use_cache=False).logits

    with replaced_forwards(model.blocks, hand_through):
        yield logits


def logits_bytes(model: StreamedModel, ids: Tensor) -> int:
    """Bytes of what is computed from the logits of tokens: some float32 copies of them."""
    return BUFFERS * 4 * ids.numel() * int(model.config.get_text_config().vocab_size)


def token_losses(logits_of: Logits, batch: Batch) -> Tensor:
    """Cross entropy (B, T - 1) float32 of every token given those before it. The batch has passed all blocks."""
    logits = logits_of(batch)[:, :-1].float()
    targets = batch.ids[:, 1:].to(logits.device)
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def _shared(call: Call, first: Call) -> Call:
    """The same call with the first batch's tensors in place of equal ones: masks and rotary tables exist once."""

    def same(value: Any, other: Any) -> Any:
        if isinstance(value, Tensor) and isinstance(other, Tensor):
            return other if value.shape == other.shape and torch.equal(value, other) else value
        if isinstance(value, tuple) and isinstance(other, tuple) and len(value) == len(other):
            return tuple(same(a, b) for a, b in zip(value, other, strict=True))
        return value

    kwargs = {name: same(value, first.kwargs.get(name)) for name, value in call.kwargs.items()}
    return Call(same(call.args, first.args), kwargs)


def stored(hidden: Tensor, spill: Path | None) -> Tensor:
    """A copy in host memory, or in an unlinked file of the folder `spill`."""
    if spill is None:
        return hidden.cpu().clone()
    spill.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=spill, prefix="activations-") as file:
        stored = torch.from_file(file.name, shared=True, size=hidden.numel(), dtype=hidden.dtype).view_as(hidden)
    return stored.copy_(hidden)
