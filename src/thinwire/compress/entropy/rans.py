"""An entropy coder over adaptive tables of 16 symbols: rANS, its states interleaved, integers only.

Every table counts the symbols coded under it and turns the counts into frequencies from time to time, the decoder at
the same places as the encoder: no table travels. rANS decodes in the reverse order of encoding, so the encoder first
runs forward through the model, keeps the interval of every symbol (`model`), and then codes the intervals backward
(`flush`). Symbol i goes through state i mod lanes: the states do not wait for each other.

What is uniform goes as plain bits into a second stream. Both are little-endian words of 32 bits. A reader that runs
out of words goes on with zeros, and its cursor shows it; no index leaves an array, whatever the bytes are.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

SYMBOLS = 16
BITS = 16
"""The frequencies of a table add up to 2**BITS, and none is 0."""
LANES = 4
STEP = 32
"""What one symbol adds to its count; the counts begin with a few of these, shared out by `_PRIOR`."""
LIMIT = STEP << 16
"""A table whose counts pass this is halved: what lies far back counts less."""

_PRIOR = (24, 8, 8, 4, 4, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1)
_FLAT = (8,) * SYMBOLS
LOW = np.uint64(1 << 31)
_32, BITS64, MASK = np.uint64(32), np.uint64(BITS), np.uint64((1 << BITS) - 1)
_TOP = np.uint64(31 + 32 - BITS)

Tables = tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.int32]]


def tables(skewed: int, flat: int) -> Tables:
    """Fresh tables: (counts uint32 [n, 16], starts uint32 [n, 17], symbols until the next renewal int32 [n]).

    The first `skewed` expect small symbols, the `flat` ones after them nothing.
    """
    counts = np.empty((skewed + flat, SYMBOLS), np.uint32)
    counts[:skewed], counts[skewed:] = _PRIOR, _FLAT
    starts, left = np.zeros((skewed + flat, SYMBOLS + 1), np.uint32), np.ones(skewed + flat, np.int32)
    _renew_all(counts, starts, left)
    return counts, starts, left


@njit(nogil=True, cache=True)
def renew(counts, starts, left, c):
    """Frequencies from counts, and the next renewal after a quarter more symbols."""
    total, best = np.uint32(0), 0
    for s in range(SYMBOLS):
        total += counts[c, s]
        if counts[c, s] > counts[c, best]:
            best = s
    if total > LIMIT:
        total = np.uint32(0)
        for s in range(SYMBOLS):
            counts[c, s] = (counts[c, s] + np.uint32(1)) >> np.uint32(1)
            total += counts[c, s]
    room, position = np.uint64((1 << BITS) - SYMBOLS), np.uint32(0)
    # what rounding leaves over goes to the most frequent symbol
    spare = np.uint32(1 << BITS)
    for s in range(SYMBOLS):
        spare -= np.uint32(np.uint64(1) + np.uint64(counts[c, s]) * room // np.uint64(total))
    for s in range(SYMBOLS):
        starts[c, s] = position
        position += np.uint32(np.uint64(1) + np.uint64(counts[c, s]) * room // np.uint64(total))
        if s == best:
            position += spare
    starts[c, SYMBOLS] = position
    left[c] = min(2048, 2 + int(total) // (4 * STEP))


@njit(nogil=True, cache=True)
def _renew_all(counts, starts, left):
    for c in range(left.size):
        renew(counts, starts, left, c)


@njit(nogil=True, cache=True)
def model(symbols, counts, starts, left):
    """In place of each 16 * table + symbol, uint32 [n], its interval: 2**BITS * start + size."""
    for i in range(symbols.size):
        c, s = symbols[i] >> np.uint32(4), symbols[i] & np.uint32(15)
        start = starts[c, s]
        symbols[i] = (start << np.uint32(BITS)) | (starts[c, s + np.uint32(1)] - start)
        counts[c, s] += np.uint32(STEP)
        left[c] -= 1
        if left[c] == 0:
            renew(counts, starts, left, c)


@njit(nogil=True, cache=True, error_model="numpy")
def flush(intervals, lanes, out):
    """Code the intervals backward into the END of out, uint32 [>= n / 2 + 4 lanes]; the index where they begin."""
    x = np.full(lanes, LOW, np.uint64)
    at = out.size
    for i in range(intervals.size - 1, -1, -1):
        lane = i % lanes
        start, size = np.uint64(intervals[i] >> np.uint32(BITS)), np.uint64(intervals[i]) & MASK
        state = x[lane]
        if state >= size << _TOP:
            at -= 1
            out[at] = np.uint32(state & np.uint64(0xFFFFFFFF))
            state >>= _32
        quotient = state // size
        x[lane] = (quotient << BITS64) + (state - quotient * size) + start
    for lane in range(lanes - 1, -1, -1):
        at -= 2
        out[at] = np.uint32(x[lane] & np.uint64(0xFFFFFFFF))
        out[at + 1] = np.uint32(x[lane] >> _32)
    return at


@njit(nogil=True, cache=True)
def begin(words, lanes):
    """The states, uint64 [lanes], at the start of words, uint32 [>= 2 lanes]; the first word after them is 2 lanes."""
    states = np.empty(lanes, np.uint64)
    for lane in range(lanes):
        states[lane] = np.uint64(words[2 * lane]) | np.uint64(words[2 * lane + 1]) << _32
    return states


@njit(nogil=True, cache=True)
def ended(words, states, word):
    """Whether a reader stands where the writer began: all words taken, all states at their first value."""
    good = word == words.size
    for lane in range(states.size):
        good = good and states[lane] == LOW
    return good


@njit(nogil=True, cache=True)
def take(counts, starts, left, c, words, states, lane, word):
    """The next symbol under table c from the state of `lane`; (symbol, index of the next word)."""
    # inner loops have a copy of these lines: numba counts references at a call with arrays, which takes far longer
    x = states[lane]
    slot, s = np.uint32(x & MASK), np.uint32(0)
    if slot >= starts[c, 1]:
        for t in range(1, SYMBOLS):
            s += np.uint32(slot >= starts[c, t])
    start = starts[c, s]
    x = np.uint64(starts[c, s + np.uint32(1)] - start) * (x >> BITS64) + np.uint64(slot - start)
    if x < LOW:
        # past the end the word is 0; `ended` sees it by the index
        x <<= _32
        if word < words.size:
            x |= np.uint64(words[word])
        word += 1
    states[lane] = x
    counts[c, s] += np.uint32(STEP)
    left[c] -= 1
    if left[c] == 0:
        renew(counts, starts, left, c)
    return np.int64(s), word
