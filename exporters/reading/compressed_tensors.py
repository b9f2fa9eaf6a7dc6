"""Reader of compressed-tensors' pack-quantized folders, from the published layout: numpy, words to bits to codes."""

from pathlib import Path

import numpy as np

from exporters.reading import Decoded, Reader, from_grid, little_endian_fields
from exporters.reading.files import TensorFiles
from mspc.errors import InputError
from mspc.storage.manifest import MatrixEntry


def reader(folder: Path) -> Reader:
    files = TensorFiles(folder)

    def read(entry: MatrixEntry) -> Decoded:
        name, (num_out, num_in), grid = entry.name, entry.shape, entry.target.grid
        if grid is None or (entry.role and f"{name}.weight_packed" not in files):  # it may be dense
            weight, dtype = files.read(entry.address.parameter)
            return Decoded(weight.astype(np.float32), dtype)
        shape, _ = files.read(f"{name}.weight_shape")
        if shape.tolist() != [num_out, num_in]:
            raise InputError(f"its weight_shape is {shape.tolist()} instead of {[num_out, num_in]}")
        scales, _ = files.read(f"{name}.weight_scale")
        codes = little_endian_fields(files.read(f"{name}.weight_packed")[0], grid.bits, num_in)
        if grid.symmetric:
            zeros = np.full(scales.shape, 2 ** (grid.bits - 1), np.uint8)
        else:
            packed, _ = files.read(f"{name}.weight_zero_point")
            zeros = np.ascontiguousarray(little_endian_fields(packed.T, grid.bits, num_out).T)
        return from_grid(codes, scales, zeros)

    return read
