"""Small symbols near their entropy: adaptive tables of 16 symbols, one for each context, coded by rANS.

What context a symbol has is known at both ends before it is coded, such as how large its neighbours are expected to be.
Bytes: little-endian words of 32 bits, as `rans.flush` leaves them.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from thinwire.compress.entropy import rans
from thinwire.compress.entropy.packing import octets


@njit(nogil=True, cache=True)
def _read(words, contexts, counts, starts, left, states, out):
    """The symbols under their contexts to out, uint8 [n]; the index of the next word."""
    lanes = states.size
    word, lane = 2 * lanes, 0
    for i in range(out.size):
        # `rans.take`, without a call
        c, x = contexts[i], states[lane]
        slot, s = np.uint32(x & rans.MASK), 0
        if slot >= starts[c, 1]:
            s = 8 * (slot >= starts[c, 8])
            s += 4 * (slot >= starts[c, s + 4])
            s += 2 * (slot >= starts[c, s + 2])
            s += slot >= starts[c, s + 1]
        start = starts[c, s]
        x = np.uint64(starts[c, s + 1] - start) * (x >> rans.BITS64) + np.uint64(slot - start)
        if x < rans.LOW:
            x <<= np.uint64(32)
            if word < words.size:
                x |= np.uint64(words[word])
            word += 1
        states[lane] = x
        lane = 0 if lane + 1 == lanes else lane + 1
        counts[c, s] += np.uint32(rans.STEP)
        left[c] -= 1
        if left[c] == 0:
            rans.renew(counts, starts, left, c)
        out[i] = s
    return word


def encode(symbols: NDArray[np.uint8], contexts: NDArray[np.uint8], tables: int) -> bytes:
    """Symbols below 16, uint8 [n], each under the table that its context below `tables` names, as bytes."""
    intervals = contexts.astype(np.uint32) << np.uint32(4) | symbols.astype(np.uint32)
    rans.model(intervals, *rans.tables(0, tables))
    out = np.empty(symbols.size // 2 + 4 * rans.LANES + 1, np.uint32)
    return out[rans.flush(intervals, rans.LANES, out) :].astype("<u4").tobytes()


def decode(data: bytes | memoryview, contexts: NDArray[np.uint8], tables: int) -> NDArray[np.uint8]:
    """The inverse; ValueError for bytes that `encode` would not have made under these contexts."""
    body = octets(data)
    if body.size % 4 or body.size < 8 * rans.LANES:
        raise ValueError(f"{body.size} bytes are no coded symbols")
    words, out = body.view("<u4").astype(np.uint32), np.empty(contexts.size, np.uint8)
    states = rans.begin(words, rans.LANES)
    word = _read(words, contexts, *rans.tables(0, tables), states, out)
    if not rans.ended(words, states, word):
        raise ValueError("coded symbols do not end where they should")
    return out
