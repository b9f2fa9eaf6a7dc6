"""Reader of GPTQ folders, from the published layout: numpy, words to bits to codes."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from exporters.reading import Decoded, Reader, from_grid, little_endian_fields
from exporters.reading.files import TensorFiles
from mspc.errors import InputError


def reader(folder: Path) -> Reader:
    files = TensorFiles(folder)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    offset = 1 if config["checkpoint_format"] == "gptq" else 0  # the first version stores zero points less one

    def read(row: dict[str, Any]) -> Decoded:
        name, (num_out, num_in), bits = row["parameter"].removesuffix(".weight"), row["shape"], row["bits"]
        if bits == 16:
            weight, dtype = files.read(row["parameter"])
            return Decoded((weight.T if row["transposed"] else weight).astype(np.float32), dtype)
        scales, _ = files.read(f"{name}.scales")
        codes = little_endian_fields(files.read(f"{name}.qweight")[0].T, bits, num_in)
        zeros = little_endian_fields(files.read(f"{name}.qzeros")[0], bits, num_out) + np.uint8(offset)
        group, _ = files.read(f"{name}.g_idx")
        if (group != np.arange(num_in) // (num_in // len(scales))).any():
            raise InputError("its g_idx reorders columns")
        zeros &= np.uint8(2**bits - 1)
        return from_grid(codes, np.ascontiguousarray(scales.T), np.ascontiguousarray(zeros.T))

    return read
