"""ONNX decoder with a key-value cache, for ONNX Runtime, ONNX Runtime GenAI, OpenVINO and TensorRT.

Weights are float32, float16, or the codes of the solver: in MatMulNBits (ONNX Runtime's own operator), or behind the
standard's DequantizeLinear (QDQ). Sparse weights are for mspc's own operator.

Groups are those of the column order, so a `g_idx` is never needed; ONNX Runtime silently misreads one that comes with
packed zero points.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from exporters.folder import read_config
from exporters.genai import genai_config
from exporters.limits import DYNAMIC, LONGROPE
from exporters.onnx_graph import decoder_graph
from exporters.onnx_outer import INTEGERS, STORED, initializer, rename_shared, replace, store_in_16_bits, use_codes
from exporters.onnx_sparse import NOTE, SESSION, use_library, write_readme
from exporters.packed import BLOCKS, grids_of
from exporters.reference import exact_model
from mspc.errors import InputError
from mspc.formats.onnx import SMALLEST_BLOCK, block_size, pack_dequantize_linear, pack_matmul_nbits
from mspc.kernels.cpu.library import onnx_library
from mspc.model.special_ids import special_ids, text_config
from mspc.progress import Step, log
from mspc.storage.artifact import ArtifactSource
from mspc.storage.carrying import carry
from mspc.storage.config_json import with_dtype
from mspc.storage.files import write_atomically, write_json
from mspc.storage.manifest import MatrixEntry
from mspc.types import EMBEDDINGS, HEAD, Grid, PlannedMatrix

MODEL, DATA = "model.onnx", "model.onnx.data"
FLOAT32, FLOAT16, MATMUL_NBITS, QDQ, SPARSE = "float32", "float16", "matmulnbits", "qdq", "sparse"
WEIGHTS = (FLOAT32, FLOAT16, MATMUL_NBITS, QDQ, SPARSE)
FLOATS = (FLOAT32, FLOAT16)
CODE_BITS = (2, 4, 8)
ROLES = (*BLOCKS, HEAD, EMBEDDINGS)
LARGEST_FILE = 2_000_000_000
"""Bytes of weights; a protobuf message ends at 2 GiB, so more weights go to a file of their own."""
EXACT_QDQ = {"session.qdq_matmulnbits_accuracy_level": "1"}
"""Setting of a session; without it ONNX Runtime rounds activations to int8 after DequantizeLinear."""
SESSIONS = {QDQ: EXACT_QDQ, SPARSE: SESSION}
"""Settings of a session, by weights."""


@dataclass(frozen=True)
class Options:
    weights: str = FLOAT32
    """One of WEIGHTS. matmulnbits and qdq store matrices without a grid as float32. sparse stores kept weights or codes
    of every matrix; codes of embeddings, and of a head that is tied to them, are stored as by matmulnbits.
    """
    accuracy_level: int = 0
    """Arithmetic of MatMulNBits: 0 and 1 compute in float32, 4 rounds activations to int8 and is fastest on CPUs.
    Sparse weights take 0 and 4; 0 rounds activations to 16 bits.
    """


def check(matrices: Sequence[PlannedMatrix], config: dict[str, Any], options: Options, folder: Path) -> None:
    if options.weights not in WEIGHTS:
        raise InputError(f"weights must be one of {', '.join(WEIGHTS)}, not {options.weights!r}.")
    if options.accuracy_level not in range(5):
        raise InputError(f"accuracy_level must be 0 to 4, not {options.accuracy_level}.")
    if options.weights == SPARSE and options.accuracy_level not in (0, 4):
        raise InputError(f"accuracy_level of sparse weights is 0 or 4, not {options.accuracy_level}.")
    if options.accuracy_level and options.weights not in (MATMUL_NBITS, SPARSE):
        raise InputError(f"accuracy_level has no effect with weights={options.weights}. Leave it out.")
    if DYNAMIC in rope_types(config):
        raise InputError(
            "rope_type is dynamic: its frequencies depend on the length of the text, and the keys in a cache are those "
            "of a shorter one. Export dense or sparse."
        )
    if options.weights in FLOATS:
        return
    if options.weights == SPARSE:
        onnx_library()
    elif not any(matrix.target.grid for matrix in matrices):
        raise InputError(
            f"{options.weights} holds quantized weights, and no matrix has a grid; use float32 or float16."
        )
    for matrix in matrices:
        grid = matrix.target.grid
        if grid is None or (options.weights == SPARSE and matrix.role != EMBEDDINGS):
            continue
        if grid.bits not in CODE_BITS:
            raise InputError(
                f"{matrix.name}: {options.weights} takes 2, 4 or 8 bits, not {grid.bits}; compress with such --bits, "
                "or export float32 or float16 weights."
            )
        if options.weights == QDQ and matrix.role == EMBEDDINGS and grid.bits != 8:
            raise InputError(
                f"{matrix.name}: ONNX has no lookup in {grid.bits} bits, so that qdq takes embeddings of 8. Compress "
                "with --head-bits 8, or export with --weights matmulnbits."
            )
        size = grid.group_size or matrix.shape[1]
        if block_size(size) < SMALLEST_BLOCK:
            raise InputError(
                f"{matrix.name}: {options.weights} takes groups that are a multiple of {SMALLEST_BLOCK} inputs, not of "
                f"{size}; compress with such a --group-size, or export float32 or float16 weights."
            )


def rope_types(config: Any) -> set[str]:
    """Every rope_type in a config.json, however old or nested it is."""
    if not isinstance(config, dict):
        return set()
    found = set().union(*(rope_types(value) for value in config.values()))
    if isinstance(named := config.get("rope_type", config.get("type")), str):
        found.add(named)
    return found


def notes(entries: Sequence[MatrixEntry], options: Options) -> list[str]:
    return [NOTE] if options.weights == SPARSE else []


def export(artifact: ArtifactSource, out: Path, options: Options, step: Step) -> None:
    grids = {} if options.weights in FLOATS else grids_of(artifact.entries, ROLES)
    opset = 18
    if options.weights == QDQ:
        opset = 25 if any(grid.bits == 2 for grid in grids.values()) else 21
    dtype = torch.float16 if options.weights == FLOAT16 else torch.float32
    streamed = exact_model(artifact.folder, dtype)
    with streamed.whole() as model:
        _check_finite(model, dtype)
        outer = _outer(model, streamed.source_dtypes)
        graph = decoder_graph(model, [entry for entry in artifact.entries if entry.role != EMBEDDINGS], opset)
        for names in outer:
            rename_shared(graph, names)
        for key in artifact.keys():  # noqa: SIM118  not a dict
            step(key)
            entry = artifact.whole.get(key)
            if entry and options.weights == SPARSE and entry.role != EMBEDDINGS:
                use_library(graph, artifact, entry, planes=1 if options.accuracy_level == 4 else 2)
            elif entry and entry.name in grids:
                _pack(graph, artifact, entry, grids[entry.name], options)
        for names, stored in outer.items():
            if options.weights not in FLOATS and stored in STORED:
                store_in_16_bits(graph, names[0], stored)
        if any(node.domain == "com.microsoft" for node in graph.graph):
            graph.opset_imports["com.microsoft"] = 1
        write_atomically(out / MODEL, partial(write, graph))
    carry(artifact.folder, out)
    config = read_config(artifact)
    write_json(out / "config.json", with_dtype(config, FLOAT16 if options.weights == FLOAT16 else FLOAT32))
    text = text_config(config)
    if "text_config" in config:
        log.warning("The graph holds the language model alone, without the parts for images, sound or video.")
    if LONGROPE in rope_types(config):
        log.warning(
            "The model changes its rotary embedding (longrope) beyond its original context. The cache of a text that "
            "grows beyond it keeps keys of the shorter one: run the whole text again there, as transformers does."
        )
    if options.weights == SPARSE:
        write_readme(out)
    ids = special_ids(artifact.folder, text["vocab_size"])
    write_json(out / "genai_config.json", genai_config(text, ids, _cache(graph), SESSIONS.get(options.weights, {})))


def _outer(model: Any, dtypes: Mapping[str, torch.dtype]) -> dict[tuple[str, ...], torch.dtype]:
    """The dtypes in the checkpoint of embeddings and head, by all names of each, the one that it is stored as first."""
    found: dict[tuple[str, ...], torch.dtype] = {}
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = getattr(layer, "weight", None)
        names = [name for name, own in model.named_parameters(remove_duplicate=False) if own is weight]
        own_dtype = next((dtypes[name] for name in names if name in dtypes), None)
        if own_dtype is not None:
            found[tuple(names)] = own_dtype
    return found


def _check_finite(model: nn.Module, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise InputError(f"{name} has weights that do not fit into {dtype}; export float32 weights.")


def _pack(graph: ir.Model, artifact: ArtifactSource, entry: MatrixEntry, grid: Grid, options: Options) -> None:
    codes = artifact.matrix(entry).codes
    assert codes is not None
    if entry.role == EMBEDDINGS:
        use_codes(graph, entry, codes, qdq=options.weights == QDQ, accuracy_level=options.accuracy_level)
    elif options.weights == QDQ:
        _use_dequantize_linear(graph, entry, grid.bits, pack_dequantize_linear(codes, grid.bits))
    else:
        parts = pack_matmul_nbits(codes, grid.bits, symmetric=grid.symmetric)
        _use_matmul_nbits(graph, entry, grid.bits, parts, options.accuracy_level)


def _matmul_of(graph: ir.Model, parameter: str) -> ir.Node:
    """The one node that multiplies with a parameter."""
    users = list(graph.graph.initializers[parameter].consumers())
    assert [user.op_type for user in users] == ["MatMul"], f"{parameter} is used by {users}"
    return users[0]


def _use_matmul_nbits(
    graph: ir.Model, entry: MatrixEntry, bits: int, parts: dict[str, Tensor], accuracy_level: int
) -> None:
    name, (num_out, num_in) = entry.address.parameter, entry.shape
    types = {"codes": ir.DataType.UINT8, "scales": ir.DataType.FLOAT, "zeros": ir.DataType.UINT8}
    operands = [initializer(graph, f"{name}.{part}", parts[part], types[part], parts[part].shape) for part in parts]
    attributes = {
        "K": num_in,
        "N": num_out,
        "bits": bits,
        "block_size": num_in // parts["scales"].shape[1],
        "accuracy_level": accuracy_level,
    }
    old = _matmul_of(graph, name)
    new = ir.node("MatMulNBits", [old.inputs[0], *operands], attributes, domain="com.microsoft", name=entry.name)
    replace(graph, old, [new])
    del graph.graph.initializers[name]


def _use_dequantize_linear(graph: ir.Model, entry: MatrixEntry, bits: int, parts: dict[str, Tensor]) -> None:
    name, (num_out, num_in) = entry.address.parameter, entry.shape
    integer = INTEGERS[bits]
    num_blocks = len(parts["scales"])
    operands = [
        initializer(graph, f"{name}.codes", parts["codes"], integer, [num_in, num_out]),
        initializer(graph, f"{name}.scales", parts["scales"], ir.DataType.FLOAT, [num_blocks, num_out]),
        initializer(graph, f"{name}.zeros", parts["zeros"], integer, [num_blocks, num_out]),
    ]
    attributes = {"axis": 0, "block_size": num_in // num_blocks}
    dequantize = ir.node("DequantizeLinear", operands, attributes, name=f"{entry.name}.dequantize")
    dequantize.outputs[0].name = f"{name}.dequantized"
    old = _matmul_of(graph, name)
    new = ir.node("MatMul", [old.inputs[0], dequantize.outputs[0]], name=entry.name)
    replace(graph, old, [dequantize, new])
    del graph.graph.initializers[name]


def _cache(graph: ir.Model) -> tuple[int, int, int]:
    """Layers, key-value heads and head size."""
    keys = [value for value in graph.graph.inputs if str(value.name).endswith(".key")]
    assert keys[0].shape is not None
    return len(keys), int(keys[0].shape[1]), int(keys[0].shape[3])


def write(graph: ir.Model, path: Path) -> None:
    """The graph to `path`; more than LARGEST_FILE bytes of weights go to a file of their own in the same folder."""
    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value)
    ir.save(graph, path, format="protobuf", external_data=DATA if size > LARGEST_FILE else None)
