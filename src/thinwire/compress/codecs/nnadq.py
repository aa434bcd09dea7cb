"""NNADQ (Chen et al., 2022, FedOBD, arXiv:2208.05174): each tensor in as many levels as its own range is worth.

    m = (max x + min x) / 2        c = max |x - m|        s = max(1, floor(sqrt(32 c ln 4 / w)))
    q = round(|x - m| / c s)       decoded: m + sign(x - m) q c / s

s minimises bits a number, which grow with log2 s, against the error, which falls with c / s; w weighs them. A number
takes ceil(log2(s + 1)) + 1 bits, so a tensor of a small range takes few. Nothing is drawn. 0 is no level: many numbers
near it may come back longer than they went, so this is no code for error feedback.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from thinwire.compress.entropy.packing import check_key, elements, flatten, octets, pack, unpack

LN_4 = 1.3862943611198906
MOST = (1 << 24) - 1  # levels: float32 has no finer ones
HEAD = 8
LARGEST = float(np.finfo(np.float32).max)


@njit(nogil=True, cache=True)
def _to_levels(flat, middle, range_, levels, signs, planes):
    """Signs, uint8 [n], 1 below the middle, and the levels' bytes, uint8 [k, n], the low ones first."""
    for i in range(flat.size):
        at = np.float64(flat[i]) - middle
        q = np.int64(np.rint(abs(at) / range_ * levels))
        signs[i] = at < 0 and q > 0
        for k in range(planes.shape[0]):
            planes[k, i] = (q >> (8 * k)) & 255


@njit(nogil=True, cache=True)
def _from_levels(signs, planes, middle, range_, levels, largest, out):
    """The inverse; False where a level is beyond the last, or a zero has a sign."""
    right = True
    for i in range(out.size):
        q = np.int64(0)
        for k in range(planes.shape[0]):
            q |= np.int64(planes[k, i]) << (8 * k)
        if q > levels or (q == 0 and signs[i] != 0):
            right = False
        step = q * range_ / levels
        value = middle - step if signs[i] else middle + step
        out[i] = min(max(value, -largest), largest)
    return right


@dataclass(frozen=True)
class Nnadq:
    """`coarseness` is w. Bytes: m and c, float32 little-endian; then, where c > 0, signs, then levels, in packed bits.

    Levels of more than 8 bits are packed a byte's worth at a time, the low ones first. A decoded number is within
    c / (2 s) of what it was, and a rounding of float32.
    """

    coarseness: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 < self.coarseness < math.inf:
            raise ValueError(f"coarseness {self.coarseness} is not above 0, and finite")

    def levels(self, range_: float) -> int:
        """s for a tensor whose c this is."""
        return int(min(MOST, max(1.0, math.sqrt(32 * range_ * LN_4 / self.coarseness))))

    def size(self, count: int, range_: float) -> int:
        """The bytes of `count` elements whose c this is, exactly."""
        if not count or not range_:
            return HEAD
        return HEAD + sum(-(-count * bits // 8) for bits in (1, *_planes(self.levels(range_))))

    def sizes(self, count: int) -> tuple[int, int]:
        """The fewest and the most bytes of `count` elements: those of one number alone, and of the most levels."""
        return HEAD, self.size(count, LARGEST)

    def encode(self, x: Tensor, key: int) -> bytes:
        """Float32 of any shape as bytes; the key, in [0, 2^64), does not matter.

        ValueError unless x is finite float32 on the CPU.
        """
        check_key(key)
        flat = flatten(x)
        low, high = (float(flat.min()), float(flat.max())) if flat.size else (0.0, 0.0)
        middle = np.float32((low + high) / 2)
        wide = max(high - float(middle), float(middle) - low)
        range_ = np.float32(min(wide, LARGEST))
        if float(range_) < wide < LARGEST:  # no number is beyond the last level
            range_ = np.nextafter(range_, np.float32(np.inf))
        head = np.array([middle, range_], "<f4").tobytes()
        if not range_:
            return head
        levels = self.levels(float(range_))
        bits = _planes(levels)
        signs, planes = np.empty(flat.size, np.uint8), np.empty((len(bits), flat.size), np.uint8)
        _to_levels(flat, float(middle), float(range_), levels, signs, planes)
        return head + b"".join(pack(part, n).tobytes() for part, n in zip((signs, *planes), (1, *bits), strict=True))

    def decode(self, data: bytes | memoryview, shape: Sequence[int], key: int) -> Tensor:
        """The tensor back, float32 of that shape; ValueError for bytes that `encode` would not have made of one."""
        check_key(key)
        count, body = elements(shape), octets(data)
        if body.size < HEAD:
            raise ValueError(f"{body.size} bytes, fewer than the {HEAD} of a middle and a range")
        middle, range_ = (float(value) for value in body[:HEAD].view("<f4"))
        if not (math.isfinite(middle) and 0 <= range_ < math.inf):
            raise ValueError("the middle is not finite, or the range is negative or not finite")
        if body.size != (wanted := self.size(count, range_)) or (range_ and not count):
            raise ValueError(f"{body.size} bytes for {count} elements, expected {wanted}")
        if not range_:
            return torch.full(tuple(shape), middle)
        levels, parts, at = self.levels(range_), list[NDArray[np.uint8]](), HEAD
        for bits in (1, *_planes(levels)):
            end = at + -(-count * bits // 8)
            parts.append(unpack(body[at:end], bits, count))
            at = end
        out = np.empty(count, np.float32)
        if not _from_levels(parts[0], np.stack(parts[1:]), middle, range_, levels, LARGEST, out):
            raise ValueError("a level is beyond the last, or a zero has a sign")
        return torch.from_numpy(out).reshape(tuple(shape))


def _planes(levels: int) -> list[int]:
    """The bits of each byte of a level: ceil(log2(s + 1)) in all."""
    bits = levels.bit_length()
    return [min(8, bits - low) for low in range(0, bits, 8)]
