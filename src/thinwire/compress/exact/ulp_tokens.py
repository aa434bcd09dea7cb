"""The coded part of a chunk: tokens and their tables, factors, exponents and plain bits, there and back.

`ulp` describes the format. Each kernel that reads undoes the one before it that writes; what it reads may be any bytes.

The kernels see int64 only: a pattern less its `drop` lowest bits, which are 0 in all the chunk, has a sign bit above
`mask`, and its exponent above `mantissa` bits. Their inner loops call nothing that takes an array: numba counts
references there, and that takes ten times as long as the work.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from thinwire.compress.entropy.rans import BITS64, LOW, MASK, STEP, SYMBOLS, begin, ended, renew, take
from thinwire.compress.exact.ulp_forecast import EXPONENTS, LEVELS, RANK, foresee, sized

# Tables. First one for each exponent of the old weight and each certainty of the forecast: of tokens.
_ROW = EXPONENTS * LEVELS
SKEWED = _ROW + 2
"""The tables up to here expect small symbols, the FLAT ones after them nothing."""
_CROSSED = SKEWED  # one for the upper half of the new exponent, and one below each upper half
_FAR = _CROSSED + 17
_BEYOND = _FAR + 17
_FACTORS = _BEYOND + EXPONENTS
_WINDOW = _FACTORS + 2 * RANK
FLAT = _WINDOW + 1 - SKEWED
# Tokens: 0, +1, -1, ... +6, -6 cells, then these.
_NEAR, _CROSS, _UP, _DOWN = 6, 13, 14, 15
_WORD, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)


@njit(nogil=True, cache=True)
def _zigzag(value):
    return 2 * value - 1 if value > 0 else -2 * value


@njit(nogil=True, cache=True)
def _unzigzag(token):
    return (token + 1) >> 1 if token & 1 else -(token >> 1)


@njit(nogil=True, cache=True)
def _shift(exponent, pivot, mantissa):
    """log2 of the patterns in a cell: at most half a binade's worth, and the less the larger the weight."""
    return max(0, min(pivot - exponent, mantissa - 1))


@njit(nogil=True, cache=True)
def tokens(old, new, columns, drop, mask, mantissa, lowest, pivot, scales, lefts, right, thresholds, symbols, plain):
    """Fills symbols with 16 * table + symbol, and plain with bits; (symbols, bits).

    lefts int32 [rows, rank] and right int32 [rank, columns] are levels; plain is zero before.
    """
    rank, n, at, sizes = scales.size, 0, 0, np.empty(right.shape, np.int32)
    scaled, total, where = np.zeros(rank, np.int32), np.zeros(columns, np.int32), np.zeros(columns, np.int32)
    for c in range(rank):
        for j in range(columns):
            symbols[n] = 16 * (_FACTORS + 2 * c) + _zigzag(right[c, j])
            sizes[c, j] = sized(right[c, j])
            n += 1
    before = 1
    for row in range((old.size + columns - 1) // columns):
        low, high = row * columns, min(old.size, (row + 1) * columns)
        changed = 0
        for i in range(low, high):
            changed |= old[i] != new[i]
        symbols[n] = 16 * (_ROW + before) + changed
        n += 1
        before = changed
        if not changed:
            continue
        for c in range(rank):
            symbols[n] = 16 * (_FACTORS + 2 * c + 1) + _zigzag(lefts[row, c])
            n += 1
            scaled[c] = scales[c] * sized(lefts[row, c])
        foresee(old[low:high], drop, mask, mantissa, lowest, scaled, sizes, thresholds, total, where)
        for i in range(low, high):
            w = where[i - low]
            a, b = np.int64(old[i]) >> drop, np.int64(new[i]) >> drop
            table, fresh, value = w >> 1, 0, np.int64(0)
            bits = _shift((a & mask) >> mantissa, pivot, mantissa)
            if (a ^ b) < 0:
                symbols[n], fresh = 16 * table + _CROSS, _CROSSED
            else:
                # of two negative patterns the larger one is the smaller number; `where` knows of it
                k = (a - b if w & 1 else b - a) + ((1 << bits) >> 1)
                cell = k >> bits
                value = k & ((1 << bits) - 1)
                if abs(cell) <= _NEAR:
                    symbols[n] = 16 * table + _zigzag(cell)
                else:
                    symbols[n] = 16 * table + (_UP if cell > 0 else _DOWN)
                    n += 1
                    beyond = min(abs(cell) - _NEAR - 1, 15)
                    symbols[n] = 16 * (_BEYOND + table // LEVELS) + beyond
                    fresh = _FAR if beyond == 15 else 0
            n += 1
            if fresh:
                value, bits = b & mask, mantissa
                exponent = value >> mantissa
                symbols[n], symbols[n + 1] = 16 * fresh + (exponent >> 4), 16 * (fresh + 1) + exponent
                n += 2
            if bits:
                shifted = np.uint64(value & ((1 << bits) - 1)) << np.uint64(at & 31)
                plain[at >> 5] |= np.uint32(shifted & _WORD)
                plain[(at >> 5) + 1] |= np.uint32(shifted >> _32)
                at += bits
    return n, at


@njit(nogil=True, cache=True)
def weights(old, new, columns, drop, mask, mantissa, lowest, pivot, scales, thresholds, model, words, lanes, plain):
    """The inverse of `tokens`: fills new; False where the bytes are no chunk. plain ends with two words of padding."""
    counts, starts, left = model
    states = begin(words, lanes)
    rank, n, at, word, lanes = scales.size, 0, 0, 2 * lanes, lanes - 1
    scaled, total, where = np.zeros(rank, np.int32), np.zeros(columns, np.int32), np.zeros(columns, np.int32)
    right = np.zeros((rank, columns), np.int32)
    for c in range(rank):
        for j in range(columns):
            s, word = take(counts, starts, left, _FACTORS + 2 * c, words, states, n & lanes, word)
            right[c, j] = sized(_unzigzag(s))
            n += 1
    before = 1
    for row in range((old.size + columns - 1) // columns):
        low, high = row * columns, min(old.size, (row + 1) * columns)
        changed, word = take(counts, starts, left, _ROW + before, words, states, n & lanes, word)
        n += 1
        if changed > 1:
            return False
        before = changed
        if changed == 0:
            for i in range(low, high):
                new[i] = old[i]
            continue
        for c in range(rank):
            s, word = take(counts, starts, left, _FACTORS + 2 * c + 1, words, states, n & lanes, word)
            scaled[c] = scales[c] * sized(_unzigzag(s))
            n += 1
        foresee(old[low:high], drop, mask, mantissa, lowest, scaled, right, thresholds, total, where)
        for i in range(low, high):
            w = where[i - low]
            a = np.int64(old[i]) >> drop
            table, stage, cell, upper = np.uint32(w >> 1), 0, np.int64(0), np.int64(0)
            bits = _shift((a & mask) >> mantissa, pivot, mantissa)
            negative = a < 0
            # stage 0: a token; 1: how far beyond; 2 and 3: the halves of an exponent; 4: done with a new pattern
            while True:
                lane = np.uint32(n & lanes)
                x = states[lane]
                slot, u = np.uint32(x & MASK), np.uint32(0)
                if slot >= starts[table, 1]:
                    for t in range(1, SYMBOLS):
                        u += np.uint32(slot >= starts[table, t])
                start = starts[table, u]
                x = np.uint64(starts[table, u + np.uint32(1)] - start) * (x >> BITS64) + np.uint64(slot - start)
                if x < LOW:
                    x <<= _32
                    if word < words.size:
                        x |= np.uint64(words[word])
                    word += 1
                states[lane] = x
                counts[table, u] += np.uint32(STEP)
                left[table] -= 1
                if left[table] == 0:
                    renew(counts, starts, left, table)
                n += 1
                s = np.int64(u)
                if stage == 0:
                    if s < _CROSS:
                        cell = (s + 1) >> 1 if s & 1 else -(s >> 1)
                        break
                    if s == _CROSS:
                        negative = not negative
                        table, stage = np.uint32(_CROSSED), 2
                    else:
                        cell = np.int64(1 if s == _UP else -1)
                        table, stage = np.uint32(_BEYOND + (w >> 4)), 1
                elif stage == 1:
                    if s < 15:
                        cell *= s + _NEAR + 1
                        break
                    table, stage = np.uint32(_FAR), 2
                elif stage == 2:
                    upper = s
                    table, stage = np.uint32(np.int64(table) + 1 + s), 3
                else:
                    upper, stage, bits = 16 * upper + s, 4, mantissa
                    break
            value = np.int64(0)
            if bits:
                j = min(at >> 5, plain.size - 2)
                pair = np.uint64(plain[j]) | np.uint64(plain[j + 1]) << _32
                value = np.int64((pair >> np.uint64(at & 31)) & ((np.uint64(1) << np.uint64(bits)) - np.uint64(1)))
                at += bits
            if stage == 4:
                size = (upper << mantissa) | value
            else:
                k = (cell << bits) + value - ((1 << bits) >> 1)
                # `w` holds of the two patterns as they are, the magnitude is the other way round in a negative one
                step = -k if w & 1 else k
                size = (a & mask) + step
            if size < 0 or size > mask:
                return False
            new[i] = (size - mask - 1 if negative else size) << drop
    return ended(words, states, word) and (at + 31) >> 5 == plain.size - 2


@njit(nogil=True, cache=True)
def tokens_whole(new, drop, mask, mantissa, lowest, symbols, plain):
    """As `tokens`, of patterns by themselves: the exponent is coded, sign and mantissa are plain."""
    n, at = 0, 0
    for i in range(new.size):
        b = np.int64(new[i]) >> drop
        exponent = (b & mask) >> mantissa
        token = exponent - lowest
        if 0 <= token < 15:
            symbols[n] = 16 * _WINDOW + token
        else:
            symbols[n], symbols[n + 1] = 16 * _WINDOW + 15, 16 * _FAR + (exponent >> 4)
            symbols[n + 2] = 16 * (_FAR + 1) + exponent
            n += 2
        n += 1
        value = (b & ((1 << mantissa) - 1)) << 1 | (b < 0)
        shifted = np.uint64(value) << np.uint64(at & 31)
        plain[at >> 5] |= np.uint32(shifted & _WORD)
        plain[(at >> 5) + 1] |= np.uint32(shifted >> _32)
        at += mantissa + 1
    return n, at


@njit(nogil=True, cache=True)
def weights_whole(new, drop, mask, mantissa, lowest, model, words, lanes, plain):
    """The inverse of `tokens_whole`, as `weights`."""
    counts, starts, left = model
    states = begin(words, lanes)
    n, at, word, lanes, bits = 0, 0, 2 * lanes, lanes - 1, mantissa + 1
    for i in range(new.size):
        table, stage, exponent = np.uint32(_WINDOW), 0, np.int64(0)
        while True:
            lane = np.uint32(n & lanes)
            x = states[lane]
            slot, u = np.uint32(x & MASK), np.uint32(0)
            for t in range(1, SYMBOLS):
                u += np.uint32(slot >= starts[table, t])
            start = starts[table, u]
            x = np.uint64(starts[table, u + np.uint32(1)] - start) * (x >> BITS64) + np.uint64(slot - start)
            if x < LOW:
                x <<= _32
                if word < words.size:
                    x |= np.uint64(words[word])
                word += 1
            states[lane] = x
            counts[table, u] += np.uint32(STEP)
            left[table] -= 1
            if left[table] == 0:
                renew(counts, starts, left, table)
            n += 1
            s = np.int64(u)
            if stage == 0:
                if s < 15:
                    exponent = lowest + s
                    break
                table, stage = np.uint32(_FAR), 1
            elif stage == 1:
                exponent = 16 * s
                table, stage = np.uint32(_FAR + 1 + s), 2
            else:
                exponent += s
                break
        j = min(at >> 5, plain.size - 2)
        pair = np.uint64(plain[j]) | np.uint64(plain[j + 1]) << _32
        value = np.int64((pair >> np.uint64(at & 31)) & ((np.uint64(1) << np.uint64(bits)) - np.uint64(1)))
        at += bits
        size = (exponent << mantissa) | (value >> 1)
        if size > mask:
            return False
        new[i] = (size - mask - 1 if value & 1 else size) << drop
    return ended(words, states, word) and (at + 31) >> 5 == plain.size - 2
