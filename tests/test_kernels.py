"""Products with compressed matrices: repacking bit for bit, sizes, references and kernels against float64.

The Triton kernels run in the interpreter, in a process of their own (interpreted_kernels.py).
"""

import math
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import BF16, CASES, DENSE, FP16, HALF, Case, assert_product, inputs, stored
from oracles import few

from mspc.formats import layout
from mspc.formats.description import StoredMatrix
from mspc.kernels import KERNELS, kernel_for
from mspc.types import BITS, NM, Grid, Unstructured


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[part].dtype == tensor.dtype and torch.equal(found[part], tensor) for part, tensor in expected.items()
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_unrepacked_is_what_was_stored(case):
    tensors = case.stored()
    repacked = case.kernel.repack(tensors, case.matrix)
    assert all(tensor.is_contiguous() for tensor in repacked.values())
    assert same(case.kernel.unrepack(repacked, case.matrix), tensors)
    assert same(tensors, case.stored())


PATTERNS = st.one_of(
    st.just(DENSE),
    st.floats(0.01, 1).map(Unstructured),
    st.integers(1, 20).flatmap(lambda of: st.integers(1, of).map(lambda keep: NM(keep, of))),
    st.just(NM(2, 4)),
)
GRIDS = st.one_of(
    st.none(),
    st.builds(Grid, st.sampled_from([2, 3, 4, 8]), st.sampled_from([8, 32, 64, 128, 256, None]), st.booleans()),
)


@few
@given(PATTERNS, GRIDS, st.integers(1, 40), st.integers(1, 24), st.integers(0, 99))
def test_a_kernel_repacks_and_unrepacks_all_that_it_supports(pattern, grid, num_rows, num_units, seed):
    unit = math.lcm(pattern.of if isinstance(pattern, NM) else 8, (grid and grid.group_size) or 1)
    matrix = StoredMatrix((num_rows, unit * num_units), pattern, grid, BF16)
    tensors = stored(matrix, seed)
    for kernel in KERNELS.values():
        if kernel.supports(matrix, BF16):
            assert same(kernel.unrepack(kernel.repack(tensors, matrix), matrix), tensors)


@pytest.mark.parametrize(
    ("case", "more"),
    [
        (Case("codes", DENSE, Grid(4, 128), (32, 512), BF16), 0),
        (Case("codes", DENSE, Grid(4, 32, False), (32, 256), BF16), 0),
        (Case("sparse24", NM(2, 4), Grid(4, 128), (32, 512), BF16), 0),
        (Case("sparse24", NM(2, 4), None, (32, 512), BF16), 0),
        (Case("codes", DENSE, Grid(8, 128, False), (32, 512), BF16), 0),
        (Case("codes", DENSE, Grid(3, 128), (32, 512), BF16), 0),
        (Case("codes", DENSE, Grid(3, 64, False), (32, 512), BF16), 32 * 8 // 8),  # 4 bits a zero point, not 3
        (Case("codes", DENSE, Grid(2, 64), (32, 512), BF16), 0),
        (Case("codes", DENSE, Grid(4, 64), (17, 192), BF16), 32 * (128 + 8) - 17 * (96 + 6)),  # to 32 rows of 256
        (Case("nm", NM(8, 16), None, (32, 512), BF16), 256 * 2 + 256 // 2),
        (
            Case("nm", NM(4, 8), None, (32, 512), BF16),
            256 * 2 + 256 // 2 + 32 * 512 // 2 // 8,
        ),  # 4 bits an index, not 3
        (Case("bitmap", HALF, None, (32, 512), BF16), 32 * 512 * 3 // 8 // 8),
        (Case("bitmap", HALF, Grid(3, 128), (32, 512), BF16), 32 * 512 * 3 // 8 // 8 + 1),
        (Case("bitmap", NM(8, 16), Grid(4, 128), (32, 512), BF16), -32 * 512 * 5 // 8 // 8),  # 1.375 bits, not 2
        (Case("bitmap", NM(1, 16), Grid(4, 128), (32, 512), BF16), 32 * 512 * 9 // 8 // 8),  # not 0.25
    ],
    ids=str,
)
def test_bytes_are_those_of_the_file_and_the_documented_padding(case, more):
    file = layout.num_bytes(case.shape, case.matrix.target, case.dtype)
    repacked = case.repacked()
    assert sum(tensor.nbytes for tensor in repacked.values()) == file + more


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_is_the_product_in_float64(case):
    repacked = case.repacked()
    x = inputs(case, 3)
    assert_product(case.product(x, repacked), x, case)
    assert torch.equal(case.expanded(repacked), case.weight().to(case.dtype))


@pytest.mark.parametrize(
    ("pattern", "grid", "columns", "dtype", "name"),
    [
        (DENSE, Grid(4, 128), 512, BF16, "codes"),
        (DENSE, Grid(4, 96), 384, BF16, None),  # groups that no whole slabs fill
        (DENSE, Grid(4, 16), 512, BF16, None),
        (DENSE, Grid(4, None), 100, BF16, None),  # inputs that no whole words fill
        (DENSE, Grid(8, 128), 512, BF16, "codes"),
        (DENSE, Grid(3, 32, False), 512, FP16, "codes"),
        (DENSE, Grid(2, None), 512, BF16, "codes"),
        (Unstructured(1e-5), Grid(4, 128), 512, BF16, "codes"),  # nothing was pruned,
        (DENSE, Grid(4, 128), 512, torch.float32, None),
        (DENSE, None, 512, BF16, None),
        (NM(2, 4), None, 512, BF16, "sparse24"),
        (NM(2, 4), None, 508, BF16, "nm"),
        (NM(2, 4), None, 512, FP16, None),  # values are bfloat16
        (NM(2, 4), Grid(4, 32), 512, FP16, "sparse24"),
        (NM(2, 4), Grid(8, 32), 512, BF16, "bitmap"),
        (NM(5, 16), None, 512, BF16, "nm"),
        (NM(5, 16), Grid(4, 128), 512, BF16, "bitmap"),
        (NM(2, 4), Grid(3, 128), 512, FP16, "bitmap"),
        (NM(5, 16), Grid(4, 16), 512, BF16, None),  # a word of 32 columns has one scale,
        (NM(4, 4), None, 512, BF16, None),
        (HALF, None, 511, BF16, "bitmap"),
        (HALF, Grid(4, 128), 512, BF16, "bitmap"),
        (HALF, Grid(3, 128), 512, BF16, "bitmap"),
        (HALF, Grid(4, 16), 512, BF16, None),
    ],
)
def test_the_kernel_for_a_matrix(pattern, grid, columns, dtype, name):
    assert kernel_for(StoredMatrix((16, columns), pattern, grid, BF16), dtype) == name


@pytest.mark.parametrize("pattern", [DENSE, HALF, NM(2, 4), NM(4, 8), *(NM(n, 16) for n in range(1, 16))], ids=repr)
def test_all_that_a_budget_of_bits_chooses_from_has_a_kernel(pattern):
    """Oracle: the patterns and `BITS` of mspc.planning.allocation."""
    for bits, group_size, symmetric in product(BITS, (32, 64, 128, None), (True, False)):
        assert kernel_for(StoredMatrix((16, 512), pattern, Grid(bits, group_size, symmetric), BF16), BF16)
    assert pattern == DENSE or kernel_for(StoredMatrix((16, 512), pattern, None, BF16), BF16)


def test_the_kernels_in_the_interpreter():
    """See interpreted_kernels.py."""
    pytest.importorskip("triton", reason="Triton is for Linux")
    script = Path(__file__).parent / "interpreted_kernels.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(script)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_without_triton_everything_but_launching_works():
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import mspc.kernels, torch\n"
        "from mspc.kernels.launch import on_gpu\n"
        "on_gpu('codes')"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (
        "MspcError: Sparse matrices on a GPU need triton: the extra gpu of mspc (pip install '.[gpu]' in its folder)."
        in result.stderr
    )
