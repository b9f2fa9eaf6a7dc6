"""Reader of the sparse format, written from its specification alone: numpy, one loop over the groups of a row."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.reading import Decoded, Reader, from_grid, little_endian_fields
from exporters.reading.files import TensorFiles
from mspc.errors import InputError
from mspc.storage.manifest import MatrixEntry


def reader(folder: Path) -> Reader:
    files = TensorFiles(folder)
    described = json.loads((folder / "config.json").read_text())["quantization_config"]["matrices"]

    def read(entry: MatrixEntry) -> Decoded:
        base = entry.source_key.removesuffix(".weight") if entry.address.index is None else entry.name
        info = described[base]
        kept = _kept_mask(files, base, info)
        if info["bits"] == 16:
            values, dtype = files.read(f"{base}.values")
            weight = np.zeros(info["shape"], np.float32)
            weight[kept] = values.reshape(-1)
            return Decoded(weight, dtype)
        scales, _ = files.read(f"{base}.scales")
        bits, num_columns = info["bits"], info["shape"][1]
        zeros = np.full(scales.shape, 2 ** (bits - 1), np.uint8)
        if not info["symmetric"]:
            zeros = little_endian_fields(files.read(f"{base}.zeros")[0], bits, scales.shape[1])
        codes = np.repeat(zeros, num_columns // scales.shape[1], axis=1)
        stored, _ = files.read(f"{base}.codes")
        if stored.ndim == 1:
            codes[kept] = little_endian_fields(stored[None], bits, int(kept.sum()))[0]
        else:
            codes[kept] = little_endian_fields(stored, bits, int(kept[0].sum())).reshape(-1)
        return from_grid(codes, scales, zeros)

    return read


def _kept_mask(files: TensorFiles, base: str, info: dict[str, Any]) -> NDArray[np.bool_]:
    num_rows, num_columns = info["shape"]
    if info["pattern"] == "unstructured":
        if info["sparsity"] == 0:
            return np.ones((num_rows, num_columns), bool)
        kept = little_endian_fields(files.read(f"{base}.mask")[0], 1, num_columns).astype(bool)
        offsets, _ = files.read(f"{base}.row_offsets")
        if offsets.tolist() != [0, *np.cumsum(kept.sum(1)).tolist()]:
            raise InputError(f"{base}: its row_offsets do not count the bits of its mask.")
        return kept
    keep, of = map(int, info["pattern"].split(":"))
    kept = np.ones((num_rows, num_columns), bool)
    if keep < of:
        width = len(f"{of - 1:b}")
        indices = little_endian_fields(files.read(f"{base}.indices")[0], width, num_columns // of * keep)
        kept[:] = False
        first = np.repeat(np.arange(0, num_columns, of), keep)
        for row in range(num_rows):
            kept[row, first + indices[row]] = True
    return kept
