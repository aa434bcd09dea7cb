"""Ternary: the largest elements as a sign under their mean magnitude, all others 0, coded near the entropy.

Of Gaussian numbers 5 % carry 0.27 of the energy in 0.34 bits a number, a quarter 0.68 in 1.06, half 0.81 in 1.5; a sign
for each (`Blocks(1)`) carries 0.64 in 1. For error feedback: e <- x + e - decode(encode(x + e)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from torch import Tensor

from thinwire.compress.codecs.blocks import Blocks
from thinwire.compress.codecs.topk import select
from thinwire.compress.entropy import rans
from thinwire.compress.entropy.packing import check_key, elements, flatten, octets

WHOLE = 1 << 20
"""Elements of a block at most: below so many, one scale is for all."""
_SHARES = 1 << rans.BITS - 1


@njit(nogil=True, cache=True)
def _places(bits, block, kept, last, out):
    """The places of the largest of every block to out, int64; kept, last: how many of a whole one, of the last one."""
    histogram, magnitudes = np.empty(2048, np.int64), np.empty(min(block, bits.size), np.uint32)
    at = 0
    for start in range(0, bits.size, block):
        count = kept if start + block <= bits.size else last
        part = out[at : at + count]
        select(bits[start : start + block], count, part, histogram, magnitudes)
        part += start
        at += count


@njit(nogil=True, cache=True)
def _read(words, zeros, share, states, out):
    """The symbols 0, 1 and 2 to out, uint8 [n], of which `zeros`, `share` and `share` of the slots stand for one."""
    x, word = states[0], 2
    zeros, share = np.uint64(zeros), np.uint64(share)
    for i in range(out.size):
        slot = x & rans.MASK
        s, start, size = np.uint8(0), np.uint64(0), zeros
        if slot >= zeros:
            s, start, size = np.uint8(1), zeros, share
            if slot >= zeros + share:
                s, start = np.uint8(2), zeros + share
        x = size * (x >> rans.BITS64) + (slot - start)
        if x < rans.LOW:
            x <<= np.uint64(32)
            # past the end the word is 0; `rans.ended` sees it by the index
            if word < words.size:
                x |= np.uint64(words[word])
            word += 1
        out[i] = s
    states[0] = x
    return word


@dataclass(frozen=True)
class Ternary:
    """The largest max(1, round(density m)) of the m elements of every block, density in (0, 1]; of equals, the first.

    Each of them decodes to its sign (of 0: +) times the mean |x| of its block's, a bfloat16, the others to 0. What is
    left is below |x|^2 by as many times the scale's square: a contraction, unless nothing is as large as 2^-100.

    Bytes: none for no elements. Else the scales, 16 bits each, little-endian; then the symbols 0 (not sent), 1 (-) and
    2 (+) of all elements by rANS of one lane, under the shares of 2^16 slots that all blocks' numbers of elements sent,
    k of n, give: round(k 2^15 / n) for each sign, but at least 1, and 2 for 0 if any is not sent. That takes the
    entropy n H(k / n) + k, and 4 to 8 bytes.
    """

    density: float
    block: int = WHOLE

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density {self.density} is not in (0, 1]")
        if not 1 <= self.block <= WHOLE:
            raise ValueError(f"block {self.block} is not in [1, 2**20]")

    def sizes(self, count: int) -> tuple[int, int]:
        """The fewest and the most bytes of `count` elements: what the symbols take differs by a word or two."""
        if not count:
            return 0, 0
        zeros, share = self._slots(count)
        kept = self._counts(count)[2]
        bits = kept * (rans.BITS - math.log2(share))
        bits += (count - kept) * (rans.BITS - math.log2(zeros)) if zeros else 0
        slack = 1 + count * 2.0**-14  # of a state above 2^31, a step rounds off 2^-15 at most
        head = 2 * -(-count // self.block) + 8
        return head + 4 * max(0, math.ceil((bits - slack) / 32 - 1)), head + 4 * math.floor((bits + slack) / 32)

    def encode(self, x: Tensor, key: int) -> bytes:
        """Float32 of any shape as bytes; the key, in [0, 2^64), does not matter.

        ValueError unless x is finite float32 on the CPU.
        """
        check_key(key)
        flat = flatten(x)
        if not flat.size:
            return b""
        kept, last, total = self._counts(flat.size)
        zeros, share = self._slots(flat.size)
        places = np.empty(total, np.int64)
        _places(flat.view(np.uint32), self.block, kept, last, places)
        scales, signs = Blocks(1, kept).rounded(torch.from_numpy(flat[places]), key)
        # each symbol's first slot and number of slots, as `rans.flush` takes them
        slots = np.array([[zeros, share], [zeros + share, share]], np.uint32) @ np.array([1 << rans.BITS, 1], np.uint32)
        intervals = np.full(flat.size, zeros, np.uint32)
        intervals[places] = slots[signs]
        words = np.empty(flat.size // 2 + 4, np.uint32)
        return scales.astype("<u2").tobytes() + words[rans.flush(intervals, 1, words) :].astype("<u4").tobytes()

    def decode(self, data: bytes | memoryview, shape: Sequence[int], key: int) -> Tensor:
        """The tensor back, float32 of that shape; ValueError for bytes that `encode` would not have made of one."""
        check_key(key)
        count, body = elements(shape), octets(data)
        (least, most), split = self.sizes(count), 2 * -(-count // self.block)
        if not least <= body.size <= most or (body.size - split) % 4:
            raise ValueError(f"{body.size} bytes for {count} elements, expected {least} to {most}")
        out = np.zeros(count, np.float32)
        if count:
            kept, last, total = self._counts(count)
            words, symbols = body[split:].view("<u4").astype(np.uint32), np.empty(count, np.uint8)
            states = rans.begin(words, 1)
            word = _read(words, *self._slots(count), states, symbols)
            sent = np.add.reduceat(symbols > 0, np.arange(0, count, self.block), dtype=np.int64)
            if not rans.ended(words, states, word) or (sent[:-1] != kept).any() or sent[-1] != (last or kept):
                raise ValueError("the elements that were sent do not fit their blocks")
            signs, scales = symbols[symbols > 0] - np.uint8(1), body[:split].view("<u2").astype(np.uint16)
            out[symbols > 0] = Blocks(1, kept).values(scales, signs, (total,)).numpy()
        return torch.from_numpy(out).reshape(tuple(shape))

    def _kept(self, size: int) -> int:
        return max(1, round(self.density * size))

    def _counts(self, count: int) -> tuple[int, int, int]:
        """Elements sent of a whole block, of the last one if it is shorter, and of all."""
        whole, rest = divmod(count, self.block)
        kept, last = self._kept(self.block), self._kept(rest) if rest else 0
        return kept, last, whole * kept + last

    def _slots(self, count: int) -> tuple[int, int]:
        """How many of the coder's slots stand for an element that is not sent, and for either sign."""
        total = self._counts(count)[2]
        share = _SHARES if total == count else min(_SHARES - 1, max(1, round(total * _SHARES / count)))
        return 2 * (_SHARES - share), share
