"""What is known of a change of weights before it is coded: how large it will be, and which way, more or less.

Both ends make the forecast (`foresee`): the exponent of the old weight gives the size of k, and the product of a few
factors, which travel as levels, gives its sign and how sure that is. The rest is the encoder's, and no part of the
format: how large k is at each exponent (`spread`, `window`), and the search for factors (`factors`), by orthogonal
iteration on the signs of k. Integers only, in float32 where their products are exact: the same factors everywhere.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

# The format's. There is a table of tokens for each exponent of the old weight and each certainty of the forecast.
EXPONENTS, LEVELS = 32, 8
RANK = 8
"""Factors of a forecast, at most; the encoder sends as many as pay."""
_THRESHOLDS = (0, 3, 6, 9, 12, 16, 24)  # between the levels of a forecast, in eighths of its mean size
_SIZES = np.array([0, 1, 2, 3, 4, 6, 9, 13, 18])
"""The size of each level of a factor, in steps: a few rows change far more than others. No encoder uses the last."""

# The encoder's.
SWEEPS, SAMPLED = 3, 1 << 14
"""How it looks for factors: times to and fro over rows with about so many changes, before once over all rows."""
JUDGED = 1 << 15
"""Weights that it looks at to judge what pays."""
_STEPS = 3, 1  # of a factor per root mean square, as a fraction


def thresholds(mean: int) -> NDArray[np.int32]:
    """Between the levels of a forecast, int32 [LEVELS - 1], given the mean size of the products."""
    return np.array([t * mean >> 3 for t in _THRESHOLDS], np.int32)


def spread(
    old: NDArray[np.signedinteger], new: NDArray[np.signedinteger], drop: int, mask: int, mantissa: int
) -> tuple[int, int]:
    """(lowest exponent with a table to itself, the exponent below which cells hold more than one pattern)."""
    counts, sums = _survey(old, new, drop, mask, mantissa)
    known = np.cumsum(counts)
    # where every sign changes nothing is counted
    lowest = min(255, int(np.searchsorted(known, max(1, int(known[-1]) >> 10))))
    votes: dict[int, int] = {}
    for exponent, (count, total) in enumerate(zip(counts.tolist(), sums.tolist(), strict=True)):
        shift = (total // max(count, 1)).bit_length() - 2
        # where it is as large as it can be, it does not show how large it ought to be
        if count and 0 < shift < mantissa - 1:
            votes[exponent + shift] = votes.get(exponent + shift, 0) + count
    half, pivot = sum(votes.values()) // 2, 0
    for pivot in sorted(votes):
        half -= votes[pivot]
        if half < 0:
            break
    return lowest, pivot


def window(new: NDArray[np.signedinteger], drop: int, mask: int, mantissa: int) -> int:
    """The first of the 15 exponents that hold most weights."""
    counts, _ = _survey(new, new, drop, mask, mantissa)
    return int(np.argmax(np.convolve(counts[:256], np.ones(15, np.int64))[14:256]))


def factors(
    old: NDArray[np.signedinteger], new: NDArray[np.signedinteger], columns: int
) -> tuple[list[int], NDArray[np.int32], NDArray[np.int32], int]:
    """(scales, left levels [rows, rank], right levels [rank, columns], mean forecast's size); rank 0 if none pays."""
    rows = old.size // columns
    none: tuple[list[int], NDArray[np.int32], NDArray[np.int32], int] = (
        [],
        np.zeros((rows, 0), np.int32),
        np.zeros((0, columns), np.int32),
        0,
    )
    if rows * columns != old.size or min(rows, columns) < 16:
        return none
    signs, places, changed = _signs(old.reshape(rows, columns), new.reshape(rows, columns))
    if min(places.size, columns) < RANK or places.size + columns > changed:
        return none
    # Products of small integers in float32 are exact, in whatever order they are added: rows and columns are at most
    # 2**16, and the vectors stay below 128. Orthogonal iteration, with integers in between.
    seed = np.arange(RANK * columns, dtype=np.int64).reshape(RANK, columns)
    basis = ((seed * 2654435761 >> 13 & 127) - 63).astype(np.float32)
    some = signs[:: 1 + changed // SAMPLED]
    for _ in range(SWEEPS):
        basis = _straighten(_straighten(basis @ some.T) @ some)
    right, across = _levels(_straighten(basis @ signs.T) @ signs)
    product = across.astype(np.float32) @ signs.T
    left, along = _levels(product)
    product = product.astype(np.int64)
    weight = [
        (int(x @ y) << 32) // max(1, int(x @ x) * int(z @ z)) for x, y, z in zip(along, product, across, strict=True)
    ]
    scales = [max(0, 255 * w // max(1, *weight)) for w in weight]
    rank, mean = _worth(signs, changed, left, right, np.array(scales)[:, None] * along, across)
    if rank == 0:
        return none
    lefts = np.zeros((rows, rank), np.int32)
    lefts[places] = left[:rank].T
    return scales[:rank], lefts, right[:rank].astype(np.int32), mean


def _levels(products: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(the level, -7 .. 7, with the nearest size; that size) of each element, in shares of its row's mean square."""
    vectors, (up, down) = products.astype(np.int64), _STEPS
    squares = [int(row @ row) // row.size for row in vectors]
    spreads = np.array([max(1, math.isqrt(square)) for square in squares], np.int64)[:, None]
    doubled = 2 * up * np.abs(vectors) // (down * spreads)
    levels = np.searchsorted(_SIZES[:7] + _SIZES[1:8], doubled, side="right")
    return np.sign(vectors) * levels, np.sign(vectors) * _SIZES[levels]


@njit(nogil=True, cache=True)
def foresee(old, drop, mask, mantissa, lowest, scaled, right, thresholds, total, out):
    """out[j] = 2 * table of the old weight j + whether its size is to shrink, int32 as all else here.

    scaled [rank] is the row's factors, right [rank, columns] the columns'; total [columns] is for scratch.
    """
    t0, t1, t2, t3 = thresholds[0], thresholds[1], thresholds[2], thresholds[3]
    t4, t5, t6 = thresholds[4], thresholds[5], thresholds[6]
    total[:] = np.int32(0)
    for c in range(scaled.size):
        factor, levels = scaled[c], right[c]
        for j in range(old.size):
            total[j] += np.int32(factor * levels[j])
    # all of it in int32, or half the lanes of the vector unit stay empty
    shift, cut, first = np.int32(drop), np.int32(mask), np.int32(lowest)
    bits, none, last = np.int32(mantissa), np.int32(0), np.int32(EXPONENTS - 1)
    for j in range(old.size):
        x, a = total[j], np.int32(old[j])
        size = np.int32(max(x, np.int32(-x)))
        level = np.int32(size > t0) + np.int32(size > t1) + np.int32(size > t2) + np.int32(size > t3)
        level += np.int32(size > t4) + np.int32(size > t5) + np.int32(size > t6)
        exponent = np.int32(min(max(np.int32(((a >> shift) & cut) >> bits) - first, none), last))
        out[j] = np.int32(16 * exponent) + np.int32(2 * level) + np.int32((x ^ a) < 0)


@njit(nogil=True, cache=True)
def sized(level):
    """The element of a factor at a level, -8 .. 8."""
    return _SIZES[level] if level >= 0 else -_SIZES[-level]


@njit(nogil=True, cache=True)
def _survey(old, new, drop, mask, mantissa):
    """Weights, and the sum of |k| where the sign stays, for each exponent of the old weight."""
    counts, sums = np.zeros(257, np.int64), np.zeros(257, np.int64)
    # a part is enough to know, and an odd stride falls on many columns
    for i in range(0, old.size, 1 + old.size // JUDGED * 2):
        a, b = np.int64(old[i]) >> drop, np.int64(new[i]) >> drop
        if (a ^ b) >= 0:
            exponent = min((a & mask) >> mantissa, 256)
            counts[exponent] += 1
            sums[exponent] += abs(a - b)
    return counts, sums


@njit(nogil=True, cache=True)
def _signs(old, new):
    """(signs of k in the rows that change, float32 [rows, columns], which rows, how many signs are not 0)."""
    rows, columns = old.shape
    places, n = np.empty(rows, np.int64), 0
    for i in range(rows):
        for j in range(columns):
            if old[i, j] != new[i, j]:
                places[n] = i
                n += 1
                break
    signs, changed = np.empty((n, columns), np.float32), 0
    for r in range(n):
        i = places[r]
        for j in range(columns):
            a, b = np.int64(old[i, j]), np.int64(new[i, j])
            a, b = a ^ ((a >> 63) & 0x7FFFFFFF), b ^ ((b >> 63) & 0x7FFFFFFF)
            signs[r, j] = int(b > a) - int(b < a)
            changed += a != b
    return signs, places[:n], changed


@njit(nogil=True, cache=True)
def _straighten(products):
    """Rows of integers below 2**24 made orthogonal, each to those before it, to 14 bits; float32 integers below 128."""
    vectors, out = np.empty(products.shape, np.int64), np.empty(products.shape, np.float32)
    columns = products.shape[1]
    for c in range(products.shape[0]):
        peak, square = np.int64(1), np.int64(0)
        for j in range(columns):
            vectors[c, j] = np.int64(products[c, j])
            peak = max(peak, abs(vectors[c, j]))
        # divided by multiplying: a division an element is most of the time that this takes
        scale = (np.int64(1) << 38) // peak
        for j in range(columns):
            vectors[c, j] = vectors[c, j] * scale >> 24
        for p in range(c):
            dot, norm = np.int64(0), np.int64(1)
            for j in range(columns):
                dot += vectors[c, j] * vectors[p, j]
                norm += vectors[p, j] * vectors[p, j]
            part = (dot << 14) // norm
            for j in range(columns):
                vectors[c, j] -= part * vectors[p, j] >> 14
        for j in range(columns):
            square += vectors[c, j] * vectors[c, j]
        # by a power of two, to a root mean square of 32 to 64
        root = np.int64(1)
        while root * root * 1024 * columns <= square:
            root *= 2
        for j in range(columns):
            out[c, j] = min(max(2 * vectors[c, j] // root, -127), 127)
    return out


@njit(nogil=True, cache=True)
def _log2(n):
    """log2 of an integer >= 1, in 1 / 256, downward."""
    whole = 0
    while n >> (whole + 1):
        whole += 1
    x, found = (n << 20) >> whole if whole <= 40 else n >> (whole - 20), whole
    for _ in range(8):
        x = x * x >> 20
        found *= 2
        if x >> 21:
            x >>= 1
            found += 1
    return found


@njit(nogil=True, cache=True)
def _bits(counts):
    """What it takes to code symbols of these counts, in bits / 256."""
    total, bits = np.int64(0), np.int64(0)
    for n in counts:
        total += n
        if n:
            bits -= n * _log2(n)
    return bits + total * _log2(max(total, 1))


@njit(nogil=True, cache=True)
def _worth(signs, changed, left, right, along, across):
    """(the rank at which factors save the most bits of sign less their own, the mean size of its forecasts)."""
    rows, columns = signs.shape
    step = 1 + max(signs.size // JUDGED, changed // (JUDGED // 4))
    best, rank, mean, own = np.int64(0), 0, np.int64(0), np.int64(0)
    forecasts = np.zeros(((rows + step - 1) // step, columns), np.int64)
    for c in range(left.shape[0]):
        tally = np.zeros((2, 16), np.int64)
        for j in range(columns):
            tally[0, right[c, j] + 8] += 1
        for i in range(rows):
            tally[1, left[c, i] + 8] += 1
        own += _bits(tally[0]) + _bits(tally[1])
        total, seen = np.int64(0), np.int64(0)
        for i in range(forecasts.shape[0]):
            for j in range(columns):
                forecasts[i, j] += along[c, step * i] * across[c, j]
            for j in range(columns):
                count = np.int64(signs[step * i, j] != 0)
                total += count * abs(forecasts[i, j])
                seen += count
        size = 1 + total // (seen + 1)
        hits = np.zeros((16, 2), np.int64)
        for i in range(forecasts.shape[0]):
            for j in range(columns):
                sign = signs[step * i, j]
                if sign != 0:
                    forecast = forecasts[i, j]
                    hits[min(15, abs(forecast) * 4 // size), np.int64((forecast > 0) == (sign > 0))] += 1
        saved = seen << 8
        for level in range(16):
            saved -= _bits(hits[level])
        # it depends on the size of k, too
        saved = saved * step * 5 // 4 - own
        if saved > best:
            best, rank, mean = saved, c + 1, size
    return rank, mean
