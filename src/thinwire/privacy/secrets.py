"""Randomness that nobody else may repeat: the noise and the sampling that a privacy guarantee rests on.

A run's keys are no secret, since whoever has the run file has them; so what comes from here never comes from one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from thinwire.privacy.integers import of_uniform

if TYPE_CHECKING:
    from torch import Tensor


class Secrets(Protocol):
    """Where a client half draws what must stay unknown; tests hand in one that repeats."""

    def normal(self, shape: Sequence[int], scale: float) -> Tensor:
        """Independent normal numbers of mean 0 and deviation `scale`: float64 of that shape."""

    def sampled(self, count: int, rate: float) -> NDArray[np.int64]:
        """Poisson sampling: each of range(count) with probability `rate`, apart from the others; ascending."""

    def integers(self, count: int, deviation: int) -> NDArray[np.int64]:
        """Independent discrete normal numbers of mean 0 and that deviation: int64 [count]."""


class SystemSecrets:
    """From the operating system's cryptographic generator (os.urandom), afresh for each call; nothing is kept.

    Normal numbers are float64 by Box and Muller's transform of uniforms of 53 bits: their law ends 8.6 deviations out,
    and their lowest bits betray something of a sum to who sees it unrounded (Mironov, CCS 2012). That is for the
    mechanism that adds them to mend.
    """

    def normal(self, shape: Sequence[int], scale: float) -> Tensor:
        """Two normals from two uniforms."""
        import torch

        count = math.prod(shape)
        radius, angle = _uniform(2 * ((count + 1) // 2)).reshape(2, -1)
        length = np.sqrt(-2 * np.log1p(-radius))  # of 1 - u, which is not 0
        both = np.concatenate([length * np.cos(2 * np.pi * angle), length * np.sin(2 * np.pi * angle)])
        return torch.from_numpy(scale * both[:count]).view(tuple(shape))

    def sampled(self, count: int, rate: float) -> NDArray[np.int64]:
        """A uniform each. ValueError: no probability."""
        if not 0 <= rate <= 1:
            raise ValueError(f"the rate {rate} is not in [0, 1]")
        return np.flatnonzero(_uniform(count) < rate)

    def integers(self, count: int, deviation: int) -> NDArray[np.int64]:
        """A word of 64 bits each, see privacy.integers."""
        return of_uniform(np.frombuffer(os.urandom(8 * count), dtype=np.uint64), deviation)


def _uniform(count: int) -> NDArray[np.float64]:
    """Uniform on [0, 1), 53 bits each."""
    words = np.frombuffer(os.urandom(8 * count), dtype=np.uint64)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
