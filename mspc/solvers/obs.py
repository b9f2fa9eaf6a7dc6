"""Blocked OBS sweep: prune, and quantize in the same pass, column by column with error feedback.

This is the algorithm of SparseGPT (Frantar and Alistarh, arXiv:2301.00774) and GPTQ (arXiv:2210.17323). With U^T U =
H^-1, setting the weight of column j to q_j moves the error (w_j - q_j) / U_jj along row j of U into the columns after
it. That is the optimal brain surgeon update restricted to those columns, and || (W - W^) X ||^2 is exactly the sum of
the squared errors. The mask of a block of 128 columns (N:M: of a group) is chosen when the sweep reaches it, from
weights that already carry all earlier corrections.

Counts are exact. Weights of dead inputs, which are always zero, are pruned first; those that the budget leaves keep
their values. Tensors inside are transposed, (I, O), so that a column of the weight is contiguous.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mspc import threads
from mspc.errors import InputError
from mspc.numerics.linalg import InverseFactor, inverse_factor, precise_matmul
from mspc.numerics.masking import (
    check_divides,
    num_pruned,
    prune_lowest,
    prune_lowest_per_row,
    prune_n_of_m,
    select,
    spread,
)
from mspc.numerics.quant import dequantize, fit, fit_groups, groups_of
from mspc.solvers.options import SolverOptions
from mspc.types import NM, Codes, CompressedLinear, GramStats, Grid, Pattern, Target

BLOCK = 128


def obs(
    weight: Tensor, stats: GramStats, target: Target, options: SolverOptions, name: str, mask: Tensor | None = None
) -> CompressedLinear:
    """(O, I) -> pruned (and quantized) weights, kept ones corrected for the removed ones. A given `mask` is obeyed.

    Raises InputError when the pattern or the group size does not fit, and every error of `inverse_factor`.
    """
    with precise_matmul():
        if mask is None:
            return sweep(weight, stats, target, options, name)[0]
        # With a given mask no row depends on another. The factor of all is made once.
        ordered = in_order(stats, options)
        rows = zip(threads.pieces(weight), threads.pieces(mask), strict=True)
        parts = threads.run(lambda some: _swept(some[0], *ordered, target, options, name, some[1])[0], rows)
        return _joined(list(parts))


def _joined(parts: Sequence[CompressedLinear]) -> CompressedLinear:
    """The matrix whose rows are those of all parts."""
    if len(parts) == 1:
        return parts[0]
    weight, mask = (torch.cat([getattr(part, name) for part in parts]) for name in ("weight", "mask"))
    of_parts = [part.codes for part in parts if part.codes is not None]
    codes = [torch.cat([getattr(one, name) for one in of_parts]) for name in ("values", "scales", "zeros") if of_parts]
    return replace(parts[0], weight=weight, mask=mask, codes=Codes(*codes) if codes else None)


def sweep(
    weight: Tensor, stats: GramStats, target: Target, options: SolverOptions, name: str, mask: Tensor | None = None
) -> tuple[CompressedLinear, float]:
    """The result of `obs` and the loss that the sweep adds up: the sum of ((w_j - q_j) / U_jj)^2 at settling.

    With `mask` (O, I), that mask is obeyed and the target's pattern is ignored.
    """
    return _swept(weight, *in_order(stats, options), target, options, name, mask)


def _swept(
    weight: Tensor,
    order: Tensor,
    stats: GramStats,
    target: Target,
    options: SolverOptions,
    name: str,
    mask: Tensor | None,
) -> tuple[CompressedLinear, float]:
    """`sweep` with the column order, and the statistics in that order."""
    check_pattern(target.pattern, weight.shape[1], options, name)
    factor = inverse_factor(stats, options.damp, name)
    given = None if mask is None else mask[:, order]
    state = Sweep(weight.float()[:, order].T.contiguous(), factor, target, options, order, name, given)
    for start, count in zip(range(0, len(order), BLOCK), state.block_counts(), strict=True):
        state.settle_block(start, min(start + BLOCK, len(order)), count)
    return state.result(), state.loss


def sweep_all(
    weights: Sequence[Tensor], stats: GramStats, target: Target, options: SolverOptions, name: str
) -> list[Tensor]:
    """`obs` for several weights (O, I) of one matrix, with the zeros that each has already.

    A sweep is a long list of short operations: one over the rows of all takes less time than several.
    """
    whole = torch.cat(list(weights))
    return list(obs(whole, stats, target, options, name, whole != 0).weight.split(len(weights[0])))


def check_pattern(pattern: Pattern, num_columns: int, options: SolverOptions, name: str) -> None:
    check_divides(pattern, num_columns, name)
    if isinstance(pattern, NM) and BLOCK % pattern.of:
        raise InputError(
            f"{name}: the obs solver needs N:M groups that divide {BLOCK}, not {pattern}. Choose another pattern."
        )
    if isinstance(pattern, NM) and options.activation_order:
        raise InputError(
            f"{name}: activation order reorders columns, which breaks the groups of {pattern}. Use unstructured "
            "sparsity, or leave activation order out."
        )


def in_order(stats: GramStats, options: SolverOptions) -> tuple[Tensor, GramStats]:
    """The order of the columns in a sweep, and the statistics in that order."""
    if not options.activation_order:
        return torch.arange(len(stats.gram), device=stats.gram.device), stats
    order = torch.argsort(stats.gram.diagonal(), descending=True, stable=True)
    return order, GramStats(stats.gram[order][:, order], stats.num_tokens)


@dataclass
class Sweep:
    """The state of one sweep. `columns` (I, O) holds corrected weights ahead of the sweep and final ones behind it."""

    columns: Tensor
    factor: InverseFactor
    target: Target
    options: SolverOptions
    order: Tensor
    name: str
    given: Tensor | None = None
    """A mask (O, I) to obey, in the order of the sweep. None: the sweep chooses."""

    def __post_init__(self) -> None:
        num_columns, num_rows = self.columns.shape
        self.per_row = self.options.criterion.per_row
        chosen = torch.ones_like(self.columns, dtype=torch.bool)
        self.mask = chosen if self.given is None else self.given.T.contiguous()
        self.loss = 0.0
        self.grid = self.target.grid
        if self.grid is None:
            return
        size = groups_of(num_columns, self.grid, self.name)
        self.codes = torch.empty_like(self.columns, dtype=torch.uint8)
        # In column order. A group is fitted when the sweep reaches it, if its columns lie in one block.
        pattern = self.target.pattern
        straddles = BLOCK % size != 0 or (isinstance(pattern, NM) and size % pattern.of != 0)
        self.static = self.options.activation_order or straddles
        self.group_size, self.group = size, (self.order // size).tolist()
        self.scales = torch.empty(num_columns // size, num_rows, dtype=torch.float16, device=self.columns.device)
        self.zeros = torch.empty_like(self.scales, dtype=torch.uint8)
        self.at_hand = -1, torch.empty(0), torch.empty(0)  # a group, its scales and its zero points in float32
        if self.static:
            self.fit_static(self.grid)

    def score(self, start: int, stop: int) -> Tensor:
        """Scores (O, stop - start) of columns that are not settled yet. Dead inputs have the lowest score."""
        denominator = self.factor.factor.diagonal()[start:stop].square()
        score = self.options.criterion.score(self.columns[start:stop].T, self.factor.diagonal[start:stop], denominator)
        score[:, self.factor.dead[start:stop]] = -1.0
        return score

    def fit_static(self, grid: Grid) -> None:
        """Fit all scales before the sweep, on the weights of `first_mask`."""
        original = torch.argsort(self.order)
        mask = self.first_mask()[:, original]
        weight, importance = self.columns.T[:, original], self.factor.diagonal[original]
        scales, zeros = fit_groups(weight, mask, importance, grid, self.name)
        self.scales, self.zeros = scales.T.contiguous(), zeros.T.contiguous()

    def first_mask(self) -> Tensor:
        """The given mask, or the mask by scores of the whole matrix before the sweep."""
        if self.given is not None:
            return self.given
        return select(self.score(0, len(self.columns)), self.target.pattern, per_row=self.per_row)

    def block_counts(self) -> list[int]:
        """Weights to prune in each block: exact in total, dead ones first, then in proportion to live ones."""
        num_rows = self.columns.shape[1]
        blocks = self.factor.dead.split(BLOCK)
        if isinstance(self.target.pattern, NM) or self.given is not None:
            return [0] * len(blocks)
        if self.options.activation_order:  # the first blocks hold the largest inputs, so equal shares would be wrong
            return [int((~part).sum()) for part in self.first_mask().split(BLOCK, dim=1)]
        total = num_pruned(self.columns.numel(), self.target.pattern.sparsity)
        dead = [int(block.sum()) * num_rows for block in blocks]
        live = [len(block) * num_rows - d for block, d in zip(blocks, dead, strict=True)]
        dead_shares = spread(min(total, sum(dead)), dead)
        live_shares = spread(max(total - sum(dead), 0), live)
        return [a + b for a, b in zip(dead_shares, live_shares, strict=True)]

    def settle_block(self, start: int, stop: int, count: int) -> None:
        pattern = self.target.pattern
        upper = self.factor.factor
        block, mask = self.columns[start:stop], self.mask[start:stop]
        errors = torch.empty_like(block)
        if count:
            prune = prune_lowest_per_row if self.per_row else prune_lowest
            mask.copy_(prune(self.score(start, stop), count).T)
        # Views of all rows at once: this loop is made of calls, not of arithmetic.
        rows, diagonal = zip(block, mask, errors, strict=True), upper.diagonal()[start:stop]
        for j, ((weight, kept, error), divisor) in enumerate(zip(rows, diagonal, strict=True)):
            column = start + j
            if isinstance(pattern, NM) and pattern.sparsity and j % pattern.of == 0 and self.given is None:
                group = slice(column, column + pattern.of)
                self.mask[group] = prune_n_of_m(self.score(group.start, group.stop), pattern).T
            settled = self.settle_column(column, weight, kept)
            torch.sub(weight, settled, out=error).div_(divisor)
            block[j + 1 :].addr_(upper[column, column + 1 : stop], error, alpha=-1)
            weight.copy_(settled)
        self.columns[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
        self.loss += float(errors.double().square().sum())

    def settle_column(self, column: int, weight: Tensor, kept: Tensor) -> Tensor:
        """The final values (O,) of one column: zero for pruned weights, else the value or its nearest on the grid."""
        if self.grid is None:
            return torch.where(kept, weight, 0.0)
        if not self.static and column % self.group_size == 0:
            self.fit_reached_group(column, column + self.group_size, self.grid)
        if self.group[column] != self.at_hand[0]:
            group = self.group[column]
            self.at_hand = group, self.scales[group].float(), self.zeros[group].float()
        _, scale, zero = self.at_hand
        codes = (weight / scale).add_(zero).round_().clamp_(0, 2**self.grid.bits - 1)
        codes = torch.where(kept, codes, zero)
        self.codes[column].copy_(codes)
        return codes.sub_(zero).mul_(scale)

    def fit_reached_group(self, start: int, stop: int, grid: Grid) -> None:
        pattern = self.target.pattern
        if isinstance(pattern, NM) and pattern.sparsity and self.given is None:
            # The N:M groups ahead choose again when they are reached.
            mask = prune_n_of_m(self.score(start, stop), pattern)
        else:
            mask = self.mask[start:stop].T
        scale, zero = fit(self.columns[start:stop].T, mask, self.factor.diagonal[start:stop], grid)
        group = start // (stop - start)
        self.scales[group], self.zeros[group] = scale, zero

    def result(self) -> CompressedLinear:
        original = torch.argsort(self.order)
        mask = self.mask.T[:, original].contiguous()
        damp, precision = self.factor.damp, self.factor.precision
        if self.grid is None:
            weight = self.columns.T[:, original].contiguous()
            return CompressedLinear(weight, mask, self.target, None, damp, precision)
        codes = Codes(self.codes.T[:, original].contiguous(), self.scales.T.contiguous(), self.zeros.T.contiguous())
        return CompressedLinear(dequantize(codes), mask, self.target, codes, damp, precision)
