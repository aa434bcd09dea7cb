"""The local zeroth-order loop that methods share, and the move that it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from thinwire.costs.sketch import Work
from thinwire.data.batch import Batch
from thinwire.model.net import Net
from thinwire.perturb.directions import Directions
from thinwire.perturb.probe import Probe
from thinwire.train import parallel
from thinwire.train.protected import Protected

LARGEST = 6e4  # a directional derivative beyond this is no measurement of a loss; float16 still holds it


def walk(
    net: Net,
    directions: Directions,
    picks: NDArray[np.int64],
    batches: Iterator[Batch],
    *,
    lr: float,
    eps: float,
    shrink: float = 1.0,
    together: bool = False,
    applied: Callable[[NDArray[np.float32]], NDArray[np.floating]] = lambda found: found,
    last: bool = True,
    sides: int = 2,
    protected: Protected | None = None,
) -> tuple[NDArray[np.float32], float]:
    """One step a row of picks [steps, queries]: w := shrink w - lr mean_q g_q z_q, g from two losses on a batch.

    sides=2: g = (L(w + eps z) - L(w - eps z)) / (2 eps); sides=1: (L(w + eps z) - L(w)) / eps, L(w) once a step.
    Returns the scalars as `applied` made them of what was found, float32 [steps, queries], NaN throughout a step that
    was skipped since a loss was not finite or a scalar beyond LARGEST; and the mean loss of the steps taken, NaN
    without any. last=False leaves the last move out, for whom only the scalars matter. `protected`: examples are drawn,
    and what each adds is bounded and noised, as it says, from both sides always; the mean loss is then NaN.
    """
    if protected is not None:
        scalars = _walk_protected(net, directions, picks, lr, eps, shrink, together, applied, last, protected)
        return scalars, float("nan")
    rank, size = parallel.ranks()  # each process asks about its share of a step's directions
    scalars, losses = np.full(picks.shape, np.nan, np.float32), []
    with Probe(net, directions, together) as probe:
        for step, batch in enumerate(islice(batches, len(picks))):
            pairs = np.zeros((picks.shape[1], 2))
            if len(mine := picks[step, rank::size]):
                pairs[rank::size] = probe.losses(batch, mine.tolist(), eps, sides)
            pairs = parallel.summed(torch.from_numpy(pairs)).numpy()
            with np.errstate(invalid="ignore"):
                found = ((pairs[:, 0] - pairs[:, 1]) / (sides * eps)).astype(np.float32)
            if not (np.abs(found) <= LARGEST).all():
                continue
            scalars[step] = applied(found)
            losses.append(pairs.mean())
            if last or step + 1 < len(picks):
                move(net, directions, picks[step], -lr / picks.shape[1] * scalars[step], shrink)
    return scalars, float(np.mean(losses)) if losses else float("nan")


def _walk_protected(
    net: Net,
    directions: Directions,
    picks: NDArray[np.int64],
    lr: float,
    eps: float,
    shrink: float,
    together: bool,
    applied: Callable[[NDArray[np.float32]], NDArray[np.floating]],
    last: bool,
    protected: Protected,
) -> NDArray[np.float32]:
    """The scalars of such a walk: noised derivatives, each applied as it travels."""
    scalars, queries = np.zeros(picks.shape, np.float32), picks.shape[1]
    with Probe(net, directions, together) as probe:
        for step, pieces in enumerate(islice(protected.batches(), len(picks))):
            pairs = (probe.pairs(batch, picks[step].tolist(), eps) for batch in pieces)
            slopes = [(pair[:, 0] - pair[:, 1]) / (2 * eps) for pair in pairs]
            scalars[step] = applied(protected.noised_slopes(slopes, queries).clip(-LARGEST, LARGEST))
            if last or step + 1 < len(picks):
                move(net, directions, picks[step], -lr / queries * scalars[step], shrink)
    return scalars


def move(
    net: Net, directions: Directions, seeds: NDArray[np.int64], coefs: NDArray[np.floating], shrink: float
) -> None:
    """weights := shrink weights + sum_k coefs_k z_k over the seeds."""
    for name, parameter in net.parameters():
        directions.apply(parameter.data, name, seeds, coefs, scale=shrink, out=parameter.data)


def shrink_of(lr: float, weight_decay: float) -> float:
    """What one step leaves of the weights; rounded as it is applied, or the roundings would add up."""
    return float(np.float32(1.0 - lr * weight_decay))


def work(steps: int, queries: int, batch: int, together: bool, sides: int = 2) -> Work:
    """What a visit of such steps computes."""
    passes = 2 * queries if sides == 2 else queries + 1
    return Work(steps, passes * steps * batch, batch, passes if together else 1, probes=True)
