"""ONNX decoder with a key-value cache, for ONNX Runtime, ONNX Runtime GenAI, OpenVINO and TensorRT.

Weights are float32, float16, or the codes of the solver: in MatMulNBits (ONNX Runtime's own operator) or behind the
standard's DequantizeLinear (QDQ). Groups are those of the column order, so there is never a `g_idx`, which ONNX Runtime
misreads silently beside packed zero points.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from exporters.folder import copy_configs, read_config
from exporters.genai import genai_config
from exporters.onnx_graph import decoder_graph
from exporters.reference import exact_model
from mspc.errors import InputError
from mspc.formats.onnx import SMALLEST_BLOCK, block_size, pack_dequantize_linear, pack_matmul_nbits
from mspc.progress import Step
from mspc.settings import ROW
from mspc.storage.artifact import ArtifactSource
from mspc.storage.files import write_atomically, write_json

MODEL, DATA = "model.onnx", "model.onnx.data"
FLOAT32, FLOAT16, MATMUL_NBITS, QDQ = "float32", "float16", "matmulnbits", "qdq"
WEIGHTS = (FLOAT32, FLOAT16, MATMUL_NBITS, QDQ)
BITS = (2, 4, 8)
LARGEST_FILE = 2_000_000_000
"""Bytes; a protobuf message ends at 2 GiB, so that larger weights lie in a file of their own."""
BYTES_PER_KEPT = {FLOAT32: 12, FLOAT16: 10}
"""A sparse initializer stores every kept weight and its place, an int64."""
EXACT_QDQ = {"session.qdq_matmulnbits_accuracy_level": "1"}
"""Without it ONNX Runtime rounds activations to int8 where it fuses DequantizeLinear and MatMul."""


@dataclass(frozen=True)
class Options:
    weights: str = FLOAT32
    """float32, float16, matmulnbits or qdq; matrices without a grid stay float32 in the last two."""
    accuracy_level: int = 0
    """Of MatMulNBits: 0 and 1 compute in float32, 4 rounds activations to int8 and is fastest on CPUs."""
    sparse_initializers: bool = False
    """Store float matrices sparsely where that makes the file smaller."""


def check(rows: Sequence[dict[str, Any]], config: dict[str, Any], options: Options) -> None:
    if options.weights not in WEIGHTS:
        raise InputError(f"weights must be one of {', '.join(WEIGHTS)}, not {options.weights!r}.")
    if options.accuracy_level not in range(5):
        raise InputError(f"accuracy_level must be 0 to 4, not {options.accuracy_level}.")
    if options.sparse_initializers and options.weights not in BYTES_PER_KEPT:
        raise InputError(f"sparse_initializers hold float32 or float16 weights, not {options.weights}.")
    for row in rows:
        if row.get("index") is not None:
            raise InputError(f"{row['name']}: onnx cannot hold one expert of a fused parameter; export dense.")
    if options.weights in BYTES_PER_KEPT:
        return
    packed = [row for row in rows if row["bits"] != 16]
    if not packed:
        raise InputError(f"{options.weights} holds rounded weights, and no matrix has a grid; use float32 or float16.")
    for row in packed:
        if row["bits"] not in BITS:
            raise InputError(
                f"{row['name']}: {options.weights} takes 2, 4 or 8 bits, not {row['bits']}; compress with such --bits, "
                "or export float32 or float16 weights."
            )
        size = row["shape"][1] if row["group_size"] == ROW else row["group_size"]
        if block_size(size) < SMALLEST_BLOCK:
            raise InputError(
                f"{row['name']}: {options.weights} takes groups that are a multiple of {SMALLEST_BLOCK} inputs, not of "
                f"{size}; compress with such a --group-size, or export float32 or float16 weights."
            )


def notes(rows: Sequence[dict[str, Any]], options: Options) -> list[str]:
    if not options.sparse_initializers:
        return []
    sparse = [row for row in rows if stored_sparsely(row, options)]
    break_even = 1 - _width(options) / BYTES_PER_KEPT[options.weights]
    kept = sum(row["shape"][0] * row["shape"][1] - row["zeros"] for row in sparse)
    saved = sum(row["shape"][0] * row["shape"][1] for row in sparse) * _width(options)
    saved -= kept * BYTES_PER_KEPT[options.weights]
    return [
        f"Note: a sparse initializer is smaller above {break_even:.0%} zeros in {options.weights}: {len(sparse)} of "
        f"{len(rows)} matrices are stored so, which saves {saved / 1e6:.2f} MB on disk. ONNX Runtime makes them dense "
        "when it loads, so neither memory nor time is saved; OpenVINO cannot read them."
    ]


def stored_sparsely(row: dict[str, Any], options: Options) -> bool:
    numel = row["shape"][0] * row["shape"][1]
    kept = numel - row["zeros"]
    return options.sparse_initializers and kept * BYTES_PER_KEPT[options.weights] < numel * _width(options)


def _width(options: Options) -> int:
    return 2 if options.weights == FLOAT16 else 4


def export(artifact: ArtifactSource, out: Path, options: Options, step: Step) -> None:
    rows = artifact.manifest["matrices"]
    packed = {row["tensor"]: row for row in rows if row["bits"] != 16 and options.weights not in BYTES_PER_KEPT}
    opset = 18
    if options.weights == QDQ:
        opset = 25 if any(row["bits"] == 2 for row in packed.values()) else 21
    dtype = torch.float16 if options.weights == FLOAT16 else torch.float32
    with exact_model(artifact.folder, dtype).whole() as model:
        _check_finite(model, dtype)
        graph = decoder_graph(model, rows, opset)
        for key in artifact.keys():  # noqa: SIM118  not a dict
            step(key)
            if key in packed:
                _pack(graph, artifact, packed[key], options)
        if packed and options.weights == MATMUL_NBITS:
            graph.opset_imports["com.microsoft"] = 1
        sparse = [row["parameter"] for row in rows if stored_sparsely(row, options)]
        write_atomically(out / MODEL, partial(write, graph, sparse, out / DATA))
    copy_configs(artifact, out)
    config = read_config(artifact)
    write_json(out / "config.json", config | {"dtype": options.weights if options.weights == FLOAT16 else FLOAT32})
    generation = out / "generation_config.json"
    settings = json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else {}
    session = EXACT_QDQ if options.weights == QDQ else {}
    write_json(out / "genai_config.json", genai_config(config, settings, _cache(graph), session))


def _check_finite(model: nn.Module, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise InputError(f"{name} has weights that do not fit into {dtype}; export float32 weights.")


def _pack(graph: ir.Model, artifact: ArtifactSource, row: dict[str, Any], options: Options) -> None:
    codes = artifact.matrix(row).codes
    assert codes is not None
    if options.weights == QDQ:
        _use_dequantize_linear(graph, row, pack_dequantize_linear(codes, row["bits"]))
    else:
        parts = pack_matmul_nbits(codes, row["bits"], symmetric=row["symmetric"])
        _use_matmul_nbits(graph, row, parts, options.accuracy_level)


def _matmul_of(graph: ir.Model, parameter: str) -> ir.Node:
    """The one node that multiplies with a parameter."""
    users = list(graph.graph.initializers[parameter].consumers())
    assert [user.op_type for user in users] == ["MatMul"], f"{parameter} is used by {users}"
    return users[0]


def _initializer(graph: ir.Model, name: str, tensor: Tensor, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
    array = tensor.numpy()
    if dtype in (ir.DataType.UINT4, ir.DataType.UINT2):
        constant: ir.TensorProtocol = ir.PackedTensor(array, dtype, shape=shape, name=name)
    else:
        constant = ir.Tensor(array.reshape(shape), name=name)
    value = ir.val(name, dtype, shape, const_value=constant)
    graph.graph.register_initializer(value)
    return value


def _use_matmul_nbits(graph: ir.Model, row: dict[str, Any], parts: dict[str, Tensor], accuracy_level: int) -> None:
    name, (num_out, num_in), bits = row["parameter"], row["shape"], row["bits"]
    types = {"codes": ir.DataType.UINT8, "scales": ir.DataType.FLOAT, "zeros": ir.DataType.UINT8}
    operands = [_initializer(graph, f"{name}.{part}", parts[part], types[part], parts[part].shape) for part in parts]
    attributes = {
        "K": num_in,
        "N": num_out,
        "bits": bits,
        "block_size": num_in // parts["scales"].shape[1],
        "accuracy_level": accuracy_level,
    }
    old = _matmul_of(graph, name)
    new = ir.node("MatMulNBits", [old.inputs[0], *operands], attributes, domain="com.microsoft", name=row["name"])
    _replace(graph, old, [new])
    del graph.graph.initializers[name]


def _use_dequantize_linear(graph: ir.Model, row: dict[str, Any], parts: dict[str, Tensor]) -> None:
    name, (num_out, num_in), bits = row["parameter"], row["shape"], row["bits"]
    integer = {2: ir.DataType.UINT2, 4: ir.DataType.UINT4, 8: ir.DataType.UINT8}[bits]
    num_blocks = len(parts["scales"])
    operands = [
        _initializer(graph, f"{name}.codes", parts["codes"], integer, [num_in, num_out]),
        _initializer(graph, f"{name}.scales", parts["scales"], ir.DataType.FLOAT, [num_blocks, num_out]),
        _initializer(graph, f"{name}.zeros", parts["zeros"], integer, [num_blocks, num_out]),
    ]
    attributes = {"axis": 0, "block_size": num_in // num_blocks}
    dequantize = ir.node("DequantizeLinear", operands, attributes, name=f"{row['name']}.dequantize")
    dequantize.outputs[0].name = f"{name}.dequantized"
    old = _matmul_of(graph, name)
    new = ir.node("MatMul", [old.inputs[0], dequantize.outputs[0]], name=row["name"])
    _replace(graph, old, [dequantize, new])
    del graph.graph.initializers[name]


def _replace(graph: ir.Model, old: ir.Node, new: list[ir.Node]) -> None:
    product, result = old.outputs[0], new[-1].outputs[0]
    result.name, result.type, result.shape = product.name, product.type, product.shape
    graph.graph.insert_before(old, new)
    product.replace_all_uses_with(result)
    graph.graph.remove(old, safe=True)


def _cache(graph: ir.Model) -> tuple[int, int, int]:
    """Layers, key-value heads and head size."""
    keys = [value for value in graph.graph.inputs if str(value.name).endswith(".key")]
    assert keys[0].shape is not None
    return len(keys), int(keys[0].shape[1]), int(keys[0].shape[3])


def write(graph: ir.Model, sparse: Sequence[str], data: Path, path: Path) -> None:
    """The graph to `path`, the initializers named in `sparse` sparsely; more than LARGEST_FILE bytes go to `data`."""
    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value)
    if not sparse:
        ir.save(graph, path, format="protobuf", external_data=data.name if size > LARGEST_FILE else None)
        return
    if size > LARGEST_FILE:
        raise InputError(f"Sparse initializers need a model below 2 GB, not {size / 1e9:.1f} GB; leave them out.")
    proto = ir.to_proto(graph)
    dense = {tensor.name: tensor for tensor in proto.graph.initializer}
    for name in sparse:
        values = onnx.numpy_helper.to_array(dense[name]).reshape(-1)
        places = values.nonzero()[0]
        proto.graph.sparse_initializer.append(
            onnx.helper.make_sparse_tensor(
                onnx.numpy_helper.from_array(values[places], name),
                onnx.numpy_helper.from_array(places, f"{name}.places"),
                list(dense[name].dims),
            )
        )
        proto.graph.initializer.remove(dense[name])
    onnx.save(proto, path)
