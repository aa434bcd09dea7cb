"""The sign directions: every element +1 or -1, of one random bit. A run's record depends on this law; it is frozen.

Element e of the direction of seed s for the parameter with id p, in a run with the 64-bit key r:

    block   = e // 4
    key     = (r mod 2^32, r div 2^32)
    counter = (block mod 2^32, block div 2^32, p, s // 32)
    w       = word e mod 4 of philox4x32(counter, key)
    z       = +1 if bit s mod 32 of w is set, else -1

One word serves 32 seeds, a group. Replay adds a group eight seeds at a time, by tables: `reference` has the order.
The kernels give the same bits for any thread count and on any CPU, as those of `thinwire.perturb.gaussian_cpu` do.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from thinwire.perturb.gaussian_cpu import check_arrays
from thinwire.perturb.philox import check_address, check_pairs, check_seeds, philox4x32
from thinwire.streams import LOW, draw
from thinwire.threads import TILE, share, threads_for

BLOCK = 4
"""Elements drawn from one block of four 32-bit words."""
GROUP = 32
"""Seeds that share a word."""
TILE_BLOCKS = TILE // BLOCK
MATRIX_BLOCKS = 64
"""Blocks of which `matrix` keeps the words of all groups. As TILE_BLOCKS, a power of two and a multiple of 32."""

# every integer in the kernels is uint64: numba turns a mix of signed and unsigned into float64
_1, _2, _3, _4, _5, _6, _7, _8 = (np.uint64(i) for i in range(1, 9))
_16, _24, _32, _256, _512, _768 = (np.uint64(i) for i in (16, 24, 32, 256, 512, 768))
_BYTE = np.uint64(255)

_BYTES = ((np.arange(256)[:, None] >> np.arange(8) & 1) * 2 - 1).astype(np.float32).reshape(-1)
"""The eight signs that each byte stands for."""


def _words(run_key: int, group: int, pid: int, start: int, count: int) -> NDArray[np.uint32]:
    """The words of elements start .. start + count: uint32 [count]."""
    first, last = start // BLOCK, -(-(start + count) // BLOCK)
    blocks = np.arange(first, last, dtype=np.uint64)
    counter = np.empty((blocks.size, 4), dtype=np.uint32)
    counter[:, 0], counter[:, 1] = blocks & LOW, blocks >> _32
    counter[:, 2], counter[:, 3] = pid, group
    return philox4x32(counter, [run_key & 0xFFFFFFFF, run_key >> 32]).reshape(-1)[start - BLOCK * first :][:count]


def signs(run_key: int, seed: int, pid: int, start: int, count: int) -> NDArray[np.float32]:
    """Elements start .. start + count of direction `seed` for parameter `pid`: float32 [count].

    ValueError where an address is out of its range.
    """
    check_address(run_key, pid, start)
    check_seeds([seed])
    bits = _words(run_key, seed // GROUP, pid, start, count) >> np.uint32(seed % GROUP) & np.uint32(1)
    return np.where(bits == 1, np.float32(1), np.float32(-1))


def coefficients(
    seeds: NDArray[np.uint64], coefs: NDArray[np.float32]
) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
    """The groups of the seeds, ascending, and the coefficient of each of their seeds: float32 [groups, 32]."""
    groups, which = np.unique(seeds // GROUP, return_inverse=True)
    table = np.zeros((groups.size, GROUP), np.float32)
    np.add.at(table, (which, (seeds % GROUP).astype(np.int64)), coefs)
    return groups, table


def tables_of(seeds: NDArray[np.uint64], coefs: NDArray[np.float32]) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
    """The groups of the seeds, ascending [g], and their sums T [g, 4, 256]; without groups that add nothing."""
    with np.errstate(over="ignore", invalid="ignore"):
        groups, by_bit = coefficients(seeds, coefs)
        # a sum of zeros changes no total, which begins at +0.0 and so is never -0.0
        some = by_bit.any(axis=1)
        terms = by_bit[some].reshape(-1, 4, 8)
        tables = np.stack([-terms[..., 0], terms[..., 0]], axis=-1)
        for i in range(1, 8):
            tables = np.concatenate([tables - terms[..., i, None], tables + terms[..., i, None]], axis=-1)
    return groups[some], tables


def reference(
    weight: NDArray[np.float32],
    run_key: int,
    pid: int,
    seeds: ArrayLike,
    coefs: ArrayLike,
    scale: float = 1.0,
    start: int = 0,
) -> NDArray[np.float32]:
    """Replay: scale * weight + sum_k coefs[k] * z_{seeds[k]}, as float32 [n] for weight float32 [n] at element `start`.

    All is float32, and rounded after every product and every sum. c[i] is the coefficient of bit i of a group's word,
    +0.0 where no seed has that bit; a seed that comes several times has its coefficients summed in the given order.
    Byte b of the word, with the value v, stands for T_b[v] = (±c[8b] ±c[8b+1]) ±c[8b+2] ..., + where bit i of v is set.
    The sum begins at +0.0 and adds, group by group in ascending order, T_0[byte 0], T_1[byte 1], T_2[byte 2] and
    T_3[byte 3]. With no seeds nothing is added, so that weights of -0.0 survive an empty replay.
    """
    check_address(run_key, pid, start)
    seeds, coefs = check_pairs(seeds, coefs)
    scaled = weight.copy() if scale == 1 else np.float32(scale) * weight
    if seeds.size == 0:
        return scaled
    total = np.zeros(weight.size, dtype=np.float32)
    for group, table in zip(*tables_of(seeds, coefs), strict=True):
        words = _words(run_key, int(group), pid, start, weight.size)
        for b in range(4):
            total = total + table[b][words >> np.uint32(8 * b) & np.uint32(255)]
    return scaled + total


@njit(inline="always")
def _look(total, table, word):
    """total and the four sums that a word, below 2^32, stands for."""
    total = (total + table[word & _BYTE]) + table[_256 + ((word >> _8) & _BYTE)]
    return (total + table[_512 + ((word >> _16) & _BYTE)]) + table[_768 + (word >> _24)]


@njit(nogil=True, cache=True)
def _add(left, right, blocks, table, total):
    """total += the sums of a group over the drawn blocks; table: its four tables in a row."""
    for b in range(np.uint64(blocks)):
        x, y, e = left[b], right[b], _4 * b
        total[e], total[e + _1] = _look(total[e], table, x & LOW), _look(total[e + _1], table, x >> _32)
        total[e + _2], total[e + _3] = _look(total[e + _2], table, y & LOW), _look(total[e + _3], table, y >> _32)


@njit(nogil=True, cache=True)
def _put(left, right, blocks, pair, bit, total):
    """total = pair[the bit of each drawn word]."""
    for b in range(np.uint64(blocks)):
        x, y, e = left[b] >> bit, right[b] >> bit, _4 * b
        total[e], total[e + _1] = pair[x & _1], pair[(x >> _32) & _1]
        total[e + _2], total[e + _3] = pair[y & _1], pair[(y >> _32) & _1]


@njit(nogil=True, cache=True)
def _sweep(weight, out, start, key, pid, groups, tables, bit, scale):
    """One sweep over weight and out, float32 [n] from element `start` of the parameter on.

    tables: float32 [g, 1024]; or [1, 2] for a single seed, what bit number `bit` adds where it is 0 and where it is 1.
    """
    k0, k1 = key & LOW, key >> _32
    left, right = np.empty(TILE_BLOCKS, np.uint64), np.empty(TILE_BLOCKS, np.uint64)
    total = np.empty(TILE, np.float32)
    end, position = start + weight.size, start
    while position < end:
        stop = min(end, (position // TILE + 1) * TILE)
        block = position // BLOCK
        blocks = (stop + BLOCK - 1) // BLOCK - block
        low, high = np.uint64(block) & LOW, np.uint64(block) >> _32
        total[: BLOCK * blocks] = np.float32(0)
        for g in range(groups.size):
            draw(low, blocks, high, pid, groups[g], k0, k1, left, right)
            if tables.shape[1] == 2:
                _put(left, right, blocks, tables[g], bit, total)
            else:
                _add(left, right, blocks, tables[g], total)
        here, there = position - start, stop - start
        source, target, tile = weight[here:there], out[here:there], total[position - BLOCK * block :]
        # not straight to out: where out is weight itself, the compiler's vector code would not be taken
        for e in range(there - here):
            tile[e] = scale * source[e] + tile[e]
        for e in range(there - here):
            target[e] = tile[e]
        position = stop


def accumulate(
    weight: NDArray[np.float32],
    out: NDArray[np.float32],
    run_key: int,
    pid: int,
    seeds: ArrayLike,
    coefs: ArrayLike,
    scale: float = 1.0,
    start: int = 0,
    *,
    threads: int | None = None,
) -> None:
    """out = scale * weight + sum_k coefs[k] * z_{seeds[k]}, to the bit what `reference` gives.

    weight, out: contiguous float32 [n]; out is weight itself or shares no memory with it. seeds: integers [k] below
    2^32; coefs: [k], rounded to float32, as is scale. `threads` defaults to torch's, or to one where there is little
    to do. ValueError on anything else.
    """
    check_address(run_key, pid, start)
    check_arrays(weight, out)
    seeds, coefs = check_pairs(seeds, coefs)
    if seeds.size == 0:
        np.multiply(weight, np.float32(scale), out=out)
        return

    # numba compiles once more for every further type, and mixes uint64 and int64 into float64
    start = int(start)
    key, parameter, bit, factor = np.uint64(run_key), np.uint64(pid), seeds[0] % GROUP, np.float32(scale)
    if seeds.size == 1:
        # not -coefs: what a coefficient of zero adds is +0.0 either way
        groups, tables = seeds // GROUP, np.stack([0 - coefs, 0 + coefs], axis=1)
    else:
        groups, tables = tables_of(seeds, coefs)
        tables = tables.reshape(groups.size, 1024)

    def sweep(low: int, high: int) -> None:
        _sweep(weight[low:high], out[low:high], start + low, key, parameter, groups, tables, bit, factor)

    share(sweep, start, weight.size, threads_for(weight.size, seeds.size) if threads is None else threads)


@njit(inline="always")
def _expand(word, table, target, at):
    """The signs of the 32 bits of a word to target[at:]."""
    for _ in range(4):
        i = _8 * (word & _BYTE)
        # all loads before the stores, or the compiler must think that a store changes the table
        a, b, c, d = table[i], table[i + _1], table[i + _2], table[i + _3]
        e, f, g, h = table[i + _4], table[i + _5], table[i + _6], table[i + _7]
        target[at], target[at + _1], target[at + _2], target[at + _3] = a, b, c, d
        target[at + _4], target[at + _5], target[at + _6], target[at + _7] = e, f, g, h
        word, at = word >> _8, at + _8


@njit(nogil=True, cache=True)
def _fill(out, start, key, pid, groups, columns, whole, table):
    """One row of out for each element: all signs of the first `whole` groups, then those that `columns` picks.

    columns: uint64, counted over the 32 signs of every group in turn, each from group number `whole` on.
    """
    k0, k1 = key & LOW, key >> _32
    left, right = np.empty((groups.size, MATRIX_BLOCKS), np.uint64), np.empty((groups.size, MATRIX_BLOCKS), np.uint64)
    row = np.empty(GROUP * groups.size, np.float32)
    end, position, tile = start + out.shape[0], start, BLOCK * MATRIX_BLOCKS
    while position < end:
        stop = min(end, (position // tile + 1) * tile)
        block = position // BLOCK
        blocks = (stop + BLOCK - 1) // BLOCK - block
        low, high = np.uint64(block) & LOW, np.uint64(block) >> _32
        for g in range(groups.size):
            draw(low, blocks, high, pid, groups[g], k0, k1, left[g], right[g])
        for e in range(position, stop):
            words, b, shift = right if e & 2 else left, e // BLOCK - block, _32 * np.uint64(e & 1)
            target = out[e - start]
            for g in range(whole):
                _expand(words[g, b] >> shift, table, target, _32 * np.uint64(g))
            for g in range(whole, groups.size):
                _expand(words[g, b] >> shift, table, row, _32 * np.uint64(g))
            rest = target[GROUP * whole :]
            for k in range(columns.size):
                rest[k] = row[columns[k]]
        position = stop


def matrix(
    run_key: int, pid: int, seeds: ArrayLike, start: int, count: int, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """The directions as columns: float32 [count, k], entry [e, k] = element start + e of direction seeds[k].

    seeds: in any order, with any gaps; a range from a multiple of 32 on is the fastest. out: contiguous float32
    [count, k] to fill. ValueError where an address is out of its range, or on an out that does not fit.
    """
    check_address(run_key, pid, start)
    seeds = check_seeds(seeds)
    if out is None:
        out = np.empty((count, seeds.size), np.float32)
    elif out.dtype != np.float32 or out.shape != (count, seeds.size) or not out.flags.c_contiguous:
        raise ValueError(f"out must be contiguous float32 {(count, seeds.size)}, got {out.dtype} {out.shape}")
    groups, which = np.unique(seeds // GROUP, return_inverse=True)
    columns = which.astype(np.uint64) * GROUP + seeds % GROUP
    moved = np.flatnonzero(columns != np.arange(columns.size))
    whole = int(moved[0] if moved.size else columns.size) // GROUP
    if (columns[GROUP * whole :] < GROUP * whole).any():
        # a seed that comes again is copied from the row, which then has to hold its group
        whole = 0
    _fill(out, int(start), np.uint64(run_key), np.uint64(pid), groups, columns[GROUP * whole :], whole, _BYTES)
    return out
