"""The operator `ai.mspc::MatMul` in ONNX Runtime, and the reader of its weights.

Oracles: the product in float64 with `layout.unpack`, the bits of mspc's own product, ONNX Runtime's own refusals, and a
made-up ONNX Runtime that is too old.
"""

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_cases import BF16, BITMAP, CASES, CODES, DENSE, FP16, GATHERED, HALF, SPARSE24, Case, stored

from exporters.reading import onnx_sparse as reading
from mspc.errors import InputError
from mspc.formats import layout
from mspc.formats.description import StoredMatrix
from mspc.kernels.cpu import building, kernel, library
from mspc.types import NM, Grid

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # onnx's own
    pytest.mark.skipif(library.library() is None, reason="there is no C++ compiler"),
]

from exporters.onnx_sparse import attributes_of  # noqa: E402

FLOAT = onnx.TensorProto.FLOAT
PATTERNS = {"dense": DENSE, "half": HALF, "2 of 4": NM(2, 4), "5 of 16": NM(5, 16)}
FLOAT32 = [Case(name, pattern, None, (37, 96), torch.float32) for name, pattern in PATTERNS.items()]
MULTIPLIED = [CODES[1], CODES[6], CODES[10], SPARSE24[1], SPARSE24[4], GATHERED[1], BITMAP[4], BITMAP[8], *FLOAT32]
LARGE = StoredMatrix((1024, 1024), HALF, Grid(4, 128), BF16)
"""Several pieces of work."""


@pytest.fixture(autouse=True)
def bitmaps(monkeypatch):
    """Codes with zeros lie behind bitmaps, also where dense lines are faster. Those are the lines of dense matrices."""
    monkeypatch.setattr(kernel, "is_faster_dense", lambda *_: False)


def arrays_of(matrix: StoredMatrix) -> dict[str, np.ndarray]:
    return {
        part: tensor.numpy() for part, tensor in kernel.repack(stored(matrix), matrix).items() if part in kernel.PARTS
    }


def attributes(matrix: StoredMatrix) -> dict[str, int]:
    return attributes_of(matrix, kernel.repack(stored(matrix), matrix))


def model_of(matrix: StoredMatrix, tensors: list, given: tuple[str, ...] = (), **changed: int):
    """A graph of one node. Inputs of the node in `given` are inputs of the graph as well, the others initializers."""
    there = {tensor.name for tensor in tensors} | set(given)
    names = [name if name in there else "" for name in kernel.PARTS]
    node = onnx.helper.make_node("MatMul", ["x", *names], ["y"], domain="ai.mspc", **attributes(matrix) | changed)
    inputs = [onnx.helper.make_tensor_value_info("x", FLOAT, ["batch", "tokens", "columns"])]
    inputs += [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, [None]) for name in given]
    outputs = [onnx.helper.make_tensor_value_info("y", FLOAT, ["batch", "tokens", matrix.shape[0]])]
    graph = onnx.helper.make_graph([node], "one", inputs, outputs, tensors)
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("ai.mspc", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)


def session(model: object, threads: int = 1):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library.onnx_library()))
    return onnxruntime.InferenceSession(model if isinstance(model, str) else model.SerializeToString(), options)


def initializers(arrays: dict[str, np.ndarray]) -> list:
    return [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]


def product(matrix: StoredMatrix, x: torch.Tensor, threads: int = 1) -> torch.Tensor:
    running = session(model_of(matrix, initializers(arrays_of(matrix))), threads)
    return torch.from_numpy(running.run(None, {"x": x.numpy()})[0])


def inputs(matrix: StoredMatrix, *leading: int) -> torch.Tensor:
    return torch.randn(*leading, matrix.shape[1], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", [*CASES, *FLOAT32], ids=str)
def test_the_reader_reads_what_was_repacked(case):
    """Oracle: `layout.unpack` of the stored tensors, bit for bit."""
    matrix = case.matrix
    dtype = matrix.dtype if matrix.grid is None else torch.float32
    expected = layout.unpack(stored(matrix), matrix.shape, matrix.target, dtype)
    arrays = arrays_of(matrix)
    found = reading.decoded(attributes(matrix), lambda part: arrays[part])
    assert np.array_equal(found.weight, expected.weight.float().numpy())
    assert found.dtype == str(dtype).removeprefix("torch.")
    if expected.codes is not None:
        assert np.array_equal(found.codes, expected.codes.values.numpy())
        assert np.array_equal(found.scales, expected.codes.scales.numpy())
        assert np.array_equal(found.zeros, expected.codes.zeros.numpy())


@pytest.mark.parametrize("case", MULTIPLIED, ids=str)
def test_a_product(case):
    """Oracles: float64, and the bits of `kernel.product`, at one token, some, and more than are multiplied at once."""
    matrix = case.matrix
    weight = layout.unpack(stored(matrix), matrix.shape, matrix.target, case.weight().dtype).weight.double()
    running = session(model_of(matrix, initializers(arrays_of(matrix))))
    for leading in ((1, 1), (2, 3), (1, 67), (0, 4)):
        x = inputs(matrix, *leading)
        y = torch.from_numpy(running.run(None, {"x": x.numpy()})[0])
        expected = x.double() @ weight.T
        assert y.shape == expected.shape
        assert (y - expected).norm() <= 5e-5 * expected.norm()
        assert y.equal(kernel.product(x, kernel.repack(stored(matrix), matrix), matrix))


@pytest.mark.parametrize("case", [CODES[1], SPARSE24[1], BITMAP[8]], ids=str)
def test_inputs_in_8_bits(case):
    """Oracle: the bits of `kernel.product`, and float64 within what 8 bits explain."""
    matrix = case.matrix
    x, weight = inputs(matrix, 1, 5), case.weight().double()
    running = session(model_of(matrix, initializers(arrays_of(matrix)), planes=1))
    y = torch.from_numpy(running.run(None, {"x": x.numpy()})[0])
    expected = x.double() @ weight.T
    assert 1e-3 * expected.norm() < (y - expected).norm() < 2e-2 * expected.norm()
    assert y.equal(kernel.product(x, kernel.repack(stored(matrix), matrix), matrix, planes=1))


def test_threads_of_the_session_change_no_bit():
    x = inputs(LARGE, 1, 5)
    assert product(LARGE, x, 2).equal(product(LARGE, x, 1))


@pytest.mark.parametrize("isa", library.available())
def test_the_instruction_set_is_that_of_the_variable(isa, monkeypatch):
    """Oracle: the bits of mspc's own product on it."""
    matrix = CODES[1].matrix
    monkeypatch.setenv("MSPC_CPU_ISA", isa)
    x = inputs(matrix, 1, 3)
    assert product(matrix, x).equal(kernel.product(x, kernel.repack(stored(matrix), matrix), matrix))


def test_weights_may_lie_anywhere_in_a_file(tmp_path):
    """At odd bytes, where no processor has to read integers of 8 bytes."""
    matrix = StoredMatrix((37, 160), HALF, Grid(3, 32, False), FP16)
    tensors, data = [], b"?"
    for name, array in arrays_of(matrix).items():
        tensor = onnx.TensorProto(name=name, dims=array.shape, data_location=1)
        tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        for key, value in (("location", "data"), ("offset", len(data)), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
        data += array.tobytes() + b"?" * (array.nbytes % 2 == 1)
    (tmp_path / "data").write_bytes(data)
    (tmp_path / "model.onnx").write_bytes(model_of(matrix, tensors).SerializeToString())
    x = inputs(matrix, 1, 3)
    (y,) = session(str(tmp_path / "model.onnx")).run(None, {"x": x.numpy()})
    assert torch.from_numpy(y).equal(kernel.product(x, kernel.repack(stored(matrix), matrix), matrix))


def spoiled(name: str) -> dict[str, np.ndarray]:
    """Weights of `LARGE`, with one part changed."""
    arrays = {part: array.copy() for part, array in arrays_of(LARGE).items()}
    if name == "starts":
        arrays[name][5] += 2**40
    elif name == "marks":
        arrays[name][3, 4, 5] ^= 1
    else:
        arrays[name] = arrays[name][:-1]
    return arrays


@pytest.mark.parametrize("name", ["kept", "marks", "starts", "scales"])
def test_weights_that_would_be_read_out_of_bounds_are_refused(name):
    with pytest.raises(Exception, match="its weights do not fit its attributes. Export the model again"):
        session(model_of(LARGE, initializers(spoiled(name))))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layout": 2}, "its weights have layout 2, and this library reads 1. Take the library of the mspc"),
        ({"content": 5}, "do not fit its attributes"),
        ({"structure": 9}, "do not fit its attributes"),
        ({"rows": -16}, "do not fit its attributes"),
        ({"columns": 2**40}, "do not fit its attributes"),
        ({"planes": 3}, "do not fit its attributes"),
        ({"group": 0}, "do not fit its attributes"),
    ],
)
def test_attributes_that_do_not_fit_are_refused(changed, message):
    with pytest.raises(Exception, match=message):
        session(model_of(LARGE, initializers(arrays_of(LARGE)), **changed))


def test_parts_that_are_missing_or_no_initializers_are_refused():
    arrays = arrays_of(LARGE)
    for part in ("marks", "starts", "scales"):
        with pytest.raises(Exception, match=f"its input {part} is no initializer"):
            session(model_of(LARGE, initializers({name: arrays[name] for name in arrays if name != part})))
    rest = initializers({name: array for name, array in arrays.items() if name != "kept"})
    with pytest.raises(Exception, match="its input kept is no initializer"):
        session(model_of(LARGE, rest, given=("kept",)))


def test_inputs_of_another_width_are_an_error():
    running = session(model_of(CODES[0].matrix, initializers(arrays_of(CODES[0].matrix))))
    with pytest.raises(Exception, match="x has 511 columns, which are not those of the weight"):
        running.run(None, {"x": np.zeros((1, 2, 511), np.float32)})


def test_an_unknown_instruction_set_is_an_error(monkeypatch):
    model = model_of(CODES[0].matrix, initializers(arrays_of(CODES[0].matrix)))
    monkeypatch.setenv("MSPC_CPU_ISA", "mmx")
    with pytest.raises(Exception, match="MSPC_CPU_ISA=mmx is not to be had on this machine. Unset it."):
        session(model)


@pytest.mark.parametrize("is_sparse", [True, False])
def test_no_library_of_an_export_is_run(is_sparse, tmp_path):
    """Oracle: the name of mspc's own library, which sparse weights may ask for, and nothing else."""
    check = pytest.importorskip("exporters.runtimes.onnxruntime_genai").check_libraries

    def asked(name: str) -> None:
        options = {"model": {"decoder": {"session_options": {"provider_options": [{}], "custom_ops_library": name}}}}
        (tmp_path / "genai_config.json").write_text(json.dumps(options))
        check(tmp_path, is_sparse)

    with pytest.raises(InputError, match=r"asks for the library evil.so.1, and mspc runs none of an export"):
        asked("evil.so.1")
    twice = '{"model": {"decoder": {"session_options": {"custom_ops_library": "evil.so"}, "a": 1}, "decoder": {}}}'
    (tmp_path / "genai_config.json").write_text(twice)
    with pytest.raises(InputError, match=r"repeats decoder\. Delete all but one"):
        check(tmp_path, False)
    if is_sparse:
        asked(building.NAME)
    else:
        with pytest.raises(InputError):
            asked(building.NAME)


def test_an_older_onnx_runtime_is_told_to_be_upgraded():
    """Oracle: an ONNX Runtime of this test, which has version 1 of the table only."""
    said: list[bytes] = []

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    def create_status(code: int, message: bytes) -> int:
        said.append(message)
        return 1

    table = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p))

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    def table_of(version: int) -> int | None:
        return ctypes.addressof(table) if version == 1 else None

    @ctypes.CFUNCTYPE(ctypes.c_char_p)
    def version() -> bytes:
        return b"1.9.0"

    base = (ctypes.c_void_p * 2)(ctypes.cast(table_of, ctypes.c_void_p), ctypes.cast(version, ctypes.c_void_p))
    register = ctypes.CDLL(str(library.onnx_library())).RegisterCustomOps
    register.argtypes, register.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_void_p
    assert register(None, ctypes.addressof(base))
    assert said == [b"mspc needs ONNX Runtime 1.17 or newer, and this is 1.9.0. Upgrade it."]


def test_without_the_library_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("MSPC_CPU_ISA", "torch")
    with pytest.raises(InputError, match="MSPC_CPU_ISA=torch leaves out mspc's C"):
        library.onnx_library()
    monkeypatch.delenv("MSPC_CPU_ISA")
    monkeypatch.setattr(building, "FOLDER", Path(tmp_path))
    monkeypatch.setattr(building, "compiler", lambda: None)
    with pytest.raises(InputError, match=r"there is no C\+\+ compiler. Install g\+\+ 11 or newer, or a wheel of mspc"):
        library.onnx_library()


def test_a_layout_of_another_version_is_not_read():
    arrays = arrays_of(CODES[0].matrix)
    with pytest.raises(InputError, match="its layout is 2, and this mspc reads 1"):
        reading.decoded(attributes(CODES[0].matrix) | {"layout": 2}, lambda part: arrays[part])


UNLOADED = """
import gc, sys, threading
import numpy, onnxruntime

def work():
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(sys.argv[1])
    session = onnxruntime.InferenceSession(sys.argv[2], options)
    session.run(None, {"x": numpy.ones((1, 2, 512), numpy.float32)})
    del session, options
    gc.collect()

thread = threading.Thread(target=work)
thread.start()
thread.join()
print("it goes on")
"""


def test_a_thread_outlives_the_session(tmp_path):
    """ONNX Runtime unloads the library of its last session, whose code would free the memory of the thread."""
    matrix = CODES[0].matrix
    (tmp_path / "model.onnx").write_bytes(model_of(matrix, initializers(arrays_of(matrix))).SerializeToString())
    command = [sys.executable, "-c", UNLOADED, str(library.onnx_library()), str(tmp_path / "model.onnx")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "it goes on\n"), done.stderr
