"""Epsilon and delta of what was released, from a kept accountant: dp-accounting's privacy loss distributions.

A release is a sum under normal noise of `noise` times the bound of one unit's part in it. Units, records or clients,
are added or removed. Of records each is in a batch with probability `rate`, in secret and apart from the others.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from thinwire.errors import ConfigError

NEAR = 1e-3  # to which the least noise is found, as a share of it
GRID = 1e-4  # of what is lost, which is rounded up to it: epsilon is never too small


@lru_cache(maxsize=4096)
def epsilon(noise: float, rate: float, releases: int, delta: float, grid: float = GRID) -> float:
    """The epsilon of so many releases, at delta; 0 without any. ConfigError: the accountant is not installed."""
    if not releases:
        return 0.0
    found: float = _spent(noise, rate, releases, grid).get_epsilon(delta)
    return found


def grid_for(most: float) -> float:
    """The grid that suits epsilons up to this: the account of a large one on GRID takes seconds."""
    return max(GRID, most / 4000)


@lru_cache(maxsize=1024)
def least_noise(most: float, rate: float, releases: int, delta: float) -> float:
    """The least noise under which so many releases stay within an epsilon at delta, to NEAR of it, from above."""
    low, high, grid = 0.0, 0.5, grid_for(most)
    while epsilon(high, rate, releases, delta, grid) > most:
        low, high = high, 2 * high
    while high - low > NEAR * high:
        middle = (low + high) / 2 if low else high / 2
        if middle < 1e-2:  # so little that a unit's part stands bare
            break
        low, high = (low, middle) if epsilon(middle, rate, releases, delta, grid) <= most else (middle, high)
    return math.ceil(high * 1e4) / 1e4


def _spent(noise: float, rate: float, releases: int, grid: float) -> Any:
    try:
        import dp_accounting
        from dp_accounting import pld
    except ImportError:
        raise ConfigError("privacy: needs an accountant; pip install 'thinwire[privacy]'") from None
    accountant = pld.PLDAccountant(value_discretization_interval=grid)
    event: Any = dp_accounting.GaussianDpEvent(noise)
    if rate < 1:
        event = dp_accounting.PoissonSampledDpEvent(rate, event)
    accountant.compose(event, releases)
    return accountant
