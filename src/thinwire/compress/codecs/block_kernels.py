"""The kernels of `codecs.blocks`: in a fixed order, on one thread, the same bytes and bits on every machine."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

TRIALS = (0.8, 0.9, 1.0, 1.15, 1.35)
"""Scales that a block tries, in units of its root mean square; and one more that puts its largest at the top level."""

TINY = 2.0**-100
"""A block with nothing this large is sent as zeros, so that no scale and no decoded number is denormal."""

LARGEST = float(np.finfo(np.float32).max)
_MAGIC = np.float32(1.5 * 2**23)
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)


@njit(inline="always")
def _bfloat(value, limit, single):
    """The bits of the bfloat16 nearest to a value >= 0, at most `limit`; single: float32 [1], room to work in."""
    single[0] = min(value, LARGEST)
    word = single.view(np.uint32)[0]
    word = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.uint16(min(word, np.uint32(limit)))


@njit(inline="always")
def _value(code, single):
    """The float32 of a bfloat16's bits."""
    single.view(np.uint32)[0] = np.uint32(code) << np.uint32(16)
    return single[0]


@njit(inline="always")
def _largest(x):
    """max |x| of a block."""
    top = np.float32(0)
    for i in range(x.size):
        top = max(top, abs(x[i]))
    return top


@njit(nogil=True, cache=True)
def to_signs(x, block, limit, scales, codes):
    """1 bit: the sign, and mean |x|, which is the scale with the least squared error."""
    single = np.empty(1, np.float32)
    for b in range(scales.size):
        part, code = x[b * block : (b + 1) * block], codes[b * block : (b + 1) * block]
        total = 0.0
        if _largest(part) >= TINY:
            for i in range(part.size):
                total += abs(part[i])
        scales[b] = _bfloat(total / part.size, limit, single)
        for i in range(part.size):
            # a block of zeros takes the positive level, because 0 times the negative one would be -0.0
            code[i] = part[i] >= 0 if total > 0 else 1


@njit(inline="always")
def _even_scale(part, top, limit, single):
    """max |x| / top of a block, as a bfloat16's bits."""
    largest = _largest(part)
    return _bfloat(np.float64(largest) / top, limit, single) if largest >= TINY else np.uint16(0)


@njit(nogil=True, cache=True)
def to_even_scales(x, block, top, limit, scales):
    """The scales that `to_even_levels` finds, alone."""
    single = np.empty(1, np.float32)
    for b in range(scales.size):
        scales[b] = _even_scale(x[b * block : (b + 1) * block], top, limit, single)


@njit(nogil=True, cache=True)
def to_even_levels(x, block, top, limit, scales, codes):
    """The nearest of -top .. top times the scale max |x| / top."""
    single = np.empty(1, np.float32)
    for b in range(scales.size):
        part, code = x[b * block : (b + 1) * block], codes[b * block : (b + 1) * block]
        scales[b] = _even_scale(part, top, limit, single)
        scale, high = _value(scales[b], single), np.float32(top)
        if scale == 0:
            code[:] = top
            continue
        for i in range(part.size):
            # the sum has no room for a fraction: this rounds to the nearest, ties to even, and becomes vector code
            level = (part[i] / scale + _MAGIC) - _MAGIC
            code[i] = np.uint8(np.int32(min(max(level, -high), high)) + top)


@njit(nogil=True, cache=True)
def to_centroids(x, block, half, cuts, limit, scales, codes):
    """The nearest of the levels ±half times a scale, the best of those that the trials lead to.

    A trial scale rounds the block to q; then <x, q>^2 / <q, q> is what the best scale <x, q> / <q, q> leaves explained
    of |x|^2. Rounding again with that scale can only come nearer. half, cuts: tuples of float32, so that the loops over
    them are unrolled and the ones over the block become vector code.
    """
    single, positive = np.empty(1, np.float32), len(half)
    rounded = np.empty(min(block, x.size), np.float32)
    for b in range(scales.size):
        part, code = x[b * block : (b + 1) * block], codes[b * block : (b + 1) * block]
        largest = np.float64(_largest(part))
        if largest < TINY:
            scales[b] = 0
            code[:] = positive
            continue
        squares = 0.0
        for i in range(part.size):
            squares += np.float64(part[i]) * np.float64(part[i])
        rms, best, found = math.sqrt(squares / part.size), -1.0, 0.0
        for trial in range(len(TRIALS) + 1):
            scale = np.float32(rms * TRIALS[trial] if trial < len(TRIALS) else largest / half[-1])
            for i in range(part.size):
                magnitude, level = abs(part[i]), half[0]
                for j in range(len(cuts)):
                    level = half[j + 1] if magnitude >= cuts[j] * scale else level
                rounded[i] = level
            product, power = 0.0, 0.0
            for i in range(part.size):
                level = np.float64(rounded[i])
                product += np.float64(abs(part[i])) * level
                power += level * level
            if product * (product / power) > best:
                best, found = product * (product / power), product / power
        scales[b] = _bfloat(found, limit, single)
        scale = _value(scales[b], single)
        for i in range(part.size):
            magnitude, k = abs(part[i]), 0
            for j in range(len(cuts)):
                k += magnitude >= cuts[j] * scale
            code[i] = positive + k if part[i] >= 0 else positive - 1 - k


@njit(nogil=True, cache=True)
def to_even_levels_at_random(x, draws, block, top, limit, scales, codes):
    """One of the two nearest of -top .. top times the scale max |x| / top, the nearer one oftener: E[decoded] = x.

    top may be a half, the levels are whole steps apart. draws: uint64 [ceil(n / 2)], 32 bits for each number.
    """
    single = np.empty(1, np.float32)
    for b in range(scales.size):
        part, code = x[b * block : (b + 1) * block], codes[b * block : (b + 1) * block]
        largest = np.float64(_largest(part))
        if largest < TINY:
            scales[b] = 0
            code[:] = np.uint8(top + 0.5)
            continue
        word = np.int64(_bfloat(largest / top, limit, single))
        # rounded up, so that no number lies beyond the levels
        if np.float64(_value(word, single)) * top < largest and word < limit:
            word += 1
        scales[b] = word
        scale = np.float64(_value(word, single))
        for i in range(part.size):
            e = b * block + i
            draw = ((draws[e // 2] >> _32) if e % 2 else (draws[e // 2] & _LOW)) * 2.0**-32
            level = math.floor(part[i] / scale + top + draw)
            code[i] = np.uint8(min(max(level, 0.0), 2 * top))


@njit(nogil=True, cache=True)
def from_levels(codes, scales, block, levels, out):
    """out = levels[code] times the scale of the block."""
    single = np.empty(1, np.float32)
    for b in range(scales.size):
        part, code = out[b * block : (b + 1) * block], codes[b * block : (b + 1) * block]
        scale = _value(scales[b], single)
        for i in range(part.size):
            part[i] = levels[code[i]] * scale


@njit(nogil=True, cache=True)
def from_signs(packed, scales, block, out):
    """out, as the bits of float32, uint32 [n]: the scale of the block where a bit is set, else minus it.

    packed: uint8 [ceil(n / 8)], the low bits first; block: a multiple of 8.
    """
    for b in range(scales.size):
        part, code = out[b * block : (b + 1) * block], packed[b * block // 8 : (b + 1) * block // 8]
        scale, whole = np.uint32(scales[b]) << np.uint32(16), part.size // 8
        for j in range(whole):
            minus = ~np.uint32(code[j])
            for i in range(8):
                part[8 * j + i] = scale | (((minus >> np.uint32(i)) & np.uint32(1)) << np.uint32(31))
        for i in range(8 * whole, part.size):
            part[i] = scale | (((~np.uint32(code[whole]) >> np.uint32(i - 8 * whole)) & np.uint32(1)) << np.uint32(31))
