"""Numbers in 1 to 8 bits: a scale for every block of them, and a few levels that each number is rounded to.

Scales are bfloat16: updates of a fine-tuned model are near 1e-5, where a float16 scale has a digit left or none. Every
kernel here works in a fixed order, on one thread, without fused or reordered arithmetic: the same bytes and the same
decoded bits on every machine. Kernels leave Python's lock, so tensors may be coded by several threads at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thinwire.compress.codecs.block_kernels import (
    LARGEST,
    from_levels,
    from_signs,
    to_centroids,
    to_even_levels,
    to_even_levels_at_random,
    to_even_scales,
    to_signs,
)
from thinwire.compress.entropy.packing import check_key, elements, flatten, octets, pack, unpack
from thinwire.streams import words

CENTROIDS = {
    1: (0.7979,),
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1519),
    4: (0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326),
}
"""By bits: the positive levels of the quantiser of a standard Gaussian with the least squared error (Lloyd, Max)."""

EVEN = 5
"""Bits from which on levels are even: so many fit a block's own distribution as well as a Gaussian's."""

TILE = 1 << 16
"""About as many elements have their random words drawn at a time."""

Scales = NDArray[np.uint16]
Codes = NDArray[np.uint8]


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
    """Blockwise quantisation to `bits` (1 to 8) an element, with one bfloat16 scale for each `block` elements.

    8: the levels -127 .. 127 times max |x| / 127; 7, 6, 5: -63 .. 63, and so on. 4, 3 and 2: the Lloyd-Max levels of a
    Gaussian at the scale, out of a few, that leaves the least squared error. 1: mean |x| times the sign (BitDelta,
    scaled signSGD). All these are biased: use them with error feedback, e <- x + e - decode(encode(x + e)).

    stochastic, for 2 bits and more: even levels from -max |x| to max |x| (255, ..., 16, 8, 4 of them), and each number
    goes to one of its two neighbours at random so that E[decode] = x (QSGD with the largest for the norm). Draws have
    32 bits. A number above 2^127 may be cut by up to 1 %, so that no decoded one is infinite.

    Bytes: the scales, 16 bits each, little-endian; then the codes, `bits` each, the low bits of a byte first, the rest
    of the last byte zero. Blocks with nothing as large as 2^-100 have scale 0 and decode to zeros. Encoding and
    decoding give the same bits on every machine. Encoding what was decoded gives the same again with 5 to 8 bits and
    with 1; with 4, 3 and 2 it may find another scale, and so may differ.
    """

    bits: int
    block: int = 128
    stochastic: bool = False

    def __post_init__(self) -> None:
        if self.bits not in range(1, 9):
            raise ValueError(f"bits {self.bits} is not one of 1 to 8")
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
        return int(np.array(LARGEST / top, np.float32).view(np.uint32)) >> 16

    def encode(self, x: Tensor, key: int) -> bytes:
        """Float32 of any shape as `size` bytes; the key, in [0, 2^64), matters for stochastic rounding only.

        ValueError unless x is finite float32 on the CPU.
        """
        return self.join(*self.rounded(x, key))

    def decode(self, data: bytes | memoryview, shape: Sequence[int], key: int) -> Tensor:
        """The tensor back, float32 of that shape; ValueError for bytes that `encode` would not have made of one."""
        check_key(key)
        count = elements(shape)
        if self.bits > 1 or self.block % 8:
            return self.values(*self.split(data, count), shape)
        self.largest(data, count)
        body, out = octets(data), np.empty(count, np.float32)
        scales = 2 * -(-count // self.block)
        from_signs(body[scales:], body[:scales].view("<u2"), self.block, out.view(np.uint32))
        return torch.from_numpy(out).reshape(tuple(shape))

    def largest(self, data: bytes | memoryview, count: int) -> float:
        """The largest magnitude that these bytes of `count` elements can decode to, without decoding them.

        ValueError where `decode` raises it, but for codes of 5 to 8 bits that stand for nothing.
        """
        body, last = octets(data), count * self.bits % 8
        if body.size != self.size(count):
            raise ValueError(f"{body.size} bytes for {count} elements, expected {self.size(count)}")
        if last and body[-1] >> last:
            raise ValueError("a bit is set after the last code")
        scales = body[: 2 * -(-count // self.block)].view("<u2")
        top = int(scales.max(initial=0))
        if top > self._limit:
            raise ValueError("a scale is negative, not finite or too large")
        return float(np.array(top << 16, np.uint32).view(np.float32) * self.levels[-1])

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
            to_even_levels(flat, self.block, self.levels.size // 2, self._limit, scales, codes)
        elif self.bits == 1:
            to_signs(flat, self.block, self._limit, scales, codes)
        else:
            half = np.array(CENTROIDS[self.bits], np.float32)
            to_centroids(flat, self.block, tuple(half), tuple((half[1:] + half[:-1]) / 2), self._limit, scales, codes)
        return scales, codes

    def scales(self, x: Tensor) -> Scales:
        """Those of `rounded`, without the codes; for levels that are not drawn."""
        if self.bits < EVEN or self.stochastic:
            return self.rounded(x, 0)[0]
        flat = flatten(x)
        scales = np.empty(-(-flat.size // self.block), np.uint16)
        to_even_scales(flat, self.block, self.levels.size // 2, self._limit, scales)
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
            to_even_levels_at_random(
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
        from_levels(codes, scales, self.block, levels, out)
        return torch.from_numpy(out).reshape(tuple(shape))
