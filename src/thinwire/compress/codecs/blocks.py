"""Numbers in 1 to 8 bits: a scale for every block of them, and a few levels that each number is rounded to.

Scales are bfloat16: updates of a fine-tuned model are near 1e-5, where a float16 scale has a digit left or none. Every
kernel here works in a fixed order, on one thread, without fused or reordered arithmetic: the same bytes and the same
decoded bits on every machine. Kernels leave Python's lock, so tensors may be coded by several threads at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from thinwire.compress.entropy.packing import check_key, elements, flatten, octets, pack, unpack
from thinwire.streams import words

CENTROIDS = {
    1: (0.7979,),
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1519),
    4: (0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326),
}
"""By bits: the positive levels of the quantiser of a standard Gaussian with the least squared error (Lloyd, Max)."""

TRIALS = (0.8, 0.9, 1.0, 1.15, 1.35)
"""Scales that a block tries, in units of its root mean square; and one more that puts its largest at the top level."""

TINY = 2.0**-100
"""A block with nothing this large is sent as zeros, so that no scale and no decoded number is denormal."""

EVEN = 5
"""Bits from which on levels are even: so many fit a block's own distribution as well as a Gaussian's."""

TILE = 1 << 16
"""About as many elements have their random words drawn at a time."""

Scales = NDArray[np.uint16]
Codes = NDArray[np.uint8]

_LARGEST = float(np.finfo(np.float32).max)
_MAGIC = np.float32(1.5 * 2**23)
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)


@njit(inline="always")
def _bfloat(value, limit, single):
    """The bits of the bfloat16 nearest to a value >= 0, at most `limit`; single: float32 [1], room to work in."""
    single[0] = min(value, _LARGEST)
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
def _to_signs(x, block, limit, scales, codes):
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
def _to_even_scales(x, block, top, limit, scales):
    """The scales that `_to_even_levels` finds, alone."""
    single = np.empty(1, np.float32)
    for b in range(scales.size):
        scales[b] = _even_scale(x[b * block : (b + 1) * block], top, limit, single)


@njit(nogil=True, cache=True)
def _to_even_levels(x, block, top, limit, scales, codes):
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
def _to_centroids(x, block, half, cuts, limit, scales, codes):
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
def _to_even_levels_at_random(x, draws, block, top, limit, scales, codes):
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
def _from_levels(codes, scales, block, levels, out):
    """out = levels[code] times the scale of the block."""
    single = np.empty(1, np.float32)
    for b in range(scales.size):
        part, code = out[b * block : (b + 1) * block], codes[b * block : (b + 1) * block]
        scale = _value(scales[b], single)
        for i in range(part.size):
            part[i] = levels[code[i]] * scale


@cache
def _levels(bits: int, even: bool) -> NDArray[np.float32]:
    """What the codes stand for, in units of the scale, ascending: float32 [2^bits], or [2^bits - 1] from 5 bits on."""
    if bits >= EVEN:
        top = 2 ** (bits - 1) - 1
        return np.arange(-top, top + 1, dtype=np.float32)
    if even:
        return np.arange(2**bits, dtype=np.float32) - np.float32((2**bits - 1) / 2)
    half = np.array((1.0,) if bits == 1 else CENTROIDS[bits], np.float32)
    return np.concatenate([-half[::-1], half])


@dataclass(frozen=True)
class Blocks:
    """Blockwise quantisation to `bits` (1, 2, 4 to 8) an element, with one bfloat16 scale for each `block` elements.

    8: the levels -127 .. 127 times max |x| / 127; 7, 6, 5: -63 .. 63, and so on. 4 and 2: the Lloyd-Max levels of a
    Gaussian at the scale, out of a few, that leaves the least squared error. 1: mean |x| times the sign (BitDelta,
    scaled signSGD). All these are biased: use them with error feedback, e <- x + e - decode(encode(x + e)).

    stochastic, for 2 bits and more: even levels from -max |x| to max |x| (255, ..., 16, 4 of them), and each number
    goes to one of its two neighbours at random so that E[decode] = x (QSGD with the largest for the norm). Draws have
    32 bits. A number above 2^127 may be cut by up to 1 %, so that no decoded one is infinite.

    Bytes: the scales, 16 bits each, little-endian; then the codes, `bits` each, the low bits of a byte first, the rest
    of the last byte zero. Blocks with nothing as large as 2^-100 have scale 0 and decode to zeros. Encoding and
    decoding give the same bits on every machine. Encoding what was decoded gives the same again with 5 to 8 bits and
    with 1; with 4 and 2 it may find another scale, and so may differ.
    """

    bits: int
    block: int = 128
    stochastic: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (1, 2, 4, 5, 6, 7, 8):
            raise ValueError(f"bits {self.bits} is not one of 1, 2, 4, 5, 6, 7, 8")
        if not 1 <= self.block <= 1 << 20:
            raise ValueError(f"block {self.block} is not in [1, 2**20]")
        if self.stochastic and self.bits == 1:
            raise ValueError("stochastic rounding takes at least 2 bits")

    @property
    def rate(self) -> float:
        """Bits an element, scales included."""
        return self.bits + 16 / self.block

    def size(self, count: int) -> int:
        """The bytes of `count` elements, exactly."""
        return 2 * -(-count // self.block) + -(-count * self.bits // 8)

    @property
    def levels(self) -> NDArray[np.float32]:
        """What the codes stand for, in units of the scale, ascending: float32 [2^bits], or one fewer."""
        return _levels(self.bits, self.stochastic)

    @property
    def _limit(self) -> int:
        """The bits of the largest scale at which every level is finite."""
        top = float(self.levels[-1])
        return int(np.array(_LARGEST / top, np.float32).view(np.uint32)) >> 16

    def encode(self, x: Tensor, key: int) -> bytes:
        """Float32 of any shape as `size` bytes; the key, in [0, 2^64), matters for stochastic rounding only.

        ValueError unless x is finite float32 on the CPU.
        """
        return self.join(*self.rounded(x, key))

    def decode(self, data: bytes | memoryview, shape: Sequence[int], key: int) -> Tensor:
        """The tensor back, float32 of that shape; ValueError for bytes that `encode` would not have made of one."""
        check_key(key)
        return self.values(*self.split(data, elements(shape)), shape)

    def rounded(self, x: Tensor, key: int) -> tuple[Scales, Codes]:
        """What `encode` finds before it is bytes: the scales, as bits of bfloat16, and a code below 2^bits for each x.

        The key and errors are those of `encode`.
        """
        check_key(key)
        flat = flatten(x)
        scales, codes = np.empty(-(-flat.size // self.block), np.uint16), np.empty(flat.size, np.uint8)
        if self.stochastic:
            self._draw_codes(flat, key, scales, codes)
        elif self.bits >= EVEN:
            _to_even_levels(flat, self.block, self.levels.size // 2, self._limit, scales, codes)
        elif self.bits == 1:
            _to_signs(flat, self.block, self._limit, scales, codes)
        else:
            half = np.array(CENTROIDS[self.bits], np.float32)
            _to_centroids(flat, self.block, tuple(half), tuple((half[1:] + half[:-1]) / 2), self._limit, scales, codes)
        return scales, codes

    def scales(self, x: Tensor) -> Scales:
        """Those of `rounded`, without the codes; for levels that are not drawn."""
        if self.bits < EVEN or self.stochastic:
            return self.rounded(x, 0)[0]
        flat = flatten(x)
        scales = np.empty(-(-flat.size // self.block), np.uint16)
        _to_even_scales(flat, self.block, self.levels.size // 2, self._limit, scales)
        return scales

    def join(self, scales: Scales, codes: Codes) -> bytes:
        """Scales and codes as bytes."""
        return scales.astype("<u2").tobytes() + pack(codes, self.bits).tobytes()

    def split(self, data: bytes | memoryview, count: int) -> tuple[Scales, Codes]:
        """The inverse for `count` codes; ValueError for another number of bytes, or bits after the last code."""
        body, split = octets(data), 2 * -(-count // self.block)
        if body.size != self.size(count):
            raise ValueError(f"{body.size} bytes for {count} elements, expected {self.size(count)}")
        return body[:split].view("<u2").astype(np.uint16), unpack(body[split:], self.bits, count)

    def _draw_codes(
        self, flat: NDArray[np.float32], key: int, scales: NDArray[np.uint16], codes: NDArray[np.uint8]
    ) -> None:
        """Stochastic rounding, tile by tile, each with the random words of a stream of its own."""
        top = (self.levels.size - 1) / 2
        blocks = max(1, TILE // self.block)
        for tile, low in enumerate(range(0, scales.size, blocks)):
            part = slice(low * self.block, (low + blocks) * self.block)
            draws = words(key, [tile], -(-flat[part].size // 2))[0]
            _to_even_levels_at_random(
                flat[part], draws, self.block, top, self._limit, scales[low : low + blocks], codes[part]
            )

    def values(self, scales: Scales, codes: Codes, shape: Sequence[int]) -> Tensor:
        """What scales and codes stand for, float32 of that shape; ValueError where one stands for nothing."""
        # above the limit are also all that are negative, infinite or not a number
        if int(scales.max(initial=0)) > self._limit:
            raise ValueError("a scale is negative, not finite or too large")
        levels = self.levels
        if int(codes.max(initial=0)) >= levels.size:
            raise ValueError("a code stands for no level")
        out = np.empty(codes.size, np.float32)
        _from_levels(codes, scales, self.block, levels, out)
        return torch.from_numpy(out).reshape(tuple(shape))
