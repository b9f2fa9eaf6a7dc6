"""The power-law exponent of a matrix's spectrum, which AlphaPruning calls alpha (arXiv:2410.10912).

A well trained matrix has a heavy tail, and so a small exponent.
"""

import math

import torch
from torch import Tensor

BINS = 100
LEAST = torch.finfo(torch.float32).eps ** 2
"""Smallest eigenvalue as a share of the greatest. Values below are zeros, rounded in float32."""


def spectrum(weight: Tensor) -> Tensor:
    """The eigenvalues of W^T W for W (O, I) that are not zero, ascending, in float64 on the CPU."""
    values = torch.linalg.svdvals(weight.float()).cpu().double().square().flip(0)
    return values[values > LEAST * values[-1]]


def tail_exponent(spectrum: Tensor) -> float:
    """Hill's estimate, 1 + n / sum(log(l_i / l_min)) over the n eigenvalues from l_min on, with the best l_min.

    As in the authors' code, l_min is an eigenvalue near the peak of the histogram of log10 l. Candidates lie between
    log10(0.95 peak) and 1.5 peak; the lower bound is a logarithm there although eigenvalues are compared with it. The
    best one has the least Kolmogorov-Smirnov distance between tail and power law. The result is NaN without candidates.
    """
    if len(spectrum) < 2 or spectrum[0] == spectrum[-1]:
        return math.nan
    logs = spectrum.log10()
    low, high = float(logs[0]), float(logs[-1])
    counts = torch.histc(logs, BINS, low, high)
    peak = 10 ** (low + (high - low) * int(counts.argmax()) / BINS)
    near = (spectrum[:-1] >= math.log10(0.95 * peak)) & (spectrum[:-1] <= 1.5 * peak)
    best, exponent = math.inf, math.nan
    for i in near.nonzero().flatten().tolist():
        tail = spectrum[i:] / spectrum[i]
        candidate = float(1 + len(tail) / tail.log().sum())
        steps = torch.arange(len(tail), dtype=torch.float64) / len(tail)
        distance = float((1 - tail ** (1 - candidate) - steps).abs().max())
        if distance < best:
            best, exponent = distance, candidate
    return exponent
