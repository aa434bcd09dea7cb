"""The CPU kernel of the Gaussian directions: bit-identical to `thinwire.perturb.philox`, in one sweep over the weights.

A tile of weights stays in cache while the loop runs over all seeds, and is written once. The generator fills a small
buffer with straight-line 64-bit arithmetic that the compiler turns into vector code; the table look-ups that follow are
scalar, and are what bounds the speed (the 256 KB table lives in the second-level cache).

Bit-identical for any thread count and on any CPU: no fast-math, no fused multiply-add, one order of sums an element.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from numba import njit
from numpy.typing import ArrayLike, NDArray

from thinwire.perturb.philox import BLOCK, MULTIPLIERS, ROUNDS, WEYL, check_address, check_seeds
from thinwire.perturb.table import quantiles

TILE_BLOCKS = 256
"""Blocks in a tile, a multiple of 32 and a power of two: it never straddles the carry into the counter's 2nd word."""
TILE = TILE_BLOCKS * BLOCK
CHUNK = 32 * TILE
"""Elements that a thread takes at a time; chunks begin at multiples of it from element 0 of the parameter."""
ALONE = 1 << 20
"""Elements times seeds below which a second thread takes more than it gives."""

# every integer in the kernel is uint64: numba turns a mix of signed and unsigned into float64
_M0, _M1 = np.uint64(MULTIPLIERS[0]), np.uint64(MULTIPLIERS[1])
_W0, _W1 = np.uint64(WEYL[0]), np.uint64(WEYL[1])
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(0xFFFF)
_16, _32, _48 = np.uint64(16), np.uint64(32), np.uint64(48)
_ROUNDS = np.uint64(ROUNDS)
_ZERO = np.float32(0)


@njit(inline="always")
def _round(c0, c1, c2, c3, k0, k1):
    """One Philox round; the upper halves of the words may hold rubbish, which the masks on c0 and c2 shed."""
    product0, product1 = _M0 * (c0 & _LOW), _M1 * (c2 & _LOW)
    return (product1 >> _32) ^ c1 ^ k0, product1, (product0 >> _32) ^ c3 ^ k1, product0


@njit(nogil=True, cache=True)
def _draw(block, blocks, high, pid, last, k0, k1, left, right):
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
        left[b], right[b] = (x[0] & _LOW) | (x[1] << _32), (x[2] & _LOW) | (x[3] << _32)
        left[b + half], right[b + half] = (y[0] & _LOW) | (y[1] << _32), (y[2] & _LOW) | (y[3] << _32)


@njit(nogil=True, cache=True)
def _fill(streams, key, out):
    """Each row of out, uint64 [streams, words]: the words of a stream's blocks, as `words` says."""
    k0, k1 = key & _LOW, key >> _32
    count = out.shape[1]
    blocks = (count + 1) // 2
    room = 32 * ((blocks + 31) // 32)
    left, right = np.empty(room, np.uint64), np.empty(room, np.uint64)
    for i in range(streams.size):
        _draw(np.uint64(0), blocks, np.uint64(0), streams[i] & _LOW, streams[i] >> _32, k0, k1, left, right)
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


@njit(nogil=True, cache=True)
def _add(left, right, blocks, coef, total, table):
    """total[e] += coef * z[e] over the drawn blocks."""
    for b in range(blocks):
        x, y, e = left[b], right[b], BLOCK * b
        total[e] += coef * table[x & _HALF]
        total[e + 1] += coef * table[(x >> _16) & _HALF]
        total[e + 2] += coef * table[(x >> _32) & _HALF]
        total[e + 3] += coef * table[x >> _48]
        total[e + 4] += coef * table[y & _HALF]
        total[e + 5] += coef * table[(y >> _16) & _HALF]
        total[e + 6] += coef * table[(y >> _32) & _HALF]
        total[e + 7] += coef * table[y >> _48]


@njit(nogil=True, cache=True)
def _add_and_write(left, right, coef, total, table, weight, out, scale):
    """out = scale * weight + (total + coef * z) for a whole tile: the weights stream in while look-ups wait."""
    for b in range(TILE_BLOCKS):
        x, y, e = left[b], right[b], BLOCK * b
        out[e] = scale * weight[e] + (total[e] + coef * table[x & _HALF])
        out[e + 1] = scale * weight[e + 1] + (total[e + 1] + coef * table[(x >> _16) & _HALF])
        out[e + 2] = scale * weight[e + 2] + (total[e + 2] + coef * table[(x >> _32) & _HALF])
        out[e + 3] = scale * weight[e + 3] + (total[e + 3] + coef * table[x >> _48])
        out[e + 4] = scale * weight[e + 4] + (total[e + 4] + coef * table[y & _HALF])
        out[e + 5] = scale * weight[e + 5] + (total[e + 5] + coef * table[(y >> _16) & _HALF])
        out[e + 6] = scale * weight[e + 6] + (total[e + 6] + coef * table[(y >> _32) & _HALF])
        out[e + 7] = scale * weight[e + 7] + (total[e + 7] + coef * table[y >> _48])


@njit(nogil=True, cache=True)
def _sweep(weight, out, start, key, pid, seeds, coefs, scale, table):
    """One sweep over weight and out, float32 [n] from element `start` of the parameter on; at least one seed."""
    k0, k1 = key & _LOW, key >> _32
    left, right = np.empty(TILE_BLOCKS, np.uint64), np.empty(TILE_BLOCKS, np.uint64)
    total = np.empty(TILE, np.float32)
    end, last = start + weight.size, seeds.size - 1
    position = start
    while position < end:
        stop = min(end, (position // TILE + 1) * TILE)
        block = position // BLOCK
        blocks = (stop + BLOCK - 1) // BLOCK - block
        low, high = np.uint64(block) & _LOW, np.uint64(block) >> _32
        total[: BLOCK * blocks] = _ZERO
        for k in range(last):
            _draw(low, blocks, high, pid, seeds[k], k0, k1, left, right)
            _add(left, right, blocks, coefs[k], total, table)
        _draw(low, blocks, high, pid, seeds[last], k0, k1, left, right)
        here, there = position - start, stop - start
        if there - here == TILE:
            _add_and_write(left, right, coefs[last], total, table, weight[here:there], out[here:there], scale)
        else:
            _add(left, right, blocks, coefs[last], total, table)
            skip = position - BLOCK * block
            for e in range(there - here):
                out[here + e] = scale * weight[here + e] + total[skip + e]
        position = stop


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    """The threads that help the calling one; started on first use and kept."""
    return ThreadPoolExecutor(workers, thread_name_prefix="thinwire-perturb")


# a forked child inherits the pool objects without their threads, and would wait for them for ever
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _threads_for(size: int, seeds: int) -> int:
    """How many threads share the work where nobody says: torch's, but one alone where there is little of it.

    torch's own threads spin for a while after each of its operations, and one of ours that wakes then has to wait.
    """
    return torch.get_num_threads() if size * seeds >= ALONE else 1


def _share(sweep: Callable[[int, int], None], start: int, size: int, threads: int) -> None:
    """sweep(low, high) over slices that make up 0 .. size, cut where start + low is a multiple of CHUNK."""
    if size <= CHUNK or threads <= 1:
        sweep(0, size)
        return
    # taking from the left of a deque is atomic, so the threads share it without a lock
    waiting = deque(range(start // CHUNK * CHUNK, start + size, CHUNK))

    def work() -> None:
        while True:
            try:
                chunk = waiting.popleft()
            except IndexError:
                return
            sweep(max(start, chunk) - start, min(start + size, chunk + CHUNK) - start)

    helpers = [_pool(threads - 1).submit(work) for _ in range(min(threads, len(waiting)) - 1)]
    try:
        work()
    finally:
        # even on an interrupt, do not return while a thread still writes
        waiting.clear()
        for helper in helpers:
            helper.result()


def _check_array(name: str, array: NDArray[np.float32]) -> None:
    if array.dtype != np.float32 or array.ndim != 1 or not array.flags.c_contiguous:
        raise ValueError(f"{name} must be contiguous float32 of one dimension, got {array.dtype} {array.shape}")


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
    """out = scale * weight + sum_k coefs[k] * z_{seeds[k]}, to the bit what `philox.accumulate` gives.

    weight, out: contiguous float32 [n]; out is weight itself or shares no memory with it. seeds: integers [k] below
    2^32; coefs: [k], rounded to float32, as is scale. `threads` defaults to
    torch's, or to one where there is little to do. ValueError on anything else.
    """
    _check_array("weight", weight)
    _check_array("out", out)
    check_address(run_key, pid, start)
    seeds, coefs = check_seeds(seeds), np.ascontiguousarray(coefs, dtype=np.float32)
    if weight.shape != out.shape:
        raise ValueError(f"weight has {weight.size} elements but out has {out.size}")
    if seeds.shape != coefs.shape:
        raise ValueError(f"{seeds.size} seeds but coefficients of shape {coefs.shape}")
    if seeds.size == 0:
        np.multiply(weight, np.float32(scale), out=out)
        return

    # numba compiles once more for every further type, and mixes uint64 and int64 into float64
    start = int(start)
    key, parameter, factor, table = np.uint64(run_key), np.uint64(pid), np.float32(scale), quantiles()
    threads = _threads_for(weight.size, seeds.size) if threads is None else threads

    def sweep(low: int, high: int) -> None:
        _sweep(weight[low:high], out[low:high], start + low, key, parameter, seeds, coefs, factor, table)

    _share(sweep, start, weight.size, threads)
