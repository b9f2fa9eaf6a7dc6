"""Slow and obvious float64 answers that the tests compare with, and the random problems they are asked about."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from hypothesis import settings
from torch import Tensor

from mspc.published.criteria import CRITERIA
from mspc.solvers.obs import obs
from mspc.solvers.options import SolverOptions
from mspc.types import NM, Codes, CompressedLinear, GramStats, Pattern, Target, Unstructured

BLOCK = 128

torch.set_num_threads(1)  # on matrices this small, a hundred times as fast as threads that wait for a busy machine

few = settings(deadline=None, database=None, max_examples=40, derandomize=True)


@dataclass(frozen=True)
class Problem:
    weight: Tensor
    """(O, I) float32."""
    inputs: Tensor
    """(I, T) float32, correlated, of very different sizes."""
    stats: GramStats


def problem(seed: int, num_rows: int = 24, num_columns: int = 64, dead: Sequence[int] = ()) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    num_tokens = 4 * num_columns
    mixing = (
        torch.eye(num_columns) + 1.5 * torch.randn(num_columns, num_columns, generator=generator) / num_columns**0.5
    )
    sizes = torch.randn(num_columns, 1, generator=generator).exp()
    inputs = sizes * (mixing @ torch.randn(num_columns, num_tokens, generator=generator))
    inputs[list(dead)] = 0
    weight = torch.randn(num_rows, num_columns, generator=generator)
    return Problem(weight, inputs, GramStats(inputs @ inputs.T, num_tokens))


def damped(gram: Tensor, damp: float) -> Tensor:
    """H + damp mean(diag H) 1, with the mean over the inputs that are not dead; a dead input counts as average."""
    matrix = gram.double().clone()
    live = [j for j in range(len(gram)) if gram[j, j] > 0]
    mean = sum(float(gram[j, j]) for j in live) / len(live) if live else 1.0
    for j in range(len(gram)):
        matrix[j, j] = (1 + damp) * mean if j not in live else matrix[j, j] + damp * mean
    return matrix


def row_losses(difference: Tensor, gram: Tensor) -> Tensor:
    """|| difference X ||^2 of every row, (O,)."""
    difference = difference.double()
    return torch.stack([row @ gram.double() @ row for row in difference])


def loss(difference: Tensor, gram: Tensor) -> float:
    return float(row_losses(difference, gram).sum())


def least_squares(weight: Tensor, mask: Tensor, gram: Tensor) -> Tensor:
    """The best weights (O, I) that are zero outside the mask, row by row from the normal equations."""
    best = torch.zeros_like(weight, dtype=torch.float64)
    gram = gram.double()
    for row, (w, kept) in enumerate(zip(weight.double(), mask, strict=True)):
        if kept.any():
            best[row, kept] = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ w)
    return best


def drop_lowest(score: Tensor, count: int) -> Tensor:
    """Mask of any shape that drops the `count` lowest; of equal scores the later goes first."""
    flat = score.flatten().tolist()
    dropped = sorted(range(len(flat)), key=lambda i: (flat[i], -i))[:count]
    return torch.tensor([i not in set(dropped) for i in range(len(flat))]).view(score.shape)


def best_n_of_m(score: Tensor, pattern: NM) -> Tensor:
    """Mask (O, I): in every group, of all subsets of N the one with the highest sum (the first of equals)."""
    mask = torch.zeros_like(score, dtype=torch.bool)
    for row, scores in enumerate(score.tolist()):
        for start in range(0, len(scores), pattern.of):
            subsets = combinations(range(start, start + pattern.of), pattern.keep)
            mask[row, list(max(subsets, key=lambda subset: sum(scores[j] for j in subset)))] = True
    return mask


def score_of(criterion: str, weight: Tensor, diagonal: Tensor, inverse_diagonal: Tensor) -> Tensor:
    """The formulas of the papers, weight by weight."""
    size = weight.abs()
    return {
        "magnitude": lambda: size,
        "wanda": lambda: size * diagonal**0.5,
        "ria": lambda: (size / size.sum(0) + (size.T / size.sum(1)).T) * diagonal**0.25,
        "obs": lambda: weight**2 / inverse_diagonal,
        "isc": lambda: weight**2 * diagonal + weight**2 / inverse_diagonal,
    }[criterion]()


def textbook_obs(
    weight: Tensor,
    hessian: Tensor,
    pattern: Pattern,
    criterion: str = "isc",
    rounded: Callable[[Tensor, int], Tensor] = lambda column, j: column,
) -> tuple[Tensor, Tensor]:
    """Optimal brain surgeon, left to right: before every column the rows and columns of H already settled are deleted
    and the rest is inverted anew. `rounded(column, j)` puts kept weights on a grid. Returns weight and mask (O, I)."""
    weight, hessian = weight.double().clone(), hessian.double()
    num_rows, num_columns = weight.shape
    mask = torch.ones_like(weight, dtype=torch.bool)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(num_columns)]
    first = torch.stack([inverse[0, 0] for inverse in inverses])
    pruned = 0
    for j in range(num_columns):
        if isinstance(pattern, Unstructured) and j % BLOCK == 0:
            stop = min(j + BLOCK, num_columns)
            total = round(weight.numel() * pattern.sparsity)
            count = total * stop // num_columns - pruned
            score = score_of(criterion, weight[:, j:stop], hessian.diagonal()[j:stop], first[j:stop])
            if criterion in ("wanda", "ria"):
                shares = [count * (row + 1) // num_rows - count * row // num_rows for row in range(num_rows)]
                mask[:, j:stop] = torch.stack([drop_lowest(*pair) for pair in zip(score, shares, strict=True)])
            else:
                mask[:, j:stop] = drop_lowest(score, count)
            pruned += count
        if isinstance(pattern, NM) and j % pattern.of == 0:
            group = slice(j, j + pattern.of)
            score = score_of(criterion, weight[:, group], hessian.diagonal()[group], first[group])
            mask[:, group] = best_n_of_m(score, pattern)
        settled = rounded(weight[:, j], j) * mask[:, j]
        error = (weight[:, j] - settled) / inverses[j][0, 0]
        weight[:, j:] -= error[:, None] * inverses[j][0]
        weight[:, j] = settled
    return weight, mask


def code_product(codes: Codes) -> Tensor:
    """(values - zeros) * scales in Python arithmetic, weight by weight, (O, I) float64."""
    size = codes.values.shape[1] // codes.scales.shape[1]
    rows = [
        [(v - zeros[j // size]) * scales[j // size] for j, v in enumerate(values)]
        for values, scales, zeros in zip(
            codes.values.tolist(), codes.scales.tolist(), codes.zeros.tolist(), strict=True
        )
    ]
    return torch.tensor(rows, dtype=torch.float64)


def run_obs(case: Problem, target: Target | Pattern, criterion: str = "isc", **options) -> CompressedLinear:
    target = target if isinstance(target, Target) else Target(target)
    return obs(case.weight, case.stats, target, SolverOptions(criterion=CRITERIA[criterion], **options), "q_proj")


def divides(pattern: Pattern, num_columns: int) -> bool:
    return not isinstance(pattern, NM) or num_columns % pattern.of == 0


def is_n_of_m(mask: Tensor, pattern: NM) -> bool:
    return bool((mask.reshape(len(mask), -1, pattern.of).sum(2) == pattern.keep).all())
