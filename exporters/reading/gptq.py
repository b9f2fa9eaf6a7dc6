"""Reader of GPTQ folders, from the published layout: numpy, words to bits to codes."""

import json
from pathlib import Path

import numpy as np

from exporters.reading import Decoded, Reader, from_grid, little_endian_fields
from exporters.reading.files import TensorFiles
from mspc.errors import InputError
from mspc.storage.manifest import MatrixEntry


def reader(folder: Path) -> Reader:
    files = TensorFiles(folder)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    offset = 1 if config["checkpoint_format"] == "gptq" else 0  # the first version stores zero points less one

    def read(entry: MatrixEntry) -> Decoded:
        name, (num_out, num_in), grid = entry.name, entry.shape, entry.target.grid
        if grid is None or entry.role:  # head and embeddings are never packed
            weight, dtype = files.read(entry.address.parameter)
            return Decoded((weight.T if entry.address.transposed else weight).astype(np.float32), dtype)
        scales, _ = files.read(f"{name}.scales")
        codes = little_endian_fields(files.read(f"{name}.qweight")[0].T, grid.bits, num_in)
        zeros = little_endian_fields(files.read(f"{name}.qzeros")[0], grid.bits, num_out) + np.uint8(offset)
        group, _ = files.read(f"{name}.g_idx")
        if (group != np.arange(num_in) // (num_in // len(scales))).any():
            raise InputError("its g_idx reorders columns")
        zeros &= np.uint8(2**grid.bits - 1)
        return from_grid(codes, np.ascontiguousarray(scales.T), np.ascontiguousarray(zeros.T))

    return read
