"""Replay of low-rank directions on a CPU: w + sum_k c_k A_k B_k^T with factors of signs, by tables, not by products.

A word of the generator holds the signs of 32 seeds (`thinwire.perturb.sign_cpu`). For four seeds, a column's four signs
and the coefficients leave sixteen possible sums, one for each pattern of a row's four signs: a table of them serves all
rows. So 32 seeds cost an element eight look-ups, which lie side by side in a row, and eight additions, where a matrix
product takes 32 multiply-adds.

Bit-identical for any thread count and on any CPU: no fused multiply-add, one order of sums. For the four seeds 4 q to
4 q + 3 of a group, and the signs s_k = a_k b_k of an element,

    t_q   = (s_0 c_0 + s_1 c_1) + (s_2 c_2 + s_3 c_3)
    total = total + (((t_0 + t_1) + (t_2 + t_3)) + ((t_4 + t_5) + (t_6 + t_7)))     group by group, rank by rank
    out   = scale w + total

in float32, c_k = 0 for seeds that are not asked for, the coefficients of a seed that comes again added first.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from thinwire.perturb.matmul_replay import one_thread_each
from thinwire.perturb.philox import check_address, check_seeds
from thinwire.perturb.sign_cpu import BLOCK, GROUP, TILE_BLOCKS, coefficients, signs
from thinwire.streams import LOW, draw

ROWS, COLUMNS = 512, 192
"""Of a tile: its sums and the tables of a group lie in the second-level cache together."""
FOURS = GROUP // 4

# every integer in the kernels is uint64 or uint32: numba turns a mix of signed and unsigned into float64
_C = np.uint64(COLUMNS)
_15, _32 = np.uint64(15), np.uint64(32)
_S1, _S2, _S3, _S4, _S5, _S6, _S7 = (np.uint64(4 * q) for q in range(1, FOURS))
_T1, _T2, _T3, _T4, _T5, _T6, _T7 = (np.uint64(16 * q) for q in range(1, FOURS))
_BIT = np.uint32(1)


def reference(
    weight: NDArray[np.float32],
    run_key: int,
    pid: int,
    seeds: ArrayLike,
    coefs: ArrayLike,
    scale: float = 1.0,
    rank: int = 1,
) -> NDArray[np.float32]:
    """The specification of `accumulate`, slow: float32 [m, n]."""
    m, n = weight.shape
    groups, table = coefficients(check_seeds(seeds), np.asarray(coefs, np.float32))
    total = np.zeros((m, n), np.float32)
    for i in range(rank):
        for group, c in zip(groups.tolist(), table, strict=True):
            drawn = [signs(run_key, GROUP * group + k, pid, i * (m + n), m + n) for k in range(GROUP)]
            x = [c[k] * np.multiply.outer(z[:m], z[m:]) for k, z in enumerate(drawn)]
            t = [(x[4 * q] + x[4 * q + 1]) + (x[4 * q + 2] + x[4 * q + 3]) for q in range(FOURS)]
            total += ((t[0] + t[1]) + (t[2] + t[3])) + ((t[4] + t[5]) + (t[6] + t[7]))
    return np.float32(scale) * weight + total


@njit(nogil=True, cache=True)
def _words(out, start, key, pid, groups):
    """out: uint32 [groups, count], the words of elements start .. start + count for each group."""
    k0, k1 = key & LOW, key >> _32
    left, right = np.empty(TILE_BLOCKS, np.uint64), np.empty(TILE_BLOCKS, np.uint64)
    end, position, tile = start + out.shape[1], start, BLOCK * TILE_BLOCKS
    while position < end:
        stop = min(end, (position // tile + 1) * tile)
        block = position // BLOCK
        blocks = (stop + BLOCK - 1) // BLOCK - block
        low, high = np.uint64(block) & LOW, np.uint64(block) >> _32
        for g in range(groups.size):
            draw(low, blocks, high, pid, groups[g], k0, k1, left, right)
            for e in range(position, stop):
                word = right[e // BLOCK - block] if e & 2 else left[e // BLOCK - block]
                out[g, e - start] = (word >> (_32 * np.uint64(e & 1))) & LOW
        position = stop


@njit(nogil=True, cache=True)
def _tables(words, coefs, first, count, sums, table):
    """table[16 q + p, j]: what four seeds add to a row whose signs are the bits of p, in column first + j."""
    for q in range(FOURS):
        for k in range(4):
            bit, c, x = np.uint32(4 * q + k), coefs[4 * q + k], sums[k]
            for j in range(count):
                x[j] = c if (words[first + j] >> bit) & _BIT else -c
        x0, x1, x2, x3 = sums[0], sums[1], sums[2], sums[3]
        for p in range(4):
            s0, s1 = np.float32(2 * (p & 1) - 1), np.float32((p & 2) - 1)
            low, high = sums[4 + p], sums[8 + p]
            for j in range(count):
                low[j] = s0 * x0[j] + s1 * x1[j]
                high[j] = s0 * x2[j] + s1 * x3[j]
        for p in range(16):
            low, high, row = sums[4 + (p & 3)], sums[8 + (p >> 2)], table[16 * q + p]
            for j in range(count):
                row[j] = low[j] + high[j]


@njit(nogil=True, cache=True)
def _add(words, table, total):
    """Add to every row of total, flat [rows, COLUMNS], what its words pick of the tables, flat [128, COLUMNS]."""
    for i in range(words.size):
        w = np.uint64(words[i])
        b0, b1 = (w & _15) * _C, (_T1 + ((w >> _S1) & _15)) * _C
        b2, b3 = (_T2 + ((w >> _S2) & _15)) * _C, (_T3 + ((w >> _S3) & _15)) * _C
        b4, b5 = (_T4 + ((w >> _S4) & _15)) * _C, (_T5 + ((w >> _S5) & _15)) * _C
        b6, b7 = (_T6 + ((w >> _S6) & _15)) * _C, (_T7 + ((w >> _S7) & _15)) * _C
        at = np.uint64(i) * _C
        # all columns, also of a narrower tile, whose last ones nobody reads: a fixed length is faster
        for j in range(_C):
            total[at + j] += ((table[b0 + j] + table[b1 + j]) + (table[b2 + j] + table[b3 + j])) + (
                (table[b4 + j] + table[b5 + j]) + (table[b6 + j] + table[b7 + j])
            )


@njit(nogil=True, cache=True)
def _sweep(weight, out, rows, columns, coefs, scale):
    """Some rows of a matrix. rows, columns: uint32 [rank, groups, ...], the words of these rows and of all columns."""
    m, n = weight.shape
    total, table = np.empty((m, COLUMNS), np.float32), np.zeros((16 * FOURS, COLUMNS), np.float32)
    sums = np.empty((12, COLUMNS), np.float32)
    for low in range(0, n, COLUMNS):
        count = min(COLUMNS, n - low)
        total[:] = np.float32(0)
        for i in range(rows.shape[0]):
            for g in range(coefs.shape[0]):
                _tables(columns[i, g], coefs[g], low, count, sums, table)
                _add(rows[i, g], table.reshape(-1), total.reshape(-1))
        for r in range(m):
            for j in range(count):
                out[r, low + j] = scale * weight[r, low + j] + total[r, j]


def accumulate(
    weight: NDArray[np.float32],
    out: NDArray[np.float32],
    run_key: int,
    pid: int,
    seeds: ArrayLike,
    coefs: ArrayLike,
    scale: float = 1.0,
    rank: int = 1,
    start: int = 0,
    height: int | None = None,
) -> None:
    """out = scale * weight + sum_k coefs[k] A_k B_k^T, to the bit what `reference` gives.

    weight, out: contiguous float32 [rows, n], the rows from `start` on of a matrix with `height` (all of it where that
    is None); out is weight itself or shares no memory with it. seeds, coefs: [k]; the coefficients are to have
    1 / sqrt(rank) in them. ValueError where an address is out of its range.
    """
    rows, n = weight.shape
    m = rows if height is None else height
    check_address(run_key, pid, rank * (m + n))
    seeds, coefs = check_seeds(seeds), np.ascontiguousarray(coefs, np.float32)
    if seeds.size == 0:
        np.multiply(weight, np.float32(scale), out=out)
        return
    groups, table = coefficients(seeds, coefs)
    key, parameter, factor = np.uint64(run_key), np.uint64(pid), np.float32(scale)
    columns = np.empty((rank, groups.size, n), np.uint32)
    for i in range(rank):
        _words(columns[i], i * (m + n) + m, key, parameter, groups)

    def tile(first: int, size: int) -> None:
        last = min(first + size, rows)
        words = np.empty((rank, groups.size, last - first), np.uint32)
        for i in range(rank):
            _words(words[i], i * (m + n) + start + first, key, parameter, groups)
        _sweep(weight[first:last], out[first:last], words, columns, table, factor)

    # an even number of even tiles, whatever the threads: most matrices have few, and two threads then end together
    size = -(-rows // max(2, 2 * -(-rows // (2 * ROWS))))
    one_thread_each([partial(tile, first, size) for first in range(0, rows, size)])
