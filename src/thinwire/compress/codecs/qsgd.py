"""QSGD (Alistarh et al., 2017, arXiv:1610.02132) at any number of bytes.

Every bucket of n elements by its norm, and each element by the sign and a level l of |x| s / norm rounded at
random to a neighbour, so that the mean over keys is x. Its variance is min(n / s^2, sqrt(n) / s) |x|^2: of the size of
|x|^2 times 10 where it takes half a bit. Levels are entropy-coded, in place of the paper's Elias code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thinwire.compress.entropy import adaptive
from thinwire.compress.entropy.packing import check_key, elements, flatten, octets
from thinwire.streams import words


@dataclass(frozen=True)
class Qsgd:
    """`levels` s, 1 to 7, and `bucket` n. Bytes: the norms, float32 little-endian, then the coded levels."""

    levels: int = 1
    bucket: int = 512

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= 7:
            raise ValueError(f"levels {self.levels} is not in [1, 7]")
        if not 1 <= self.bucket <= 1 << 20:
            raise ValueError(f"bucket {self.bucket} is not in [1, 2**20]")

    def encode(self, x: Tensor, key: int) -> bytes:
        """Float32 of any shape as bytes, at random by the key; ValueError unless x is finite float32 on the CPU."""
        check_key(key)
        flat = flatten(x)
        norms = np.array(
            [np.linalg.norm(flat[i : i + self.bucket].astype(np.float64)) for i in range(0, flat.size, self.bucket)]
        ).astype("<f4")
        each = np.repeat(norms.astype(np.float64), self.bucket)[: flat.size]
        draws = (words(key, [0], max(1, flat.size))[0][: flat.size] >> np.uint64(11)) * 2.0**-53
        with np.errstate(divide="ignore", invalid="ignore"):
            level = np.floor(np.abs(flat) / each * self.levels + draws)
        level = np.where(each > 0, np.minimum(level, self.levels), 0) * np.sign(flat)
        coded = adaptive.encode((level + self.levels).astype(np.uint8), _no_context(flat.size), 1)
        return norms.tobytes() + coded

    def decode(self, data: bytes | memoryview, shape: Sequence[int], key: int) -> Tensor:
        """The tensor back, float32 of that shape; ValueError for bytes that `encode` would not have made of one."""
        check_key(key)
        count, body = elements(shape), octets(data)
        split = 4 * -(-count // self.bucket)
        if body.size < split:
            raise ValueError(f"{body.size} bytes for {count} elements, expected more than {split}")
        norms = body[:split].view("<f4").astype(np.float32)
        if not np.isfinite(norms).all() or (norms < 0).any():
            raise ValueError("a norm is negative or not finite")
        level = adaptive.decode(body[split:].data, _no_context(count), 1)
        if int(level.max(initial=0)) > 2 * self.levels:
            raise ValueError("a symbol stands for no level")
        unit = np.repeat(norms / np.float32(self.levels), self.bucket)[:count]
        out = (level.astype(np.float32) - np.float32(self.levels)) * unit
        return torch.from_numpy(out).reshape(tuple(shape))


def _no_context(count: int) -> NDArray[np.uint8]:
    return np.zeros(count, np.uint8)
