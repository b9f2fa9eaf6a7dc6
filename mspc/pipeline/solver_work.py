"""The work of the solvers on one matrix (O, I), counted from their code: products, factors, and passes over memory.

Searches count all of their iterations, so what stops early takes less.
"""

import math

from mspc.numerics.quant import SHRINK_STEPS
from mspc.passes.gradients import fisher_block_size
from mspc.pipeline.workload import Work
from mspc.planning.curve_measurement import QUANTIZED, SAMPLED, SWEPT_BITS
from mspc.settings import BY_ADMM, Settings
from mspc.solvers.admm import CG_STEPS, PATH_CG_STEPS, PATH_ITERATIONS, ROUND
from mspc.solvers.two_sided import PARTS
from mspc.threads import ROWS
from mspc.types import NM, Pattern, Target

OF_PRODUCT = 0.4
"""Operations that the result of a product takes, as a new tensor."""
OF_ITERATION, OF_INNER, OF_STEP, OF_LOSS = 11, 8, 9, 3
"""Operations of an ADMM iteration, of its inner step, of a step of conjugate gradients, and of a loss."""
BLOCK = 128
"""Columns that a sweep settles before it updates the others."""
CALLS, CALLS_WITH_CODES, CALLS_OF_POLISH = 6, 17, 14
"""Short operations of a sweep and of a polish for each column."""


class MatrixWork:
    """Adds the work of one matrix to a stage. `ways` is the number of matrices that threads work on at once.

    `ranks` is the number of ranks that share the rows of its products, and `together` that of matrices in a batch.
    """

    def __init__(
        self, work: Work, shape: tuple[int, int], ways: float = 1, *, ranks: int = 1, together: int = 1
    ) -> None:
        self.work, (self.rows, self.columns), self.ranks, self.together = work, shape, ranks, together
        self.block = fisher_block_size(self.rows)
        self.matrices = ways
        self.ways = max(ways, self.rows / ROWS)

    @property
    def numel(self) -> int:
        return self.rows * self.columns

    def operations(self, count: float) -> None:
        self.work.operations(self.numel, count, self.ways)

    def on_gram(self, count: float) -> None:
        self.work.operations(self.columns**2, count, self.matrices)

    def products(self, count: float) -> None:
        """Products of the weight with a Gram."""
        self.shared("product", 2 * count * self.numel * self.columns, count)
        self.operations(OF_PRODUCT * count)

    def shared(self, kind: str, amount: float, results: float) -> None:
        """Work on rows that ranks share, who then send each other their rows of `results` matrices."""
        if self.ranks == 1:
            self.work.add(kind, amount, self.ways)
            return
        with self.work.shared(self.ranks):
            self.work.add(kind, amount, max(self.ways / self.ranks, 1))
        self.work.add("exchange", 4 * results * self.numel)

    def factors(self, count: float) -> None:
        self.work.add("factor", count * self.columns**3, self.matrices)

    def blocks(self, count: float, two_sided: bool) -> None:
        """Products of the blocks of an output Fisher factor with the weight."""
        if two_sided and self.block > 1:
            self.shared("product", 2 * count * self.numel * self.block, count)
            self.operations(OF_PRODUCT * count)

    def applied(self, count: float, kfac: bool) -> None:
        """`Quadratic.apply`."""
        self.products(count)
        self.blocks(count, kfac)

    def solved(self, count: float, kfac: bool) -> None:
        """The inner problem of each iteration, without the decompositions that it needs."""
        self.products(count)
        self.blocks(2 * count, kfac)
        self.operations(OF_INNER * count if kfac else 0)

    def selected(self, count: float, pattern: Pattern) -> None:
        """The largest weights by a threshold, or of every group."""
        if isinstance(pattern, NM):
            self.work.add("sort", count * self.numel / 4, self.ways)
        else:
            self.work.add("select", count * self.numel, self.matrices)

    def form(self) -> None:
        self.operations(4)

    def decomposed(self, kfac: bool) -> None:
        """The decompositions of the output Fisher factor."""
        if kfac and self.block > 1:
            self.work.add("eigen", self.rows / self.block * self.block**3, self.matrices)

    def refined(self, steps: int, kfac: bool) -> None:
        self.applied(1 + steps, kfac)
        self.operations(4 + OF_STEP * steps)

    def started(self, kfac: bool) -> None:
        """The right side of the first iteration, and what the inner problem starts from."""
        self.applied(1, kfac)
        self.blocks(2, kfac)

    def iterated(self, iterations: int, pattern: Pattern, kfac: bool, *, changes_rho: int = 0) -> None:
        self.solved(iterations, kfac)
        self.operations(OF_ITERATION * iterations)
        self.selected(iterations, pattern)
        if not kfac:  # an inverse of the Gram for every rho
            rhos = math.ceil(iterations / changes_rho) if changes_rho else iterations
            self.factors(rhos)
            self.on_gram(2 * rhos)

    def path(self, patterns: list[Pattern], kfac: bool) -> None:
        """`error_path`."""
        self.started(kfac)
        for pattern in patterns:
            if pattern.sparsity < 1:
                self.iterated(PATH_ITERATIONS, pattern, kfac)
                self.refined(PATH_CG_STEPS, kfac)
            else:
                self.applied(1, kfac)
                self.operations(OF_LOSS)

    def searched(self, target: Target, settings: Settings, kfac: bool) -> None:
        """`admm`, and the rounding of what it finds."""
        self.form()
        self.decomposed(kfac)
        if not settings.keep_zeros:
            # Without zeros the first round changes nothing.
            iterations = settings.iterations if target.pattern.sparsity > 0 else min(ROUND, settings.iterations)
            self.started(kfac)
            self.iterated(iterations, target.pattern, kfac, changes_rho=ROUND)
            self.selected(2, target.pattern)
            self.operations(6)
        self.refined(CG_STEPS, kfac)
        if target.grid is not None:
            self.rounded(PARTS if kfac else 1)

    def swept(self, *, codes: bool, parts: int = 1, copies: int = 1) -> None:
        """The OBS sweep, of `copies` of the matrix at once, in some parts of its rows."""
        pieces = max(parts, copies * self.rows / ROWS)
        calls = CALLS_WITH_CODES / self.together if codes else CALLS
        self.work.add("call", pieces * self.columns * calls, self.ways)
        self.work.add("product", copies * self.numel * self.columns, self.ways)
        self.work.operations(copies * self.numel, BLOCK / 4, self.ways, near=True)
        self.operations(8 * copies)
        if codes:
            self.work.operations(copies * self.numel, 10 * (len(SHRINK_STEPS) + 1), self.ways, near=True)

    def rounded(self, parts: int) -> None:
        """A sweep with codes on a given mask, and its polish; with `parts` above 1, two-sided."""
        self.swept(codes=True, parts=parts)
        groups = max(self.columns / 128, 1)
        self.products(12)  # six errors of rows, the scales twice, the codes once
        self.operations(30)
        self.work.operations(self.numel, 4 * groups, self.ways, near=self.numel / parts <= 2**20)
        self.work.add("product", 20 * self.rows * groups**3, self.ways)
        self.work.add("call", parts * self.columns * CALLS_OF_POLISH / self.together, self.ways)
        self.work.operations(self.numel, BLOCK / 4, self.ways, near=True)
        if parts > 1:
            self.blocks(0.5, True)
            self.work.add("factor", self.rows * self.block**2, self.matrices)

    def curve(self, patterns: list[Pattern], settings: Settings) -> None:
        """`curve_of`: the whole matrix once, and a few of its rows for the path, by the whole factor of the outputs."""
        kfac = True
        self.form()
        sample = self
        if self.rows // self.block > SAMPLED:
            self.applied(1, kfac)
            self.operations(OF_LOSS)
            sample = MatrixWork(self.work, (SAMPLED * self.block, self.columns), self.matrices)
            sample.form()
            sample.applied(1, kfac)
        if settings.solver in BY_ADMM:
            sample.decomposed(kfac)
            sample.path(patterns, kfac)
        else:
            for _ in patterns:
                sample.swept(codes=False)
                sample.applied(1, kfac)
        if settings.has_budget:
            points = sum(point <= len(patterns) for point in QUANTIZED)
            for _ in SWEPT_BITS:
                sample.swept(codes=True, copies=points)
                sample.applied(points, False)
                sample.operations(3 * points)

    def estimated(self, patterns: list[Pattern]) -> None:
        """`estimated_curve`."""
        self.form()
        self.factors(1)
        self.operations(4)
        for _ in {pattern.of if isinstance(pattern, NM) else 0 for pattern in patterns}:
            self.work.add("sort", self.numel, self.matrices)
            self.operations(4)

    def compensated(self) -> None:
        self.products(3)
        self.operations(3)

    def judged_and_stored(self, *, codes: bool, num_bytes: int) -> None:
        """The output error in float64, the tensors as they are stored, their digest, packing and writing."""
        self.shared("double", 4 * self.numel * self.columns, 4)  # two results of twice the bytes
        self.operations(12 + (6 if codes else 0))
        self.on_gram(2)
        self.work.add("hash", self.numel * (1 if codes else 2) + num_bytes)
        self.work.add("write", num_bytes)
