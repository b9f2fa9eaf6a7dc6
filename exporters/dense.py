"""An ordinary Hugging Face folder with exact zeros in the weights, sharded like the source. Every runtime loads it."""

import json
import shutil
from functools import partial
from pathlib import Path

from mspc.artifact import ArtifactSource
from mspc.checkpoint import INDEX, write_atomically, write_json, write_tensors

PRIVATE = ("mspc.json", "plan.json")


def export(artifact: ArtifactSource, out: Path) -> None:
    for path in sorted(artifact.folder.iterdir()):
        if path.is_file() and path.name not in (*PRIVATE, "config.json", "recipe.toml"):
            write_atomically(out / path.name, partial(shutil.copyfile, path))
    config = json.loads((artifact.folder / "config.json").read_text(encoding="utf-8"))
    manifest = artifact.manifest
    # Under a key of our own: readers of `quantization_config` and `sparsity_config` would expect packed tensors.
    config["mspc"] = {key: manifest[key] for key in ("format_version", "mspc_version", "sparsity")}
    write_json(out / "config.json", config)
    total_size = 0
    for shard, keys in artifact.shards().items():
        tensors = dict(artifact.read(keys))
        total_size += sum(tensor.nbytes for tensor in tensors.values())
        write_tensors(out / shard, tensors)
    if len(artifact.shards()) > 1:
        weight_map = {key: shard for shard, keys in artifact.shards().items() for key in keys}
        write_json(out / INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})
