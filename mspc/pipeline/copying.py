"""All of a checkpoint that a run does not compress, copied to the artifact."""

from collections.abc import Sequence
from pathlib import Path

from mspc.model.streamed import StreamedModel
from mspc.pipeline.demand import artifact_bytes
from mspc.progress import Progress
from mspc.storage.artifact import UNCHANGED
from mspc.storage.carrying import carry
from mspc.storage.checkpoint import Checkpoint
from mspc.storage.files import write_tensors
from mspc.storage.output_folder import check_space
from mspc.types import Matrix, PlannedMatrix


def copy_rest(
    checkpoint: Checkpoint, model: StreamedModel, plan: Sequence[PlannedMatrix], matrices: Sequence[Matrix],
    folder: Path, progress: Progress,
) -> None:  # fmt: skip
    """Copy all that belongs to the model and, shard by shard, the weights that are not compressed.

    `plan` and `matrices` are all that is compressed, embeddings and head too.
    """
    check_space(folder, artifact_bytes(model, [list(matrices)], plan))
    carry(checkpoint.folder, folder, read=checkpoint.shards())
    compressed = model.compressed_keys(matrices)
    with progress.stage("Copying other weights", len(checkpoint.shards())) as step:
        for shard, keys in checkpoint.shards().items():
            rest = [key for key in keys if key not in compressed]
            if rest and not (folder / UNCHANGED / shard).is_file():
                write_tensors(folder / UNCHANGED / shard, dict(checkpoint.read(rest)))
            step(shard)
