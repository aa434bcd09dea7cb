"""A client's visits in a run's first round, each by itself, and what the client has learnt in them in truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thinwire import wire
from thinwire.core import Method
from thinwire.data.batch import Dataset
from thinwire.errors import ConfigError
from thinwire.leaks.reading import Change, Reading, held
from thinwire.model.personal import at_home
from thinwire.privacy.secrets import Secrets, SystemSecrets
from thinwire.runtime.endpoint import serve
from thinwire.runtime.job import Job
from thinwire.runtime.seats import Seats
from thinwire.runtime.store import VersionStore
from thinwire.wire.frame import header_room


class Visits:
    """The first round's first client, visited as often as is asked for; no visit leaves a trace."""

    def __init__(self, job: Job, place: Path, secrets: Secrets | None = None) -> None:
        self.job, self.method, self.net = job, job.method, job.net
        self.secrets = secrets or SystemSecrets()
        private = (job.budget.protected, job.budget.protection) if job.budget is not None else ({}, None)
        versions, clients = VersionStore(place / "versions"), len(job.names)
        parts = (job.key, job.rounds, job.net, versions, job.clients)
        self.seats = Seats(*parts, public=job.public, clients=clients, loss=job.loss, protected=private[0])
        cohort = self.seats.cohort(job.segments, clients, 1)
        self.id, self.state = cohort[0], job.method.init(self.seats.server(0))
        self.server = replace(self.seats.server(1, cohort), protection=private[1], secrets=self.secrets)
        self.reading = Reading(job.method, job.net, self.state, self.server)

    @property
    def data(self) -> Dataset:
        """The client's rows."""
        return self.job.clients[self.id]

    def reply(self, data: Dataset, secrets: Secrets | None = None, method: Method | None = None) -> Any:
        """The client's reply, through the frames that travel; its net is left as the visit has left it."""
        method = method or self.method
        client = replace(self.seats.client(self.id, 1), data=data, secrets=secrets or self.secrets)
        down = self.method.broadcast(self.state, self.server, self.id, None)
        frame = wire.encode(down, run=self.job.run, round=1, client=self.id)
        try:
            with at_home(self.net, client.memory, remember=False):
                answer = serve(method, frame, client)
        except wire.WireError as error:
            raise ConfigError(f"method: no visit to {len(data)} rows can be made: {error}") from None
        return wire.decode(method.Up, answer, max_header=header_room(method.Up, self.net.names))

    def visit(self, data: Dataset) -> tuple[Any, Change]:
        """A reply, and by what the same visit moves the weights without noise, of the same batches."""
        noted = Noted(self.secrets)
        up, before = self.reply(data, noted), self.reading.before()
        method = self.method
        if method.leaves_last:
            method = method.model_copy(update={"steps": method.work(1).steps + 1})
        self.reply(data, Still(self.secrets, noted.batches), method)
        after = held(self.net)
        return up, {name: after[name] - before[name] for name in after}

    def simulated(self, data: Dataset) -> Any:
        """The reply that a server makes itself for rows that it guesses: bounded as the client's is, without noise."""
        return self.reply(data, Still(self.secrets))


class Noted:
    """Secrets whose batches are noted."""

    def __init__(self, secrets: Secrets) -> None:
        self.secrets, self.batches = secrets, list[NDArray[np.int64]]()

    def normal(self, shape: Sequence[int], scale: float) -> Tensor:
        """See Secrets."""
        return self.secrets.normal(shape, scale)

    def sampled(self, count: int, rate: float) -> NDArray[np.int64]:
        """See Secrets."""
        self.batches.append(self.secrets.sampled(count, rate))
        return self.batches[-1]

    def integers(self, count: int, deviation: int) -> NDArray[np.int64]:
        """See Secrets."""
        return self.secrets.integers(count, deviation)


class Still:
    """No noise, and batches that were drawn before; when they are over, new ones."""

    def __init__(self, secrets: Secrets, batches: Sequence[NDArray[np.int64]] = ()) -> None:
        self.secrets, self.batches = secrets, list(batches)

    def normal(self, shape: Sequence[int], scale: float) -> Tensor:
        """See Secrets."""
        return torch.zeros(tuple(shape), dtype=torch.float64)

    def sampled(self, count: int, rate: float) -> NDArray[np.int64]:
        """See Secrets."""
        return self.batches.pop(0) if self.batches else self.secrets.sampled(count, rate)

    def integers(self, count: int, deviation: int) -> NDArray[np.int64]:
        """See Secrets."""
        return np.zeros(count, np.int64)
