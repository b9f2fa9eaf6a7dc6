"""Reader of the dense format: the weight is simply there."""

from pathlib import Path

import numpy as np

from exporters.reading import Decoded, Reader
from exporters.reading.files import TensorFiles
from mspc.storage.manifest import MatrixEntry


def reader(folder: Path) -> Reader:
    files = TensorFiles(folder)

    def read(entry: MatrixEntry) -> Decoded:
        if entry.rows:
            parts = [files.read(key) for key, _ in entry.rows]
            below = [part[entry.address.index] if part.ndim == 3 else part for part, _ in parts]
            return Decoded(np.concatenate(below).astype(np.float32), parts[0][1])
        tensor, dtype = files.read(entry.source_key)
        if entry.stacked:
            tensor = tensor.reshape(-1, entry.shape[1 if entry.address.transposed else 0], tensor.shape[1])
        weight = tensor if entry.address.index is None else tensor[entry.address.index]
        return Decoded((weight.T if entry.address.transposed else weight).astype(np.float32), dtype)

    return read
