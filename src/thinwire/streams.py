"""Uniform words of numbered streams, by Philox4x32-10 of Random123 (Salmon et al., SC 2011): what all draws come from.

`perturb.philox` is the plain specification of the generator; the kernel here gives the same words.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

# every integer in the kernel is uint64: numba turns a mix of signed and unsigned into float64
_M0, _M1 = np.uint64(MULTIPLIERS[0]), np.uint64(MULTIPLIERS[1])
_W0, _W1 = np.uint64(WEYL[0]), np.uint64(WEYL[1])
LOW, HALF = np.uint64(0xFFFFFFFF), np.uint64(0xFFFF)
_16, _32, _48 = np.uint64(16), np.uint64(32), np.uint64(48)
_ROUNDS = np.uint64(ROUNDS)


@njit(inline="always")
def _round(c0, c1, c2, c3, k0, k1):
    """One Philox round; the upper halves of the words may hold rubbish, which the masks on c0 and c2 shed."""
    product0, product1 = _M0 * (c0 & LOW), _M1 * (c2 & LOW)
    return (product1 >> _32) ^ c1 ^ k0, product1, (product0 >> _32) ^ c3 ^ k1, product0


@njit(nogil=True, cache=True)
def draw(block, blocks, high, pid, last, k0, k1, left, right):
    """The words of `blocks` blocks, rounded up to 32: two of each block in left[b], two in right[b]; uint64."""
    # below 16 turns the compiler falls back to scalar code, which takes longer than the blocks that nobody wants
    half = np.uint64(16 * ((blocks + 31) // 32))
    for b in range(half):
        x = (block + b, high, pid, last)
        # a second block in between, because one alone leaves the CPU waiting for its multiplications
        y = (block + b + half, high, pid, last)
        for turn in range(_ROUNDS):
            r0, r1 = k0 + turn * _W0, k1 + turn * _W1
            x, y = _round(x[0], x[1], x[2], x[3], r0, r1), _round(y[0], y[1], y[2], y[3], r0, r1)
        left[b], right[b] = (x[0] & LOW) | (x[1] << _32), (x[2] & LOW) | (x[3] << _32)
        left[b + half], right[b + half] = (y[0] & LOW) | (y[1] << _32), (y[2] & LOW) | (y[3] << _32)


@njit(nogil=True, cache=True)
def _fill(streams, key, out):
    """Each row of out, uint64 [streams, words]: the words of a stream's blocks, as in `words`."""
    k0, k1 = key & LOW, key >> _32
    count = out.shape[1]
    blocks = (count + 1) // 2
    room = 32 * ((blocks + 31) // 32)
    left, right = np.empty(room, np.uint64), np.empty(room, np.uint64)
    for i in range(streams.size):
        draw(np.uint64(0), blocks, np.uint64(0), streams[i] & LOW, streams[i] >> _32, k0, k1, left, right)
        for w in range(count):
            out[i, w] = right[w // 2] if w % 2 else left[w // 2]


def words(key: int, streams: ArrayLike, count: int) -> NDArray[np.uint64]:
    """Uniform 64-bit words of numbered streams: uint64 [streams, count], the same on every machine.

    Words 2 b and 2 b + 1 of stream s are the words w0 + 2^32 w1 and w2 + 2^32 w3 of philox4x32 at the counter
    (b, 0, s mod 2^32, s div 2^32) under the 64-bit key. count is below 2^33, a stream's number below 2^64.
    """
    out = np.empty((len(np.asarray(streams)), count), np.uint64)
    _fill(np.ascontiguousarray(streams, dtype=np.uint64), np.uint64(key), out)
    return out
