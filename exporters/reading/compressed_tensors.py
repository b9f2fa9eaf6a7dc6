"""Reader of compressed-tensors' pack-quantized folders, from the published layout: numpy, words to bits to codes."""

from pathlib import Path
from typing import Any

import numpy as np

from exporters.reading import Decoded, Reader, from_grid, little_endian_fields
from exporters.reading.files import TensorFiles
from mspc.errors import InputError


def reader(folder: Path) -> Reader:
    files = TensorFiles(folder)

    def read(row: dict[str, Any]) -> Decoded:
        name, bits = row["parameter"].removesuffix(".weight"), row["bits"]
        if bits == 16:
            weight, dtype = files.read(row["parameter"])
            return Decoded(weight.astype(np.float32), dtype)
        shape, _ = files.read(f"{name}.weight_shape")
        if shape.tolist() != row["shape"]:
            raise InputError(f"its weight_shape is {shape.tolist()} instead of {row['shape']}")
        scales, _ = files.read(f"{name}.weight_scale")
        codes = little_endian_fields(files.read(f"{name}.weight_packed")[0], bits, row["shape"][1])
        if row["symmetric"]:
            zeros = np.full(scales.shape, 2 ** (bits - 1), np.uint8)
        else:
            packed, _ = files.read(f"{name}.weight_zero_point")
            zeros = np.ascontiguousarray(little_endian_fields(packed.T, bits, row["shape"][0]).T)
        return from_grid(codes, scales, zeros)

    return read
