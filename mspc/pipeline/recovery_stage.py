"""The stage of a run that recovers: its text, its memory, its models, and the files that it writes at the end.

Where no step is better than what came in, all files stay as they were.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mspc.errors import InputError
from mspc.formats import layout
from mspc.memory import free_memory
from mspc.model.streamed import StreamedModel
from mspc.passes.blocks import advance, batches_of, handed_through
from mspc.passes.distillation import orders
from mspc.pipeline.calibration import Drawn
from mspc.pipeline.latents import Vector, latents_of
from mspc.pipeline.recovering import Text, Training, Tuned
from mspc.pipeline.solve_blocks import check_packed
from mspc.pipeline.student import Student
from mspc.progress import Progress
from mspc.settings import Settings
from mspc.sizes import in_words
from mspc.storage.artifact import MATRICES, MEASUREMENTS, UNCHANGED, read_matrix, read_stored
from mspc.storage.checkpoint import read_file, types_in
from mspc.storage.files import sha256_of, write_tensors
from mspc.storage.journal import NAME as JOURNAL
from mspc.storage.journal import Journal
from mspc.storage.manifest import MatrixEntry
from mspc.types import PlannedMatrix

BATCH_SIZE = 4
"""Sequences of a step."""
LENGTH = 512
"""Tokens of a sequence, at most."""
MOST_VALIDATION = 16
"""Sequences of validation text, at most."""
STATE = f"{MEASUREMENTS}/recovery.safetensors"
COPIES = 5
"""Float32 numbers of each kept weight: itself, its gradient, two moments, and the best so far."""

OpenModel = Callable[[], StreamedModel]


def recover_all(
    open_model: OpenModel, text: Drawn, settings: Settings, folder: Path, journal: Journal, spill: Path | None,
    progress: Progress,
) -> None:  # fmt: skip
    """Train what the journal has, and commit what is better. Nothing is done if that was committed before."""
    if journal.recovery is not None:
        return
    assert text.validation is not None
    dense, model = open_model(), open_model()
    with ExitStack() as stack:
        data = _text(dense, text, settings, spill, progress)
        stack.enter_context(dense.loaded_outer())
        stack.enter_context(model.whole())
        _share_embeddings(dense, model)
        tuned = _tuned(model, folder, journal)
        head = stack.enter_context(handed_through(dense))
        student = Student(model, head, list(dict.fromkeys(one.parameter for one in tuned)))
        training = Training(student, tuned, settings, folder / STATE)
        training.load()
        training.install()
        training.run(data, progress)
    training.save()
    best = training.validations.best_step()
    found = {
        "steps": training.made,
        "best_step": best,
        "learning_rate": settings.recover_lr,
        "sequences_per_step": BATCH_SIZE,
        "sequence_length": len(data.ids[0]),
        "tokens": sum(data.order[step].numel() for step in range(training.made)) * len(data.ids[0]),
        "text": text.calibration.source,
        "validation_tokens": sum(len(one) for one in data.validation[0]),
        "divergence_before": training.validations.divergences[0],
        "divergence_after": training.validations.divergences[best],
        "precision": "bfloat16" if student.half else str(model.dtype).removeprefix("torch."),
    }
    blocks = _write_blocks(model, tuned, folder, journal) if best else []
    if best:
        _write_vectors(model, tuned, folder)
    journal.commit({
        "file": STATE, "sha256": sha256_of(folder / STATE), "matrices": [], "recovery": found, "recovered": blocks,
    })  # fmt: skip


def check_memory(model: StreamedModel, plan: Sequence[PlannedMatrix], settings: Settings) -> None:
    """Raises InputError if training does not fit in memory, or if blocks share more than one hidden state."""
    if model.shares or (model.route and model.route.axis):
        raise InputError(
            f"recover: blocks of {type(model.model).__name__} share keys and values, hand states to the next one, or "
            "pass several hidden states on, which training does not know. Leave recover out."
        )
    needed = memory_of_training(model, model.dtype, plan, settings)
    free = free_memory(model.device)
    if needed > free:
        raise InputError(
            f"recover: training needs {in_words(needed)} for the model, gradients, the optimizer and the best weights, "
            f"and {in_words(free)} are free. Use another device or a smaller model, or leave recover out."
        )


def memory_of_training(
    model: StreamedModel, dtype: torch.dtype, plan: Sequence[PlannedMatrix], settings: Settings
) -> int:
    """Bytes that training needs: the model in its dtype, and for each kept weight `COPIES` numbers."""
    itemsize = 4 if dtype == torch.float16 else dtype.itemsize  # small gradients would vanish in float16
    whole = sum(parameter.numel() * itemsize for parameter in model.model.parameters())
    shares = [0.0 if settings.has_budget else matrix.target.pattern.sparsity for matrix in plan]
    kept = sum(matrix.numel * (1 - share) for matrix, share in zip(plan, shares, strict=True))
    return int(whole + COPIES * 4 * kept + sum(matrix.numel for matrix in plan))


def pieces(ids: Tensor, begin: tuple[int, ...]) -> Tensor:
    """Sequences (N, T) cut into ones of at most `LENGTH` tokens (M, t), each with the tokens that begin a text."""
    if ids.shape[1] <= LENGTH:
        return ids
    size = LENGTH - len(begin)
    body = ids[:, len(begin) :]
    body = body[:, : body.shape[1] // size * size].reshape(-1, size)
    return torch.cat([ids.new_tensor(begin).expand(len(body), -1), body], 1)


def _text(dense: StreamedModel, text: Drawn, settings: Settings, spill: Path | None, progress: Progress) -> Text:
    """The text with the outputs of the dense model, which passes it a block at a time."""
    begin = text.calibration.begin
    assert text.validation is not None
    ids, validation = pieces(text.calibration.ids, begin), pieces(text.validation, begin)[:MOST_VALIDATION]
    order = orders(len(ids), BATCH_SIZE, settings.recover, settings.seed)
    used, order_of_used = torch.cat(order).unique(return_inverse=True)
    order = list(order_of_used.split(BATCH_SIZE))
    ids = ids[used]
    batches = batches_of(dense, torch.cat([ids, validation]), spill)
    with progress.stage("Passing the dense model", len(dense.blocks)) as step:
        for index in range(len(dense.blocks)):
            with dense.loaded(index) as block:
                advance(dense, index, block, batches)
            step()
    outputs = [hidden for batch in batches for hidden in batch.hidden]
    return Text(list(ids), outputs[: len(ids)], order, (list(validation), outputs[len(ids) :]))


def _share_embeddings(dense: StreamedModel, model: StreamedModel) -> None:
    """Let two loaded models have one copy of the matrices outside of the blocks, which are not trained."""
    inside = model.blocks_name + "."
    own = dict(model.model.named_parameters())
    for name, parameter in dense.model.named_parameters():
        if not name.startswith(inside) and parameter.ndim > 1:
            own[name].data = parameter.data


def _tuned(model: StreamedModel, folder: Path, journal: Journal) -> list[Tuned]:
    """The latents of every compressed matrix, and of every vector that is one tensor of the source."""
    found = []
    for block in journal.blocks:
        for entry in (MatrixEntry.from_row(row, folder / JOURNAL) for row in block["matrices"]):
            if entry.pruned < entry.address.numel:
                matrix = latents_of(read_matrix(folder, entry), model.device)
                found.append(Tuned(entry.address.parameter, entry.address, matrix))
            else:
                entry.address.read(model.model.get_parameter(entry.address.parameter)).zero_()
    matrices = {row["parameter"] for block in journal.blocks for row in block["matrices"]}
    users = [key for origin in model.source_tensors.values() for key in origin.keys]
    for name, parameter in model.model.named_parameters():
        is_vector = sum(size != 1 for size in parameter.shape) < 2 and name not in matrices
        origin = model.source_tensors[name]
        if is_vector and origin.converter is None and users.count(origin.keys[0]) == 1:
            found.append(Tuned(name, None, Vector.of(model.read_parameter(name), model.device)))
    return found


def _write_blocks(model: StreamedModel, tuned: Sequence[Tuned], folder: Path, journal: Journal) -> list[dict[str, Any]]:
    """Write the recovered matrices of every block to a new file, and return entries like those of solved blocks."""
    latents = {one.name: one.latents for one in tuned if one.matrix is not None}
    blocks = []
    for block in journal.blocks:
        file = f"{MATRICES}/{block['block']:05d}.recovered.safetensors"
        tensors: dict[str, Tensor] = {}
        rows = []
        for entry in (MatrixEntry.from_row(row, folder / JOURNAL) for row in block["matrices"]):
            packed = read_stored(folder, entry)
            if entry.name in latents:
                stored = latents[entry.name].stored()
                assert not isinstance(stored, Tensor)
                packed = layout.pack(stored, entry.dtype)
                entry = replace(
                    entry, digest=layout.digest(stored), zeros=int(torch.count_nonzero(stored.weight == 0)),
                    output_error=None,
                )  # fmt: skip
                check_packed(packed, entry)
            rows.append(replace(entry, file=file).to_row())
            tensors |= {f"{entry.name}.{part}": tensor for part, tensor in packed.items()}
        write_tensors(folder / file, tensors)
        blocks.append({"block": block["block"], "file": file, "sha256": sha256_of(folder / file), "matrices": rows})
    return blocks


def _write_vectors(model: StreamedModel, tuned: Sequence[Tuned], folder: Path) -> None:
    """Write the recovered vectors in place of those of the source."""
    vectors = {
        model.source_tensors[one.parameter].keys[0]: stored
        for one in tuned
        if isinstance(stored := one.latents.stored(), Tensor)
    }
    for shard, keys in model.source.shards().items():
        path = folder / UNCHANGED / shard
        if vectors.keys().isdisjoint(keys):
            continue
        with_them = {key: vectors.get(key, tensor).cpu() for key, tensor in read_file(path, types_in(path))}
        write_tensors(path, with_them)
