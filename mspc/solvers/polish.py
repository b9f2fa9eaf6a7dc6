"""Improvement of quantized weights on a fixed mask: scales by least squares, then codes one column at a time.

The sweep settles each column once, before later columns are quantized. Here the squared error of the layer,
tr(E H E^T), is lowered further. The best scales for given codes solve a small linear system per row. The best code of a
column for given other columns is the nearest to w_j + (E H)_j / H_jj, as in QuantEase (Behdin et al.,
arXiv:2309.01885). The error of no row grows.
"""

from dataclasses import replace

import torch
from torch import Tensor

from mspc.numerics.linalg import precise_matmul, regularized
from mspc.numerics.quant import LARGEST_SCALE, SMALLEST_SCALE, dequantize
from mspc.types import Codes, CompressedLinear, GramStats

BLOCK = 128
RIDGE = 1e-6
STRIP = 2**24
"""Elements of the linear systems for the scales that are in memory at once."""


def polish(wanted: Tensor, quantized: CompressedLinear, stats: GramStats, damp: float) -> CompressedLinear:
    """A solution on the same mask and grid that is closer to `wanted` (O, I) than `quantized` is."""
    assert quantized.codes is not None
    assert quantized.target.grid is not None
    levels = 2**quantized.target.grid.bits - 1
    with precise_matmul():
        gram, _ = regularized(stats.gram, damp)
        codes = better(wanted, gram, quantized.codes, refit_scales(wanted, gram, quantized.codes))
        codes = better(wanted, gram, codes, descend(wanted, gram, codes, quantized.mask, levels))
        codes = better(wanted, gram, codes, refit_scales(wanted, gram, codes))
    return replace(quantized, weight=dequantize(codes), codes=codes)


def refit_scales(wanted: Tensor, gram: Tensor, codes: Codes) -> Codes:
    """The codes with the scales (O, G) of least error. Groups without weights, or beyond float16, keep their scale.

    With c_g the codes of group g of a row, minus its zero point, they solve sum_h (c_g^T H_gh c_h) s_h = c_g^T H_g w.
    """
    rows = max(STRIP // codes.scales.shape[1] ** 2, 1)
    parts = (part.split(rows) for part in (wanted, codes.values, codes.scales, codes.zeros))
    refitted = [_refit(some, gram, Codes(*of_some)) for some, *of_some in zip(*parts, strict=True)]
    return replace(codes, scales=torch.cat(refitted))


def _refit(wanted: Tensor, gram: Tensor, codes: Codes) -> Tensor:
    by_group = (*codes.scales.shape, -1)
    levels = codes.values.view(by_group).float() - codes.zeros[..., None].float()

    def sums(image: Tensor) -> Tensor:
        return (image.view(by_group) * levels).sum(-1)

    of_groups = gram.split(levels.shape[2])
    normal = torch.stack([sums(levels[:, g] @ of_group) for g, of_group in enumerate(of_groups)], -1)
    right = sums(wanted @ gram)
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    ridge = torch.where(diagonal > 0, RIDGE * diagonal, 1.0)
    scales = torch.linalg.solve(normal + torch.diag_embed(ridge), right)
    usable = (diagonal > 0) & (scales >= SMALLEST_SCALE) & (scales <= LARGEST_SCALE)
    return torch.where(usable, scales, codes.scales.float()).half()


def descend(wanted: Tensor, gram: Tensor, codes: Codes, mask: Tensor, levels: int) -> Codes:
    """One pass over the columns that sets each code to the best one for the current other codes."""
    size = mask.shape[1] // codes.scales.shape[1]
    # Transposed, (I, O), so that a column of the weight is contiguous.
    scales = codes.scales.float().T.repeat_interleave(size, 0)
    zeros = codes.zeros.float().T.repeat_interleave(size, 0)
    values, kept = codes.values.float().T.contiguous(), mask.T.contiguous()
    weight = (values - zeros) * scales
    image = gram @ (wanted.T - weight)  # H E^T, updated after each block
    for start in range(0, len(gram), BLOCK):
        block = slice(start, min(start + BLOCK, len(gram)))
        near, within = image[block].clone(), gram[block, block]
        before = weight[block].clone()
        for j, column in enumerate(range(block.start, block.stop)):
            best = (weight[column] + near[j] / gram[column, column]) / scales[column] + zeros[column]
            best = torch.where(kept[column], best.round().clamp(0, levels), values[column])
            step = (best - values[column]) * scales[column]
            values[column] = best
            weight[column] += step
            near.addr_(within[:, j], step, alpha=-1)
        image.addmm_(gram[:, block], weight[block] - before, alpha=-1)
    return replace(codes, values=values.T.contiguous().to(torch.uint8))


def better(wanted: Tensor, gram: Tensor, old: Codes, new: Codes) -> Codes:
    """For each row, the codes of lower error."""
    worse = (_row_errors(wanted, gram, new) > _row_errors(wanted, gram, old))[:, None]
    return Codes(torch.where(worse, old.values, new.values), torch.where(worse, old.scales, new.scales), old.zeros)


def _row_errors(wanted: Tensor, gram: Tensor, codes: Codes) -> Tensor:
    error = wanted - dequantize(codes)
    return ((error @ gram) * error).sum(1)
