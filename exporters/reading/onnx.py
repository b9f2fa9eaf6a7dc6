"""Reader of ONNX exports: the protobuf message, and numpy. A matrix is found by the name of its initializer."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from exporters.reading import Decoded, Reader, from_grid, little_endian_fields
from mspc.errors import InputError
from mspc.storage.manifest import MatrixEntry

TYPES = {1: np.float32, 2: np.uint8, 7: np.int64, 10: np.float16}
"""Types by their number in TensorProto.DataType; 21 and 25 are packed unsigned integers of 4 and 2 bits."""
PACKED_BITS = {21: 4, 25: 2}


def reader(folder: Path) -> Reader:
    try:
        graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    except DecodeError as error:
        raise InputError(f"{folder / 'model.onnx'} is no ONNX model ({error})") from error
    dense = {tensor.name: tensor for tensor in graph.initializer}
    user_of = {name: node for node in graph.node for name in node.input}

    def array(name: str) -> NDArray[Any]:
        if name not in dense:
            raise InputError(f"the graph has no initializer {name}")
        return _from_dense(folder, dense[name])

    def read(entry: MatrixEntry) -> Decoded:
        name, grid = entry.address.parameter, entry.target.grid
        if name in dense:
            weight = array(name)
            return Decoded(np.ascontiguousarray(weight.T.astype(np.float32)), str(weight.dtype))
        node = user_of.get(f"{name}.codes")
        if node is None or grid is None:
            raise InputError("no operator of the graph uses it")
        size = grid.group_size or entry.shape[1]
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type == "MatMulNBits":
            if len(node.input) > 4:
                raise InputError("its MatMulNBits has a g_idx, which ONNX Runtime misreads")
            codes, scales, zeros = _matmul_nbits(node, attributes, array)
        else:
            if attributes["axis"] != 0:
                raise InputError(f"its blocks lie along axis {attributes['axis']}")
            codes, scales, zeros = (np.ascontiguousarray(array(part).T) for part in node.input)
        repeats = size // attributes["block_size"]
        for part in (scales, zeros):
            if (part != np.repeat(part[:, ::repeats], repeats, axis=1)).any():
                raise InputError("blocks of one group differ in their scale or zero point")
        halves = scales.astype(np.float16)
        if (halves != scales).any():
            raise InputError("it has a scale that was no float16")
        return from_grid(codes, np.ascontiguousarray(halves[:, ::repeats]), np.ascontiguousarray(zeros[:, ::repeats]))

    return read


def _matmul_nbits(node: Any, attributes: dict[str, int], array: Any) -> tuple[Any, Any, Any]:
    bits, num_out, num_in = attributes["bits"], attributes["N"], attributes["K"]
    scales = array(node.input[2])
    codes = little_endian_fields(array(node.input[1]).reshape(num_out, -1), bits, num_in)
    if len(node.input) == 3:
        return codes, scales, np.full(scales.shape, 2 ** (bits - 1), np.uint8)
    return codes, scales, little_endian_fields(array(node.input[3]), bits, scales.shape[1])


def _from_dense(folder: Path, tensor: Any) -> NDArray[Any]:
    shape = tuple(tensor.dims)
    count = math.prod(shape)
    bits = PACKED_BITS.get(tensor.data_type)
    dtype = np.dtype(np.uint8 if bits else TYPES[tensor.data_type])
    stored = math.ceil(count * bits / 8) if bits else count
    if tensor.external_data:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if Path(place["location"]).name != place["location"]:
            raise InputError(f"{tensor.name} points outside the folder, at {place['location']!r}")
        values = np.fromfile(folder / place["location"], dtype, stored, offset=int(place.get("offset", 0)))
    else:
        values = np.frombuffer(tensor.raw_data, dtype)
    if bits:
        values = little_endian_fields(values[None], bits, count)[0]
    return values.reshape(shape)
