"""EDEN: a random rotation makes any update look Gaussian, so that 0.5 to 4 bits an element carry it without bias.

Vargaftik et al., "EDEN: Communication-Efficient and Robust Distributed Mean Estimation for Federated Learning" (ICML
2022). The error is the same for every vector, and the errors of clients with different keys average out.

An update is cut into pieces of d elements, d a power of two, and each is coded by itself:

    z = R x,   R = H D2 H D1 / d        H: the Hadamard matrix of +1 and -1, [d, d]; D1, D2: random signs
    q = z sqrt(d) / |x|, each rounded to the nearest of the Lloyd-Max levels of a standard Gaussian
    S = |x|^2 / <q, z>,   decoded = S R^-1 q,   R^-1 = D1 H D2 H / d

Two rounds of signs and H, where EDEN's code has one: after one, the rotated (a, b, 0, 0, ...) takes only the values
±a ± b, whose signs are those of the larger alone, so that at 1 bit the smaller is lost under every key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, repeat

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from thinwire.compress.codecs.blocks import CENTROIDS
from thinwire.compress.entropy.packing import check_key, elements, flatten, octets, pack, unpack
from thinwire.streams import words

PIECE = 1 << 16
"""Elements of a full piece: 256 KB stay in the second-level cache, and the scale is 0.0005 bits an element."""
SMALLEST = 128
"""Elements of the smallest piece: in fewer the rotated numbers are not Gaussian enough, and the error grows."""

_LARGEST = np.float32(np.finfo(np.float32).max)
_1, _31 = np.uint64(1), np.uint32(31)


@njit(nogil=True, cache=True)
def _hadamard(v):
    """v <- H v in place, float32 [d], d a power of two >= 8; every output is one fixed tree of sums and differences."""
    for i in range(0, v.size, 8):
        u = v[i : i + 8]
        a, b, c, d = _four(u[0], u[1], u[2], u[3])
        e, f, g, h = _four(u[4], u[5], u[6], u[7])
        u[0], u[1], u[2], u[3] = a + e, b + f, c + g, d + h
        u[4], u[5], u[6], u[7] = a - e, b - f, c - g, d - h
    half = 8
    # two stages a sweep halve the traffic
    while 2 * half < v.size:
        for i in range(0, v.size, 4 * half):
            a, b = v[i : i + half], v[i + half : i + 2 * half]
            c, d = v[i + 2 * half : i + 3 * half], v[i + 3 * half : i + 4 * half]
            for j in range(half):
                a[j], b[j], c[j], d[j] = _four(a[j], b[j], c[j], d[j])
        half *= 4
    if half < v.size:
        a, b = v[:half], v[half:]
        for j in range(half):
            a[j], b[j] = a[j] + b[j], a[j] - b[j]


@njit(inline="always")
def _four(a, b, c, d):
    """Two stages on four numbers."""
    e, f, g, h = a + b, a - b, c + d, c - d
    return e + g, f + h, e - g, f - h


@njit(nogil=True, cache=True)
def _flip(bits, draws):
    """Change the sign of element e, given as float32 bits, uint32 [d], where bit e mod 64 of draws[e // 64] is set."""
    for w in range(draws.size):
        word, part = draws[w], bits[64 * w : 64 * w + 64]
        for j in range(64):
            part[j] ^= np.uint32((word >> np.uint64(j)) & _1) << _31


@njit(nogil=True, cache=True)
def rotate(x, draws, v):
    """v <- d R x / 2^e, float32 [d], for x [n <= d] and the e that puts max |x| in [2^(e-1), 2^e): |x|^2 / 4^e and 2^e.

    So scaled, nothing overflows or falls below what float32 holds. draws: uint64 [d / 32], the signs of D1 and of D2.
    """
    largest = np.float32(0)
    for i in range(x.size):
        largest = max(largest, abs(x[i]))
    exponent = math.frexp(largest)[1]
    factor, squares = math.ldexp(1.0, -exponent), 0.0
    for i in range(x.size):
        v[i] = x[i] * factor
        squares += np.float64(v[i]) * np.float64(v[i])
    v[x.size :] = 0
    bits, half = v.view(np.uint32), v.size // 64
    _flip(bits, draws[:half])
    _hadamard(v)
    _flip(bits, draws[half:])
    _hadamard(v)
    return squares, math.ldexp(1.0, exponent)


@njit(nogil=True, cache=True)
def _choose(v, picks):
    """v[p] <- v[2 p] or v[2 p + 1], the latter where bit p mod 64 of picks[p // 64] is set."""
    for p in range(v.size // 2):
        v[p] = v[2 * p + np.int64((picks[p // 64] >> np.uint64(p % 64)) & _1)]


@njit(nogil=True, cache=True)
def _spread(v, picks):
    """The inverse of `_choose` with 0 for what was not chosen: v float32 [d], of which the first half is given."""
    for p in range(v.size // 2 - 1, -1, -1):
        value, one = v[p], (picks[p // 64] >> np.uint64(p % 64)) & _1
        v[2 * p], v[2 * p + 1] = (np.float32(0), value) if one else (value, np.float32(0))


@njit(nogil=True, cache=True)
def _to_codes(v, unit, half, floors, rounded, codes):
    """The nearest of ±half to each v / unit, as codes in the levels' order; returns <rounded, v>.

    floors: where the levels begin, the first at 0. Both are tuples of float32, so that the loops over them are unrolled
    and the one over v becomes vector code.
    """
    positive, product = len(half), 0.0
    for i in range(codes.size):
        magnitude, level, k = abs(v[i]), half[0], -1
        for j in range(len(half)):
            above = magnitude >= floors[j] * unit
            level = half[j] if above else level
            k += above
        rounded[i] = level
        codes[i] = positive + k if v[i] >= 0 else positive - 1 - k
    for i in range(codes.size):
        product += np.float64(rounded[i]) * np.float64(abs(v[i]))
    return product


@njit(nogil=True, cache=True)
def rotate_back(v, draws, scale, out):
    """out <- scale R^-1 v, float32 [n <= d]; v, float32 [d], is spoilt. No result is infinite."""
    bits, half = v.view(np.uint32), v.size // 64
    _hadamard(v)
    _flip(bits, draws[half:])
    _hadamard(v)
    _flip(bits, draws[:half])
    # a power of two: the product is exact
    step = np.float32(1 / v.size)
    for i in range(out.size):
        out[i] = min(max((v[i] * step) * scale, -_LARGEST), _LARGEST)


def _bytes(d: int, bits: float) -> int:
    """The bytes of a piece of d elements."""
    return 4 + int(d * bits) // 8


@cache
def _sizes(rest: int, bits: float) -> tuple[int, ...]:
    """The pieces that carry `rest` elements, fewer than PIECE, in the fewest bytes: one padded, or two or more."""
    if rest == 0:
        return ()
    size = max(SMALLEST, 1 << (rest - 1).bit_length())
    if size == SMALLEST:
        return (size,)
    split = (size // 2, *_sizes(rest - size // 2, bits))
    return min((size,), split, key=lambda sizes: sum(_bytes(d, bits) for d in sizes))


def sum_over_pieces(count: int, bits: float, each: Callable[[int], int]) -> int:
    """The sum over the pieces of `count` elements of what one of d has."""
    whole, rest = divmod(count, PIECE)
    return whole * each(PIECE) + sum(map(each, _sizes(rest, bits)))


def pieces(count: int, bits: float, key: int) -> Iterator[tuple[slice, int, NDArray[np.uint64], NDArray[np.uint64]]]:
    """Each piece: where it lies, its size d, and the random words of its signs and, below 1 bit, of its picks."""
    whole, rest = divmod(count, PIECE)
    start = 0
    for piece, d in enumerate(chain(repeat(PIECE, whole), _sizes(rest, bits))):
        drawn = words(key, [piece], d // 32 + (d // 128 if bits < 1 else 0))[0]
        yield slice(start, min(start + d, count)), d, drawn[: d // 32], drawn[d // 32 :]
        start += d


@dataclass(frozen=True)
class Eden:
    """EDEN with `bits` 0.5, 1, 2, 3 or 4 an element: |decoded - x|^2 is 2.14, 0.571, 0.133, 0.0357 or 0.0096 |x|^2.

    The mean over keys is x: exactly for a uniformly random rotation, closely for this one. So the errors of many
    clients average out, and no client needs error feedback; at 0.5 bits, an error above |x|^2, that would diverge.

    0.5 bits: of each two neighbours in z, one that the key picks is sent, at 1 bit; <q, z> runs over those sent.

    Bytes: piece after piece, the scale S as float32, little-endian, then the codes of its d elements (0.5 bits: d / 2),
    max(1, bits) each, ascending with the level, the low bits of a byte first. Pieces have PIECE elements; the rest goes
    into the smaller powers of two, the last one padded with zeros, that take the fewest bytes. The random words of
    piece p are those of stream p of `streams.words` under the key: d / 64 for D1, d / 64 for D2, then the picks.

    Encoding and decoding give the same bits on every machine. A number beyond float32's range decodes to its end.
    """

    bits: float

    def __post_init__(self) -> None:
        if self.bits not in (0.5, 1, 2, 3, 4):
            raise ValueError(f"bits {self.bits} is not one of 0.5, 1, 2, 3, 4")

    @property
    def rate(self) -> float:
        """Bits an element, scales included, of full pieces."""
        return self.bits + 32 / PIECE

    def size(self, count: int) -> int:
        """The bytes of `count` elements, exactly."""
        return sum_over_pieces(count, self.bits, lambda d: _bytes(d, self.bits))

    def encode(self, x: Tensor, key: int) -> bytes:
        """Float32 of any shape as `size` bytes; the key, in [0, 2^64), is fresh for each client, round and tensor.

        ValueError unless x is finite float32 on the CPU.
        """
        check_key(key)
        flat = flatten(x)
        half = np.array(CENTROIDS[self._width], np.float32)
        floors = (np.float32(0), *((half[1:] + half[:-1]) / 2))
        v, rounded, codes = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32), np.empty(PIECE, np.uint8)
        out = []
        for part, d, signs, picks in pieces(flat.size, self.bits, key):
            z, sent = v[:d], int(d * min(1, self.bits))
            squares, power = rotate(flat[part], signs, z)
            if picks.size:
                _choose(z, picks)
            unit = np.float32(math.sqrt(squares * d))
            product = _to_codes(z[:sent], unit, tuple(half), floors, rounded, codes[:sent])
            scale = min(squares * d / product * power, float(_LARGEST)) if squares else 0.0
            out += [np.array(scale, "<f4").tobytes(), pack(codes[:sent], self._width).tobytes()]
        return b"".join(out)

    def decode(self, data: bytes | memoryview, shape: Sequence[int], key: int) -> Tensor:
        """The tensor back, float32 of that shape; ValueError for bytes that `encode` would not have made of one."""
        check_key(key)
        count, body = elements(shape), octets(data)
        if body.size != self.size(count):
            raise ValueError(f"{body.size} bytes for {count} elements, expected {self.size(count)}")
        half = np.array(CENTROIDS[self._width], np.float32)
        levels = np.concatenate([-half[::-1], half])
        out, v, start = np.empty(count, np.float32), np.empty(PIECE, np.float32), 0
        for part, d, signs, picks in pieces(count, self.bits, key):
            stop, z, sent = start + _bytes(d, self.bits), v[:d], int(d * min(1, self.bits))
            scale = body[start : start + 4].view("<f4").astype(np.float32)[0]
            if not 0 <= scale <= _LARGEST:
                raise ValueError(f"scale {scale} is negative or not finite")
            np.take(levels, unpack(body[start + 4 : stop], self._width, sent), out=z[:sent])
            if picks.size:
                _spread(z, picks)
            # a scale of 0 would leave the signs, in zeros
            if scale > 0:
                rotate_back(z, signs, scale, out[part])
            else:
                out[part] = 0
            start = stop
        return torch.from_numpy(out).reshape(tuple(shape))

    @property
    def _width(self) -> int:
        """Bits of a code."""
        return max(1, int(self.bits))
