"""A finite pool of directions that all peers know from one key: w = s w0 - sum_j A_j z_j (FedKSeed, section 3)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thinwire import streams
from thinwire.compress.entropy import integers
from thinwire.keys import reduced, uniform
from thinwire.model.net import Net
from thinwire.perturb.directions import Directions
from thinwire.wire import Illegal, raw

Shares = NDArray[np.int64] | NDArray[np.float64]


@dataclass(frozen=True)
class Pool:
    """`size` directions of a law under a key, numbered from 0."""

    directions: Directions
    size: int

    def picks(
        self, key: int, numbers: Sequence[int], shape: tuple[int, ...], shares: Shares | None = None
    ) -> NDArray[np.int64]:
        """Directions drawn for each numbered stream under a key, in order: int64 [streams, *shape].

        Uniform, or in the `shares` of the directions, [size]: integers draw with integers only, the same everywhere.
        """
        words = streams.words(key, numbers, int(np.prod(shape))).reshape(-1, *shape)
        if shares is None:
            return reduced(words, self.size)
        cumulative = np.cumsum(shares)
        if shares.dtype == np.int64:
            return np.searchsorted(cumulative, reduced(words, int(cumulative[-1])), side="right")
        points = uniform(words) * cumulative[-1]
        found: NDArray[np.int64] = np.minimum(np.searchsorted(cumulative, points, side="right"), self.size - 1)
        return found

    def rebuild(self, net: Net, gains: Tensor, shrink: float = 1.0) -> None:
        """weights := shrink w0 - sum_j gains_j z_j in the order of j, whatever the history; a gain of 0 costs nothing.

        gains: float32 [size].
        """
        token = hashlib.sha256(f"fedkseed {self.directions} {shrink!r} ".encode() + bytes(raw(gains))).digest()
        coefs = -gains.numpy().astype(np.float64)
        touched: NDArray[np.int64] = np.flatnonzero(coefs)

        def build() -> None:
            for name, parameter in net.parameters():
                base = net.base[name]
                self.directions.apply(base, name, touched, coefs[touched], scale=shrink, out=parameter.data)

        net.rebuild(token, build)


@lru_cache(maxsize=32)
def packed(values: bytes) -> bytes:
    """int64 values as packed integers; a round sends thousands of clients the same."""
    return integers.pack(np.frombuffer(values, np.int64))


def unpacked(packed: bytes | None, count: int, name: str) -> NDArray[np.int64]:
    """Packed integers off the wire, int64 [count]; Illegal where they are none."""
    try:
        return integers.unpack(packed or b"", count)
    except ValueError as error:
        raise Illegal(f"{name}: {error}") from None


@dataclass(frozen=True)
class Levels:
    """Numbers in whole multiples of a grid, as they travel: packed whole, or as the changes to those of a version."""

    values: NDArray[np.int64]

    @classmethod
    def of(cls, numbers: Tensor, grid: float) -> Levels:
        """The nearest multiples of the grid, float64 [n]; a grid of 0 is 1."""
        return cls(np.rint(numbers.numpy() / (grid or 1.0)).astype(np.int64))

    def table(self) -> dict[str, Tensor]:
        """What is kept of them as a version."""
        return {"levels": torch.from_numpy(self.values)}

    def encode(self, known: NDArray[np.int64] | None) -> tuple[bytes, bool]:
        """The packed integers, and whether they are changes to the known ones: the shorter of the two."""
        whole = packed(self.values.tobytes())
        if known is not None and len(change := packed((self.values - known).tobytes())) < len(whole):
            return change, True
        return whole, False
