"""Rounding with error feedback on both sides of a matrix: from input to input, and from output to output.

The sweep moves the rounding error of a column into later columns, as far as their inputs are correlated. With the loss
of the model, tr(S E H E^T), outputs are coupled too: what an error at one output does to the loss, a change at another
can undo. With S = L D L^T, D and the unit lower triangular L in blocks, the loss is the sum over the blocks r of

    tr(D_r F_r H F_r^T),   F_r = E_r + sum_(q > r) L_qr^T E_q

so blocks of outputs are rounded from the last to the first, each to its weights plus the sum. This is the rounding of
YAQA (Tseng, Sun and De Sa, arXiv:2505.22988), with a sweep and a polish in place of single weights. Inside a block, D_r
counts as diagonal.
"""

from dataclasses import replace

import torch
from torch import Tensor

from mspc.numerics.linalg import precise_matmul
from mspc.solvers.options import SolverOptions
from mspc.solvers.quadratic import damped_outputs
from mspc.solvers.rounding import Rounding, Rounds
from mspc.types import Codes, CompressedLinear, GramStats, Target

PARTS = 8
"""Blocks of outputs that are rounded one after the other. More of them gain little and take longer."""


def two_sided(
    wanted: Tensor, mask: Tensor, stats: GramStats, target: Target, options: SolverOptions, name: str
) -> Rounds:
    """Round `wanted` (O, I) to the grid of the target, on `mask` (O, I). `stats` must have an output Fisher factor.

    Raises every error of `obs`.
    """
    assert stats.output_fisher is not None
    with precise_matmul():
        outputs = damped_outputs(stats.output_fisher)
        order = interleaved(outputs.shape[1]).to(outputs.device)
        lower = torch.linalg.cholesky(outputs[:, order][:, :, order])
        weight, kept = (matrix.unflatten(0, outputs.shape[:2])[:, order] for matrix in (wanted, mask))
        errors, rounded = torch.zeros_like(weight), list[CompressedLinear]()
        for rows in reversed(parts_of(len(order))):
            own = weight[:, rows]
            if rows.stop < len(order):
                # L_qr^T is C_rr^-T C_qr^T by the Cholesky factor C.
                moved = lower[:, rows.stop :, rows].mT @ errors[:, rows.stop :]
                own = own + torch.linalg.solve_triangular(lower[:, rows, rows].mT, moved, upper=True)
            given, some = own.flatten(0, 1), kept[:, rows].flatten(0, 1)
            found = yield Rounding(given, some, stats, target, options, name)
            errors[:, rows] = weight[:, rows] - found.weight.unflatten(0, own.shape[:2])
            rounded.insert(0, found)
    return _joined(rounded, len(outputs), torch.argsort(order), mask)


def influence(outputs: Tensor) -> Tensor:
    """The diagonal of D (O,), of the damped factor (K, B, B): how much the error of a row costs, two-sided.

    The predicted loss of rounding a matrix is the sum of its rows' squared errors, each times its influence.
    """
    order = interleaved(outputs.shape[1]).to(outputs.device)
    lower = torch.linalg.cholesky(damped_outputs(outputs)[:, order][:, :, order])
    own = [lower[:, rows, rows].square().sum(2) for rows in parts_of(len(order))]
    return torch.cat(own, 1)[:, torch.argsort(order)].flatten()


def interleaved(num_outputs: int) -> Tensor:
    """The outputs (B,) in the order of their parts. Neighbours are the most correlated, and so in different parts."""
    return torch.cat([torch.arange(part, num_outputs, PARTS) for part in range(min(PARTS, num_outputs))])


def parts_of(num_outputs: int) -> list[slice]:
    sizes = [len(range(part, num_outputs, PARTS)) for part in range(min(PARTS, num_outputs))]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _joined(parts: list[CompressedLinear], num_blocks: int, original: Tensor, mask: Tensor) -> CompressedLinear:
    """The matrix of all parts, whose rows are those of every block, in the original order."""

    def rows(tensors: list[Tensor]) -> Tensor:
        by_block = torch.cat([tensor.unflatten(0, (num_blocks, -1)) for tensor in tensors], 1)
        return by_block[:, original].flatten(0, 1).contiguous()

    of_parts = [part.codes for part in parts if part.codes is not None]
    codes = Codes(*(rows([getattr(one, name) for one in of_parts]) for name in ("values", "scales", "zeros")))
    return replace(parts[0], weight=rows([part.weight for part in parts]), mask=mask, codes=codes)
