"""Instructions of the kernels per weight, counted in the machine code that ptxas makes for GPUs that are not here.

Each limit is the count when it was written, plus 5%; they hold for Triton 3.6 and 3.7. On an H200 a kernel is limited
by memory if it needs at most 7.8 thread instructions a byte of weights (A100: 9.7).
"""

from collections import Counter

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")

import sass
from triton.compiler import CompiledKernel

from mspc.kernels.gpu.bitmap import bitmap_matmul
from mspc.kernels.gpu.codes import codes_matmul
from mspc.kernels.gpu.nm import COLUMN, INDICES, nm_matmul
from mspc.kernels.gpu.sparse24 import sparse24_matmul
from mspc.kernels.gpu.tiling import tiles_of

pytestmark = pytest.mark.skipif(not sass.NVDISASM.exists(), reason="this Triton has no disassembler")
UNROLLED = 2
COLUMNS = 14336


@pytest.fixture(autouse=True, scope="module")
def no_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def fragment_constants(group_size: int, symmetric: bool, tokens: int) -> dict[str, object]:
    num_groups = COLUMNS // group_size
    tiles = {"NUM_COLUMNS": COLUMNS, "NUM_GROUPS": num_groups, "SYMMETRIC": symmetric, **tiles_of(group_size)}
    return {**tiles, "TOKENS": tokens, "S": 4, "PTX": True, "WIDE": False}


def per_weight(compiled: CompiledKernel, weights_of_a_warp: int) -> tuple[float, Counter[str]]:
    opcodes = sass.longest_loop(compiled)
    return opcodes.total() * 32 / weights_of_a_warp, opcodes


def codes(capability: int, dtype: str, bits: int, group_size: int, symmetric: bool, tokens: int) -> CompiledKernel:
    pointers = {"inputs_ptr": dtype, "words_ptr": "*i32", "scales_ptr": "*fp16", "zeros_ptr": "*i32"}
    numbers = dict.fromkeys(("num_tokens", "num_rows", "symmetric_zero"), "i32")
    constants = {**fragment_constants(group_size, symmetric, tokens), "BITS": bits}
    return sass.build(codes_matmul, {**pointers, "outputs_ptr": dtype, **numbers}, constants, capability, 4)


def sparse24(capability: int, dtype: str, codes: bool, symmetric: bool, tokens: int) -> CompiledKernel:
    pointers = {"inputs_ptr": dtype, "kept_ptr": "*i32", "indices_ptr": "*i32", "scales_ptr": "*fp16"}
    numbers = ("num_tokens", "num_rows", "symmetric_zero", "column0", "column1", "column2", "column3")
    arguments = {**pointers, "zeros_ptr": "*i32", "outputs_ptr": dtype, **dict.fromkeys(numbers, "i32")}
    constants = {**fragment_constants(128, symmetric, tokens), "CODES": codes}
    return sass.build(sparse24_matmul, arguments, constants, capability, 4)


def nm(capability: int, dtype: str, keep: int, of: int, tokens: int) -> CompiledKernel:
    bits = 2 if of <= 4 else 4
    integer = {torch_dtype: f"*i{8 * torch_dtype.itemsize}" for torch_dtype in (*COLUMN.values(), *INDICES.values())}
    pointers = {"inputs_ptr": integer[COLUMN[tokens]], "values_ptr": "*i32", "indices_ptr": integer[INDICES[bits]]}
    numbers = dict.fromkeys(("num_tokens", "num_rows", "num_groups"), "i32")
    constants = {"N": keep, "M": of, "BITS": bits, "ROWS": 4, "TOKENS": tokens}
    return sass.build(nm_matmul, {**pointers, "outputs_ptr": dtype, **numbers}, constants, capability, 4)


def bitmap(capability: int, bits: int) -> CompiledKernel:
    kept = "*bf16" if bits == 16 else "*u8"
    words = {"words_ptr": "*i32", "bases_ptr": "*i32", "ranks_ptr": "*u8", "scales_ptr": "*fp16", "zeros_ptr": "*u8"}
    pointers = {"inputs_ptr": "*bf16", "kept_ptr": kept, **words, "outputs_ptr": "*bf16"}
    sizes = dict.fromkeys(("num_rows", "num_columns", "num_words"), "i32/16")
    numbers = dict.fromkeys(("num_tokens", "num_bases", "symmetric_zero"), "i32") | sizes
    groups = {"BITS": bits, "NUM_GROUPS": 112, "GROUP_WORDS": 4, "SYMMETRIC": True}
    constants = {**groups, "TOKENS": 8, "S": 8, "PTX": True, "WIDE": False}
    return sass.build(bitmap_matmul, {**pointers, **numbers}, constants, capability, 8, 3 if bits == 16 else 1)


BF16, FP16 = "*bf16", "*fp16"
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("compiled", "arguments", "limit"),
    [
        pytest.param(codes, (90, FP16, 4, 128, True, 8), 1.70, marks=slow),
        (codes, (90, BF16, 4, 128, True, 8), 1.95),
        pytest.param(codes, (90, BF16, 4, 128, True, 32), 2.80, marks=slow),
        pytest.param(codes, (90, BF16, 4, 128, False, 8), 2.15, marks=slow),
        pytest.param(codes, (90, BF16, 4, 32, True, 8), 2.40, marks=slow),
        pytest.param(codes, (80, BF16, 4, 128, True, 8), 1.95, marks=slow),
        pytest.param(codes, (90, BF16, 3, 128, True, 8), 2.45, marks=slow),
        pytest.param(codes, (90, BF16, 3, 128, True, 32), 3.30, marks=slow),
        pytest.param(codes, (90, BF16, 2, 128, True, 8), 2.15, marks=slow),
        pytest.param(codes, (90, BF16, 8, 128, True, 8), 4.45, marks=slow),
        pytest.param(codes, (90, BF16, 8, 128, True, 32), 5.30, marks=slow),
        (sparse24, (90, BF16, True, True, 8), 2.70),
        pytest.param(sparse24, (90, BF16, False, True, 8), 1.90, marks=slow),
        pytest.param(sparse24, (90, BF16, True, False, 8), 2.90, marks=slow),
        pytest.param(sparse24, (90, BF16, True, True, 32), 3.55, marks=slow),
        pytest.param(sparse24, (80, BF16, True, True, 8), 2.80, marks=slow),
    ],
)
def test_on_tensor_cores(compiled, arguments, limit):
    """Per dense position; nothing goes through shared memory or to another lane."""
    kernel = compiled(*arguments)
    unrolled = 1 if compiled is codes and arguments[2] == 8 else UNROLLED
    instructions, opcodes = per_weight(kernel, unrolled * 16 * 128)
    assert instructions <= limit
    assert opcodes["HMMA"] == unrolled * 8 * arguments[-1] // 8
    assert not {"LDS", "STS", "BAR", "SHFL", "LDL", "STL"} & set(opcodes)
    if arguments[2]:
        assert opcodes["LOP3"]
        assert "lop3.b32" in kernel.asm["ptx"]
    if compiled is sparse24:
        assert opcodes["PRMT"] == UNROLLED * 48  # one for the selectors of two groups, two to place each pair
        assert "prmt.b32" in kernel.asm["ptx"]


@pytest.mark.parametrize(
    ("arguments", "limit"),
    [
        ((90, BF16, 8, 16, 1), 9.6),
        pytest.param((90, BF16, 5, 16, 1), 13.4, marks=slow),
        pytest.param((90, BF16, 2, 4, 1), 9.7, marks=slow),
        pytest.param((90, BF16, 8, 16, 4), 16.2, marks=slow),
        pytest.param((90, BF16, 8, 16, 8), 26.3, marks=slow),
        pytest.param((80, BF16, 8, 16, 1), 9.7, marks=slow),
    ],
)
def test_gathered(arguments, limit):
    """Per kept weight."""
    instructions, opcodes = per_weight(nm(*arguments), UNROLLED * 256)
    assert instructions <= limit
    assert not {"LDS", "STS", "BAR", "SHFL", "LDL", "STL"} & set(opcodes)


@pytest.mark.parametrize(
    ("arguments", "limit"),
    [
        ((90, 16), 16.1),
        pytest.param((90, 3), 31.9, marks=slow),
        pytest.param((80, 16), 16.2, marks=slow),
        pytest.param((90, 4), 26.3, marks=slow),
        pytest.param((90, 8), 20.4, marks=slow),
    ],
)
def test_bitmap(arguments, limit):
    """Per dense position."""
    instructions, opcodes = per_weight(bitmap(*arguments), 16 * 32)
    assert instructions <= limit
    assert opcodes["POPC"]
