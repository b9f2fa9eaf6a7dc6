"""The Triton kernels in Triton's interpreter, compared with float64. test_kernels.py runs this in its own process.

TRITON_INTERPRET has to be set before a kernel is defined, and changes how Triton behaves in the whole process.
"""

from contextlib import contextmanager

import numpy as np
import ptx
import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import BF16, CASES, FP16, assert_product, inputs
from torch.library import opcheck

from mspc.kernels import KERNELS, bitmap, codes, launch, nm, sparse24
from mspc.kernels.gpu.dequantize import add_sixteenfold, dequantize
from mspc.kernels.gpu.sparse24 import COLUMN0_OF_A, COLUMN1_OF_B, COLUMN2_OF_A, COLUMN3_OF_B, two_groups
from mspc.kernels.sparse24 import INDICES_A, INDICES_B
from mspc.runtime.linear import SparseLinear

# Triton 3.6 with numpy from 1.25 on.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")
ptx.install()
torch.set_num_threads(1)


WITH_ASSEMBLY = [case for case in CASES if case.kernel_name != "nm"][::3]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_product(case):
    repacked = case.repacked()
    for num_tokens in (1, 8) if case.kernel_name == "nm" else (5,):  # the others pad to 8
        x = inputs(case, num_tokens)
        assert_product(case.product(x, repacked), x, case)


@pytest.mark.parametrize("case", [case for case in CASES if case.kernel.MAX_TOKENS > 8][::3], ids=str)
def test_product_with_more_tokens(case):
    repacked = case.repacked()
    for num_tokens in (13, case.kernel.MAX_TOKENS):
        x = inputs(case, num_tokens)
        assert_product(case.product(x, repacked), x, case)


@pytest.mark.parametrize("kernel", [codes, sparse24, nm, bitmap], ids=lambda kernel: kernel.__name__)
def test_operators_are_as_they_are_declared(kernel, monkeypatch):
    """Oracle: torch.library.opcheck, of shapes, aliases and what is written to."""
    case = next(case for case in CASES if case.kernel is kernel)
    repacked = case.repacked()
    for name in ("_matmul", "_expand"):
        operator = getattr(kernel, name)

        def check(*arguments, operator=operator):
            opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
            return operator(*arguments)

        monkeypatch.setattr(kernel, name, check)
    kernel.matmul(inputs(case, 3), repacked, case.matrix)
    kernel.expand(repacked, case.matrix, torch.empty(case.shape, dtype=case.dtype))


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=lambda kernel: kernel.__name__)
def test_a_model_that_is_cast_after_it_was_prepared_stays_on_its_device(kernel, monkeypatch):
    """Oracle: the layer before; `unrepack` is what goes through the CPU."""
    for case in [case for case in CASES if case.kernel is kernel][:2]:
        layer = SparseLinear.of(case.stored(), case.matrix)
        x = inputs(case, 3).float()
        expected, weight = layer(x), layer.weight
        layer.prepare(case.dtype)
        monkeypatch.setattr(kernel, "unrepack", None)
        assert torch.equal(layer.float()(x), expected)
        assert torch.equal(layer.weight, weight)
        monkeypatch.undo()


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=lambda kernel: kernel.__name__)
def test_kernels_are_launched_on_the_device_of_their_tensors(kernel, monkeypatch):
    """Triton takes the current one, which is another for some layers of a model on several."""
    case = next(case for case in CASES if case.kernel is kernel)
    repacked, x, out = case.repacked(), inputs(case, 3), torch.empty(case.shape, dtype=case.dtype)
    gpu, current, launched = launch.on_gpu(kernel.__name__.rpartition(".")[2]), [], []

    @contextmanager
    def device_of(tensor):
        current.append(tensor.data_ptr())
        yield
        current.pop()

    monkeypatch.setattr(kernel, "device_of", device_of)
    for name in ("matmul", "expand"):
        run = getattr(gpu, name)
        monkeypatch.setattr(gpu, name, lambda *args, run=run: launched.append(list(current)) or run(*args))
    kernel.matmul(x, repacked, case.matrix)
    kernel.expand(repacked, case.matrix, out)
    assert launched == [[x.data_ptr()], [out.data_ptr()]]


@pytest.mark.parametrize("case", WITH_ASSEMBLY, ids=str)
def test_product_with_assembly_is_the_same_bit_for_bit(case, monkeypatch):
    """Oracle: the plain branch. PTX is run by tests/ptx.py."""
    x = inputs(case, 3)
    repacked = case.repacked()
    expected = case.product(x, repacked)
    ran = []
    run = ptx.run
    monkeypatch.setattr(ptx, "run", lambda *args: ran.append(args) or run(*args))
    monkeypatch.setattr(launch, "has_ptx", lambda: True)
    assert torch.equal(case.product(x, repacked), expected)
    assert ran


@pytest.mark.parametrize("case", CASES, ids=str)
def test_expansion_is_the_weight_bit_for_bit(case):
    out = torch.full(case.shape, 7.0, dtype=case.dtype)
    case.kernel.expand(case.repacked(), case.matrix, out)
    assert torch.equal(out, case.weight().to(case.dtype))


@triton.jit
def dequantize_all(words_ptr, zeros_ptr, out_ptr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    i = tl.arange(0, 256)
    pairs = dequantize(tl.load(words_ptr + i), tl.load(zeros_ptr + i), DTYPE, PTX)
    for p in tl.static_range(4):
        tl.store(out_ptr + 4 * i + p, pairs[p])


@pytest.mark.parametrize("assembly", [False, True])
@pytest.mark.parametrize(("dtype", "triton_dtype"), [(FP16, tl.float16), (BF16, tl.bfloat16)])
def test_every_code_with_every_zero_point(dtype, triton_dtype, assembly):
    """Oracle: the subtraction."""
    code, zero = torch.arange(256) // 16, torch.arange(256) % 16
    turned = (code[:, None] + torch.arange(8)) % 16  # every code at every index of a word
    words = sum(turned[:, 2 * p + c] << (4 * p + 16 * c) for p in range(4) for c in range(2)).to(torch.int32)
    out = torch.empty(256, 4, dtype=torch.int32)
    dequantize_all[(1,)](words, zero.int(), out, DTYPE=triton_dtype, PTX=assembly)
    assert torch.equal(out.view(dtype), (turned - zero[:, None]).to(dtype))


@triton.jit
def dequantize_all_bytes(words_ptr, zeros_ptr, out_ptr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    i = tl.arange(0, 65536)
    word, zero = tl.load(words_ptr + i), tl.load(zeros_ptr + i)
    low = dequantize(word & 0x0F0F0F0F, zero & 15, DTYPE, PTX)
    high = dequantize((word >> 4) & 0x0F0F0F0F, zero >> 4, DTYPE, PTX)
    pairs = add_sixteenfold(low, high, DTYPE, PTX)
    tl.store(out_ptr + 2 * i, pairs[0])
    tl.store(out_ptr + 2 * i + 1, pairs[2])


@pytest.mark.parametrize("assembly", [False, True])
@pytest.mark.parametrize(("dtype", "triton_dtype"), [(FP16, tl.float16), (BF16, tl.bfloat16)])
def test_every_byte_with_every_zero_point(dtype, triton_dtype, assembly):
    """Oracle: the subtraction. Nibbles 0, 4 are pair 0 of a word of four bits, nibbles 2, 6 pair 2."""
    code, zero = torch.arange(2**16) // 256, torch.arange(2**16) % 256
    turned = (code[:, None] + 64 * torch.arange(4)) % 256
    words = sum(turned[:, 2 * p + c] << (8 * p + 16 * c) for p in range(2) for c in range(2)).to(torch.int32)
    out = torch.empty(2**16, 2, dtype=torch.int32)
    dequantize_all_bytes[(1,)](words, zero.int(), out, DTYPE=triton_dtype, PTX=assembly)
    assert torch.equal(out.view(dtype), (turned - zero[:, None]).to(dtype))


@triton.jit
def place_all(
    pairs_ptr, indices_ptr, out_ptr, column0, column1, column2, column3, PTX: tl.constexpr
):  # fmt: skip
    i = tl.arange(0, 64)
    pair0, pair1 = tl.load(pairs_ptr + 2 * i), tl.load(pairs_ptr + 2 * i + 1)
    selectors = column0, column1, column2, column3
    columns = two_groups(pair0, pair1, tl.load(indices_ptr + i), selectors, PTX)
    for c in tl.static_range(4):
        tl.store(out_ptr + 4 * i + c, columns[c])


@pytest.mark.parametrize("assembly", [False, True])
def test_every_pair_of_groups(assembly):
    """Oracle: the columns that each choice of two keeps, in order."""
    choices = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 2**16, (64, 2, 2))
    which = np.stack([np.arange(64) % 36 // 6, np.arange(64) % 6], 1)
    expected = np.zeros((64, 2, 4), np.int64)
    indices = np.zeros(64, np.int64)
    for i in range(64):
        for group in range(2):
            choice = which[i, group]
            expected[i, group, list(choices[choice])] = weights[i, group]
            if choices[choice] == (1, 2):
                weights[i, group] = weights[i, group][::-1]  # the first of the pair is for column 0 or 2
            indices[i] |= (INDICES_A[choice] | INDICES_B[choice] << 4 | 4 << 4) << (8 * group)
    pairs = torch.from_numpy(weights[..., 0] | weights[..., 1] << 16).to(torch.int32)
    out = torch.empty(64, 4, dtype=torch.int32)
    selectors = COLUMN0_OF_A, COLUMN1_OF_B, COLUMN2_OF_A, COLUMN3_OF_B
    place_all[(1,)](pairs, torch.from_numpy(indices).int(), out, *selectors, PTX=assembly)
    assert np.array_equal(out.numpy().view(np.uint16).reshape(64, 2, 4), expected)
