"""What a reply adds, and the weighted mean of what replies add."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

Metrics = dict[str, float]


class Update(NamedTuple):
    """What one reply adds: named tensors of any float dtype, read when asked for, and how much they count.

    A client holds some of the names or all of them. `loss` may be NaN, where no step was taken; `skipped` counts steps.
    `metrics` are the method's own numbers about this reply.
    """

    tensors: Mapping[str, Tensor]
    weight: float
    loss: float = math.nan
    skipped: int = 0
    metrics: Mapping[str, float] = {}


class Counted(NamedTuple):
    """Who counted how much in an aggregation, and the method's own numbers about that reply."""

    client: int
    weight: float
    metrics: Mapping[str, float]


class Reports:
    """What replies report beside their updates: the weighted mean of their losses, and the steps skipped."""

    def __init__(self) -> None:
        self.loss, self.measured, self.skipped = 0.0, 0.0, 0

    def add(self, update: Update) -> None:
        """One more."""
        if math.isfinite(update.loss):
            self.measured += update.weight
            self.loss += (update.loss - self.loss) * update.weight / self.measured
        self.skipped += update.skipped

    @property
    def metrics(self) -> Metrics:
        """For the run's records."""
        return {"loss": self.loss, "skipped": self.skipped}


class Mean(BaseModel):
    """m += (u - m) n_i / n: one client's tensor in memory at a time. A tensor's mean is over those that hold it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["mean"] = "mean"

    def __call__(self, updates: Iterable[tuple[int, Update]]) -> tuple[dict[str, Tensor], Metrics]:
        """The mean of the updates, float32, by name, and their mean loss and skipped steps; nothing without updates."""
        mean: dict[str, Tensor] = {}
        totals: dict[str, float] = {}
        reports = Reports()
        for _, update in updates:
            for name, tensor in update.tensors.items():
                totals[name] = totals.get(name, 0) + update.weight
                if name in mean:
                    mean[name].lerp_(tensor.float(), update.weight / totals[name])
                else:
                    mean[name] = tensor.to(torch.float32, copy=True)
            reports.add(update)
        return mean, reports.metrics if mean else {}
