"""From right guesses to epsilon: the bound of an audit in one run (Steinke, Nasr and Jagielski 2023, arXiv:2305.08846).

Of m canaries each was in or out by a fair coin. Somebody who sees what a run releases guesses r of them, and v guesses
are right. Were the run private of a row by epsilon and delta, with q = 1 / (1 + exp(-epsilon)),

    P[v or more are right] <= beta + 2 m delta alpha        beta = P[Bin(r, q) >= v]
                                                            alpha = max_i sum_{j=1..i} P[Bin(r, q) = v - j] / i
"""

from __future__ import annotations

import math

import numpy as np

LEVEL = 0.05  # how often a bound may be wrong
LARGEST = 64.0


def p_value(right: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """How probable so many right guesses are, at most, under epsilon and delta. ValueError: counts that cannot be."""
    if not 0 <= right <= guesses <= canaries:
        raise ValueError(f"{right} of {guesses} guesses are right about {canaries} canaries")
    rest = math.log1p(math.exp(-epsilon))
    yes, no = -rest, -epsilon - rest  # the logarithms of q and 1 - q
    masses = np.exp(
        [
            math.lgamma(guesses + 1) - math.lgamma(k + 1) - math.lgamma(guesses - k + 1) + k * yes + (guesses - k) * no
            for k in range(guesses + 1)
        ]
    )
    beta = float(masses[right:].sum())
    below = masses[:right][::-1].cumsum()  # of v - 1, then with v - 2, and so on
    alpha = float((below / np.arange(1, right + 1)).max()) if right else 0.0
    return min(1.0, beta + 2 * canaries * delta * alpha)


def bound(right: int, guesses: int, canaries: int, delta: float, level: float = LEVEL) -> float:
    """The largest epsilon that so many right guesses rule out, but for a share of `level` of all runs; 0: none."""
    low, high = 0.0, LARGEST
    if p_value(right, guesses, canaries, low, delta) > level:
        return 0.0
    for _ in range(48):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(right, guesses, canaries, middle, delta) <= level else (low, middle)
    return low
