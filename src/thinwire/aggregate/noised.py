"""The mean of whole clients' updates, none of which sways it beyond a bound, under noise: client-level privacy.

    m = (sum_i trunc(u_i min(1, C / |u_i|) / u) + k) u / n          n the clients of the round, k discrete normal noise

All tensors of an update together have the length |u_i|; each client counts alike, who does not reply with 0, and the
sum is divided by the cohort's size, so that it does not say who was there (McMahan et al. 2018, arXiv:1710.06963). The
sums are of whole numbers, see privacy.integers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from thinwire.aggregate import columns
from thinwire.aggregate.columns import Tensors
from thinwire.aggregate.mean import Metrics, Setting, Update
from thinwire.privacy.integers import FINE, truncated, within
from thinwire.privacy.protection import Protection
from thinwire.privacy.secrets import Secrets


class Noised(NamedTuple):
    """In place of another aggregation: how clients are protected, how many were asked, and where noise comes from."""

    protection: Protection
    clients: int
    secrets: Secrets

    def __call__(
        self, updates: Iterable[tuple[int, Update]], at: Setting | None = None
    ) -> tuple[dict[str, Tensor], Metrics]:
        """The mean by name, float32, and no numbers for the records; nothing where nobody has replied."""
        return noised_mean(updates, at.origin if at is not None else {}, *self), {}


def noised_mean(
    updates: Iterable[tuple[int, Update]], origin: Tensors, protection: Protection, clients: int, secrets: Secrets
) -> dict[str, Tensor]:
    """The mean by name, float32; nothing where nobody has replied. `origin`: see Setting."""
    unit, sums = protection.unit(FINE), dict[str, Tensor]()
    for _, update in updates:
        factor = within(columns.norm(update.tensors, origin), protection.clip)
        for name in update.tensors:
            found = truncated(columns.change(update.tensors, origin, name), factor, unit)
            sums[name] = found if name not in sums else sums[name].add_(found)
    means = {}
    for name in list(sums):
        total = sums.pop(name)
        total.view(-1).add_(torch.from_numpy(secrets.integers(total.numel(), FINE)))
        mean = total.double().mul_(unit / clients)
        means[name] = (mean.add_(columns.wide(origin[name])) if name in origin else mean).float()
    return means
