"""Symbols below 16, all alike in what is expected of them, near their entropy: rANS over a table that goes first.

Where all symbols are there before any is coded, their counts need not be learnt on the way: the table stays, and one
look at it decodes a symbol.

    shares   uint16 [16], how many of 2**TABLE slots each symbol has; nothing else is there where all symbols are 0
    words    little-endian, of 32 bits, as `rans.flush` leaves them
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from thinwire.compress.entropy import rans
from thinwire.compress.entropy.packing import octets

TABLE = 12
_SLOTS = 1 << TABLE
_MORE = np.uint32(rans.BITS - TABLE)  # the coder's own slots are finer
_16, _32 = np.uint32(16), np.uint64(32)
# of a slot's word: its symbol's share, where that symbol begins among the coder's slots, the symbol
_START, _SYMBOL = np.uint32(0xFFF0), np.uint32(15)


@njit(nogil=True, cache=True)
def _intervals(symbols, starts, shares, out):
    """In place of each symbol its interval, as `rans.model` has it."""
    for i in range(symbols.size):
        s = symbols[i]
        out[i] = (starts[s] << np.uint32(rans.BITS)) | shares[s]


@njit(nogil=True, cache=True)
def _read(words, slots, states, out):
    """The symbols to out, uint8 [n]; the index of the next word."""
    lanes = states.size - 1  # a power of two, less one
    word = states.size * 2
    for i in range(out.size):
        lane = i & lanes
        x = states[lane]
        low = x & rans.MASK
        slot = slots[low >> _MORE]
        x = np.uint64((slot >> _16) << _MORE) * (x >> rans.BITS64) + low - np.uint64(slot & _START)
        if x < rans.LOW:
            x <<= _32
            # past the end the word is 0; `rans.ended` sees it by the index
            if word < words.size:
                x |= np.uint64(words[word])
            word += 1
        states[lane] = x
        out[i] = slot & _SYMBOL
    return word


def encode(symbols: NDArray[np.uint8]) -> bytes:
    """Symbols below 16, uint8 [n], as bytes."""
    counts = np.bincount(symbols, minlength=rans.SYMBOLS)
    if not counts[1:].any():
        return b""
    shares = _shares(counts)
    starts = np.cumsum(shares) - shares
    intervals = np.empty(symbols.size, np.uint32)
    _intervals(symbols, (starts << _MORE).astype(np.uint32), (shares << _MORE).astype(np.uint32), intervals)
    out = np.empty(symbols.size // 2 + 4 * rans.LANES + 1, np.uint32)
    return shares.astype("<u2").tobytes() + out[rans.flush(intervals, rans.LANES, out) :].astype("<u4").tobytes()


def decode(data: bytes | memoryview, count: int) -> NDArray[np.uint8]:
    """The inverse, uint8 [count]; ValueError for bytes that `encode` would not have made."""
    body = octets(data)
    if not body.size:
        return np.zeros(count, np.uint8)
    head = 2 * rans.SYMBOLS
    if body.size % 4 or body.size < head + 8 * rans.LANES:
        raise ValueError(f"{body.size} bytes are no coded symbols")
    shares = body[:head].view("<u2").astype(np.uint32)
    if int(shares.sum()) != _SLOTS or shares.max() == _SLOTS:
        raise ValueError("the shares of coded symbols do not add up")
    symbols, starts = np.arange(rans.SYMBOLS, dtype=np.uint32), np.cumsum(shares, dtype=np.uint32) - shares
    slots = np.repeat(shares << _16 | starts << _MORE | symbols, shares)
    words, out = body[head:].view("<u4").astype(np.uint32), np.empty(count, np.uint8)
    states = rans.begin(words, rans.LANES)
    word = _read(words, slots, states, out)
    if not rans.ended(words, states, word):
        raise ValueError("coded symbols do not end where they should")
    return out


def _shares(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many slots each symbol has: about its share of the counts, none only where it does not occur, not all."""
    shares: NDArray[np.int64] = np.maximum(counts * _SLOTS // counts.sum(), counts > 0)
    best = int(counts.argmax())
    shares[best] += _SLOTS - shares.sum()
    if shares[best] == _SLOTS:
        shares[best], shares[0] = _SLOTS - 1, 1
    return shares
