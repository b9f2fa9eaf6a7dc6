"""Stored matrices for the kernels, and their product in float64 by `layout.unpack`, which no kernel goes through."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mspc.formats import layout
from mspc.formats.description import StoredMatrix
from mspc.kernels import KERNELS, Kernel, dispatch
from mspc.kernels.timings import Choice
from mspc.numerics.masking import num_pruned, prune_lowest, prune_n_of_m
from mspc.numerics.quant import dequantize, groups_of
from mspc.types import NM, Codes, CompressedLinear, Grid, Pattern, Unstructured

BF16, FP16 = torch.bfloat16, torch.float16
DENSE, HALF = Unstructured(0.0), Unstructured(0.5)


@dataclass(frozen=True)
class Case:
    kernel_name: str
    pattern: Pattern
    grid: Grid | None
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def kernel(self) -> Kernel:
        return KERNELS[self.kernel_name]

    @property
    def matrix(self) -> StoredMatrix:
        return StoredMatrix(self.shape, self.pattern, self.grid, self.dtype)

    def stored(self) -> dict[str, Tensor]:
        return stored(self.matrix)

    def repacked(self) -> dict[str, Tensor]:
        return self.kernel.repack(self.stored(), self.matrix)

    def product(self, x: Tensor, repacked: dict[str, Tensor]) -> Tensor:
        """x Wᵀ by the kernel, or by its reference where nothing launches it."""
        choice = Choice(self.kernel.MAX_TOKENS, "fused", 0)
        return dispatch.multiply(choice, x, self.kernel, repacked, self.matrix)

    def expanded(self, repacked: dict[str, Tensor]) -> Tensor:
        return dispatch.expand(self.kernel, repacked, self.matrix, self.dtype)

    def weight(self) -> Tensor:
        """The weight, not rounded: float32 where there is a grid."""
        dtype = self.dtype if self.grid is None else torch.float32
        return layout.unpack(self.stored(), self.shape, self.matrix.target, dtype).weight

    def __str__(self) -> str:
        grid = (
            "" if self.grid is None else f"-{self.grid.bits}b{self.grid.group_size}{'' if self.grid.symmetric else 'a'}"
        )
        return f"{self.kernel_name}-{self.pattern}{grid}-{'x'.join(map(str, self.shape))}-{str(self.dtype)[6:]}"


CODES = [
    Case("codes", DENSE, Grid(4, 128), (20, 512), FP16),
    Case("codes", DENSE, Grid(4, 64, False), (40, 384), FP16),
    Case("codes", DENSE, Grid(4, 32, False), (37, 160), BF16),  # blocks cut off, rows cut off
    Case("codes", DENSE, Grid(4, 256, False), (16, 1280), BF16),
    Case("codes", DENSE, Grid(4, None), (5, 72), BF16),
    Case("codes", NM(4, 4), Grid(4, None, False), (33, 384), FP16),
    Case("codes", DENSE, Grid(8, 128), (20, 512), BF16),
    Case("codes", DENSE, Grid(8, 32, False), (37, 160), BF16),
    Case("codes", DENSE, Grid(8, None, False), (33, 384), FP16),
    Case("codes", DENSE, Grid(3, 64, False), (40, 384), BF16),
    Case("codes", DENSE, Grid(3, 32, False), (37, 160), FP16),
    Case("codes", DENSE, Grid(3, None), (5, 72), BF16),
    Case("codes", DENSE, Grid(2, 128, False), (20, 512), BF16),
    Case("codes", DENSE, Grid(2, 32), (37, 160), FP16),
]
SPARSE24 = [
    Case("sparse24", NM(2, 4), Grid(4, 128), (20, 512), FP16),
    Case("sparse24", NM(2, 4), Grid(4, 32, False), (37, 160), BF16),
    Case("sparse24", NM(2, 4), Grid(4, None, False), (33, 384), FP16),
    Case("sparse24", NM(2, 4), None, (20, 512), FP16),
    Case("sparse24", NM(2, 4), None, (37, 168), BF16),
]
GATHERED = [
    Case("nm", NM(8, 16), None, (9, 1024), BF16),
    Case("nm", NM(5, 16), None, (7, 1648), FP16),  # 515 kept weights of a row
    Case("nm", NM(15, 16), None, (3, 304), BF16),
    Case("nm", NM(2, 4), None, (5, 140), FP16),
    Case("nm", NM(4, 8), None, (4, 520), BF16),
    Case("nm", NM(1, 2), None, (4, 38), BF16),
    Case("nm", NM(3, 7), None, (4, 91), FP16),
    Case("nm", NM(100, 256), None, (3, 768), BF16),
]
BITMAP = [
    Case("bitmap", HALF, None, (20, 320), BF16),
    Case("bitmap", Unstructured(0.7), None, (5, 75), FP16),
    Case("bitmap", Unstructured(1.0), None, (5, 75), BF16),
    Case("bitmap", HALF, Grid(8, None), (17, 75), FP16),
    Case("bitmap", HALF, Grid(2, 32), (4, 288), BF16),
    Case("bitmap", HALF, Grid(3, 64, False), (18, 320), BF16),
    Case("bitmap", Unstructured(0.7), Grid(3, None), (5, 75), FP16),
    Case("bitmap", NM(8, 16), Grid(4, 128), (9, 512), BF16),
    Case("bitmap", NM(5, 16), Grid(3, 32, False), (7, 160), FP16),  # rows end within a byte
    Case("bitmap", NM(3, 7), Grid(2, None, False), (4, 91), FP16),
]
CASES = [*CODES, *SPARSE24, *GATHERED, *BITMAP]
ONE_OF_EACH = [CODES[0], SPARSE24[0], GATHERED[0], BITMAP[0]]


def stored(matrix: StoredMatrix, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of the sparse export for random weights, codes, scales and zero points."""
    generator = torch.Generator().manual_seed(seed)
    shape, (pattern, grid) = matrix.shape, (matrix.target.pattern, matrix.target.grid)
    score = torch.rand(shape, generator=generator)
    if isinstance(pattern, NM):
        mask = prune_n_of_m(score, pattern)
    else:
        mask = prune_lowest(score, num_pruned(score.numel(), pattern.sparsity))
    weight, codes = torch.randn(shape, generator=generator).to(matrix.dtype).float() * mask, None
    if grid is not None:
        groups = shape[1] // groups_of(shape[1], grid)
        middle = torch.full((shape[0], groups), 2 ** (grid.bits - 1), dtype=torch.uint8)
        zeros = middle if grid.symmetric else torch.randint(2**grid.bits, middle.shape, generator=generator).byte()
        values = torch.randint(2**grid.bits, shape, generator=generator).byte()
        values = torch.where(mask, values, zeros.repeat_interleave(shape[1] // groups, 1))
        codes = Codes(values, torch.rand(zeros.shape, generator=generator).half(), zeros)
        weight = dequantize(codes)
    tensors = layout.pack(CompressedLinear(weight, mask, matrix.target, codes), matrix.dtype)
    if "mask" in tensors:
        tensors["row_offsets"] = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    return tensors


def inputs(case: Case, num_tokens: int) -> Tensor:
    """Random; behind them in memory are NaN, which no kernel may read."""
    generator = torch.Generator().manual_seed(num_tokens)
    size = num_tokens * case.shape[1]
    memory = torch.full((size + 1024,), torch.nan, dtype=case.dtype)
    memory[:size] = torch.randn(size, generator=generator)
    return memory[:size].view(num_tokens, case.shape[1])


def assert_product(y: Tensor, x: Tensor, case: Case) -> None:
    """`y` is x W^T summed in float32 and rounded once: half a unit in the last place, and 2^-20 of the sum of sizes."""
    weight, x = case.weight().double(), x.cpu().double()
    expected = x @ weight.T
    half_unit = torch.finfo(case.dtype).eps / 2
    bound = half_unit * expected.abs() + 2.0**-20 * (x.abs() @ weight.abs().T) + torch.finfo(case.dtype).tiny
    assert y.shape == expected.shape
    assert y.dtype == case.dtype
    assert bool(((y.cpu().double() - expected).abs() <= bound).all())
