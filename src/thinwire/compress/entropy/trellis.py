"""Trellis-coded quantisation: `bits` choose a path through states, and each state stands for `width` numbers.

A state is the last L bits; a step shifts k new bits in, and puts out the codeword of the new state. So each codeword of
`width` numbers costs k bits, k / width a number, and the encoder takes, out of all paths, the one nearest to the
numbers (Viterbi). With 2^12 states half a bit a number carries a Gaussian with 0.69 of its length, where a level a
number (EDEN) carries 0.56 and the rate-distortion bound is 0.71. See Marcellin and Fischer (1990), and QTIP (Tseng et
al., 2024), whose shift register this is; the codewords here are learnt from what is to be coded.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

STEPS = 4096
"""Steps of one path: the encoder keeps a byte for each step and predecessor."""


@njit(nogil=True, cache=True)
def _viterbi(x, book, norms, k, cost, least, choice, path):
    """The path nearest to x, float32 [steps, width], from state 0: its k new bits a step to path, uint8 [steps].

    book: float32 [width, states]; norms: |codeword|^2 [states]; room: cost, least float32 [states], choice uint8
    [steps, states >> k]. Of equal paths, the one through the lower predecessor.
    """
    states, width = book.shape[1], book.shape[0]
    fan = 1 << k
    few = states >> k
    cost[:] = np.float32(1e30)
    cost[0] = 0
    for t in range(path.size):
        row = choice[t]
        for p in range(few):
            least[p] = cost[p]
            row[p] = 0
        for h in range(1, fan):
            part = cost[h * few : (h + 1) * few]
            for p in range(few):
                if part[p] < least[p]:
                    least[p] = part[p]
                    row[p] = h
        lowest = np.float32(3e38)
        for p in range(few):
            lowest = min(lowest, least[p])
        for s in range(states):
            cost[s] = norms[s] + (least[s >> k] - lowest)
        for j in range(width):
            twice, line = np.float32(2) * x[t, j], book[j]
            for s in range(states):
                cost[s] -= twice * line[s]
    best = 0
    for s in range(states):
        if cost[s] < cost[best]:
            best = s
    shift = few
    s = best
    for t in range(path.size - 1, -1, -1):
        path[t] = s & (fan - 1)
        p = s >> k
        s = p + np.int64(choice[t, p]) * shift


@njit(nogil=True, cache=True)
def _states(path, k, mask, out):
    """The states that a path goes through, int32 [steps]."""
    s = 0
    for t in range(path.size):
        s = ((s << k) | path[t]) & mask
        out[t] = s


def encode(x: NDArray[np.float32], book: NDArray[np.float32], k: int) -> NDArray[np.uint8]:
    """The k new bits of each step, uint8 [n / width], for numbers x, float32 [n], n a multiple of the width.

    book: float32 [states, width], states a power of two above 2^k. Paths of STEPS steps, each from state 0.
    """
    states, width = book.shape
    rows = np.ascontiguousarray(x.reshape(-1, width))
    lines, norms = np.ascontiguousarray(book.T), np.square(book).sum(1).astype(np.float32)
    cost, least = np.empty(states, np.float32), np.empty(states >> k, np.float32)
    choice = np.empty((min(STEPS, len(rows)), states >> k), np.uint8)
    path = np.empty(len(rows), np.uint8)
    for low in range(0, len(rows), STEPS):
        part = slice(low, low + STEPS)
        _viterbi(rows[part], lines, norms, k, cost, least, choice, path[part])
    return path


def decode(path: NDArray[np.uint8], book: NDArray[np.float32], k: int) -> NDArray[np.float32]:
    """The numbers that the steps stand for, float32 [steps width]."""
    return book[walk(path, book.shape[0], k)].reshape(-1)


def walk(path: NDArray[np.uint8], states: int, k: int) -> NDArray[np.int32]:
    """The states that the steps lead to, int32 [steps]."""
    out = np.empty(path.size, np.int32)
    for low in range(0, path.size, STEPS):
        _states(path[low : low + STEPS], k, states - 1, out[low : low + STEPS])
    return out


def fit(
    x: NDArray[np.float32], book: NDArray[np.float32], k: int, rounds: int = 4, few: int = 8
) -> NDArray[np.float32]:
    """Codewords nearer to numbers like x, by turns of coding and averaging (Lloyd); float32 [states, width].

    A codeword that fewer than `few` of the rows of x take stays where it is.
    """
    book = book.copy()
    rows = x.reshape(-1, book.shape[1])
    for _ in range(rounds):
        taken = walk(encode(x, book, k), book.shape[0], k)
        count = np.bincount(taken, minlength=book.shape[0])
        for j in range(book.shape[1]):
            total = np.bincount(taken, rows[:, j], minlength=book.shape[0])
            book[:, j] = np.where(count >= few, total / np.maximum(count, 1), book[:, j])
    return book
