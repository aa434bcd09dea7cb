"""The CPU kernel of the Gaussian directions: bit-identical to `thinwire.perturb.philox`, in one sweep over the weights.

A tile of weights stays in cache while the loop runs over all seeds, and is written once. The generator fills a small
buffer with straight-line 64-bit arithmetic that the compiler turns into vector code; the table look-ups that follow are
scalar, and are what bounds the speed (the 256 KB table lives in the second-level cache).

Bit-identical for any thread count and on any CPU: no fast-math, no fused multiply-add, one order of sums an element.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from thinwire.perturb.normal_table import quantiles
from thinwire.perturb.philox import BLOCK, check_address, check_pairs
from thinwire.streams import HALF, LOW, draw
from thinwire.threads import TILE, share, threads_for

TILE_BLOCKS = TILE // BLOCK  # a multiple of 32
_16, _32, _48 = np.uint64(16), np.uint64(32), np.uint64(48)
_ZERO = np.float32(0)


@njit(nogil=True, cache=True)
def _add(left, right, blocks, coef, total, table):
    """total[e] += coef * z[e] over the drawn blocks."""
    for b in range(blocks):
        x, y, e = left[b], right[b], BLOCK * b
        total[e] += coef * table[x & HALF]
        total[e + 1] += coef * table[(x >> _16) & HALF]
        total[e + 2] += coef * table[(x >> _32) & HALF]
        total[e + 3] += coef * table[x >> _48]
        total[e + 4] += coef * table[y & HALF]
        total[e + 5] += coef * table[(y >> _16) & HALF]
        total[e + 6] += coef * table[(y >> _32) & HALF]
        total[e + 7] += coef * table[y >> _48]


@njit(nogil=True, cache=True)
def _add_and_write(left, right, coef, total, table, weight, out, scale):
    """out = scale * weight + (total + coef * z) for a whole tile: the weights stream in while look-ups wait."""
    for b in range(TILE_BLOCKS):
        x, y, e = left[b], right[b], BLOCK * b
        out[e] = scale * weight[e] + (total[e] + coef * table[x & HALF])
        out[e + 1] = scale * weight[e + 1] + (total[e + 1] + coef * table[(x >> _16) & HALF])
        out[e + 2] = scale * weight[e + 2] + (total[e + 2] + coef * table[(x >> _32) & HALF])
        out[e + 3] = scale * weight[e + 3] + (total[e + 3] + coef * table[x >> _48])
        out[e + 4] = scale * weight[e + 4] + (total[e + 4] + coef * table[y & HALF])
        out[e + 5] = scale * weight[e + 5] + (total[e + 5] + coef * table[(y >> _16) & HALF])
        out[e + 6] = scale * weight[e + 6] + (total[e + 6] + coef * table[(y >> _32) & HALF])
        out[e + 7] = scale * weight[e + 7] + (total[e + 7] + coef * table[y >> _48])


@njit(nogil=True, cache=True)
def _sweep(weight, out, start, key, pid, seeds, coefs, scale, table):
    """One sweep over weight and out, float32 [n] from element `start` of the parameter on; at least one seed."""
    k0, k1 = key & LOW, key >> _32
    left, right = np.empty(TILE_BLOCKS, np.uint64), np.empty(TILE_BLOCKS, np.uint64)
    total = np.empty(TILE, np.float32)
    end, last = start + weight.size, seeds.size - 1
    position = start
    while position < end:
        stop = min(end, (position // TILE + 1) * TILE)
        block = position // BLOCK
        blocks = (stop + BLOCK - 1) // BLOCK - block
        low, high = np.uint64(block) & LOW, np.uint64(block) >> _32
        total[: BLOCK * blocks] = _ZERO
        for k in range(last):
            draw(low, blocks, high, pid, seeds[k], k0, k1, left, right)
            _add(left, right, blocks, coefs[k], total, table)
        draw(low, blocks, high, pid, seeds[last], k0, k1, left, right)
        here, there = position - start, stop - start
        if there - here == TILE:
            _add_and_write(left, right, coefs[last], total, table, weight[here:there], out[here:there], scale)
        else:
            _add(left, right, blocks, coefs[last], total, table)
            skip = position - BLOCK * block
            for e in range(there - here):
                out[here + e] = scale * weight[here + e] + total[skip + e]
        position = stop


def check_arrays(weight: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """ValueError unless both are contiguous float32 [n]."""
    for name, array in (("weight", weight), ("out", out)):
        if array.dtype != np.float32 or array.ndim != 1 or not array.flags.c_contiguous:
            raise ValueError(f"{name} must be contiguous float32 of one dimension, got {array.dtype} {array.shape}")
    if weight.shape != out.shape:
        raise ValueError(f"weight has {weight.size} elements but out has {out.size}")


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
    key, parameter, factor, table = np.uint64(run_key), np.uint64(pid), np.float32(scale), quantiles()
    threads = threads_for(weight.size, seeds.size) if threads is None else threads

    def sweep(low: int, high: int) -> None:
        _sweep(weight[low:high], out[low:high], start + low, key, parameter, seeds, coefs, factor, table)

    share(sweep, start, weight.size, threads)
