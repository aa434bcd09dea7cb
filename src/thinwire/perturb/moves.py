"""What replies of scalars add up to: how far along each direction of a pool, how often, and how large they were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thinwire.aggregate.mean import Counted

Floats = NDArray[np.float64]


class Moves:
    """The sums over replies, in their order.

    gains: float64 [K], the moves; amplitude, visits: the sum and the count of |g| on top of those that are there,
    float64 [K]; shrink: the sum of the products of steps' weight decays; lengths: of each reply's moves, and of the
    same weighed. `clip` bounds |g| in the amplitude alone.
    """

    def __init__(self, amplitude: Tensor, visits: Tensor, clip: float) -> None:
        self.amplitude, self.visits = amplitude.numpy().copy(), visits.numpy().copy()
        self.gains = np.zeros_like(self.amplitude)
        self.clip = clip
        self.shrink, self.skipped, self.weight = 0.0, 0, 0.0
        self.lengths: list[tuple[float, float]] = []

    def add(self, picks: NDArray[np.int64], scalars: Floats, weights: Floats, rate: float, decay: float) -> None:
        """Some replies more. picks, scalars: [replies, steps, queries]; NaN, which is overwritten, in skipped steps.

        A step moves by -rate g; `decay` is of a step.
        """
        taken = ~np.isnan(scalars[..., 0])
        scalars[~taken] = 0.0
        taken = taken.astype(np.float64)
        # A client's weights are D w - sum_t lr g_t s^(steps after t) z_t, with s = 1 - lr wd and D = s^steps.
        steps = taken.sum(axis=1)
        after = steps[:, None] - taken.cumsum(axis=1) if decay != 1 else np.zeros(1)
        moves = (rate * weights[:, None] * decay**after)[..., None] * scalars
        clipped = np.minimum(np.abs(scalars), self.clip)
        visited = np.broadcast_to(taken[..., None], picks.shape)
        long = np.sqrt(np.square(moves).sum(axis=(1, 2)))
        self.lengths += zip((long / weights).tolist(), long.tolist(), strict=True)
        for total, terms in ((self.gains, moves), (self.amplitude, clipped), (self.visits, visited)):
            total += np.bincount(picks.ravel(), terms.ravel(), total.size)
        self.shrink += float(weights @ decay**steps)
        self.skipped += int(taken.size - steps.sum())
        self.weight += float(weights.sum())

    def average(self) -> Moves:
        """Moves and shrink as the mean of the replies has them."""
        self.gains, self.shrink = self.gains / self.weight, self.shrink / self.weight
        return self

    @property
    def tensor(self) -> Tensor:
        """The moves."""
        return torch.from_numpy(self.gains)

    @property
    def metrics(self) -> Mapping[str, float]:
        """Of a single reply, of weight 1: what `take` asks of it beside its moves."""
        return {"shrink": self.shrink, "length": self.lengths[0][0]}

    def take(self, gains: Tensor, counted: Sequence[Counted]) -> Moves:
        """Moves that replies were combined to, float [K], in place of sums; the shrink is their weighted mean."""
        self.gains, total = gains.double().numpy(), sum(each.weight for each in counted)
        known = [each for each in counted if each.metrics]  # a private mean comes without numbers about any reply
        self.shrink = sum(each.weight * each.metrics["shrink"] for each in known) / total if known else 1.0
        self.lengths = [(each.metrics["length"], each.weight * each.metrics["length"]) for each in known]
        return self
