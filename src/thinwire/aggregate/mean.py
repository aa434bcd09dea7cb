"""What a reply adds, and the weighted mean of what replies add."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from thinwire.keys import Key

Metrics = dict[str, float]
LENGTH = "length"  # in a round's metrics: the median of its updates' lengths, which later rounds may ask for


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


@dataclass
class Setting:
    """Where updates are combined: what an aggregation may ask for beside them, and whom it leaves out.

    `origin`: by name what a tensor was at the round's start, of those that are states and not changes. `rise`: how much
    the loss on the server's rows rises by a client's update alone. `spool`: a folder for what is too large for memory.
    `left_out`: client -> why its update is not in the result. `key`: the round's, for what is drawn. `lengths`: of each
    earlier round the median of its updates' lengths, where the aggregation has put it into that round's metrics.
    """

    origin: Mapping[str, Tensor] = field(default_factory=dict)
    rise: Callable[[int, Update], float] | None = None
    spool: Path | None = None
    left_out: dict[int, str] = field(default_factory=dict)
    key: Key | None = None
    lengths: Sequence[float] = ()


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


class Aggregation(BaseModel):
    """How a round's updates are combined; known by its `kind`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str

    @property
    def kinds(self) -> tuple[str, ...]:
        """Its kind, and those of what it hands updates on to."""
        return (self.kind,)

    @property
    def keeps_all(self) -> bool:
        """Whether it needs all updates at once, so that replies stay where they are until the round has ended."""
        return False

    def check_cohort(self, clients: int) -> None:
        """Raise ConfigError where so many clients in a round are too few for it."""

    def __call__(
        self, updates: Iterable[tuple[int, Update]], at: Setting | None = None
    ) -> tuple[dict[str, Tensor], Metrics]:
        """What the updates come to, by name, and numbers for the records; nothing without updates."""
        raise NotImplementedError


class Mean(Aggregation):
    """m += (u - m) n_i / n: one client's tensor in memory at a time. A tensor's mean is over those that hold it."""

    kind: Literal["mean"] = "mean"

    def __call__(
        self, updates: Iterable[tuple[int, Update]], at: Setting | None = None
    ) -> tuple[dict[str, Tensor], Metrics]:
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
