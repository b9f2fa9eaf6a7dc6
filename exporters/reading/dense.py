"""Reader of the dense format: the weight is simply there."""

from pathlib import Path
from typing import Any

import numpy as np

from exporters.reading import Decoded, Reader
from exporters.reading.files import TensorFiles


def reader(folder: Path) -> Reader:
    files = TensorFiles(folder)

    def read(row: dict[str, Any]) -> Decoded:
        weight, dtype = files.read(row["tensor"])
        return Decoded((weight.T if row["transposed"] else weight).astype(np.float32), dtype)

    return read
