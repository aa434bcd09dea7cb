"""What travels of a private update: whole multiples of a unit, with discrete normal noise added to them.

    x -> trunc(x min(1, C / |x|) / u) + k         k integer, P(k) proportional to exp(-k^2 / (2 s^2)), s = sigma C / u

Truncation never makes a number longer, so the integers keep the bound C / u, and what is accounted for is, to the bit,
what is sent: no low bits of a float betray the sum (Mironov, CCS 2012). The noise obeys the same bound of concentrated
privacy as a normal one of that deviation (Canonne, Kamath and Steinke 2020, arXiv:2004.00010, theorem 14), and the sum
of several clients' shares differs from it by some exp(-2 pi^2 s^2) (Kairouz et al. 2021, arXiv:2102.06387): nothing,
with s of thousands.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Integers = NDArray[np.int64]

FINE = 1 << 16  # units in a deviation of the noise, of what is long
TAIL = 14  # deviations after which there is no more noise: 1e-43 of it
BITS = 256  # of a probability


def truncated(x: Tensor, factor: float, unit: float) -> Tensor:
    """trunc(x factor / unit): int64 in x's shape; what is not finite counts as 0."""
    scaled = (x.detach().to("cpu", torch.float64) * (factor / unit)).nan_to_num_(0.0, 0.0, 0.0)
    return scaled.trunc_().to(torch.int64)


def within(length: float, clip: float) -> float:
    """What a vector of that length is multiplied by to be no longer than `clip`; 0 where the length is no number."""
    if not np.isfinite(length):
        return 0.0
    return 1.0 if length <= clip else clip / length


def of_uniform(words: NDArray[np.uint64], deviation: int) -> Integers:
    """Discrete normal numbers of a deviation in whole units, one for each uniform word of 64 bits; int64.

    By inversion of the distribution function, cut to 64 bits: a draw's law is within 2^-63 a point of the exact one.
    ValueError: a deviation below 8, whose law is not nearly normal, or above 2^20.
    """
    if not 8 <= deviation <= 1 << 20:
        raise ValueError(f"a deviation of {deviation} units; between 8 and {1 << 20}")
    edges = _edges(deviation)
    return np.searchsorted(edges, words, side="right").astype(np.int64) - TAIL * deviation


@lru_cache(maxsize=4)
def _edges(deviation: int) -> NDArray[np.uint64]:
    """P(k <= j) for j from -TAIL s to TAIL s - 1, in units of 2^-64: uint64, ascending."""
    import mpmath

    one, reach = 1 << BITS, TAIL * deviation
    with mpmath.workprec(2 * BITS):
        first = int(mpmath.exp(mpmath.mpf(-1) / (2 * deviation**2)) * one)  # exp(-1 / 2 s^2): P(1) / P(0)
        square = int(mpmath.exp(mpmath.mpf(-1) / deviation**2) * one)
    weights, weight, ratio = [one], one, first
    for _ in range(reach):  # P(k + 1) / P(k) = exp(-(2 k + 1) / 2 s^2)
        weight = weight * ratio >> BITS
        ratio = ratio * square >> BITS
        weights.append(weight)
    total = weights[0] + 2 * sum(weights[1:])
    edges, below = np.empty(2 * reach, np.uint64), 0
    for place in range(2 * reach):
        below += weights[abs(place - reach)]
        edges[place] = min((below << 64) // total, (1 << 64) - 1)
    return edges
