"""Estimating loss curves without a solver: from what each weight costs when it is removed alone.

By the quadratic form, removing a weight costs its square (in scaled weights) if no other weight changes, and its square
over the diagonal of the inverse Gram if all other inputs make up for it as well as they can (OBS, Hassibi and Stork
1993). When half of the weights go, the truth is between the two. The estimate is their geometric mean, summed over the
weights that are the cheapest within the pattern.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mspc.numerics.linalg import precise_matmul
from mspc.numerics.masking import num_pruned
from mspc.planning.curve import Curve
from mspc.solvers.quadratic import quadratic
from mspc.types import NM, GramStats, Pattern


def estimated_curve(weight: Tensor, stats: GramStats, patterns: Sequence[Pattern], damp: float, name: str) -> Curve:
    """The curve of one matrix (O, I), in nats per token. `stats` must have an output Fisher factor."""
    assert stats.output_fisher is not None
    with precise_matmul():
        form = quadratic(weight, stats, stats.output_fisher, damp, name)
        costs = form.target.square() / form.inverse(0.0).diagonal().sqrt()
    costs[:, form.inputs.dead] = 0.0
    half_tokens = 1 / (2 * max(stats.num_tokens, 1)) if bool(stats.output_fisher.any()) else 0.0
    return Curve(
        tuple(pattern.sparsity for pattern in patterns),
        tuple(cost * half_tokens for cost in _cheapest(costs, patterns)),
    )


def _cheapest(costs: Tensor, patterns: Sequence[Pattern]) -> list[float]:
    """The sum of the costs (O, I) of the weights that each pattern removes, if it removes the cheapest."""
    sums: dict[int, Tensor] = {}
    found = []
    for pattern in patterns:
        size = pattern.of if isinstance(pattern, NM) else costs.numel()
        if size not in sums:
            ascending = costs.view(-1, size).double().sort(1).values
            sums[size] = torch.nn.functional.pad(ascending.cumsum(1).sum(0), (1, 0))
        count = size - pattern.keep if isinstance(pattern, NM) else num_pruned(size, pattern.sparsity)
        found.append(float(sums[size][count]))
    return found
