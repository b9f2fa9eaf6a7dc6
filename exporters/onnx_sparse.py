"""Matrices in an ONNX graph as mspc's C++ library multiplies them: the operator MatMul of the domain `ai.mspc`.

Its inputs are x and the repacked tensors of docs/cpu-kernels.md, as initializers. So a runtime keeps compressed weights
in memory and nothing else, and every instruction set reads the same file.
"""

from pathlib import Path

import onnx_ir as ir
import torch

from exporters.onnx_outer import initializer, replace
from mspc.formats.description import StoredMatrix
from mspc.formats.layout import with_offsets
from mspc.kernels.cpu import kernel
from mspc.kernels.cpu.building import NAME
from mspc.storage.artifact import ArtifactSource
from mspc.storage.files import write_text
from mspc.storage.manifest import MatrixEntry

DOMAIN, LAYOUT = "ai.mspc", 1
"""The library (onnx.cpp) refuses other layouts."""
SESSION = {"custom_ops_library": NAME}
"""Entry of genai_config.json: GenAI looks in the folder of the model, and takes no library from elsewhere."""
README = "README.onnx.md"
TYPES = {torch.uint8: ir.DataType.UINT8, torch.int64: ir.DataType.INT64, torch.float16: ir.DataType.FLOAT16}
NOTE = (
    "Its compressed matrices are multiplied by mspc's C++ library, so a session needs "
    f"register_custom_ops_library(str(mspc.onnx_library())). {README} says how, also for ONNX Runtime GenAI."
)
README_TEXT = f"""# An ONNX model with compressed matrices of mspc

Its matrices are multiplied by the operator `{DOMAIN}::MatMul`, which is in mspc's C++ library. ONNX Runtime 1.17 or
newer loads it:

```python
import mspc
import onnxruntime

options = onnxruntime.SessionOptions()
options.register_custom_ops_library(str(mspc.onnx_library()))
session = onnxruntime.InferenceSession("path/to/this/folder/model.onnx", options)
```

ONNX Runtime GenAI takes the library from the folder of the model, so put it there once on every machine:

```python
import shutil

shutil.copy(mspc.onnx_library(), "path/to/this/folder")
model = onnxruntime_genai.Model("path/to/this/folder")
```

`mspc verify path/to/this/folder` proves that the files are whole. `mspc_export.json` says what every matrix is.
"""


def attributes_of(matrix: StoredMatrix, repacked: dict[str, torch.Tensor], planes: int = 2) -> dict[str, int]:
    """Attributes of the operator for a matrix and its tensors.

    Inputs of codes are rounded to 16 bits with two planes, to 8 with one. `bits` are those of the grid, for readers:
    codes may lie in more (`content`).
    """
    layout = kernel.layout_of(repacked, matrix)
    return {
        "layout": LAYOUT,
        "rows": matrix.shape[0],
        "columns": matrix.shape[1],
        "group": kernel.group_of(matrix),
        "structure": layout.structure,
        "content": layout.content,
        "planes": planes,
        "has_zeros": int("zeros" in repacked),
        "bits": 0 if matrix.grid is None else matrix.grid.bits,
    }


def use_library(graph: ir.Model, artifact: ArtifactSource, entry: MatrixEntry, planes: int) -> None:
    """Put the operator in the place of the product with a matrix."""
    matrix, name = entry.stored, entry.address.parameter
    stored = with_offsets(artifact.stored(entry), matrix, entry.name)
    repacked = kernel.repack(stored, matrix, "avx512")  # a file is not for this machine alone, and this is the smallest
    operands = [
        initializer(graph, f"{name}.{part}", repacked[part], TYPES[repacked[part].dtype], repacked[part].shape)
        if part in repacked
        else None
        for part in kernel.PARTS
    ]
    while operands[-1] is None:
        operands.pop()
    (old,) = graph.graph.initializers[name].consumers()
    assert old.op_type == "MatMul", f"{name} is used by {old}"
    replace(
        graph,
        old,
        [
            ir.node(
                "MatMul",
                [old.inputs[0], *operands],
                attributes_of(matrix, repacked, planes),
                domain=DOMAIN,
                name=entry.name,
            )
        ],
    )
    del graph.graph.initializers[name]
    graph.opset_imports[DOMAIN] = 1


def write_readme(out: Path) -> None:
    write_text(out / README, README_TEXT)
