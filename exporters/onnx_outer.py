"""Embeddings and output head of an ONNX graph, each stored once: in 16 bits, or as codes that both of their users read.

Every row that a text needs is looked up in codes or 16 bits, and becomes float32 afterwards.
"""

from collections.abc import Callable, Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from mspc.formats.onnx import pack_dequantize_linear, pack_matmul_nbits
from mspc.storage.manifest import MatrixEntry
from mspc.types import Codes

STORED = {torch.bfloat16: ir.DataType.BFLOAT16, torch.float16: ir.DataType.FLOAT16}
INTEGERS = {2: ir.DataType.UINT2, 4: ir.DataType.UINT4, 8: ir.DataType.UINT8}


def initializer(graph: ir.Model, name: str, tensor: Tensor, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
    """A new initializer; those of less than 8 bits come packed."""
    if dtype in (ir.DataType.UINT4, ir.DataType.UINT2):
        constant: ir.TensorProtocol = ir.PackedTensor(tensor.numpy(), dtype, shape=shape, name=name)
    elif dtype == ir.DataType.BFLOAT16:
        constant = ir.Tensor(tensor.view(torch.uint16).numpy(), dtype=dtype, shape=ir.Shape(shape), name=name)
    else:
        constant = ir.Tensor(tensor.numpy().reshape(shape), name=name)
    value = ir.val(name, dtype, shape, const_value=constant)
    graph.graph.register_initializer(value)
    return value


def replace(graph: ir.Model, old: ir.Node, new: list[ir.Node]) -> None:
    """Put nodes in place of one, whose result the last of them makes."""
    product, result = old.outputs[0], new[-1].outputs[0]
    result.name, result.type, result.shape = product.name, product.type, product.shape
    graph.graph.insert_before(old, new)
    product.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.graph.remove(old, safe=True)


def rename_shared(graph: ir.Model, names: Sequence[str]) -> None:
    """Give the initializer that has one of the names of a parameter the first of them."""
    found = next((name for name in names if name in graph.graph.initializers), None)
    if found is not None and found != names[0]:
        value = graph.graph.initializers.pop(found)
        value.name = names[0]
        graph.graph.register_initializer(value)


def store_in_16_bits(graph: ir.Model, name: str, dtype: torch.dtype) -> None:
    """Store a float32 initializer, whose values came from 16 bits, in these. Users get float32."""
    old = graph.graph.initializers.pop(name, None)
    if old is None or old.const_value is None:
        return
    values = torch.from_numpy(old.const_value.numpy()).to(dtype)
    stored = initializer(graph, name, values, STORED[dtype], values.shape)
    for number, node in enumerate(list(old.consumers())):
        if node.op_type == "Gather":
            rows = ir.node("Gather", [stored, node.inputs[1]], dict(_attributes(node)))
            rows.outputs[0].name = f"{name}.rows.{number}"
            replace(graph, node, [rows, _cast(rows.outputs[0], f"{name}.rows.{number}.float")])
            continue
        cast = _cast(stored, f"{name}.float.{number}")
        graph.graph.insert_before(node, [cast])
        for index, value in enumerate(node.inputs):
            if value is old:
                node.replace_input_with(index, cast.outputs[0])


def _attributes(node: ir.Node) -> dict[str, int]:
    return {"axis": node.attributes["axis"].as_int()} if "axis" in node.attributes else {}


def _cast(value: ir.Value, name: str) -> ir.Node:
    node = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=name)
    node.outputs[0].name = name
    return node


def use_codes(graph: ir.Model, entry: MatrixEntry, codes: Codes, *, qdq: bool, accuracy_level: int) -> None:
    """Replace the embeddings (V, D), and the product of a head that is tied to them, by their codes."""
    assert entry.target.grid is not None
    name, bits = entry.address.parameter, entry.target.grid.bits
    old = graph.graph.initializers.pop(name)
    users = list(old.consumers())
    if qdq:
        looked_up, multiplied = _by_dequantize_linear(graph, entry, codes, bits)
    else:
        symmetric = entry.target.grid.symmetric
        parts = pack_matmul_nbits(codes, bits, symmetric=symmetric)
        looked_up, multiplied = _by_matmul_nbits(graph, entry, parts, bits, accuracy_level)
    for node in users:
        if node.op_type == "Gather":
            replace(graph, node, looked_up(node.inputs[1]))
            continue
        assert node.op_type == "Transpose", f"{name} is used by {node}"
        (product,) = node.outputs[0].consumers()
        assert product.op_type == "MatMul"
        replace(graph, product, multiplied(product.inputs[0]))
        graph.graph.remove(node, safe=True)


Nodes = Callable[[ir.Value], list[ir.Node]]


def _by_matmul_nbits(
    graph: ir.Model, entry: MatrixEntry, parts: dict[str, Tensor], bits: int, accuracy_level: int
) -> tuple[Nodes, Nodes]:
    name, (num_rows, num_columns) = entry.address.parameter, entry.shape
    types = {"codes": ir.DataType.UINT8, "scales": ir.DataType.FLOAT, "zeros": ir.DataType.UINT8}
    parts = parts | {"codes": parts["codes"].flatten(1)} if entry.tied is None else parts
    operands = [initializer(graph, f"{name}.{part}", parts[part], types[part], parts[part].shape) for part in parts]
    size = num_columns // parts["scales"].shape[1]

    def look_up(ids: ir.Value) -> list[ir.Node]:
        nodes, rows = [], operands[0]
        if entry.tied is not None:  # the product wants blocks
            shape = torch.tensor([num_rows, num_columns * bits // 8])
            width = initializer(graph, f"{name}.codes.shape", shape, ir.DataType.INT64, [2])
            nodes = [ir.node("Reshape", [rows, width], name=f"{entry.name}.reshape")]
            rows = nodes[0].outputs[0]
            rows.name = f"{name}.codes.rows"
        attributes = {"bits": bits, "block_size": size, "gather_axis": 0, "quantize_axis": 1}
        inputs = [rows, ids, *operands[1:]]
        return [*nodes, ir.node("GatherBlockQuantized", inputs, attributes, domain="com.microsoft", name=entry.name)]

    def multiply(x: ir.Value) -> list[ir.Node]:
        numbers = {"K": num_columns, "N": num_rows, "bits": bits, "block_size": size}
        attributes = numbers | {"accuracy_level": accuracy_level}
        return [ir.node("MatMulNBits", [x, *operands], attributes, domain="com.microsoft", name=f"{entry.tied}")]

    return look_up, multiply


def _by_dequantize_linear(graph: ir.Model, entry: MatrixEntry, codes: Codes, bits: int) -> tuple[Nodes, Nodes]:
    """Codes lie as (D, V), as those of every other matrix, so that the product is the usual one."""
    name, (num_rows, num_columns) = entry.address.parameter, entry.shape
    parts = pack_dequantize_linear(codes, bits)
    num_blocks = len(parts["scales"])
    operands = {
        "codes": initializer(graph, f"{name}.codes", parts["codes"], INTEGERS[bits], [num_columns, num_rows]),
        "scales": initializer(graph, f"{name}.scales", parts["scales"], ir.DataType.FLOAT, [num_blocks, num_rows]),
        "zeros": initializer(graph, f"{name}.zeros", parts["zeros"], INTEGERS[bits], [num_blocks, num_rows]),
    }
    attributes = {"axis": 0, "block_size": num_columns // num_blocks}

    def look_up(ids: ir.Value) -> list[ir.Node]:
        gathered = [
            ir.node("Gather", [value, ids], {"axis": 1}, name=f"{entry.name}.{part}")
            for part, value in operands.items()
        ]
        for node in gathered:
            node.outputs[0].name = f"{node.name}.rows"
        dequantize = ir.node("DequantizeLinear", [node.outputs[0] for node in gathered], attributes)
        dequantize.outputs[0].name = f"{name}.rows"
        return [*gathered, dequantize, ir.node("Transpose", dequantize.outputs, {"perm": [1, 2, 0]}, name=entry.name)]

    def multiply(x: ir.Value) -> list[ir.Node]:
        dequantize = ir.node("DequantizeLinear", list(operands.values()), attributes, name=f"{entry.name}.dequantize")
        dequantize.outputs[0].name = f"{name}.dequantized"
        return [dequantize, ir.node("MatMul", [x, dequantize.outputs[0]], name=f"{entry.tied}")]

    return look_up, multiply
