"""Learning rates over the rounds of a run."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def scheduled(schedule: Schedule, lr: float, round: int, rounds: int) -> float:
    """The learning rate of round `round` (from 1) of `rounds`: the full one in the first, near 0 after the last."""
    done = (round - 1) / rounds
    if schedule == "linear":
        return lr * (1 - done)
    if schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * done))
    return lr
