"""The loops over columns of the sweep (`obs`) and of the polish (`polish`), for matrices of one shape at once.

Such a loop is made of short operations, which take the longer to be called than to be computed the smaller the matrices
are. Here each is one operation on the same column of all E matrices. Tensors inside are (I, E, O). Products with whole
blocks are those of each matrix. So a matrix has the same bytes in a batch of any size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mspc.numerics.linalg import InverseFactor
from mspc.numerics.quant import fit
from mspc.types import Codes, Grid

BLOCK = 128


def sweep_together(
    weights: Sequence[Tensor], masks: Sequence[Tensor], factors: Sequence[InverseFactor], grid: Grid, size: int
) -> list[Codes]:
    """The codes that the sweep finds for weights (O, I) on masks (O, I), with groups of `size`, which divides 128."""
    columns, kept = _by_column([weight.float() for weight in weights]), _by_column(masks)
    num_columns, count, num_rows = columns.shape
    upper = torch.stack([factor.factor for factor in factors])
    importance, divisors = torch.stack([factor.diagonal for factor in factors], 1), upper.diagonal(dim1=1, dim2=2).T
    codes = torch.empty_like(columns, dtype=torch.uint8)
    scales = torch.empty(num_columns // size, count, num_rows, dtype=torch.float16, device=columns.device)
    zeros = torch.empty_like(scales, dtype=torch.uint8)
    for start in range(0, num_columns, BLOCK):
        stop = min(start + BLOCK, num_columns)
        block, errors = columns[start:stop], torch.empty_like(columns[start:stop])
        for j, column in enumerate(range(start, stop)):
            if column % size == 0:
                some, group = slice(column, column + size), column // size
                by_row = importance[some].repeat_interleave(num_rows, 1).T
                fitted = fit(columns[some].flatten(1).T, kept[some].flatten(1).T, by_row, grid)
                scales[group], zeros[group] = (found.view(count, num_rows) for found in fitted)
                scale, zero = scales[group].float(), zeros[group].float()
            values = (block[j] / scale).add_(zero).round_().clamp_(0, 2**grid.bits - 1)
            values = torch.where(kept[column], values, zero)
            codes[column].copy_(values)
            settled = values.sub_(zero).mul_(scale)
            torch.sub(block[j], settled, out=errors[j]).div_(divisors[column, :, None])
            block[j + 1 :].addcmul_(upper[:, column, column + 1 : stop].T[:, :, None], errors[j], value=-1)
            block[j].copy_(settled)
        for e, own in enumerate(upper):
            columns[stop:, e].addmm_(own[start:stop, stop:].T, errors[:, e], alpha=-1)
    return [Codes(*(tensor[:, e].T.contiguous() for tensor in (codes, scales, zeros))) for e in range(count)]


def descend_together(
    wanted: Sequence[Tensor], grams: Sequence[Tensor], codes: Sequence[Codes], masks: Sequence[Tensor], levels: int
) -> list[Codes]:
    """`polish.descend` for weights (O, I) with Grams (I, I)."""
    num_columns, size = len(grams[0]), masks[0].shape[1] // codes[0].scales.shape[1]
    scales = _by_column([one.scales.float() for one in codes]).repeat_interleave(size, 0)
    zeros = _by_column([one.zeros.float() for one in codes]).repeat_interleave(size, 0)
    values, kept = _by_column([one.values.float() for one in codes]), _by_column(masks)
    weight = (values - zeros) * scales
    image = torch.stack([gram @ (w.T - weight[:, e]) for e, (w, gram) in enumerate(zip(wanted, grams, strict=True))], 1)
    diagonal = torch.stack([gram.diagonal() for gram in grams], 1)[:, :, None]
    for start in range(0, num_columns, BLOCK):
        block = slice(start, min(start + BLOCK, num_columns))
        near, before = image[block].clone(), weight[block].clone()
        within = torch.stack([gram[block, block] for gram in grams], 2)
        for j, column in enumerate(range(block.start, block.stop)):
            best = (weight[column] + near[j] / diagonal[column]) / scales[column] + zeros[column]
            best = torch.where(kept[column], best.round().clamp(0, levels), values[column])
            step = (best - values[column]) * scales[column]
            values[column] = best
            weight[column] += step
            near.addcmul_(within[:, j, :, None], step, value=-1)
        for e, gram in enumerate(grams):
            image[:, e].addmm_(gram[:, block], weight[block, e] - before[:, e], alpha=-1)
    found = values.to(torch.uint8)
    return [Codes(found[:, e].T.contiguous(), one.scales, one.zeros) for e, one in enumerate(codes)]


def _by_column(matrices: Sequence[Tensor]) -> Tensor:
    """(O, I) each -> (I, E, O)."""
    return torch.stack([matrix.T for matrix in matrices], 1)
