"""Products in ONNX Runtime, in turns: mspc's operator, MatMulNBits, and MatMul in float32.

    python benchmarks/onnx_products.py [--seconds 60] [--matrices 12] [--tokens 1 16] [--out FILE]

Each contender is one session of one thread with a few matrices of 8192 x 2048, more than a cache holds. The codes of
MatMulNBits are those of mspc's int4, in the same groups. CPU seconds of the process, so that a busy machine disturbs
little; memory and caches that others use disturb it still.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

import mspc
from exporters.onnx_sparse import attributes_of
from mspc.bench.formats import Source, describe, parse_format, random_stored
from mspc.bench.timing import describe_device, spread, versions
from mspc.formats import layout
from mspc.formats.onnx import block_size, pack_matmul_nbits
from mspc.kernels.cpu import kernel
from mspc.storage.files import write_atomically

SHAPE = 8192, 2048
IN_8_BITS = ", int8 activations"
OURS = (
    "int4",
    "int4, int8 activations",
    "2:4+int4, int8 activations",
    "int3",
    "2:4+int4",
    "2:4+int3",
    "60%+int4",
    "70%+int4",
    "int8",
    "dense",
    "2:4",
    "60%",
)
NBITS = {"MatMulNBits int4, float32": 0, "MatMulNBits int4, int8 activations": 4}
FLOAT32 = "MatMul float32"
BASE = "MatMulNBits int4, int8 activations"
Arrays = dict[str, NDArray[Any]]


def contender(name: str) -> tuple[str, str, dict[str, int], Arrays]:
    """Operator, domain, attributes and weights."""
    source = Source.seeded(0, torch.device("cpu"))
    if name == FLOAT32:
        return "MatMul", "", {}, {"weight": source.normal((SHAPE[1], SHAPE[0]), 0.02, torch.float32).numpy()}
    planes, of = 1 if name.endswith(IN_8_BITS) else 2, name.removesuffix(IN_8_BITS)
    matrix = describe(SHAPE, parse_format("int4" if name in NBITS else of), name)
    stored = random_stored(matrix, source)
    if name not in NBITS:
        repacked = kernel.repack(stored, matrix)
        return (
            "MatMul",
            "ai.mspc",
            attributes_of(matrix, repacked, planes),
            {part: tensor.numpy() for part, tensor in repacked.items() if part in kernel.PARTS},
        )
    codes = layout.decode(stored, matrix, name).codes
    assert codes is not None
    parts = pack_matmul_nbits(codes, 4, symmetric=True)
    size = block_size(kernel.group_of(matrix))
    attributes = {"K": SHAPE[1], "N": SHAPE[0], "bits": 4, "block_size": size, "accuracy_level": NBITS[name]}
    return "MatMulNBits", "com.microsoft", attributes, {part: tensor.numpy() for part, tensor in parts.items()}


def session_of(name: str, count: int) -> tuple[Any, int]:
    """A session that multiplies by `count` copies of a matrix, and the bytes of one."""
    operator, domain, attributes, arrays = contender(name)
    parts = kernel.PARTS if domain == "ai.mspc" else tuple(arrays)
    nodes, tensors, outputs = [], [], []
    for number in range(count):
        tensors += [onnx.numpy_helper.from_array(array, f"{part}.{number}") for part, array in arrays.items()]
        names = [f"{part}.{number}" if part in arrays else "" for part in parts]
        nodes.append(onnx.helper.make_node(operator, ["x", *names], [f"y.{number}"], domain=domain, **attributes))
        outputs.append(onnx.helper.make_tensor_value_info(f"y.{number}", onnx.TensorProto.FLOAT, ["T", SHAPE[0]]))
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["T", SHAPE[1]])
    graph = onnx.helper.make_graph(nodes, "products", [x], outputs, tensors)
    opsets = [onnx.helper.make_opsetid(one, 18 if one == "" else 1) for one in sorted({"", domain})]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(str(mspc.onnx_library()))
    num_bytes = sum(array.nbytes for array in arrays.values())
    return onnxruntime.InferenceSession(model.SerializeToString(), options), num_bytes


def in_turns(sessions: dict[str, Any], tokens: int, count: int, seconds: float) -> dict[str, list[float]]:
    """CPU seconds of one product in every round; the first round warms up and is left out."""
    x = np.random.default_rng(0).standard_normal((tokens, SHAPE[1])).astype(np.float32)
    took: dict[str, list[float]] = {name: [] for name in sessions}
    end, rounds = time.monotonic() + seconds, 0
    while rounds < 4 or time.monotonic() < end:
        for name, session in sessions.items():
            before = time.process_time()
            session.run(None, {"x": x})
            if rounds:
                took[name].append((time.process_time() - before) / count)
        rounds += 1
    return took


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="for each number of tokens")
    parser.add_argument("--matrices", type=int, default=12)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    load, sessions, num_bytes = os.getloadavg()[0], {}, {}
    for name in (*NBITS, FLOAT32, *OURS):
        sessions[name], num_bytes[name] = session_of(name, given.matrices)
    rows: list[dict[str, Any]] = []
    for tokens in given.tokens:
        took = in_turns(sessions, tokens, given.matrices, given.seconds)
        print(f"{tokens} tokens{'':32} MB   ms a product (10%..90%)   x {BASE}")
        for name, seconds in took.items():
            ratio = spread([one / other for one, other in zip(took[BASE], seconds, strict=True)])
            found = spread([1000 * one for one in seconds])
            print(
                f"{name:40} {num_bytes[name] / 1e6:6.1f} "
                f"{found['median']:8.3f} ({found['p10']:.3f}..{found['p90']:.3f})   "
                f"{ratio['median']:.2f} ({ratio['p10']:.2f}..{ratio['p90']:.2f})"
            )
            rows.append({"tokens": tokens, "name": name, "bytes": num_bytes[name], "cpu_seconds": spread(seconds),
                         "rounds": len(seconds), "speedup": ratio})  # fmt: skip
    if given.out:
        result = {
            "date": date.today().isoformat(),
            "versions": versions() | {"onnxruntime": version("onnxruntime")},
            "device": describe_device(torch.device("cpu")),
            "load_average_before": load,
            "load_average_after": os.getloadavg()[0],
            "configuration": {"shape": SHAPE, "matrices": given.matrices, "threads": 1, "seconds": given.seconds},
            "base": BASE,
            "rows": rows,
        }
        text = json.dumps(result, indent=1) + "\n"
        write_atomically(given.out, lambda temporary: temporary.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
