"""Top-k: of every chunk of an update only the largest elements, with their places coded near the entropy.

For error feedback: e <- x + e - decode(encode(x + e)). Without it, what is small is never sent. Keeping k of n elements
leaves at most (1 - k / n) |x|^2 unsent; chunks keep the selection local, its places short, and its memory small.

Kernels run on one thread and in a fixed order; the same bytes and the same decoded bits on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from thinwire.compress.codecs.blocks import Blocks
from thinwire.compress.entropy.packing import check_key, elements, flatten, octets

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_EXPONENT = np.uint16(0x7F80)
_LARGEST = np.uint32(0x7F7F)
_DIGITS = ((21, 10), (11, 10), (0, 11))
"""Shift and width of the three digits of a magnitude's 31 bits, the highest first."""


@njit(nogil=True, cache=True)
def _threshold(magnitudes, count, histogram):
    """The magnitude with rank `count`, and how many of its equals are among the largest `count`.

    A radix selection, always three sweeps: no input makes it slow. magnitudes: the float32 bits without the sign, whose
    order as integers is that of the numbers. histogram: int64 [2048], room to work in.
    """
    prefix, wanted = np.uint32(0), count
    above = np.uint32(31)
    for shift, width in _DIGITS:
        low, mask = np.uint32(shift), np.uint32((1 << width) - 1)
        histogram[:] = 0
        for i in range(magnitudes.size):
            word = magnitudes[i]
            if word >> above == prefix:
                histogram[(word >> low) & mask] += 1
        digit = mask
        while histogram[digit] < wanted:
            wanted -= histogram[digit]
            digit -= np.uint32(1)
        prefix, above = np.uint32((prefix << np.uint32(width)) | digit), low
    return prefix, wanted


@njit(nogil=True, cache=True)
def select(bits, count, places, histogram, magnitudes):
    """The places of the `count` largest magnitudes, ascending; of equals, the first. bits: float32 as uint32 [m]."""
    for i in range(bits.size):
        magnitudes[i] = bits[i] & _MAGNITUDE
    least, equals = _threshold(magnitudes[: bits.size], count, histogram)
    found = 0
    for i in range(bits.size):
        if magnitudes[i] > least:
            places[found] = i
            found += 1
        elif magnitudes[i] == least and equals > 0:
            places[found] = i
            found, equals = found + 1, equals - 1


@njit(nogil=True, cache=True)
def _remainder_bits(size, kept):
    """The bits of a gap that are sent as they are: the least r with 2^r >= size / (2 kept).

    2^r is then about 0.7 of the mean gap, where Rice's code of a geometric law is shortest.
    """
    r = 0
    while (2 * kept) << r < size:
        r += 1
    return r


@njit(inline="always")
def _write(out, at, value, width):
    """The low `width` bits of a value at bit `at` of out, which is zero from there on; the bit after them."""
    while width > 0:
        take = min(8 - (at & 7), width)
        out[at >> 3] |= (value & ((1 << take) - 1)) << (at & 7)
        value, at, width = value >> take, at + take, width - take
    return at


@njit(inline="always")
def _read(data, at, width):
    """The `width` bits at bit `at`, which the caller knows to be there."""
    value, done = 0, 0
    while done < width:
        take = min(8 - (at & 7), width - done)
        value |= ((np.int64(data[at >> 3]) >> (at & 7)) & ((1 << take) - 1)) << done
        at, done = at + take, done + take
    return value


@njit(nogil=True, cache=True)
def _gather(x, chunk, kept, last, values, out):
    """The kept elements of every chunk to values, their places to out, uint8 of zeros; returns the bits written.

    kept, last: how many of a whole chunk, and of the last one. A place is sent as its gap to the one before: gap div
    2^r as so many ones and a zero, then gap mod 2^r in r bits.
    """
    histogram, magnitudes = np.empty(2048, np.int64), np.empty(min(chunk, x.size), np.uint32)
    places = np.empty(max(kept, last), np.int64)
    at, sent = 0, 0
    for start in range(0, x.size, chunk):
        part = x[start : start + chunk]
        count = kept if start + chunk <= x.size else last
        select(part.view(np.uint32), count, places, histogram, magnitudes)
        r, following = _remainder_bits(part.size, count), 0
        for i in range(count):
            values[sent] = part[places[i]]
            gap = places[i] - following
            ones = gap >> r
            while ones > 0:
                at = _write(out, at, 255, min(ones, 8))
                ones -= 8
            at = _write(out, at + 1, gap, r)
            following, sent = places[i] + 1, sent + 1
    return at


@njit(nogil=True, cache=True)
def _scatter(data, values, chunk, kept, last, out):
    """The inverse: values to their places in out, float32 of zeros; the bits read, or -1 for what nobody encoded."""
    at, end, sent = 0, 8 * data.size, 0
    for start in range(0, out.size, chunk):
        part = out[start : start + chunk]
        count = kept if start + chunk <= out.size else last
        r, place = _remainder_bits(part.size, count), -1
        for _ in range(count):
            ones = 0
            while at < end and _read(data, at, 1) == 1:
                at, ones = at + 1, ones + 1
            if at + 1 + r > end or ones > part.size:
                return -1
            place += 1 + ((ones << r) | _read(data, at + 1, r))
            if place >= part.size:
                return -1
            at += 1 + r
            part[place] = values[sent]
            sent += 1
    return at


@dataclass(frozen=True)
class TopK:
    """The largest elements of every chunk: round(share m) of its m, but at least one, and their places.

    share is in (0, 1]. bits: of a value; 16 is bfloat16, and 8, 4 and 2 are `blocks.Blocks` with the values of one
    chunk as its block. Biased: use it with error feedback. Of equal magnitudes the first are kept. Where k of m
    are kept, at most half, their places take log2 C(m, k) bits and 1 to 6 % more if all are equally likely (at 1 % of
    4096, 1 %; 12-bit places 50 %, a bitmap under zstandard 34 %), and 14 % more at worst.

    Bytes: the values in the order of their places (16 bits: each little-endian; else as Blocks lays them out), then for
    every place its gap to the one before in the chunk in Rice's code, with the r of `_remainder_bits`: gap div 2^r
    ones, a zero, and gap mod 2^r in r bits; the low bits of a byte first, the rest of the last byte zero.
    """

    share: float
    chunk: int = 4096
    bits: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share {self.share} is not in (0, 1]")
        if not 1 <= self.chunk <= 1 << 20:
            raise ValueError(f"chunk {self.chunk} is not in [1, 2**20]")
        if self.bits not in (2, 4, 8, 16):
            raise ValueError(f"bits {self.bits} is not one of 2, 4, 8, 16")

    @property
    def rate(self) -> float:
        """Bits an element, scales included, of whole chunks in which every place is as likely as any other."""
        kept, r = self._kept(self.chunk), int(_remainder_bits(self.chunk, self._kept(self.chunk)))
        skipped = (1 - kept / self.chunk) ** (1 << r)
        place = 1 + r + skipped / (1 - skipped)
        return kept / self.chunk * (place + (16 if self.bits == 16 else self._codec.rate))

    def most(self, count: int) -> int:
        """A number of bytes that no encoding of `count` elements exceeds; what it takes depends on the places."""
        total, bits = 0, 0
        for size, chunks in self._chunks(count):
            kept = self._kept(size)
            r = int(_remainder_bits(size, kept))
            total, bits = total + chunks * kept, bits + chunks * (kept * (1 + r) + (size - kept >> r))
        return self._values_size(total) - (-bits // 8)

    def encode(self, x: Tensor, key: int) -> bytes:
        """Float32 of any shape as bytes; the key, in [0, 2^64), does not matter.

        ValueError unless x is finite float32 on the CPU.
        """
        check_key(key)
        flat = flatten(x)
        kept, last, total = self._counts(flat.size)
        values = np.empty(total, np.float32)
        places = np.zeros(self.most(flat.size) - self._values_size(total), np.uint8)
        used = _gather(flat, self.chunk, kept, last, values, places)
        return self._encode_values(values, key) + places[: -(-used // 8)].tobytes()

    def decode(self, data: bytes | memoryview, shape: Sequence[int], key: int) -> Tensor:
        """The tensor back, float32 of that shape, zero where nothing was sent; ValueError for bytes of no encoding."""
        check_key(key)
        count, body = elements(shape), octets(data)
        kept, last, total = self._counts(count)
        split = self._values_size(total)
        if not split <= body.size <= self.most(count):
            raise ValueError(f"{body.size} bytes for {count} elements, expected {split} to {self.most(count)}")
        values, places = self._decode_values(body[:split], total, key), body[split:]
        out = np.zeros(count, np.float32)
        used = _scatter(places, values, self.chunk, kept, last, out)
        if used < 0 or -(-used // 8) != places.size or (used % 8 and places[-1] >> used % 8):
            raise ValueError("the places of the kept elements do not fit their chunks")
        return torch.from_numpy(out).reshape(tuple(shape))

    @property
    def _codec(self) -> Blocks:
        return Blocks(self.bits, block=self._kept(self.chunk))

    def _kept(self, size: int) -> int:
        return max(1, round(self.share * size))

    def _chunks(self, count: int) -> tuple[tuple[int, int], ...]:
        """The sizes of chunks, and how many have each."""
        whole, rest = divmod(count, self.chunk)
        return ((self.chunk, whole), (rest, 1)) if rest else ((self.chunk, whole),)

    def _counts(self, count: int) -> tuple[int, int, int]:
        """Elements kept of a whole chunk, of the last one, and of all."""
        whole, rest = divmod(count, self.chunk)
        kept, last = self._kept(self.chunk), self._kept(rest) if rest else 0
        return kept, last, whole * kept + last

    def _values_size(self, total: int) -> int:
        return 2 * total if self.bits == 16 else self._codec.size(total)

    def _encode_values(self, values: NDArray[np.float32], key: int) -> bytes:
        if self.bits < 16:
            return self._codec.encode(torch.from_numpy(values), key)
        words = values.view(np.uint32)
        magnitudes = words & _MAGNITUDE
        # to the nearest, ties to even, and not to infinity
        rounded = np.minimum((magnitudes + 0x7FFF + (magnitudes >> 16 & 1)) >> 16, _LARGEST)
        found: NDArray[np.uint16] = (rounded | words >> 16 & 0x8000).astype("<u2")
        return found.tobytes()

    def _decode_values(self, data: NDArray[np.uint8], total: int, key: int) -> NDArray[np.float32]:
        if self.bits < 16:
            return self._codec.decode(data.data, (total,), key).numpy()
        words = data.view("<u2").astype(np.uint16)
        if ((words & _EXPONENT) == _EXPONENT).any():
            raise ValueError("a value is not finite")
        return (words.astype(np.uint32) << 16).view(np.float32)
