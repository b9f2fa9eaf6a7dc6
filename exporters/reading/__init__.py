"""Readers of what the exporters write, for `verify`: plain numpy that shares nothing with the code that packed.

Each format has a module with `reader(folder)`, a function from an entry of the export manifest to its matrix as
`Decoded`.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mspc.storage.manifest import MatrixEntry


@dataclass(frozen=True)
class Decoded:
    """A matrix as the files hold it: `weight` (O, I) as exact float32, and the parts of its grid if it has one.

    `codes` (O, I) and `zeros` (O, G) are uint8, `scales` (O, G) float16. `dtype` is that of the stored weight.
    """

    weight: NDArray[np.float32]
    dtype: str = "float32"
    codes: NDArray[np.uint8] | None = None
    scales: NDArray[np.float16] | None = None
    zeros: NDArray[np.uint8] | None = None


Reader = Callable[[MatrixEntry], Decoded]


def reader_of(format_name: str, folder: Path) -> Reader:
    module = importlib.import_module(f"exporters.reading.{format_name.replace('-', '_')}")
    reader: Reader = module.reader(folder)
    return reader


def from_grid(codes: NDArray[np.uint8], scales: NDArray[np.float16], zeros: NDArray[np.uint8]) -> Decoded:
    """(O, I), (O, G), (O, G) -> the matrix, its weight in exact float32 products."""
    size = codes.shape[1] // scales.shape[1]
    scale = np.repeat(scales.astype(np.float32), size, axis=1)
    difference = codes.astype(np.float32) - np.repeat(zeros, size, axis=1).astype(np.float32)
    return Decoded(difference * scale, "float32", codes, scales, zeros)


def little_endian_fields(words: NDArray[Any], bits: int, count: int) -> NDArray[np.uint8]:
    """The first `count` fields of `bits` bits in every row of a little-endian bit stream: (R, W) -> (R, count)."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    fields = stream[:, : count * bits].reshape(len(words), count, bits)
    return (fields << np.arange(bits, dtype=np.uint8)).sum(axis=2, dtype=np.uint8)
