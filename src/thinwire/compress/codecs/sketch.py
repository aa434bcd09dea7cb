"""One-bit random sketches: signs of fewer random projections than there are numbers, as of pFed1BS (2025).

    z = R x, EDEN's rotation of a piece of d;   decoded = s R^T q
    q [d]: the signs of the first m = ceil(ratio d) of z, then 0s;   s: the mean |z| of those m

For error feedback: |decoded - x|^2 = |x|^2 - m s^2, in the mean over keys 1 - 2 ratio / pi of |x|^2, for any x. At
ratio 1 this is EDEN at 1 bit, at the length of least error in place of no bias.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thinwire.compress.codecs.blocks import Blocks
from thinwire.compress.codecs.eden import PIECE, pieces, rotate, rotate_back, sum_over_pieces
from thinwire.compress.entropy.packing import check_key, elements, flatten, octets

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Sketch:
    """The signs of `ratio` times as many projections as elements, ratio in (0, 1].

    Bytes: piece after piece, those of `Blocks(1)` for its m numbers as one block. Pieces and rotation are those of
    Eden(1) under the key. What is all below 2^-92 may decode to 0. The same bytes and decoded bits on every machine.
    """

    ratio: float

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio {self.ratio} is not in (0, 1]")

    def size(self, count: int) -> int:
        """The bytes of `count` elements, exactly."""
        return sum_over_pieces(count, 1, lambda d: self._code(d).size(self._sent(d)))

    def encode(self, x: Tensor, key: int) -> bytes:
        """Float32 of any shape as `size` bytes; the key, in [0, 2^64), is fresh for each round.

        ValueError unless x is finite float32 on the CPU.
        """
        check_key(key)
        flat, v, out = flatten(x), np.empty(PIECE, np.float32), []
        for part, d, signs, _ in pieces(flat.size, 1, key):
            _, power = rotate(flat[part], signs, v[:d])
            # of numbers near the end of float32 the projections are beyond it
            z = np.clip(v[: self._sent(d)].astype(np.float64) * (power / d), -_LARGEST, _LARGEST).astype(np.float32)
            out.append(self._code(d).encode(torch.from_numpy(z), key))
        return b"".join(out)

    def decode(self, data: bytes | memoryview, shape: Sequence[int], key: int) -> Tensor:
        """The tensor back, float32 of that shape; ValueError for bytes that `encode` would not have made of one."""
        check_key(key)
        count, body = elements(shape), octets(data)
        if body.size != self.size(count):
            raise ValueError(f"{body.size} bytes for {count} elements, expected {self.size(count)}")
        out, v, start = np.zeros(count, np.float32), np.empty(PIECE, np.float32), 0
        for part, d, signs, _ in pieces(count, 1, key):
            code, sent = self._code(d), self._sent(d)
            stop = start + code.size(sent)
            found = code.decode(body[start:stop].data, (sent,), key).numpy()
            if scale := abs(found[0]):  # of 0 all stay 0
                v[:sent], v[sent:d] = found / scale, 0
                rotate_back(v[:d], signs, scale, out[part])
            start = stop
        return torch.from_numpy(out).reshape(tuple(shape))

    def _sent(self, d: int) -> int:
        return math.ceil(self.ratio * d)

    def _code(self, d: int) -> Blocks:
        return Blocks(1, self._sent(d))
