"""Keys: all the randomness of a run that must repeat, drawn from the run's seed and nothing else.

A key is a path such as (seed, "round", 3, "client", 7, "batches"). Its words are SHAKE-128 of that path, so they are
the same on every machine and in every version of every library, and two different paths share nothing.

Covered: directions, partitions, cohorts, ordinary batches. Not covered: privacy noise, the sampling that privacy
accounting relies on, masking keys; those come from the operating system.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Part = int | str


@dataclass(frozen=True)
class Key:
    """One node in the tree of a run's randomness; immutable, hashable, cheap to derive."""

    path: tuple[Part, ...]

    @classmethod
    def root(cls, seed: int) -> Key:
        """The key of a whole run."""
        return cls((seed,))

    def fold(self, *parts: Part) -> Key:
        """The key below this one named by `parts` (integers or strings; 1 and "1" differ)."""
        return Key(self.path + parts)

    def words(self, count: int) -> NDArray[np.uint64]:
        """`count` uniform 64-bit words; a longer draw begins with the shorter one."""
        return np.frombuffer(self._digest(8 * count), dtype="<u8")

    def word(self) -> int:
        """One uniform 64-bit integer."""
        return int.from_bytes(self._digest(8), "little")

    def integers(self, bound: int, count: int) -> NDArray[np.int64]:
        """`count` integers uniform on [0, bound), as `reduced` makes them."""
        return reduced(self.words(count), bound)

    def uniform(self, count: int) -> NDArray[np.float64]:
        """`count` float64 uniform on [0, 1), 53 bits each."""
        return uniform(self.words(count))

    def permutation(self, count: int) -> NDArray[np.int64]:
        """A uniform permutation of range(count)."""
        return np.argsort(self.words(count), kind="stable")

    def numpy(self) -> np.random.Generator:
        """A numpy generator, for laws such as Dirichlet's; its stream may change between numpy versions."""
        return np.random.Generator(np.random.Philox(key=self.word()))

    def _digest(self, size: int) -> bytes:
        texts = [f"{type(part).__name__[0]}{len(text := str(part))}:{text}" for part in self.path]
        return hashlib.shake_128("/".join(texts).encode()).digest(size)


def reduced(words: NDArray[np.uint64], bound: int) -> NDArray[np.int64]:
    """word * bound div 2**64 in exact integers, uniform on [0, bound): int64 of the words' shape; bound < 2**63."""
    if not 0 < bound < 1 << 63:
        raise ValueError(f"bound {bound} is not in [1, 2**63)")
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    found: NDArray[np.uint64]
    upper, lower = words >> half, words & low
    if bound < 1 << 32:
        small = np.uint64(bound)
        found = (upper * small + (lower * small >> half)) >> half
        return found.astype(np.int64)
    head, tail = np.uint64(bound >> 32), np.uint64(bound & 0xFFFFFFFF)
    first, second = upper * tail, lower * head
    carried = (first & low) + (second & low) + (lower * tail >> half)
    found = upper * head + (first >> half) + (second >> half) + (carried >> half)
    return found.astype(np.int64)


def uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Float64 uniform on [0, 1) from the upper 53 bits of each word."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
