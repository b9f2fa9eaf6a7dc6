"""OpenVINO on the CPU, in float32."""

from pathlib import Path
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

from exporters.manifest import ExportManifest
from exporters.runtimes import Runner, Unsupported
from exporters.runtimes.onnxruntime import cached_runner, tolerance_of

# By default it rounds activations to int8 before matrices of codes.
EXACT_CONFIG = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
DTYPES = {"f32": np.float32, "f16": np.float16, "i64": np.int64}


def load(folder: Path, manifest: ExportManifest) -> Runner:
    grids = [entry.target.grid for entry in manifest.entries if entry.target.grid]
    if manifest.options["weights"] == "qdq" and any(grid.bits == 2 for grid in grids):
        raise Unsupported("it has no DequantizeLinear of 2 bits")
    if manifest.options["weights"] == "sparse":
        raise Unsupported("it does not know mspc's operator ai.mspc::MatMul")
    model = openvino.Core().compile_model(folder / "model.onnx", "CPU", EXACT_CONFIG)
    inputs: dict[str, tuple[list[int | None], Any]] = {
        item.any_name: (
            [None if size.is_dynamic else size.get_length() for size in item.partial_shape],
            DTYPES[item.element_type.to_string()],
        )
        for item in model.inputs
    }

    def run(feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        found = model(feeds)
        return {item.any_name: np.array(found[item]) for item in model.outputs}

    return cached_runner(openvino.__version__, tolerance_of(manifest), inputs, run)
