"""Reader of ONNX exports: the protobuf message, and numpy. A matrix is found by the name of its initializer."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from exporters.reading import Decoded, Reader, from_grid, little_endian_fields, onnx_sparse
from mspc.errors import InputError
from mspc.storage.manifest import MatrixEntry

TYPES = {1: np.float32, 2: np.uint8, 7: np.int64, 10: np.float16}
"""Types by their number in TensorProto.DataType; 21 and 25 are packed unsigned integers of 4 and 2 bits."""
PACKED_BITS = {21: 4, 25: 2}
OURS, INPUTS = "ai.mspc", ("x", "kept", "marks", "starts", "scales", "zeros")
"""The domain of mspc's own operator, and its inputs."""
LOOKUPS = {"Gather", "GatherBlockQuantized", "Reshape"}


def reader(folder: Path) -> Reader:
    try:
        graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    except DecodeError as error:
        raise InputError(f"{folder / 'model.onnx'} is no ONNX model ({error})") from error
    dense = {tensor.name: tensor for tensor in graph.initializer}
    user_of = {name: node for node in graph.node for name in node.input if node.op_type not in LOOKUPS}
    users_of: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            users_of.setdefault(name, set()).add(node.op_type)

    def array(name: str) -> NDArray[Any]:
        if name not in dense:
            raise InputError(f"the graph has no initializer {name}")
        return _from_dense(folder, dense[name])

    def read(entry: MatrixEntry) -> Decoded:
        name, grid = entry.address.parameter, entry.target.grid
        if name in dense:
            weight = array(name) if entry.role == "embeddings" else array(name).T
            return Decoded(np.ascontiguousarray(weight.astype(np.float32)), str(weight.dtype))
        if (node := user_of.get(f"{name}.kept")) is not None and node.domain == OURS:
            names = {part: value for part, value in zip(INPUTS, node.input, strict=False) if value}
            numbers = {attribute.name: attribute.i for attribute in node.attribute}
            return onnx_sparse.decoded(numbers, lambda part: array(names[part]))
        node = user_of.get(f"{name}.codes")
        size = entry.shape[1] if grid is None else grid.group_size or entry.shape[1]
        if grid is not None and entry.role == "embeddings" and users_of.get(f"{name}.codes", set()) & LOOKUPS:
            return _embeddings(name, entry, size, array, "Gather" in users_of[f"{name}.codes"])
        if node is None or grid is None:
            raise InputError("no operator of the graph uses it")
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type == "MatMulNBits":
            if len(node.input) > 4:
                raise InputError("its MatMulNBits has a g_idx, which ONNX Runtime misreads")
            codes, scales, zeros = _matmul_nbits(node, attributes, array)
        else:
            if attributes["axis"] != 0:
                raise InputError(f"its blocks lie along axis {attributes['axis']}")
            codes, scales, zeros = (np.ascontiguousarray(array(part).T) for part in node.input)
        return _of_groups(codes, scales, zeros, size // attributes["block_size"])

    return read


def _embeddings(name: str, entry: MatrixEntry, size: int, array: Any, transposed: bool) -> Decoded:
    """Embeddings in codes, by the names of their initializers: (D, V) where single rows are gathered, else (V, ...)."""
    assert entry.target.grid is not None
    bits, (num_rows, num_columns) = entry.target.grid.bits, entry.shape
    codes, scales = array(f"{name}.codes"), array(f"{name}.scales")
    if transposed:
        codes, scales, zeros = (
            np.ascontiguousarray(array(f"{name}.{part}").T) for part in ("codes", "scales", "zeros")
        )
    else:
        codes = little_endian_fields(codes.reshape(num_rows, -1), bits, num_columns)
        zeros = np.full(scales.shape, 2 ** (bits - 1), np.uint8)
        if not entry.target.grid.symmetric:
            zeros = little_endian_fields(array(f"{name}.zeros"), bits, scales.shape[1])
    return _of_groups(codes, scales, zeros, size * scales.shape[1] // num_columns)


def _of_groups(codes: NDArray[Any], scales: NDArray[Any], zeros: NDArray[Any], repeats: int) -> Decoded:
    """The matrix of codes (O, I), and of scales and zeros of blocks. `repeats` blocks are one group."""
    for part in (scales, zeros):
        if (part != np.repeat(part[:, ::repeats], repeats, axis=1)).any():
            raise InputError("blocks of one group differ in their scale or zero point")
    halves = scales.astype(np.float16)
    if (halves != scales).any():
        raise InputError("it has a scale that was no float16")
    return from_grid(codes, np.ascontiguousarray(halves[:, ::repeats]), np.ascontiguousarray(zeros[:, ::repeats]))


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
