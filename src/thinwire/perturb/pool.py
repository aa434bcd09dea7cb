"""A finite pool of directions that all peers know from one key: w = s w0 - sum_j A_j z_j (FedKSeed, section 3)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thinwire import streams
from thinwire.compress.entropy import integers
from thinwire.core import Client, StaleVersion
from thinwire.keys import Key, reduced, uniform
from thinwire.model.net import Net
from thinwire.perturb.directions import Directions
from thinwire.wire import Illegal, raw

TILTS = np.array([256, 274, 293, 313, 334, 357, 382, 408, 436, 466, 499, 533, 570, 609, 651, 696])  # 256 exp(i / 15)
GRID = 4  # steps of the grid in the root mean square of the gains of the first round
APART = 8  # times the median: a reply whose scalars are larger does not set the grid
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

        gains: float32 [size], or [parameters, size] where each of the net's, in their order, has its own.
        """
        token = hashlib.sha256(f"fedkseed {self.directions} {shrink!r} ".encode() + bytes(raw(gains))).digest()
        rows = np.broadcast_to(-gains.numpy().astype(np.float64), (len(net.names), self.size))

        def build() -> None:
            for (name, parameter), coefs in zip(net.parameters(), rows, strict=True):
                touched = np.flatnonzero(coefs)
                self.directions.apply(net.base[name], name, touched, coefs[touched], scale=shrink, out=parameter.data)

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

    @classmethod
    def decode(cls, sent: bytes | None, count: int, known: Mapping[str, Tensor] | None) -> Levels:
        """The inverse of `encode`: `count` integers, changes where a version is known; Illegal for what is none."""
        levels = unpacked(sent, count, "levels")
        return cls(levels if known is None else levels + known["levels"].numpy())

    def table(self) -> dict[str, Tensor]:
        """What is kept of them as a version."""
        return {"levels": torch.from_numpy(self.values)}

    def encode(self, known: Mapping[str, Tensor] | None) -> tuple[bytes, bool]:
        """The packed integers, and whether they are changes to those of a known version: the shorter of the two."""
        whole = packed(self.values.tobytes())
        change = whole if known is None else packed((self.values - known["levels"].numpy()).tobytes())
        return (change, True) if len(change) < len(whole) else (whole, False)


def received(client: Client, sent: bytes | None, base: str | None, grid: float, count: int) -> Tensor:
    """The numbers that levels off the wire mean, float32 [count], whose version the client then holds.

    Illegal where they are none; StaleVersion where they are changes to what this client does not have.
    """
    known = client.versions.get(base) if base is not None else None
    if base is not None and (known is None or "levels" not in known or known["levels"].shape != (count,)):
        raise StaleVersion
    levels = Levels.decode(sent, count, known)
    if not abs(grid) < math.inf:
        raise Illegal(f"the grid of the gains is {grid}")
    client.held = client.versions.put(levels.table())
    return torch.from_numpy(levels.values * grid).float()


def plain(sent: Tensor | None, count: int) -> Tensor:
    """Gains off the wire as they are, float32 [count]; Illegal where they are none."""
    if sent is None or sent.dtype != torch.float32 or sent.shape != (count,):
        raise Illegal(f"gains are not float32 [{count}]")
    return sent


def grid_of(gains: NDArray[np.float64], grid: float, lengths: NDArray[np.float64] | None) -> float:
    """The grid of gains that are not 0: at first GRID steps in their root mean square, and then that one for the run.

    lengths: [2, replies], each reply's own length and what it weighs in the mean. Of three replies or more none counts
    as longer than APART times the median one. A single reply can still be all there is: so the grid is made anew where
    the gains' middle is far below it.
    """
    if not gains.size:
        return grid
    spread = math.sqrt(np.square(gains).mean())
    if grid:
        middle = min(spread, GRID * float(np.median(np.abs(gains))))
        return grid if middle >= grid else middle / GRID
    own, weighed = lengths[:, lengths[0] > 0] if lengths is not None else np.ones((2, 1))
    most = APART * np.sort(own)[(own.size - 1) // 2] if own.size > 2 else math.inf
    if (own > most).any():
        spread *= math.sqrt(np.square(weighed * np.minimum(1.0, most / own)).sum() / np.square(weighed).sum())
    return spread / GRID


def seed_probabilities(amplitudes: Tensor) -> Tensor:
    """FedKSeed-Pro's softmax of the min-max normalised mean |g| of each direction; float64 [K], sums to 1."""
    low, high = amplitudes.min(), amplitudes.max()
    return torch.softmax((amplitudes - low) / (high - low + 1e-10), dim=0)


def seed_tilts(amplitudes: Tensor) -> NDArray[np.int64]:
    """The same law in sixteen steps: int64 [K] in 0..15, of which TILTS has the shares."""
    low, high = amplitudes.min(), amplitudes.max()
    return torch.round(15 * (amplitudes - low) / (high - low + 1e-10)).to(torch.int64).numpy()


def tilted(sent: bytes | None, count: int) -> Shares:
    """The shares that packed tilts mean, int64 [count]; Illegal where they are none."""
    tilts = unpacked(sent, count, "tilts")
    if not ((tilts >= 0) & (tilts < len(TILTS))).all():
        raise Illegal("a tilt is not in 0..15")
    return TILTS[tilts]


def shares_of(sent: Tensor | None, count: int) -> Shares:
    """Probabilities off the wire, float64 [count]; Illegal where they are none."""
    if sent is None or sent.dtype != torch.float32 or sent.shape != (count,) or not (sent >= 0).all():
        raise Illegal(f"probabilities are not {count} shares of 1")
    if not 0 < float(sent.sum()) < 2:
        raise Illegal(f"probabilities are not {count} shares of 1")
    return sent.numpy().astype(np.float64)


def shares_sent(sent: bytes | Tensor | None, count: int) -> Shares:
    """Pro's shares of the directions, none uniform: tilts on the thin wire, probabilities in the paper's form."""
    return shares_of(sent, count) if isinstance(sent, Tensor) else tilted(sent, count)


def draws_key(key: Key) -> int:
    """The key of the directions that clients draw in a round, from the server's: known at both ends, 64 bits."""
    return key.fold("draws").word()
